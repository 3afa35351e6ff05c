"""Drafts by prompt lookup: what followed the last tokens when they stood in the text before.

Method: prompt lookup decoding (Saxena 2023; ``prompt_lookup_num_tokens`` in transformers), verified as in speculative
decoding (arXiv 2211.17192) but with the exact match of the token that is drawn for each row, so that nothing changes.
"""

from __future__ import annotations

from array import array
from typing import Literal

Speculation = Literal["prompt-lookup", "self"]

LONGEST_NGRAM = 3
LONGEST_DRAFT = 8
FIRST_DRAFT = 3
LONGEST_PAUSE = 64
# A step with drafts has at most this many decoding rows: beyond it rows are not free any more.
DRAFT_ROWS = 32


class PromptLookup:
    """Drafts for one sequence. ``append`` must see every token in order, the prompt's first.

    The draft grows after one that was right to its end, shrinks after one that was not, and after drafts of which
    nothing was right the sequence pauses for 2, 4, 8 ... tokens.
    """

    __slots__ = ("_ends", "_follow", "_length", "_pause", "_paused_for", "_tokens")

    def __init__(self, tokens: array[int]) -> None:
        """``tokens``: the sequence's own array, which grows with it."""
        self._tokens = tokens
        self._ends: dict[tuple[int, ...], int] = {}
        self._follow = 0  # where the continuation of the last match begins; 0: there was none
        self._length = FIRST_DRAFT
        self._pause = 0
        self._paused_for = 1
        for end in range(1, len(tokens) + 1):
            self._see(end)

    def append(self) -> None:
        """The sequence has one more token."""
        self._see(len(self._tokens))
        if self._pause:
            self._pause -= 1

    def _see(self, end: int) -> None:
        """Finds where the longest n-gram that ends here ended before, and remembers that it ends here now."""
        ends = self._ends
        self._follow = 0
        for n in range(min(LONGEST_NGRAM, end), 0, -1):
            ngram = tuple(self._tokens[end - n : end])
            if not self._follow:
                self._follow = ends.get(ngram, 0)
            ends[ngram] = end

    def draft(self, limit: int) -> array[int]:
        """At most ``limit`` tokens that may follow."""
        if self._pause or not self._follow:
            return array("i")
        length = min(limit, self._length)
        follow = self._tokens[self._follow : self._follow + length]
        # What followed can reach to the end of the text: it then goes on in a circle.
        return follow if len(follow) == length else (follow * (length // len(follow) + 1))[:length]

    def observe(self, drafted: int, accepted: int) -> None:
        """How much of the last draft was right."""
        if accepted == drafted:
            self._length = min(2 * self._length, LONGEST_DRAFT)
        else:
            self._length = max(accepted + 1, 1)
        if accepted:
            self._paused_for = 1
        else:
            self._paused_for = min(2 * self._paused_for, LONGEST_PAUSE)
            self._pause = self._paused_for
