"""Whether a model's own drafts pay, and how long they should be: by what steps took and how many tokens came true.

A round drafts some tokens of each sequence, a step each, and verifies them all in one step. What it is expected to
bring is equation 1 of arXiv 2211.17192, for each sequence with the share of its own drafts that came true.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from statistics import median

LONGEST_DRAFT = 8
TRIAL_DRAFT = 3
RECENT = 9  # steps of a kind of which the median counts
FEWEST = 3  # steps of a kind that are seen before it counts
PLAIN_EVERY = 32  # rounds: as sequences grow, the time of a step without drafts is looked at again
FIRST_PAUSE = 16
LONGEST_PAUSE = 512

Load = tuple[int, int]
"""How many sequences and how many tokens in their caches, to the next power of two: steps of one load take as long."""


def load_of(sequences: int, tokens: int) -> Load:
    return sequences.bit_length(), tokens.bit_length()


def expected_tokens(rate: float, length: int) -> float:
    """Of a round for one sequence whose drafted tokens come true at this rate, each by itself."""
    return sum(rate**i for i in range(length + 1))


class Pays:
    """Chooses the length of the next round's drafts; outputs do not depend on it.

    Seconds are those of the steps of the same load: without drafts, of drafting a token, and for each further row of a
    sequence in verification. Where drafts do not pay they are tried again after 16, 32, ... 512 steps.
    """

    def __init__(self) -> None:
        self._costs: dict[Load, _Costs] = {}

    def length(self, load: Load, rates: Sequence[float], others: int, most: int) -> int:
        """How many tokens to draft for sequences of these ``rates`` beside ``others`` without drafts, at most
        ``most``; 0: a plain step is next."""
        costs = self._of(load)
        most = min(most, LONGEST_DRAFT)
        if most <= 0 or len(costs.plain) < FEWEST:
            return 0
        if min(len(costs.draft), len(costs.row)) < FEWEST:
            return min(most, TRIAL_DRAFT)

        def tokens_per_second(length: int) -> float:
            tokens = others + sum(expected_tokens(rate, length) for rate in rates)
            return tokens / costs.seconds(length)

        best = max(range(most + 1), key=tokens_per_second)
        if best:
            return 0 if costs.is_plain_due() else best
        return min(most, TRIAL_DRAFT) if costs.is_trial_due() else 0

    def saw_plain(self, load: Load, seconds: float) -> None:
        """A step without drafts."""
        self._of(load).plain.append(seconds)

    def saw_draft(self, load: Load, seconds: float) -> None:
        """A step that drafted one token of each sequence."""
        self._of(load).draft.append(seconds)

    def saw_verification(self, load: Load, further_rows: float, seconds: float) -> None:
        """A step with so many rows beside the first one, the mean of the sequences with drafts."""
        costs = self._of(load)
        if costs.plain:
            costs.row.append(max(seconds - median(costs.plain), 0.0) / further_rows)

    def _of(self, load: Load) -> _Costs:
        return self._costs.setdefault(load, _Costs())


class _Costs:
    """Seconds of the latest steps of one load."""

    def __init__(self) -> None:
        self.plain: deque[float] = deque(maxlen=RECENT)
        self.draft: deque[float] = deque(maxlen=RECENT)
        self.row: deque[float] = deque(maxlen=RECENT)
        self._rounds = 0
        self._pause = FIRST_PAUSE
        self._waited = 0

    def seconds(self, length: int) -> float:
        """Of a round."""
        return median(self.plain) + length * (median(self.draft) + median(self.row))

    def is_plain_due(self) -> bool:
        """Another round pays: whether a plain step comes in between."""
        self._pause, self._waited = FIRST_PAUSE, 0
        self._rounds = (self._rounds + 1) % PLAIN_EVERY
        return self._rounds == 0

    def is_trial_due(self) -> bool:
        """Drafts do not pay: whether one is tried nevertheless."""
        self._waited += 1
        if self._waited < self._pause:
            return False
        self._pause, self._waited = min(2 * self._pause, LONGEST_PAUSE), 0
        return True
