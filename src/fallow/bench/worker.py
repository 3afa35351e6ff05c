"""The worker's side of the protocol: one JSON object a line on stdin, one or more on stdout, standard library only.

The first line is the worker's options; ``{"ready": true, ...}`` answers it when the model is loaded. Each later line
is a request ``{"op": "measure" | "perplexity" | "memory", ...}``. While it works a worker may say
``{"progress": [done, total]}``; the answer ends the request. A failure is ``{"error": "..."}``, after which the worker
goes on. End of input ends it. What libraries print goes to stderr.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from fallow.meter.energy import EnergyMeter, Measurement, Reading
from fallow.meter.processes import peak_resident_bytes, process_tree


@dataclass(frozen=True)
class WorkerOptions:
    """What a worker needs to know to load its model.

    ``max_batch`` sequences at once, of ``max_context`` tokens at most each, ``max_positions`` tokens together.
    ``dense``: without the plan that lies beside the model.
    """

    model: str
    threads: int
    max_batch: int
    max_context: int
    max_positions: int
    precision: str = "auto"
    dense: bool = False


class Backend(Protocol):
    """An engine with its model."""

    vocab_size: int

    def run(self, prompts: list[list[int]], tokens: int, timeline: Timeline) -> None:
        """Hand in all prompts, generate exactly ``tokens`` tokens greedily for each, and tell ``timeline``."""

    def nll(self, tokens: list[int]) -> float:
        """The sum of the negative log-likelihoods (nats) of ``tokens[1:]``, each given all before it."""


class Timeline:
    """When the tokens of a batch arrived, and what was used while all of its sequences were running.

    The decode region goes from the arrival of the last sequence's first token to the end of the first sequence that
    ends: prompts are read before it, and after it the batch is smaller.
    """

    def __init__(self, prompts: list[list[int]], tokens: int, meter: EnergyMeter, pids: list[int]) -> None:
        self.tokens = tokens
        self.prompt_tokens = sum(map(len, prompts))
        batch = len(prompts)
        self._meter, self._pids = meter, pids
        self.arrivals: list[list[float]] = [[] for _ in range(batch)]
        self._waiting = batch
        self.region: list[Reading] = []
        self.began = meter.reading(pids)

    def arrived(self, sequence: int) -> None:
        """The next token of ``sequence`` is there."""
        arrivals = self.arrivals[sequence]
        arrivals.append(time.perf_counter())
        if len(arrivals) == 1:
            self._waiting -= 1
            if self._waiting == 0:
                self.region.append(self._meter.reading(self._pids))
        if len(arrivals) == self.tokens and len(self.region) == 1:
            self.region.append(self._meter.reading(self._pids))

    def prefill(self) -> dict[str, float]:
        """Seconds until the last of the first tokens, and what was used until then, a prompt token."""
        used = self._meter.between(self.began, self.region[0])
        seconds = max(arrivals[0] for arrivals in self.arrivals) - self.began.at
        tokens = self.prompt_tokens
        return {"tokens_per_s": tokens / seconds, "ttft_s": seconds, **_used(used, tokens)}

    def decode(self) -> dict[str, float]:
        """Tokens per second of the whole batch in the decode region, and what was used in it.

        The sum over the sequences of the arrivals in the region less one, over the time between the first and the last
        of them: the small lags between sequences of one step then cancel. Where the sequences hardly ran together (a
        model so small that one ends before the next has begun) it is that of the whole run instead, prompts among it,
        and ``together`` is false.
        """
        begin, end = max(a[0] for a in self.arrivals), min(a[-1] for a in self.arrivals)
        inside = [[at for at in arrivals if begin <= at <= end] for arrivals in self.arrivals]
        together = all(len(times) >= 2 for times in inside)
        if together:
            rate = sum((len(times) - 1) / (times[-1] - times[0]) for times in inside)
        else:
            whole = max(a[-1] for a in self.arrivals) - min(a[0] for a in self.arrivals)
            rate = sum(len(arrivals) - 1 for arrivals in self.arrivals) / whole
        before, after = self.region
        tokens = sum(before.at < at <= after.at for arrivals in self.arrivals for at in arrivals)
        first = sorted(arrivals[0] for arrivals in self.arrivals)
        used = self._meter.between(before, after)
        ttft = first[len(first) // 2] - self.began.at
        return {"tokens_per_s": rate, "ttft_s": ttft, "together": together, **_used(used, tokens)}


def _used(used: Measurement, tokens: int) -> dict[str, float]:
    return {
        "tokens": tokens,
        "seconds": used.seconds,
        "joules": used.joules,
        "cpu_seconds": used.cpu_seconds,
        "joules_per_token": used.joules / max(tokens, 1),
    }


def random_prompts(batch: int, context: int, vocab_size: int, seed: int) -> list[list[int]]:
    """``batch`` prompts of random ids, the same for every engine; the lowest ids are left out: many are special."""
    low, state, prompts = min(100, vocab_size // 2), seed * 2 + 1, []
    for _ in range(batch):
        prompt = []
        for _ in range(context):
            state = (state * 6364136223846793005 + 1442695040888963407) % 2**64  # Knuth's MMIX generator
            prompt.append(low + (state >> 33) % (min(vocab_size, 40000) - low))
        prompts.append(prompt)
    return prompts


class _Worker:
    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.meter = EnergyMeter()

    def measure(self, request: dict[str, Any]) -> dict[str, Any]:
        """The repeat of median speed."""
        count: int = request.get("repeats", 1)
        answers = [self._measure_once(request, request["seed"] * 100 + repeat) for repeat in range(count)]
        return sorted(answers, key=lambda answer: answer["tokens_per_s"])[count // 2]

    def _measure_once(self, request: dict[str, Any], seed: int) -> dict[str, Any]:
        tokens = request["tokens"]
        prompts = random_prompts(request["batch"], request["context"], self.backend.vocab_size, seed)
        timeline = Timeline(prompts, tokens, self.meter, process_tree(os.getpid()))
        self.backend.run(prompts, tokens, timeline)
        assert all(len(arrivals) == tokens for arrivals in timeline.arrivals), "not every token arrived"
        answer = timeline.prefill() if request["kind"] == "prefill" else timeline.decode()
        return {**answer, "energy_source": self.meter.source}

    def perplexity(self, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
        with open(request["windows"], encoding="utf-8") as file:
            windows: list[list[int]] = json.load(file)
        total, done, nll = sum(map(len, windows)), 0, 0.0
        for tokens in windows:
            nll += self.backend.nll(tokens)
            done += len(tokens)
            yield {"progress": [done, total]}
        yield {"nll": nll, "tokens": total - len(windows)}

    def answers(self, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
        if request["op"] == "measure":
            yield self.measure(request)
        elif request["op"] == "perplexity":
            yield from self.perplexity(request)
        elif request["op"] == "memory":
            yield {"peak_memory_bytes": peak_resident_bytes(process_tree(os.getpid()))}
        else:
            raise ValueError(f"there is no operation {request['op']!r}")


Say = Callable[[dict[str, Any]], None]
"""Writes one message of a worker."""


def _messages() -> Say:
    """Libraries print to descriptor 1; the messages get one of their own."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(message: dict[str, Any]) -> None:
        out.write(json.dumps(message) + "\n")
        out.flush()

    return say


def do_job(run: Callable[[dict[str, Any], Say], dict[str, Any]]) -> None:
    """One job instead of requests: the only line of the input is given to ``run``, whose result is the last message."""
    say = _messages()
    try:
        say({"done": run(json.loads(sys.stdin.readline()), say)})
    except Exception as error:
        traceback.print_exc()
        say({"error": f"{type(error).__name__}: {error}"})


def serve(load: Callable[[WorkerOptions], Backend]) -> None:
    """Speak the protocol until the input ends. ``load`` makes the engine out of the options of the first line."""
    say = _messages()
    worker: _Worker | None = None
    for line in sys.stdin:
        try:
            request = json.loads(line)
            if worker is None:
                started = time.perf_counter()
                worker = _Worker(load(WorkerOptions(**request)))
                say({"ready": True, "seconds": time.perf_counter() - started})
            else:
                for answer in worker.answers(request):
                    say(answer)
        except Exception as error:
            traceback.print_exc()
            say({"error": f"{type(error).__name__}: {error}"})
    # Engines that keep threads or processes of their own can hang when they are torn down; nothing is left to save.
    sys.stderr.flush()
    for child in process_tree(os.getpid())[1:]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    os._exit(0)
