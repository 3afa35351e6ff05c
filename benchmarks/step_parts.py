"""The time of a part of a model: that of a step of decoding less that of the same model without the part."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager

from fallow.engine import program
from fallow.engine.program import DecoderProgram
from fallow.engine.runner import ModelRunner, Precision
from fallow.models.tensors import Checkpoint
from fallow.plan import SparsityPlan
from fallow.sparsification.timing import Decoding, pages_of


def step_milliseconds(
    checkpoint: Checkpoint,
    plan: SparsityPlan,
    without: type[DecoderProgram],
    texts: Sequence[Sequence[int]],
    *,
    batch: int,
    context: int,
    turns: int,
    precision: Precision = "auto",
) -> tuple[float, float, float]:
    """A step of ``batch`` sequences of ``context`` tokens: of the dense model, under ``plan``, and of the dense model
    laid out by ``without``. They take turns; of each the best turn counts."""
    with ExitStack() as stack:

        def decoding(rules: SparsityPlan) -> Decoding:
            runner = ModelRunner(
                checkpoint,
                precision=precision,
                num_pages=batch * pages_of(context),
                max_step_sequences=batch,
                plan=rules,
            )
            return Decoding(stack.enter_context(closing(runner)), texts, batch, context)

        sides = [decoding(SparsityPlan.dense()), decoding(plan)]
        with _other_layout(checkpoint.config.architecture, without):
            sides.append(decoding(SparsityPlan.dense()))
        times = [[side.step_seconds() for side in sides] for _ in range(turns)]
    dense, sparse, rest = (1000 * min(column) for column in zip(*times, strict=True))
    return dense, sparse, rest


@contextmanager
def _other_layout(architecture: str, layout: type[DecoderProgram]) -> Iterator[None]:
    own = program.LAYOUTS[architecture]
    program.LAYOUTS[architecture] = layout
    try:
        yield
    finally:
        program.LAYOUTS[architecture] = own
