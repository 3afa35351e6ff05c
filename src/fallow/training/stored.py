"""Training weights as the files of a model can hold them.

Float32 weights are trained, and every pass computes with what they are once written: rounded to the type of their
tensor, or onto the grid of each block, whose scale and offset stay those of the file. Rounding has no useful gradient,
so theirs is taken to be that of the rounded weights (the straight-through estimator, Bengio et al., arXiv 1308.3432).
Rounding only at the end would undo the training: most weights move by less than half a step of their grid.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fallow.arrays import Bytes
from fallow.models.decoder import Decoder
from fallow.models.decoder_weights import parameter_name
from fallow.models.tensors import Checkpoint, RawTensor, TensorType

_FLOATS = {TensorType.F32: torch.float32, TensorType.F16: torch.float16, TensorType.BF16: torch.bfloat16}


class StoredWeights:
    """The parameters of ``decoder`` that are trained as the tensors of ``checkpoint``, where they come from.

    What is stored in any other type than ``F32``, ``F16``, ``BF16``, ``Q4_0``, ``Q4_1`` and ``Q8_0``, or otherwise than
    it is used (Gemma's norms), is ``frozen`` and needs no gradient from now on. Raises ``ModelFileError`` where a
    tensor cannot be read.
    """

    def __init__(self, decoder: Decoder, checkpoint: Checkpoint) -> None:
        parameters = dict(decoder.named_parameters())
        self.frozen: list[RawTensor] = []
        self._tuned: dict[str, tuple[Tensor, _Stored]] = {}
        for name, tensor in checkpoint.tensors.items():
            parameter = parameters[parameter_name(name)]
            stored = _stored(tensor)
            if stored is None:
                parameter.requires_grad_(False)
                self.frozen.append(tensor)
            else:
                self._tuned[name] = parameter, stored

    @property
    def has_matrices(self) -> bool:
        """Whether any of what is trained is a matrix."""
        return any(parameter.ndim == 2 for parameter, _ in self._tuned.values())

    @contextmanager
    @torch.no_grad()
    def in_place(self) -> Iterator[None]:
        """The decoder holds what can be stored while the block runs: gradients come for that, and optimizers update
        what is behind it."""
        kept = [(parameter, parameter.data) for parameter, _ in self._tuned.values()]
        for parameter, stored in self._tuned.values():
            parameter.data = stored.rounded(parameter.data)
        try:
            yield
        finally:
            for parameter, data in kept:
                parameter.data = data

    @torch.no_grad()
    def to_bytes(self, weights: Mapping[str, Tensor]) -> dict[str, Bytes]:
        """The tensors of the checkpoint, as ``RawTensor.read`` gives them, that hold ``weights``, which have the
        decoder's names."""
        return {name: stored.to_bytes(weights[parameter_name(name)]) for name, (_, stored) in self._tuned.items()}


@dataclass(frozen=True)
class _Float:
    """A tensor each of whose elements is a number."""

    dtype: torch.dtype

    def rounded(self, weights: Tensor) -> Tensor:
        return weights.to(self.dtype).float()

    def to_bytes(self, weights: Tensor) -> Bytes:
        rows = weights.cpu().to(self.dtype).contiguous().reshape(1 if weights.ndim == 1 else len(weights), -1)
        return rows.view(torch.uint8).numpy()


@dataclass
class _Blocks:
    """A matrix in blocks of 32: a weight is ``scale * code + offset``, in float32 as ``dequantize`` computes it.

    ``scale`` and ``offset`` are float32 ``[blocks, 1]``, ``codes`` the smallest and the largest code that the type has,
    ``head`` the bytes of each block before its codes, ``pack`` makes bytes of codes, int32 ``[blocks, 32]``.
    """

    scale: Tensor
    offset: Tensor
    codes: tuple[int, int]
    head: Bytes
    pack: Callable[[np.ndarray], Bytes]

    def rounded(self, weights: Tensor) -> Tensor:
        self.scale, self.offset = self.scale.to(weights.device), self.offset.to(weights.device)
        return (self.scale * self._nearest(weights) + self.offset).view_as(weights)

    def to_bytes(self, weights: Tensor) -> Bytes:
        codes = self._nearest(weights.to(self.scale.device)).to("cpu", torch.int32).numpy()
        return np.concatenate((self.head, self.pack(codes)), 1).reshape(len(weights), -1)

    def _nearest(self, weights: Tensor) -> Tensor:
        """Codes as float32 ``[blocks, 32]``. A block whose scale is 0 holds one number, whatever its codes are."""
        steps = torch.where(self.scale == 0, 0, (weights.reshape(len(self.scale), -1) - self.offset) / self.scale)
        return steps.round().clamp(*self.codes)


_Stored = _Float | _Blocks


def _stored(tensor: RawTensor) -> _Stored | None:
    if tensor.place is None:
        return None
    if tensor.type in _FLOATS:
        return _Float(_FLOATS[tensor.type])
    if tensor.type not in _HEADS:
        return None
    head_bytes, codes, pack = _HEADS[tensor.type]
    blocks = tensor.read().reshape(-1, tensor.type.block_bytes)
    head = np.ascontiguousarray(blocks[:, :head_bytes])
    numbers = torch.from_numpy(head.view("<f2").astype(np.float32))  # the scale, and an offset where there is one
    offset = numbers[:, 1:] if numbers.shape[1] == 2 else torch.zeros(len(numbers), 1)
    return _Blocks(numbers[:, :1], offset, codes, head, pack)


def _nibbles(lowest: int) -> Callable[[np.ndarray], Bytes]:
    """Codes that begin at ``lowest``, the first half low, the second high."""

    def pack(codes: np.ndarray) -> Bytes:
        whole = (codes - lowest).astype(np.uint8)
        return np.bitwise_or(whole[:, :16], np.left_shift(whole[:, 16:], 4), dtype=np.uint8)

    return pack


def _signed_bytes(codes: np.ndarray) -> Bytes:
    return codes.astype(np.int8).view(np.uint8)


# Bytes before the codes of a block, the codes, and how they are packed. No quantiser writes -128.
_HEADS: dict[TensorType, tuple[int, tuple[int, int], Callable[[np.ndarray], Bytes]]] = {
    TensorType.Q4_0: (2, (-8, 7), _nibbles(-8)),
    TensorType.Q4_1: (4, (0, 15), _nibbles(0)),
    TensorType.Q8_0: (2, (-127, 127), _signed_bytes),
}
