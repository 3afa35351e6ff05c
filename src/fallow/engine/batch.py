"""What one step of the engine is given and what it returns: plain arrays, no objects."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from fallow.arrays import Float32, Int32, UInt32

if TYPE_CHECKING:
    import numpy.typing as npt


SAMPLING_DTYPE = np.dtype(
    [
        ("temperature", np.float32),  # 0: greedy
        ("top_p", np.float32),  # 1: off
        ("min_p", np.float32),  # 0: off
        ("repetition_penalty", np.float32),  # 1: off
        ("top_k", np.int32),  # 0: off
        ("logprobs", np.int32),  # how many of the most likely tokens to return; below 0: no log-probability at all
        ("seed", np.uint64),
        ("draw", np.uint64),  # index of the token in its output: (seed, draw) fixes the random number
    ]
)


StepMode = Literal["plan", "draft", "dense"]


def greedy(rows: int) -> npt.NDArray[np.void]:
    """The sampling of rows that each take the most likely token, without log-probabilities."""
    sampling = np.zeros(rows, SAMPLING_DTYPE)
    sampling["top_p"], sampling["repetition_penalty"], sampling["logprobs"] = 1, 1, -1
    return sampling


@dataclass
class StepBatch:
    """One step over S sequences, T tokens in all, R rows of which logits are wanted.

    The tokens of sequence ``s`` are rows ``row_offsets[s]:row_offsets[s + 1]``; the first of them is at
    position ``start_positions[s]`` of its sequence, whose earlier positions are in the KV cache already.
    ``page_table[s, j]`` is the page of positions ``j * page_size`` to ``(j + 1) * page_size - 1``.

    What rests is what ``mode`` says: under ``plan`` what the plan says; under ``dense`` neither pages nor words, to the
    bits of a model without these axes; under ``draft`` what the plan says, but tokens are likely, if not surely, those
    that a dense step would draw of the same logits: of a screened head only the shortlist is computed.
    """

    tokens: Int32  # [T]
    row_offsets: Int32  # [S + 1]
    start_positions: Int32  # [S]
    page_table: Int32  # [S, max pages of these sequences]; unused entries are -1
    logit_rows: Int32  # [R], ascending
    sampling: npt.NDArray[np.void]  # [R], SAMPLING_DTYPE
    # Additive edits of the logits (logit bias, presence and frequency penalties), rows concatenated.
    bias_offsets: Int32 | None = None  # [R + 1]
    bias_tokens: Int32 | None = None
    bias_values: Float32 | None = None
    # Tokens that the repetition penalty of a row applies to, rows concatenated.
    repeated_offsets: Int32 | None = None  # [R + 1]
    repeated_tokens: Int32 | None = None
    # Tokens that a row may take, one bit a token, least significant first; all ones where unconstrained.
    allowed: UInt32 | None = None  # [R, ceil(vocab / 32)]
    mode: StepMode = "plan"


@dataclass
class StepResult:
    """The sampled token of each of the R rows and its log-probability under the unmodified logits.

    A row with ``sampling["logprobs"] < 0`` asked for none, which spares a pass over its logits: its entry of
    ``logprobs`` is 0 and means nothing. Entries beyond the ``sampling["logprobs"]`` that a row asked for are -1 in
    ``top_tokens`` and minus infinity in ``top_logprobs``. Where the logits allow no token, the token is 0 and its
    log-probability is not a number.
    """

    tokens: Int32  # [R]
    logprobs: Float32  # [R]
    top_tokens: Int32  # [R, max of sampling["logprobs"]], most likely first
    top_logprobs: Float32  # the same shape
