"""Workers: what they make of arrivals, and the protocol, spoken with our own engine on a tiny model."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from fallow.bench.environment import PeerError
from fallow.bench.loads import load_named
from fallow.bench.ours import our_variants
from fallow.bench.peers.base import Variant
from fallow.bench.pool import WorkerPool, start_worker
from fallow.bench.quality import QualityText, measure_quality
from fallow.bench.worker import Timeline, random_prompts
from fallow.errors import FallowError
from fallow.evaluate.perplexity import perplexity, token_windows
from fallow.meter.energy import EnergyMeter
from fallow.models.tokenizer import load_tokenizer

LIMITS = {"threads": 1, "max_batch": 4, "max_context": 256, "max_positions": 1024}
MEASURE = {"op": "measure", "kind": "decode", "batch": 3, "context": 40, "tokens": 24, "seed": 1}
TEXT = Path(__file__).read_text(encoding="utf-8")[:2000]


def timeline(arrivals: list[list[float]]) -> Timeline:
    """A timeline whose tokens came at the given seconds after it began, in that order."""
    found = Timeline([[0, 0]] * len(arrivals), len(arrivals[0]), EnergyMeter(), [os.getpid()])
    came: list[list[float]] = [[] for _ in arrivals]
    for at, sequence in sorted((at, sequence) for sequence, times in enumerate(arrivals) for at in times):
        readings = len(found.region)
        found.arrived(sequence)
        came[sequence].append(found.began.at + at)
        if len(found.region) > readings:
            found.region[-1] = replace(found.region[-1], at=found.began.at + at)
    found.arrivals = came
    return found


def test_decode_speed_is_that_of_the_time_in_which_all_sequences_run() -> None:
    # The second prompt is read two seconds later; meanwhile the first one gets a token a second, then both ten.
    first = [1.0, 2.0, 3.0] + [3.0 + i / 10 for i in range(1, 21)]
    second = [3.0 + i / 10 for i in range(23)]
    found = timeline([first, second]).decode()
    assert found["tokens_per_s"] == pytest.approx(20.0)
    assert found["seconds"] == pytest.approx(2.0)
    assert found["tokens"] == 40
    assert found["joules_per_token"] == pytest.approx(found["joules"] / 40)


def test_lags_between_the_sequences_of_one_step_cancel() -> None:
    steps = [[0.1 * step + 0.02 * sequence for step in range(1, 31)] for sequence in range(4)]
    assert timeline(steps).decode()["tokens_per_s"] == pytest.approx(40.0)


def test_sequences_that_hardly_run_together_are_measured_over_the_whole_run() -> None:
    for second, speed in (([3.0, 4.0, 5.0], 1.0), ([4.0, 5.0, 6.0], 0.8)):
        found = timeline([[1.0, 2.0, 3.0], second]).decode()
        assert found["tokens_per_s"] == pytest.approx(speed)
        assert found["together"] is False
    assert timeline([[1.0, 2.0, 3.0], [2.0, 3.0, 4.0]]).decode()["together"] is True


def test_prefill_ends_with_the_last_of_the_first_tokens() -> None:
    found = timeline([[0.5], [2.0]]).prefill()
    assert found["ttft_s"] == pytest.approx(2.0)
    assert found["tokens_per_s"] == pytest.approx(4 / 2.0)


def test_prompts_are_the_same_everywhere_and_differ_by_seed() -> None:
    prompts = random_prompts(3, 50, 49_152, 7)
    assert prompts == random_prompts(3, 50, 49_152, 7) != random_prompts(3, 50, 49_152, 8)
    assert all(len(prompt) == 50 and all(100 <= token < 40_000 for token in prompt) for prompt in prompts)
    assert len({tuple(prompt) for prompt in prompts}) == 3
    assert all(0 <= token < 50 for token in random_prompts(1, 200, 50, 0)[0])


@pytest.fixture
def variant(tiny_checkpoints: dict[str, Path]) -> Variant:
    return our_variants(tiny_checkpoints["llama"], ["auto"])[0]


def test_a_worker_measures_is_stopped_between_and_ends(variant: Variant, tmp_path: Path) -> None:
    worker = start_worker(variant, tmp_path, **LIMITS)
    pid = worker.pid
    try:
        answer = worker.ask(MEASURE)
        assert answer["tokens_per_s"] > 0
        assert 0 < answer["ttft_s"] < 60
        assert answer["joules_per_token"] > 0
        assert answer["energy_source"] in ("rapl", "estimate")
        assert worker.ask({**MEASURE, "kind": "prefill", "batch": 1, "tokens": 1})["tokens"] == 40
        assert worker.ask({"op": "memory"})["peak_memory_bytes"] > 10_000_000
        until = time.monotonic() + 10
        while state(pid) != "T" and time.monotonic() < until:
            time.sleep(0.01)
        assert state(pid) == "T"
        with pytest.raises(PeerError, match="there is no operation 'dance'"):
            worker.ask({"op": "dance"})
        with pytest.raises(PeerError, match=r"fallow auto.*context"):
            worker.ask({**MEASURE, "context": 300})
        assert worker.ask(MEASURE)["tokens_per_s"] > 0
    finally:
        worker.close()
    assert state(pid) is None


def test_all_prompts_are_read_long_before_the_first_sequence_ends(smollm2_gguf: Path, tmp_path: Path) -> None:
    load = load_named("decode:3:1024")
    variant = our_variants(smollm2_gguf, ["auto"])[0]
    limits = {"max_batch": 3, "max_context": load.context + load.tokens, "max_positions": load.positions}
    with WorkerPool(tmp_path, threads=2, **limits) as pool:
        answer = pool.ask(variant, {**MEASURE, "batch": 3, "context": load.context, "tokens": load.tokens})
    assert answer["tokens"] >= 3 * 31
    assert load_named("decode:1:1024").tokens == 32


def state(pid: int) -> str | None:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return None


def test_a_worker_that_dies_is_reported_and_started_anew(variant: Variant, tmp_path: Path) -> None:
    with WorkerPool(tmp_path, **LIMITS) as pool:
        assert pool.ask(variant, MEASURE)["tokens_per_s"] > 0
        os.kill(pool.pids[variant.name], signal.SIGKILL)
        with pytest.raises(PeerError, match=r"fallow auto was ended by signal 9"):
            pool.ask(variant, MEASURE)
        assert pool.ask(variant, MEASURE)["tokens_per_s"] > 0
        (pid,) = pool.pids.values()
    assert state(pid) is None


def test_a_stopped_worker_does_not_outlive_a_killed_driver(variant: Variant, tmp_path: Path) -> None:
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from fallow.bench.ours import our_variants\n"
        "from fallow.bench.pool import start_worker\n"
        "variant = our_variants(Path(sys.argv[1]), ['auto'])[0]\n"
        f"worker = start_worker(variant, Path(sys.argv[2]), **{LIMITS!r})\n"
        "print(worker.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    command = [sys.executable, "-c", code, str(variant.model), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdout is not None
        pid = int(driver.stdout.readline())
        assert state(pid) in ("T", "S", "R")
        driver.kill()
    until = time.monotonic() + 10
    while state(pid) not in (None, "Z") and time.monotonic() < until:
        time.sleep(0.02)
    assert state(pid) in (None, "Z")


def test_a_worker_that_cannot_begin_says_why(variant: Variant, tmp_path: Path) -> None:
    with WorkerPool(tmp_path, **LIMITS) as pool:
        with pytest.raises(PeerError, match=r"no-such-model"):
            pool.ask(replace(variant, model=tmp_path / "no-such-model"), MEASURE)
        without = replace(variant, engine="other", worker="no_such_worker", python=Path(sys.executable))
        with pytest.raises(PeerError, match=r"other auto ended.*no_such_worker"):
            pool.ask(without, MEASURE)


def test_a_worker_gives_the_perplexity_of_the_very_windows(variant: Variant, tmp_path: Path) -> None:
    from fallow.engine.runner import ModelRunner
    from fallow.models.checkpoint import open_checkpoint

    tokenizer = load_tokenizer(variant.model)
    said: list[str] = []
    with WorkerPool(tmp_path, **LIMITS) as pool:
        (found,) = measure_quality(
            pool,
            [variant],
            tokenizer,
            QualityText("this file", TEXT),
            window=128,
            max_tokens=700,
            scratch=tmp_path,
            progress=lambda what, done, total: said.append(what),
            on_failure=lambda variant, error: pytest.fail(str(error)),
        )
    runner = ModelRunner(open_checkpoint(variant.model), num_pages=8, threads=1)
    expected = perplexity(runner, tokenizer, token_windows(tokenizer, TEXT, window=128, max_tokens=700))
    runner.close()
    assert found.perplexity == pytest.approx(expected.perplexity, rel=1e-9)
    assert (found.tokens, found.window, found.text) == (expected.tokens, 128, "this file")
    assert set(said) == {"perplexity of fallow auto"}


def test_precisions_of_ours(tiny_checkpoints: dict[str, Path], smollm2_gguf: Path) -> None:
    assert [v.precision for v in our_variants(tiny_checkpoints["llama"])] == ["auto", "q8", "q4"]
    assert [v.precision for v in our_variants(smollm2_gguf)] == ["auto", "q8"]
    with pytest.raises(FallowError, match="'q3'"):
        our_variants(smollm2_gguf, ["q3"])
