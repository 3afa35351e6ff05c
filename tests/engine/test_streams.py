"""Hard use: hundreds of requests at once from many threads, of which a third is given up midway."""

from __future__ import annotations

import random
import threading
from typing import Any

from fallow.engine.engine import Engine, RequestDelta
from fallow.engine.sampling import SamplingParams

STREAMS = 256
THREADS = 16


class Stream:
    """One request; cancelled after ``leaves_after`` deltas, if it is to be."""

    def __init__(self, engine: Engine, leaves_after: int | None) -> None:
        self._engine = engine
        self._leaves_after = leaves_after
        self.deltas: list[RequestDelta] = []
        self.ended = threading.Event()

    def __call__(self, delta: RequestDelta) -> None:
        assert not self.ended.is_set(), "a delta after the last"
        self.deltas.append(delta)
        if len(self.deltas) == self._leaves_after:
            self._engine.cancel(delta.request_id)
        if delta.finish_reason is not None:
            self.ended.set()


def test_256_streams_of_which_a_third_is_cancelled(start_engine: Any) -> None:
    engine = start_engine(pages=96, max_num_seqs=32, prefill_chunk=128)
    draw = random.Random(7)
    vocab_size = engine.tokenizer.vocab_size
    prompts = [[draw.randrange(3, vocab_size) for _ in range(draw.randrange(1, 40))] for _ in range(STREAMS)]
    streams = [Stream(engine, draw.randrange(1, 6) if i % 3 == 0 else None) for i in range(STREAMS)]

    def submit(first: int) -> None:
        for i in range(first, STREAMS, THREADS):
            request_id = engine.submit(prompts[i], SamplingParams(max_tokens=10, seed=i, ignore_eos=True), streams[i])
            if i % 9 == 0:  # before it has begun, or in the middle
                engine.cancel(request_id)

    threads = [threading.Thread(target=submit, args=(first,)) for first in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for i, stream in enumerate(streams):
        assert stream.ended.wait(60), i
        last = stream.deltas[-1]
        assert last.completion_tokens == sum(len(delta.token_ids) for delta in stream.deltas)
        if i % 3:
            assert (last.finish_reason, last.completion_tokens) == ("length", 10)
        else:
            assert last.finish_reason == "cancelled"
            assert last.completion_tokens < 10
    assert engine.drain(30)
    stats = engine.stats()
    assert stats.pages_used == stats.running == stats.waiting == 0
    engine.scheduler.check()
