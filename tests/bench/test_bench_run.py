"""The whole benchmark on a tiny model: ours, a peer that is there, peers that are not, and a trace."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from fallow.bench.result import BenchResult
from fallow.bench.run import run_bench
from fallow.bench.trace import TraceOptions
from fallow.errors import FallowError

MISSING = "/nowhere/bin/python"


@pytest.fixture(autouse=True)
def peers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers is the tests' own; no other peer is there."""
    monkeypatch.setenv("FALLOW_PEERS_HOME", str(tmp_path / "peers"))
    monkeypatch.setenv("FALLOW_PEER_PYTHON_TRANSFORMERS", sys.executable)
    for name in ("LLAMA_CPP", "OPENVINO", "VLLM"):
        monkeypatch.setenv(f"FALLOW_PEER_PYTHON_{name}", MISSING)


def runs_of(result: BenchResult) -> list[tuple[str, str, str, int | None]]:
    return [(run.engine, run.precision, run.load, run.batch) for run in result.runs]


def test_ours_alone_and_peers_that_are_not_there(tiny_checkpoints: dict[str, Path]) -> None:
    said: list[str] = []
    result = run_bench(
        tiny_checkpoints["llama"],
        peers=["openvino", "llama.cpp"],
        precisions=["auto"],
        loads="quick",
        repetitions=1,
        threads=1,
        price=3.6,
        progress=lambda what, done, total: said.append(what),
    )
    assert runs_of(result) == [("fallow", "auto", "decode", 1), ("fallow", "auto", "decode", 8)]  # 512 do not fit
    assert [skipped.peer for skipped in result.skipped] == ["llama.cpp", "openvino"]
    assert all(MISSING in skipped.reason for skipped in result.skipped)
    first, second = result.runs
    assert first.peak_memory_bytes is not None
    assert second.peak_memory_bytes is None
    assert first.usd_per_million_output_tokens == pytest.approx(1000 / first.tokens_per_s)
    assert result.quality == []
    assert "decode ×8: fallow auto" in said
    json.dumps(result.to_json(), allow_nan=False)


@pytest.mark.slow
def test_transformers_is_measured_beside_us_and_agrees_on_the_perplexity(tiny_checkpoints: dict[str, Path]) -> None:
    result = run_bench(
        tiny_checkpoints["qwen3"],
        peers=["transformers", "vllm"],
        precisions=["auto"],
        loads="quick",
        repetitions=1,
        threads=1,
        quality_tokens=900,
    )
    assert {(run.engine, run.precision) for run in result.runs} == {
        ("fallow", "auto"),
        ("transformers", "fp32"),
        ("transformers", "bf16"),
    }
    assert [skipped.peer for skipped in result.skipped] == ["vllm"]
    assert [ratio.batch for ratio in result.ratios] == [1, 8]
    ours, reference = result.quality
    assert (ours.engine, reference.engine, reference.precision) == ("fallow", "transformers", "fp32")
    assert ours.tokens == reference.tokens
    assert ours.perplexity == pytest.approx(reference.perplexity, rel=0.02)


@pytest.mark.slow
def test_a_trace_is_replayed_against_our_server(tiny_checkpoints: dict[str, Path], tmp_path: Path) -> None:
    lines = [f"2023-11-16 18:15:{second:02d}.5000000,{20 + second},{5 + second}" for second in range(20)]
    file = tmp_path / "trace.csv"
    file.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "\n".join(lines) + "\n")
    options = TraceOptions(
        file, ttft_objective=60, tpot_objective=60, replay_seconds=2, max_seconds=0.1, first_rate=4, max_generated=16
    )
    result = run_bench(
        tiny_checkpoints["llama"],
        peers=["transformers"],
        precisions=["auto"],
        loads="none",
        threads=1,
        quality_tokens=0,
        trace=options,
    )
    (run,) = result.runs
    assert (run.engine, run.load, run.batch) == ("fallow", "trace", None)
    assert run.tokens_per_s > 0
    assert run.joules_per_token is not None
    assert run.details["best"]["failed"] == 0
    assert run.details["best"]["tokens"] == sum(min(5 + second, 16) for second in range(8))
    assert "without a server" in result.skipped[0].reason
    json.dumps(result.to_json(), allow_nan=False)


def test_arguments_without_meaning_are_refused(tiny_checkpoints: dict[str, Path]) -> None:
    model = tiny_checkpoints["llama"]
    with pytest.raises(FallowError, match="no peer named"):
        run_bench(model, peers=["nobody"])
    with pytest.raises(FallowError, match="no loads named"):
        run_bench(model, loads="everything")
    with pytest.raises(FallowError, match="repetitions"):
        run_bench(model, repetitions=0)
    with pytest.raises(FallowError, match="price"):
        run_bench(model, price=-1)
