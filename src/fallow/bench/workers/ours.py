"""Our engine as a worker: ``Engine.submit``, with its scheduler, sampler and detokenizer in the measured time."""

from __future__ import annotations

import threading
from typing import cast

from fallow.bench.worker import Timeline, WorkerOptions, serve
from fallow.engine.engine import Engine
from fallow.engine.memory import page_bytes
from fallow.engine.outputs import RequestDelta
from fallow.engine.runner import ModelRunner, Precision
from fallow.engine.sampling import SamplingParams
from fallow.models.checkpoint import open_checkpoint
from fallow.models.store import resolve
from fallow.plan import SparsityPlan


class OursBackend:
    """No prefix cache and no speculation: each prompt is read, and each token is a step. All sequences of a load have
    room in the KV cache at once."""

    def __init__(self, options: WorkerOptions) -> None:
        pages = -(-options.max_positions // ModelRunner.page_size)
        pages += pages // 50 + 2 * options.max_batch  # begun ones, and what the scheduler holds in reserve
        a_page = page_bytes(open_checkpoint(resolve(options.model)).config, ModelRunner.page_size, summaries=True)
        self.engine = Engine(
            options.model,
            precision=cast(Precision, options.precision),
            threads=options.threads,
            max_context=options.max_context,
            kv_cache_bytes=pages * a_page,
            max_num_seqs=options.max_batch,
            prefix_caching=False,
            plan=SparsityPlan.dense() if options.dense else None,
        )
        self.vocab_size = self.engine.runner.vocab_size

    def run(self, prompts: list[list[int]], tokens: int, timeline: Timeline) -> None:
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        unfinished, errors = threading.Semaphore(0), []

        def follow(sequence: int, delta: RequestDelta) -> None:
            for _ in delta.token_ids:
                timeline.arrived(sequence)
            if delta.error:
                errors.append(delta.error)
            if delta.finish_reason is not None:
                unfinished.release()

        for i, prompt in enumerate(prompts):
            self.engine.submit(prompt, params, lambda delta, i=i: follow(i, delta))  # type: ignore[misc]
        for _ in prompts:
            unfinished.acquire()
        if errors:
            raise RuntimeError(errors[0])

    def nll(self, tokens: list[int]) -> float:
        # The engine is idle here, so that its runner may be used.
        return -float(self.engine.runner.score(tokens).sum(dtype="float64"))


if __name__ == "__main__":
    serve(OursBackend)
