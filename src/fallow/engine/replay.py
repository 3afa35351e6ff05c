"""An answer once more, with what worked for it: the same steps' choices, cut into chunks."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from fallow.arrays import Int32
from fallow.engine.batch import SAMPLING_DTYPE
from fallow.engine.running import sampling_row
from fallow.engine.sampling import SamplingParams
from fallow.engine.trace import Trace
from fallow.errors import OverloadedError, RequestError

if TYPE_CHECKING:
    from fallow.engine.engine import Engine


def traced_answer(engine: Engine, prompt: str | Sequence[int], params: SamplingParams) -> Trace:
    """What ``Engine.trace`` gives, and raises."""
    if params.n != 1:
        raise RequestError(f"n is {params.n}, but one answer can be traced: leave n out.", param="n")
    if params.seed is None:
        params = replace(params, seed=int.from_bytes(os.urandom(8), "little"))
    ids = engine._prompt_tokens(prompt)
    (output,) = engine.generate([list(ids)], params)
    answer = np.array(output.outputs[0].token_ids, np.int32)
    tokens = np.concatenate([np.array(ids, np.int32), answer[:-1]])
    trace = engine._loop.between_steps(lambda: replay(engine, tokens, params, len(answer)))
    return replace(trace, chosen=answer)


def replay(engine: Engine, tokens: Int32, params: SamplingParams, choices: int) -> Trace:
    """The trace of ``tokens``, after the last ``choices`` of which one was chosen as ``params`` say; on the engine's
    thread, in pages that are given back."""
    if params.has_penalties or params.logit_bias or params.constraint is not None:
        params = replace(params, logprobs=params.logprobs or 0)  # as these do, it takes all logits
    assert params.seed is not None
    rows = [sampling_row(params, params.seed, draw) for draw in range(choices)]
    manager = engine.scheduler.pages
    count = manager.pages_for(len(tokens))
    if count > manager.available_pages:
        raise OverloadedError(
            f"The trace needs {count} pages of the KV cache, but {manager.available_pages} are left: send the request "
            "again later."
        )
    pages = [manager.allocate() for _ in range(count)]
    try:
        trace: Trace = engine.runner.trace(tokens, sampling=np.array(rows, SAMPLING_DTYPE), pages=pages)
    finally:
        manager.release(pages)
    return trace
