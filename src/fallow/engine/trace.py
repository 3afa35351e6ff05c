"""What worked for each token: of every axis on which a plan lets something rest, the parts that did not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fallow.arrays import Bytes, Int32, Int64
from fallow.errors import FallowError
from fallow.models.resting import Resting
from fallow.models.structure import spans

if TYPE_CHECKING:
    import numpy.typing as npt

MAX_TRACE_BYTES = 1 << 30
_ONES = np.array([number.bit_count() for number in range(256)], np.uint8)  # of each byte
_COUNTED = 1 << 22  # bytes at once


@dataclass(frozen=True)
class Worked:
    """Which parts worked in those ``layers`` that have a rule: ``packed`` uint8 ``[T, layers, ..., bytes]``, a bit a
    part, the least significant of a byte first; ``size`` parts in all."""

    layers: tuple[int, ...]
    packed: Bytes
    size: int

    @property
    def counts(self) -> Int32:
        """How many of them, ``[T, layers, ...]``."""
        counts = np.empty(self.packed.shape[:-1], np.int32)
        rows = max(_COUNTED // max(self.packed[:1].nbytes, 1), 1)
        for start in range(0, len(counts), rows):
            part = slice(start, start + rows)
            _ONES[self.packed[part]].sum(-1, dtype=np.int32, out=counts[part])
        return counts

    def unpacked(self, tokens: slice = slice(None)) -> npt.NDArray[np.bool_]:
        """Whether each of them did, bool ``[tokens, layers, ..., size]``; eight times the memory, so ``tokens`` may be
        a slice of all."""
        bits = np.unpackbits(self.packed[tokens], axis=-1, count=self.size, bitorder="little")
        return bits.view(np.bool_)


@dataclass(frozen=True)
class InputWork:
    """Which inputs of linear layers worked: ``places`` are layers, names and widths, ``packed`` uint8 ``[T, places,
    bytes]`` as that of ``Worked``, with bits for the widest."""

    places: tuple[tuple[int, str, int], ...]
    packed: Bytes

    def of(self, linear: str) -> Worked:
        """Those of the linear layers of this name; without layers where there are none."""
        found = [place for place, (_, name, _) in enumerate(self.places) if name == linear]
        width = max((self.places[place][2] for place in found), default=0)
        layers = tuple(self.places[place][0] for place in found)
        return Worked(layers, np.ascontiguousarray(self.packed[:, found, : -(-width // 8)]), width)


@dataclass(frozen=True)
class HeadWork:
    """For each choice of a token how many ``tiles`` of the head (16 words each, of ``size`` in all) were computed
    exactly, int32 ``[C]``."""

    tiles: Int32
    size: int

    @property
    def whole(self) -> npt.NDArray[np.bool_]:
        """Whether the whole head was, ``[C]``."""
        whole: npt.NDArray[np.bool_] = self.tiles == self.size
        return whole


@dataclass(frozen=True)
class Trace:
    """The work for ``T`` tokens of a sequence and for ``C`` choices: ``chosen[i]`` was chosen after
    ``tokens[first_choice + i]``. An axis is None where the plan lets nothing rest on it.

    ``pages``: the pages of the KV cache that a token's query read, ``[T, layers, kv_heads, pages]``; to the token at
    position ``p`` there are ``p // 32 + 1`` of them. ``neurons``: those of feed-forward networks, ``[T, layers,
    intermediate]``; in the model's last layer only tokens have any after which there is a choice, since it computes
    no others. ``inputs``: those of linear layers, as neurons; where a network's neurons lie one by one, its neurons
    tell what goes into ``down_proj``. ``head``: the vocabulary.
    """

    tokens: Int32
    chosen: Int32
    pages: Worked | None = None
    neurons: Worked | None = None
    inputs: InputWork | None = None
    head: HeadWork | None = None

    @property
    def first_choice(self) -> int:
        """The token after which the first choice is made: the last one of a prompt."""
        return len(self.tokens) - len(self.chosen)


@dataclass(frozen=True)
class TraceShape:
    """What a trace of one model and plan is made of; ``inputs`` are those that ``InputWork`` has as places, ``tiles``
    those of the head, None where it is not screened."""

    rests: Sequence[Resting]
    kv_heads: int
    page_size: int
    intermediate_size: int
    inputs: Sequence[tuple[int, str, int]]
    tiles: int | None

    def empty(self, tokens: Int32, choices: int) -> Trace:
        """In which nothing has worked yet. Raises ``FallowError`` where it would be larger than ``MAX_TRACE_BYTES``."""
        count = len(tokens)
        pages = tuple(layer for layer, rests in enumerate(self.rests) if rests.pages is not None)
        neurons = tuple(layer for layer, rests in enumerate(self.rests) if rests.neurons is not None)
        most_pages = -(-count // self.page_size)
        page_bits = (count, len(pages), self.kv_heads, -(-most_pages // 8))
        neuron_bits = (count, len(neurons), -(-self.intermediate_size // 8))
        widest = max((width for _, _, width in self.inputs), default=0)
        input_bits = (count, len(self.inputs), -(-widest // 8))
        size = math.prod(page_bits) + math.prod(neuron_bits) + math.prod(input_bits)
        if size > MAX_TRACE_BYTES:
            raise FallowError(
                f"A trace of {count:,} tokens of this model would take {size / 2**30:.1f} GiB, more than the "
                f"{MAX_TRACE_BYTES >> 30} GiB that one may: trace fewer tokens."
            )
        return Trace(
            tokens,
            np.zeros(choices, np.int32),
            Worked(pages, np.zeros(page_bits, np.uint8), most_pages) if pages else None,
            Worked(neurons, np.zeros(neuron_bits, np.uint8), self.intermediate_size) if neurons else None,
            InputWork(tuple(self.inputs), np.zeros(input_bits, np.uint8)) if self.inputs else None,
            None if self.tiles is None else HeadWork(np.zeros(choices, np.int32), self.tiles),
        )

    def renumber(self, trace: Trace) -> None:
        """Where parts of a layer were taken out, give bits the numbers that its parts had before; what was taken out
        does not work."""
        if trace.pages is not None:
            for place, layer in enumerate(trace.pages.layers):
                heads = self.rests[layer].kept.kv_heads
                if heads is not None:
                    rows = trace.pages.packed[:, place]
                    of_kept = rows[:, : len(heads)].copy()
                    rows[:] = 0
                    rows[:, heads] = of_kept
        if trace.neurons is not None:
            for place, layer in enumerate(trace.neurons.layers):
                neurons = self.rests[layer].kept.neurons
                if neurons is not None:
                    _spread(trace.neurons.packed[:, place], np.array(neurons), self.intermediate_size)
        if trace.inputs is not None:
            for place, (layer, name, width) in enumerate(trace.inputs.places):
                kept = self.rests[layer].kept
                parts, each = (kept.neurons, 1) if name == "down_proj" else (kept.kv_heads, width // self.kv_heads)
                if parts is not None:
                    _spread(trace.inputs.packed[:, place], spans(parts, each), width)


def _spread(packed: Bytes, numbers: Int64, size: int) -> None:
    """Of ``packed [T, bytes]`` the first bits become those with ``numbers``, of ``size``."""
    bits = np.zeros((len(packed), size), np.uint8)
    bits[:, numbers] = np.unpackbits(packed, axis=-1, count=len(numbers), bitorder="little")
    packed[:] = 0
    packed[:, : -(-size // 8)] = np.packbits(bits, axis=-1, bitorder="little")
