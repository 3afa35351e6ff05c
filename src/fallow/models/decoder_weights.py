"""Weights between a checkpoint, whatever its format, and the PyTorch decoder."""

from __future__ import annotations

import torch

from fallow.models.decoder import Decoder
from fallow.models.dequantize import dequantize
from fallow.models.tensors import Checkpoint


def parameter_name(tensor: str) -> str:
    """What the decoder calls the tensor with a canonical name (``fallow.models.tensors.Checkpoint``)."""
    return tensor if tensor.endswith(".bias") or tensor == "residual_mixes" else f"{tensor}.weight"


def load_decoder(
    checkpoint: Checkpoint, *, compute: torch.dtype = torch.float32, context: int | None = None
) -> Decoder:
    """The decoder with the checkpoint's weights as float32 (blocks dequantised), computing in ``compute``, for
    sequences of up to ``context`` tokens. Raises ``ModelFileError`` where a tensor cannot be read."""
    decoder = Decoder(checkpoint.config, compute=compute, context=context)
    parameters = dict(decoder.named_parameters())
    with torch.no_grad():
        for name, tensor in checkpoint.tensors.items():
            parameters.pop(parameter_name(name)).copy_(torch.from_numpy(dequantize(tensor)).view(tensor.shape))
    assert not parameters, "every parameter has its tensor"
    return decoder
