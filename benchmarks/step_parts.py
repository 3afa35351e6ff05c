"""The time of a part of a model: that of a step of decoding less that of the same model without the part."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field

import numpy as np

from fallow.arrays import Float64
from fallow.engine import program
from fallow.engine.program import DecoderProgram
from fallow.engine.runner import ModelRunner, Precision
from fallow.models.tensors import Checkpoint
from fallow.plan import SparsityPlan
from fallow.sparsification.timing import Decoding, pages_of


@dataclass(frozen=True)
class Side:
    """What is timed: a model under a plan, laid out as it is or without a part."""

    checkpoint: Checkpoint
    plan: SparsityPlan = field(default_factory=SparsityPlan.dense)
    layout: type[DecoderProgram] = DecoderProgram


def step_milliseconds(
    sides: Sequence[Side],
    texts: Sequence[Sequence[int]],
    *,
    batch: int,
    context: int,
    turns: int,
    precision: Precision = "auto",
) -> Float64:
    """A step of ``batch`` sequences of ``context`` tokens, ``[turns, sides]``: the sides take turns, so what a part
    takes is the difference of two that were timed one after the other, and its median over the turns."""
    with ExitStack() as stack:

        def decoding(side: Side) -> Decoding:
            with _layout(side):
                runner = ModelRunner(
                    side.checkpoint,
                    precision=precision,
                    num_pages=batch * pages_of(context),
                    max_step_sequences=batch,
                    plan=side.plan,
                )
            return Decoding(stack.enter_context(closing(runner)), texts, batch, context)

        decodings = [decoding(side) for side in sides]
        return 1000 * np.array([[decoding.step_seconds() for decoding in decodings] for _ in range(turns)])


@contextmanager
def _layout(side: Side) -> Iterator[None]:
    architecture = side.checkpoint.config.architecture
    own = program.LAYOUTS[architecture]
    program.LAYOUTS[architecture] = side.layout
    try:
        yield
    finally:
        program.LAYOUTS[architecture] = own
