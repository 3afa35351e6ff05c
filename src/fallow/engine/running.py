"""The sequences in the batch as arrays that stay in place from step to step.

Slot ``i`` of every array is the sequence ``sequences[i]``, which decodes. A step without prefill or drafts is a view of
the first slots: nothing is built and nothing copied.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from fallow.arrays import Int32
from fallow.engine.batch import SAMPLING_DTYPE, StepBatch
from fallow.engine.own_draft import OwnDraft
from fallow.engine.sampling import SamplingParams
from fallow.engine.sequence import Sequence

if TYPE_CHECKING:
    import numpy.typing as npt

T = TypeVar("T", bound=np.generic)
Chunk = tuple[Sequence, int]
"""A sequence in prefill, and how many of its next tokens are in the step."""


def sampling_row(params: SamplingParams, seed: int, draw: int) -> tuple[float, ...]:
    """A row of ``SAMPLING_DTYPE``: how the token number ``draw`` of an output is chosen."""
    return (
        0.0 if params.is_greedy else params.temperature,
        params.top_p,
        params.min_p,
        params.repetition_penalty,
        max(params.top_k, 0),
        -1 if params.logprobs is None else params.logprobs,
        seed,
        draw,
    )


class RunningSet:
    """``max_sequences`` slots, each with a page table of ``max_pages`` entries."""

    def __init__(self, *, max_sequences: int, max_pages: int, page_size: int, vocab_size: int) -> None:
        self.page_size = page_size
        self.sequences: list[Sequence] = []
        self._mask_words = -(-vocab_size // 32)
        self._tokens = np.zeros(max_sequences, np.int32)
        self._positions = np.zeros(max_sequences, np.int32)  # of the token above
        self._capacity = np.zeros(max_sequences, np.int32)  # positions that the pages hold
        self._page_table = np.full((max_sequences, max_pages), -1, np.int32)
        self._sampling = np.zeros(max_sequences, SAMPLING_DTYPE)
        self._draws = self._sampling["draw"]
        self._range = np.arange(max_sequences + 1, dtype=np.int32)
        # How many sequences in the batch, prefill included, need edits, masks or drafts.
        self.edited = 0
        self.masked = 0
        self.drafting = 0

    def __len__(self) -> int:
        return len(self.sequences)

    def slots_without_page(self) -> list[int]:
        """Slots of which the next token has no page yet."""
        count = len(self.sequences)
        missing = self._positions[:count] >= self._capacity[:count]
        return np.flatnonzero(missing).tolist() if missing.any() else []

    def give_page(self, sequence: Sequence, page: int) -> None:
        """One more page for a decoding sequence."""
        self._page_table[sequence.slot, len(sequence.pages)] = page
        sequence.pages.append(page)
        self._capacity[sequence.slot] += self.page_size

    def free_positions(self, slot: int) -> int:
        """Positions after that of the next token which have a page already."""
        return int(self._capacity[slot] - self._positions[slot]) - 1

    def join(self, sequence: Sequence) -> None:
        """The sequence was computed to its end and gets the next slot, at its last token."""
        slot = sequence.slot = len(self.sequences)
        self.sequences.append(sequence)
        self._place(slot, sequence)
        self._positions[slot] = sequence.computed - 1
        self._capacity[slot] = len(sequence.pages) * self.page_size

    def leave(self, sequence: Sequence) -> None:
        """Frees the slot; the last sequence moves into it."""
        slot, last = sequence.slot, len(self.sequences) - 1
        moved = self.sequences.pop()
        if slot != last:
            self.sequences[slot] = moved
            moved.slot = slot
            for array in (self._tokens, self._positions, self._capacity, self._page_table, self._sampling):
                array[slot] = array[last]
        sequence.slot = -1

    def advance(self, tokens: Int32) -> None:
        """Every slot took one token."""
        count = len(self.sequences)
        self._tokens[:count] = tokens
        self._positions[:count] += 1
        self._draws[:count] += 1

    def advance_one(self, slot: int, token: int, taken: int) -> None:
        """A slot took ``taken`` tokens, of which the last is ``token``."""
        self._tokens[slot] = token
        self._positions[slot] += taken
        self._draws[slot] += taken

    @property
    def cached_tokens(self) -> int:
        """Tokens of all slots that have keys and values."""
        return int(self._positions[: len(self.sequences)].sum())

    def build(self, chunks: Seq[Chunk], drafts: Seq[Seq[int]] | None) -> StepBatch:
        """The step of all slots, each with its draft if there are ``drafts``, and of ``chunks``.

        Chunks that complete a sequence come first: they take the next slots, in order, if the step succeeds.
        """
        count = len(self.sequences)
        if not chunks and drafts is None:
            batch = StepBatch(
                tokens=self._tokens[:count],
                row_offsets=self._range[: count + 1],
                start_positions=self._positions[:count],
                page_table=self._page_table[:count],
                logit_rows=self._range[:count],
                sampling=self._sampling[:count],
            )
            sampled = self.sequences
        else:
            batch, sampled = self._mixed(chunks, drafts)
        if self.edited:
            self._add_edits(batch, sampled)
        if self.masked:
            self._add_masks(batch, sampled)
        return batch

    def build_draft(self, drafts: Seq[tuple[Sequence, OwnDraft]]) -> StepBatch:
        """The step that drafts one more token of each of these sequences."""
        count = len(drafts)
        slots = [sequence.slot for sequence, _ in drafts]
        drafted = np.array([len(draft.tokens) for _, draft in drafts], np.int32)
        tokens = [draft.tokens[-1] if draft.tokens else self._tokens[sequence.slot] for sequence, draft in drafts]
        sampling = self._sampling[slots]
        sampling["draw"] += drafted.astype(np.uint64)
        sampling["logprobs"] = -1
        batch = StepBatch(
            tokens=np.array(tokens, np.int32),
            row_offsets=self._range[: count + 1],
            start_positions=self._positions[slots] + drafted,
            page_table=self._page_table[slots],
            logit_rows=self._range[:count],
            sampling=sampling,
            mode="draft",
        )
        if self.edited:
            self._add_edits(batch, [sequence for sequence, _ in drafts])
        return batch

    def _mixed(self, chunks: Seq[Chunk], drafts: Seq[Seq[int]] | None) -> tuple[StepBatch, list[Sequence]]:
        decoding = len(self.sequences)
        lengths = np.ones(decoding, np.int32)
        parts: list[Int32] = [self._tokens[:decoding]]
        sampled = self.sequences
        if drafts is not None:
            lengths += np.fromiter(map(len, drafts), np.int32, decoding)
            parts = []
            sampled = []
            for sequence, token, draft in zip(self.sequences, self._tokens.tolist(), drafts, strict=False):
                parts.append(np.array([token, *draft], np.int32))
                sampled += [sequence] * (1 + len(draft))
        sampling = [self._with_drafts(lengths)]
        rows = int(lengths.sum())
        logit_rows = [self._arange(rows)]
        for slot, (sequence, length) in enumerate(chunks, decoding):
            start = sequence.computed
            rows += length
            parts.append(np.array(sequence.tokens[start : start + length], np.int32))
            self._positions[slot] = start
            self._place(slot, sequence)
            if start + length == len(sequence.tokens):
                sampling.append(self._sampling[slot : slot + 1])
                logit_rows.append(np.array([rows - 1], np.int32))
                sampled = [*sampled, sequence]
        offsets = np.zeros(decoding + len(chunks) + 1, np.int32)
        np.cumsum([*lengths.tolist(), *(length for _, length in chunks)], out=offsets[1:])
        count = decoding + len(chunks)
        return StepBatch(
            tokens=np.concatenate(parts),
            row_offsets=offsets,
            start_positions=self._positions[:count],
            page_table=self._page_table[:count],
            logit_rows=np.concatenate(logit_rows),
            sampling=np.concatenate(sampling),
        ), sampled

    def _arange(self, count: int) -> Int32:
        return self._range[:count] if count < len(self._range) else np.arange(count, dtype=np.int32)

    def _with_drafts(self, lengths: Int32) -> npt.NDArray[np.void]:
        """The sampling of each decoding row: the rows of a draft are the next draws of their sequence."""
        sampling = np.repeat(self._sampling[: len(lengths)], lengths)
        starts = np.repeat(np.cumsum(lengths) - lengths, lengths)
        sampling["draw"] += (np.arange(len(sampling)) - starts).astype(np.uint64)
        return sampling

    def _place(self, slot: int, sequence: Sequence) -> None:
        """The page table and the sampling of ``sequence``, whose next token is its first after all it has."""
        row = self._page_table[slot]
        row[: len(sequence.pages)] = sequence.pages
        row[len(sequence.pages) :] = -1
        self._sampling[slot] = sampling_row(sequence.request.params, sequence.seed, sequence.num_generated)

    def _add_edits(self, batch: StepBatch, sampled: list[Sequence]) -> None:
        edits = [sequence.edits for sequence in sampled]
        if not any(edits):
            return
        none = np.empty(0, np.int32)
        zeros = np.empty(0, np.float32)
        batch.bias_offsets, batch.bias_tokens = _ragged([e.bias_tokens if e else none for e in edits])
        batch.bias_values = _ragged([e.bias_values if e else zeros for e in edits])[1]
        batch.repeated_offsets, batch.repeated_tokens = _ragged([e.repeated_tokens if e else none for e in edits])

    def _add_masks(self, batch: StepBatch, sampled: list[Sequence]) -> None:
        if not any(sequence.mask is not None for sequence in sampled):
            return
        allowed = np.full((len(sampled), self._mask_words), 0xFFFFFFFF, np.uint32)
        for row, sequence in enumerate(sampled):
            if sequence.mask is not None:
                allowed[row] = sequence.mask[: self._mask_words]  # llguidance keeps one token more
        batch.allowed = allowed


def _ragged(parts: list[npt.NDArray[T]]) -> tuple[Int32, npt.NDArray[T]]:
    """Rows of different lengths as offsets and one array."""
    offsets = np.zeros(len(parts) + 1, np.int32)
    np.cumsum([len(part) for part in parts], out=offsets[1:])
    return offsets, np.concatenate(parts)
