"""What a plan is worth on this machine: perplexity on held-out text, and the time of a step of decoding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from fallow.engine.engine import Engine
from fallow.engine.runner import ModelRunner, Precision
from fallow.models.head_screen import HeadScreen
from fallow.models.tensors import Checkpoint
from fallow.models.tokenizer import load_tokenizer
from fallow.plan import SparsityPlan
from fallow.sparsification.choices import Load
from fallow.sparsification.floor import Floor
from fallow.sparsification.timing import Decoding, pages_of
from fallow.terminal import Progress

_SCORED = 1024  # the last tokens of a window, whose context is the longest
_TURNS = 3  # in which the dense model and the plan are timed
_AT_ONCE = 4  # sequences, where a task is solved


@dataclass(frozen=True)
class Judge:
    """The engine over ``checkpoint`` and the screen of its head, judging on ``windows`` of token ids, each of
    ``load.context`` tokens. ``dense`` is the model that plans are compared with: the same, or what it was before it was
    healed."""

    dense: Checkpoint
    checkpoint: Checkpoint
    head_screen: HeadScreen | None
    windows: Sequence[Sequence[int]]
    load: Load
    precision: Precision
    threads: int | None
    progress: Progress

    @cached_property
    def dense_nll(self) -> float:
        """As ``nll``, of the dense model."""
        return self._nll(self.dense, SparsityPlan.dense())

    def nll(self, plan: SparsityPlan) -> float:
        """Nats a token over the ends of the windows."""
        return self._nll(self.checkpoint, replace(plan, head=None))  # a screen of the head changes no probability

    def _nll(self, checkpoint: Checkpoint, plan: SparsityPlan) -> float:
        runner = self._runner(checkpoint, plan, sequences=1)
        try:
            first = self.load.context - min(_SCORED, self.load.context // 2)
            total = 0.0
            for done, window in enumerate(self.windows):
                self.progress("verifying", done, len(self.windows))
                total -= float(runner.score(window, first=first).astype(np.float64).mean())
            return total / len(self.windows)
        finally:
            runner.close()

    def accuracy(self, plan: SparsityPlan, floor: Floor, *, dense: bool = False) -> float:
        """In the floor's task; ``dense``: of the dense model, without a plan."""
        checkpoint, rules = (self.dense, SparsityPlan.dense()) if dense else (self.checkpoint, plan)
        runner = self._runner(checkpoint, rules, _AT_ONCE)
        tokenizer = load_tokenizer(checkpoint.path)
        with Engine.over(runner, tokenizer, max_num_seqs=_AT_ONCE, prefix_caching=False) as engine:
            return floor.reached_by(engine, self.progress)

    def speedup(self, plan: SparsityPlan) -> float:
        """How many times faster than dense a step of decoding the load is, both at their best in some turns: what else
        the machine does makes any one slower, and none faster."""
        pairs = (self.dense, SparsityPlan.dense()), (self.checkpoint, plan)
        runners = [self._runner(checkpoint, rules, self.load.batch) for checkpoint, rules in pairs]
        try:
            self.progress("timing", 0, None)
            dense, sparse = (Decoding(runner, self.windows, self.load.batch, self.load.context) for runner in runners)
            turns = [(dense.step_seconds(), sparse.step_seconds()) for _ in range(_TURNS)]
            return min(seconds for seconds, _ in turns) / min(seconds for _, seconds in turns)
        finally:
            for runner in runners:
                runner.close()

    def _runner(self, checkpoint: Checkpoint, plan: SparsityPlan, sequences: int) -> ModelRunner:
        return ModelRunner(
            checkpoint,
            precision=self.precision,
            threads=self.threads,
            num_pages=sequences * pages_of(self.load.context),
            max_step_sequences=sequences,
            plan=plan,
            head_screen=self.head_screen,
        )
