"""A decoder cut over processes by FSDP2 (``fully_shard``; the idea is ZeRO's, arXiv 1910.02054, stage 3).

Each process holds a part of every parameter, of its gradient and of its optimizer state; a layer is whole while it is
computed. Parameters travel as float32 and layers round them for themselves, so the arithmetic is that of one process.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from fallow.models.decoder import Decoder
from fallow.training.processes import Processes


def place(decoder: Decoder, processes: Processes, *, compiled: bool) -> None:
    """Bring a decoder, which every process has whole, to where it is trained: in parts where there are several.

    Gradients are then summed over the processes. What is outside of layers (embeddings, the head) stays whole from the
    forward pass to the end of the backward pass, so that a loss may use it; after a forward pass alone, ``reshard``.
    """
    decoder.to(processes.device)
    if processes.mesh is None:
        if compiled:
            decoder.compile_layers()
        return
    for layer in decoder.layers:
        if compiled:  # not the module: the hooks that gather it are no part of the graph
            layer.forward = torch.compile(layer.forward)
        fully_shard(layer, mesh=processes.mesh)
    fully_shard(decoder, mesh=processes.mesh)
    for module in decoder.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)


def reshard(decoder: Decoder) -> None:
    """Let go of what a forward pass without a backward pass has left whole: parameters are parts again, whose values
    may then change. Nothing where the decoder is not cut."""
    if isinstance(decoder, FSDPModule):
        decoder.reshard()


def whole(tensor: Tensor) -> Tensor:
    """A tensor with all its parts, gathered by all processes."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_on_first(tensors: Mapping[str, Tensor], processes: Processes) -> dict[str, Tensor]:
    """All of ``tensors`` on the first process, in its main memory; none on the others, who hold one at a time."""
    kept = {}
    for name, tensor in tensors.items():
        gathered = whole(tensor)
        if processes.is_first:
            kept[name] = gathered.cpu()
    return kept
