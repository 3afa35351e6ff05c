"""The benchmark: ours and the peers in turns, on the same loads, in one run."""

from __future__ import annotations

import math
import statistics
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fallow import _native
from fallow.bench.environment import PeerError, peer_python
from fallow.bench.loads import MEMORY, Load, loads_of
from fallow.bench.ours import our_variants
from fallow.bench.peers import PEERS, peer_named
from fallow.bench.peers.base import Variant
from fallow.bench.pool import WorkerPool, start_worker
from fallow.bench.quality import QualityText, measure_quality
from fallow.bench.replay import Endpoint
from fallow.bench.result import OURS, BenchResult, Run, Skipped
from fallow.bench.servers import trace_runs
from fallow.bench.trace import TraceOptions
from fallow.errors import FallowError
from fallow.evaluate.perplexity import DEFAULT_WINDOW
from fallow.meter.cost import DEFAULT_PRICE_SOURCE, DEFAULT_USD_PER_HOUR, usd_per_million_tokens
from fallow.meter.energy import EnergyMeter
from fallow.meter.machine import machine
from fallow.models.checkpoint import open_checkpoint
from fallow.models.rope import longest_context
from fallow.models.store import resolve
from fallow.models.tokenizer import load_tokenizer
from fallow.terminal import Progress

DEFAULT_QUALITY_TOKENS = 16_384
_GIVE_UP_AFTER = 2  # failures of a variant


def run_bench(
    model: str | Path = "smollm2-135m",
    *,
    peers: Sequence[str] = (),
    precisions: Sequence[str] | None = None,
    loads: str | Sequence[Load] = "full",
    repetitions: int = 3,
    threads: int | None = None,
    price: float | None = None,
    text: QualityText | None = None,
    quality_tokens: int | None = None,
    trace: TraceOptions | None = None,
    endpoint: Endpoint | None = None,
    progress: Progress | None = None,
) -> BenchResult:
    """Measure our engine and ``peers`` with ``model``.

    ``peers``: names of ``fallow.bench.peers.PEERS``; one that cannot be measured here is in ``skipped`` with the
    reason. ``precisions`` are ours; where the model has a plan, each is measured with it and without. ``loads``:
    ``"full"``; ``"quick"`` or the loads themselves, which leave the perplexity out unless ``text`` or
    ``quality_tokens`` asks for it; or ``"none"``, for the perplexity or the trace alone. ``quality_tokens=0`` leaves
    the perplexity out always. ``price`` is what the machine costs an hour, in dollars. ``trace`` replays a trace
    against the server of each engine too (its fastest precision, ours with the plan and without) and against
    ``endpoint``. Each load is measured ``repetitions`` times, the engines taking turns, after a pass that is not
    counted; medians are given. ``progress`` is called with what is being done, steps done, and steps in all.

    Raises ``FallowError`` where the model cannot be loaded or an argument makes no sense.
    """
    wanted = [peer_named(name).name for name in dict.fromkeys(peers)]
    path = resolve(model, progress=progress)
    config = open_checkpoint(path).config
    max_context = longest_context(config.rope, config.max_position_embeddings)
    chosen = loads_of(loads, max_context)
    threads = threads or _native.usable_cores()
    window = min(DEFAULT_WINDOW, max_context)
    if repetitions < 1:
        raise FallowError(f"repetitions is {repetitions}: it must be at least 1.")
    if price is not None and not (price >= 0 and math.isfinite(price)):
        raise FallowError(f"price is {price}: it must be at least 0 dollars an hour.")
    if quality_tokens is None:
        wants_quality = loads == "full" or text is not None or (loads == "none" and trace is None)
        quality_tokens = DEFAULT_QUALITY_TOKENS if wants_quality else 0
    result = BenchResult(
        model=str(model),
        machine={**machine(), "threads": threads},
        usd_per_hour=DEFAULT_USD_PER_HOUR if price is None else price,
        price_source=DEFAULT_PRICE_SOURCE if price is None else "given",
        energy_method=EnergyMeter().method,
    )
    variants = our_variants(path, precisions)
    for name in (name for name in PEERS if name in wanted):
        try:
            python = peer_python(name, PEERS[name].requirements, progress)
            variants += PEERS[name].variants(path, python, progress)
        except PeerError as error:
            result.skipped.append(Skipped(name, str(error)))
    with tempfile.TemporaryDirectory(prefix="fallow-bench-") as folder:
        scratch = Path(folder)
        bench = _Bench(
            result,
            variants,
            chosen,
            scratch=scratch,
            threads=threads,
            repetitions=repetitions,
            progress=progress,
        )
        tokenizer = load_tokenizer(path)
        limits = {
            "max_batch": max((load.batch for load in chosen), default=1),
            "max_context": min(max(window, *(load.context + load.tokens for load in chosen), 2), max_context),
            "max_positions": max(window, *(load.positions for load in chosen), 2),
        }
        with WorkerPool(scratch, threads=threads, **limits) as pool:
            if chosen:
                memory = bench.memory()
                bench.speed(pool, memory)
            if quality_tokens:
                result.quality = measure_quality(
                    pool,
                    bench.left,
                    tokenizer,
                    text or QualityText.default(quality_tokens),
                    window=window,
                    max_tokens=quality_tokens,
                    scratch=scratch,
                    progress=progress,
                    on_failure=bench.failed,
                )
        if trace is not None:
            result.runs += trace_runs(
                bench.fastest(),
                endpoint,
                trace,
                tokenizer,
                threads=threads,
                max_context=max_context,
                usd_per_hour=result.usd_per_hour,
                scratch=scratch,
                progress=progress,
                on_failure=bench.failed,
            )
    return result


class _Bench:
    """One benchmark while it runs: what is still asked of whom, and what was found."""

    def __init__(
        self,
        result: BenchResult,
        variants: list[Variant],
        loads: Sequence[Load],
        *,
        scratch: Path,
        threads: int,
        repetitions: int,
        progress: Progress | None,
    ) -> None:
        self._result = result
        self._variants = variants
        self._measured = [variant for variant in variants if variant.for_speed]
        self._loads = loads
        self._scratch = scratch
        self._threads = threads
        self._repetitions = repetitions
        self._progress = progress
        self._failures: Counter[str] = Counter()

    @property
    def left(self) -> list[Variant]:
        """The variants that have not failed too often."""
        return [variant for variant in self._variants if self._failures[variant.name] < _GIVE_UP_AFTER]

    def failed(self, variant: Variant, error: PeerError) -> None:
        """Note why a peer was left out."""
        self._failures[variant.name] += 1
        skipped = Skipped(variant.name, str(error))
        if skipped not in self._result.skipped:
            self._result.skipped.append(skipped)

    def fastest(self) -> list[Variant]:
        """Of each engine, and of ours with the plan and without it, the variant that decoded the largest batch fastest;
        the first one where that is not known."""
        largest = max(self._loads, key=lambda load: load.batch, default=None)
        speeds = {
            (run.engine, run.precision): run.tokens_per_s
            for run in self._result.runs
            if largest is not None and (run.load, run.batch) == ("decode", largest.batch)
        }
        best: dict[tuple[str, bool], Variant] = {}
        for variant in self.left:
            if not variant.for_speed:
                continue
            key = (variant.engine, variant.dense)
            chosen = best.setdefault(key, variant)
            if speeds.get((variant.engine, variant.precision), 0) > speeds.get((chosen.engine, chosen.precision), 0):
                best[key] = variant
        return list(best.values())

    @contextmanager
    def _trying(self, variant: Variant) -> Iterator[None]:
        try:
            yield
        except PeerError as error:
            if variant.engine == OURS:
                raise
            self.failed(variant, error)

    def memory(self) -> dict[str, int]:
        """The most memory that each variant has resident with one sequence, in a process that did nothing else."""
        peaks = {}
        limits = {
            "max_batch": 1,
            "max_context": MEMORY.context + MEMORY.tokens,
            "max_positions": MEMORY.positions,
            "threads": self._threads,
        }
        for i, variant in enumerate(self._measured):
            self._say(f"memory of {variant.name}", i, len(self._measured))
            with self._trying(variant):
                worker = start_worker(variant, self._scratch, **limits)
                try:
                    worker.ask(_request(MEMORY, seed=0))
                    peaks[variant.name] = int(worker.ask({"op": "memory"})["peak_memory_bytes"])
                finally:
                    worker.close()
        return peaks

    def speed(self, pool: WorkerPool, memory: dict[str, int]) -> None:
        """All loads, the variants taking turns, pass after pass; the first pass only warms up and leaves long loads
        out."""
        answers: dict[tuple[str, Load], list[dict[str, Any]]] = {}
        broken: set[tuple[str, Load]] = set()
        done = 0
        total = (self._repetitions + 1) * len(self._loads) * len(self._measured)
        for repetition in range(self._repetitions + 1):
            for load in self._loads:
                for variant in self._measured:
                    done += 1
                    key = (variant.name, load)
                    if variant not in self.left or key in broken or (repetition == 0 and load.is_long):
                        continue
                    self._say(f"{load.title}: {variant.name}", done, total)
                    broken.add(key)  # until it is known to work
                    with self._trying(variant):
                        answer = pool.ask(variant, _request(load, seed=repetition))
                        broken.discard(key)
                        if repetition > 0:
                            answers.setdefault(key, []).append(answer)
        for load in self._loads:
            for variant in self._measured:
                taken = answers.get((variant.name, load), [])
                if taken:
                    peak = memory.get(variant.name) if load == MEMORY else None
                    self._result.runs.append(_run(variant, load, taken, peak, self._result.usd_per_hour))

    def _say(self, what: str, done: int, total: int) -> None:
        if self._progress is not None:
            self._progress(what, done, total)


def _request(load: Load, *, seed: int) -> dict[str, Any]:
    return {
        "op": "measure",
        "kind": load.kind,
        "batch": load.batch,
        "context": load.context,
        "tokens": load.tokens,
        "repeats": load.repeats,
        "seed": seed,
    }


def _run(variant: Variant, load: Load, answers: list[dict[str, Any]], peak: int | None, usd_per_hour: float) -> Run:
    speeds = [answer["tokens_per_s"] for answer in answers]
    speed = statistics.median(speeds)
    return Run(
        engine=variant.engine,
        precision=variant.precision,
        load=load.kind,
        batch=load.batch,
        context=load.context,
        tokens_per_s=speed,
        ttft_s=statistics.median(answer["ttft_s"] for answer in answers),
        peak_memory_bytes=peak,
        joules_per_token=statistics.median(answer["joules_per_token"] for answer in answers),
        energy_source=answers[0]["energy_source"],
        usd_per_million_output_tokens=usd_per_million_tokens(speed, usd_per_hour) if load.kind == "decode" else None,
        repetitions=len(answers),
        spread=(max(speeds) - min(speeds)) / speed,
        details={} if all(answer.get("together", True) for answer in answers) else {"together": False},
    )
