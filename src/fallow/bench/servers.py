"""Servers under the load of a trace: ours, the peers', or one that is already there."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from fallow.bench.environment import PeerError, last_line
from fallow.bench.guard import GUARD
from fallow.bench.ours import our_server_command
from fallow.bench.peers import PEERS
from fallow.bench.peers.base import Variant
from fallow.bench.prepare import worker_environment
from fallow.bench.replay import Endpoint, complete, replay
from fallow.bench.result import OURS, Run
from fallow.bench.trace import Arrival, ReplayResult, TraceOptions, highest_rate, read_trace, scaled, summary
from fallow.errors import FallowError
from fallow.evaluate.text import standard_library_text
from fallow.meter.cost import usd_per_million_tokens
from fallow.meter.energy import EnergyMeter, Measurement
from fallow.models.tokenizer import Tokenizer
from fallow.terminal import Progress

_START_SECONDS = 900.0
_STOP_SECONDS = 20.0
_PROMPT_CHARACTERS = 2_000_000


class Prompts:
    """Texts of a number of tokens, each beginning somewhere else, so that no prefix is shared by any two requests.

    One object serves all the replays of one server: the next replay's texts go on where the last one's ended.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids = tokenizer.encode(standard_library_text(_PROMPT_CHARACTERS), add_special_tokens=False)
        self.begin_anew()

    def begin_anew(self) -> None:
        """Give another server the same texts as the last one."""
        self._rounds = self._start = 0

    def texts(self, requests: Sequence[Arrival]) -> list[str]:
        """A text of about ``context_tokens`` tokens for each request (cut in the middle of words, it can be a few more
        or less)."""
        found = []
        for request in requests:
            if self._start + request.context_tokens > len(self._ids):
                self._rounds += 1
                self._start = self._rounds  # a token further on than the last time
            end = self._start + request.context_tokens
            found.append(self._tokenizer.decode(self._ids[self._start : end]))
            self._start = end
        return found


def measure_trace(
    endpoint: Endpoint,
    options: TraceOptions,
    arrivals: Sequence[Arrival],
    prompts: Prompts,
    *,
    max_context: int,
    pid: int | None,
    what: str,
    progress: Progress | None,
) -> tuple[ReplayResult | None, list[ReplayResult], Measurement | None]:
    """The highest rate that ``endpoint`` bears, every replay on the way, and what the processes under ``pid`` used at
    that rate. Raises ``FallowError`` where the endpoint does not answer."""
    began = time.monotonic()
    prompts.begin_anew()
    meter = EnergyMeter(pid) if pid is not None else None
    used: dict[float, Measurement] = {}

    def at(rate: float) -> ReplayResult:
        if progress is not None:
            done = min(int(time.monotonic() - began), int(options.max_seconds))
            progress(f"{what}: {rate:.3g} requests/s", done, int(options.max_seconds))
        requests = scaled(
            arrivals,
            rate=rate,
            seconds=options.replay_seconds,
            max_context=max_context,
            max_generated=options.max_generated,
        )
        texts = prompts.texts(requests)
        with meter.measure() if meter else contextlib.nullcontext(Measurement()) as measurement:
            times = replay(endpoint, requests, texts, grace_seconds=options.replay_seconds)
        used[rate] = measurement
        return summary(rate, times)

    try:
        asyncio.run(asyncio.wait_for(complete(endpoint, "Hello", 8), 120))
    except (OSError, ValueError, TimeoutError, asyncio.IncompleteReadError) as error:
        raise FallowError(f"{endpoint.url} gave no completion: {error or 'no answer within two minutes'}.") from error
    best, tried = highest_rate(options, at, lambda: time.monotonic() - began)
    return best, tried, used[best.requests_per_s] if best is not None and meter is not None else None


def trace_runs(
    variants: Sequence[Variant],
    endpoint: Endpoint | None,
    options: TraceOptions,
    tokenizer: Tokenizer,
    *,
    threads: int,
    max_context: int,
    usd_per_hour: float,
    scratch: Path,
    progress: Progress | None,
    on_failure: Callable[[Variant, PeerError], None],
) -> list[Run]:
    """Start the server of each variant in turn and find the highest rate that it bears; then that of ``endpoint``.

    Raises ``FallowError`` where the trace cannot be read, or ``endpoint`` does not answer.
    """
    prompts = Prompts(tokenizer)
    arrivals = read_trace(options.file)
    runs = []
    for variant in variants:
        try:
            with running_server(variant, threads=threads, max_context=max_context, scratch=scratch) as (url, pid):
                best, tried, used = measure_trace(
                    Endpoint(url, "model"),
                    options,
                    arrivals,
                    prompts,
                    max_context=max_context,
                    pid=pid,
                    what=f"trace on {variant.name}",
                    progress=progress,
                )
        except PeerError as error:
            if variant.engine == OURS:
                raise
            on_failure(variant, error)
            continue
        except FallowError as error:
            on_failure(variant, PeerError(str(error)))
            continue
        row = trace_run(
            variant.engine, variant.precision, options, best=best, tried=tried, used=used, usd_per_hour=usd_per_hour
        )
        runs.append(row)
    if endpoint is not None:
        best, tried, used = measure_trace(
            endpoint,
            options,
            arrivals,
            prompts,
            max_context=max_context,
            pid=None,
            what=f"trace on {endpoint.url}",
            progress=progress,
        )
        row = trace_run(
            endpoint.url, endpoint.model, options, best=best, tried=tried, used=used, usd_per_hour=usd_per_hour
        )
        runs.append(row)
    return runs


def trace_run(
    engine: str,
    precision: str,
    options: TraceOptions,
    *,
    best: ReplayResult | None,
    tried: Sequence[ReplayResult],
    used: Measurement | None,
    usd_per_hour: float,
) -> Run:
    """The row of a table: the throughput at the highest rate that was borne, 0 where none was."""
    speed = best.tokens_per_s if best else 0.0
    return Run(
        engine=engine,
        precision=precision,
        load="trace",
        batch=None,
        context=None,
        tokens_per_s=speed,
        ttft_s=best.ttft_p50 if best else None,
        peak_memory_bytes=None,
        joules_per_token=used.joules / best.tokens if best and used else None,
        energy_source=EnergyMeter().source if used else None,
        usd_per_million_output_tokens=usd_per_million_tokens(speed, usd_per_hour) if speed else None,
        details={
            "best": _finite(best) if best else None,
            "replays": [_finite(result) for result in tried],
            "objective": {"ttft_p90_s": options.ttft_objective, "tpot_p90_s": options.tpot_objective},
            "trace": options.file.name,
        },
    )


def _finite(result: ReplayResult) -> dict[str, object]:
    """The percentiles of nothing are null in JSON."""
    fields = asdict(result)
    return {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in fields.items()}


@contextmanager
def running_server(variant: Variant, *, threads: int, max_context: int, scratch: Path) -> Iterator[tuple[str, int]]:
    """The base URL and the process id of a variant's server, which ends with the block. Raises ``PeerError`` where it
    has none or does not start."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    limits = {"port": port, "threads": threads, "max_context": max_context}
    if variant.engine == OURS:
        command = our_server_command(variant, **limits)
        environment = dict(os.environ)
    else:
        command = PEERS[variant.engine].server_command(variant, **limits)
        environment = worker_environment(variant.python)
    environment |= {"OMP_NUM_THREADS": str(threads), **variant.variables}
    log = scratch / f"server-{variant.name.replace(' ', '-')}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=scratch,
            process_group=0,
        )
    GUARD.protect(process.pid)
    try:
        _wait_until_it_listens(process, port, variant, log)
        yield f"http://127.0.0.1:{port}/v1", process.pid
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        GUARD.release(process.pid)


def _wait_until_it_listens(process: subprocess.Popen[bytes], port: int, variant: Variant, log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise PeerError(f"The server of {variant.name} ended at its start: {last_line(log)}.")
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.2)
    raise PeerError(f"The server of {variant.name} did not listen within {_START_SECONDS:.0f} s: {last_line(log)}.")
