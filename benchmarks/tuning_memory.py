"""The memory that tuning all weights of SmolLM2-135M takes at 2,048 tokens a step: recipes/tune-lean.toml, its parts
taken away one by one, and HF ``Trainer`` with AdamW; and the losses, over the same windows in the same order.

    python benchmarks/tuning_memory.py             run what benchmarks/tuning_memory.jsonl does not have
    python benchmarks/tuning_memory.py --table     the table of what it has

Each run is a process of its own. Its peak is the largest resident set that the kernel has seen of it (``ru_maxrss``),
from its start to its written model; both sides find the text tokenized. Weights are float32, products bfloat16. Runs of
100 steps are scored on the same windows of other books; the others are there for their peak alone.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trials import finished

from fallow.bench.environment import peer_python
from fallow.bench.peers.transformers import Transformers
from fallow.files import append_json_line
from fallow.terminal import note, print_table

HERE = Path(__file__).parent
RESULTS = HERE / "tuning_memory.jsonl"
STEPS, STEPS_FOR_MEMORY = 100, 3
WARMUP_SHARE = 0.1  # as in the recipe
BASELINE_LR = 5e-5  # of TrainingArguments
BASELINE = "HF Trainer, AdamW"
ADAMW = """optimizer=[{kind = "adamw", parameters = ["*"], lr = 5e-5, betas = [0.9, 0.999]}]"""


@dataclass(frozen=True)
class Run:
    """``overrides`` of the recipe, or None for the baseline."""

    name: str
    steps: int
    overrides: tuple[str, ...] | None = ()
    activation_checkpointing: bool = False


RUNS = (
    Run(BASELINE, STEPS, None),
    Run("HF Trainer, AdamW, activation checkpointing", STEPS_FOR_MEMORY, None, activation_checkpointing=True),
    Run("fallow, tune-lean", STEPS),
    Run("fallow, tune-lean with AdamW", STEPS_FOR_MEMORY, (ADAMW,)),
    Run("fallow, that without fused updates", STEPS_FOR_MEMORY, (ADAMW, "train.fused_update=false")),
    Run(
        "fallow, that without activation checkpointing",
        STEPS_FOR_MEMORY,
        (ADAMW, "train.fused_update=false", "train.checkpoint_activations=false"),
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="the folder of the books")
    parser.add_argument("--work", type=Path, default=Path("runs/tuning-memory"), help="where the runs are")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--only", metavar="NAME", help="run what is called so")
    parser.add_argument("--table", action="store_true", help="run nothing, print the table of what there is")
    options = parser.parse_args()
    if not options.table:
        _run_missing(options)
    _print_table()


def _run_missing(options: argparse.Namespace) -> None:
    work: Path = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    text = {name: str((options.data / f"books-{name}.jsonl.gz").resolve()) for name in ("train", "valid")}
    missing = [run for run in RUNS if run.name not in finished(RESULTS) and options.only in (None, run.name)]
    if missing and not (work / "start").is_dir():
        _ours("prepare", {**text, "work": str(work), "steps": STEPS}, options.threads)
    for run in missing:
        note(f"{run.name}: {run.steps} steps")
        folder = work / run.name.replace(" ", "-").replace(",", "")
        if run.overrides is None:
            peak, facts = _baseline(run, folder, work, options.threads)
        else:
            job = {**text, "out": str(folder), "overrides": run.overrides, "steps": run.steps}
            peak, facts = _ours("tune", job, options.threads)
        line = {"trial": run.name, "steps": run.steps, "threads": options.threads, "peak_memory_bytes": peak, **facts}
        if run.steps == STEPS:
            model = folder if run.overrides is None else folder / "model"
            line |= _ours("score", {**text, "model": str(model)}, options.threads)[1]
        append_json_line(RESULTS, line)


def _baseline(run: Run, folder: Path, work: Path, threads: int) -> tuple[int, dict[str, Any]]:
    python = peer_python(Transformers.name, Transformers.requirements)
    folder.mkdir(exist_ok=True)
    job = {
        "model": str(work / "start"),
        "windows": str(work / "windows.npy"),
        "out": str(folder),
        "result": str(folder / "result.json"),
        "steps": run.steps,
        "lr": BASELINE_LR,
        "warmup_share": WARMUP_SHARE,
        "activation_checkpointing": run.activation_checkpointing,
        "threads": threads,
    }
    (folder / "job.json").write_text(json.dumps(job))
    peak = _peak_of([str(python), str(HERE / "tuning_baseline.py"), str(folder / "job.json")], threads)
    return peak, json.loads((folder / "result.json").read_text())


def _ours(part: str, arguments: dict[str, Any], threads: int) -> tuple[int, dict[str, Any]]:
    """A part of ``tuning_parts.py`` in a process of its own: its peak and what it found."""
    job = RESULTS.with_suffix(f".{part}.partial")
    job.write_text(json.dumps(arguments))
    peak = _peak_of([sys.executable, str(HERE / "tuning_parts.py"), part, str(job)], threads)
    found: dict[str, Any] = json.loads(job.read_text())
    job.unlink()
    return peak, found


def _peak_of(command: list[str], threads: int) -> int:
    """The largest resident set of a process, in bytes; its output goes to stderr."""
    process = subprocess.Popen(command, stdout=sys.stderr, env={**os.environ, "OMP_NUM_THREADS": str(threads)})
    _, status, usage = os.wait4(process.pid, 0)
    if os.waitstatus_to_exitcode(status):
        raise SystemExit(f"{command[:3]} failed.")
    return usage.ru_maxrss * 1024


def _print_table() -> None:
    runs = finished(RESULTS)
    baseline = runs.get(BASELINE)
    rows = []
    for run in runs.values():
        share = f"{run['peak_memory_bytes'] / baseline['peak_memory_bytes']:.2f}" if baseline else ""
        scored = run.get("valid_loss")
        behind = f"{scored / baseline['valid_loss'] - 1:+.2%}" if baseline and scored else ""
        last = f"{sum(run['losses'][-20:]) / 20:.4f}" if scored else ""
        loss = f"{scored:.4f}" if scored else ""
        seconds = f"{run['seconds'] / run['steps']:.1f}"
        rows.append([run["trial"], f"{run['peak_memory_bytes'] / 1e6:,.0f}", share, loss, behind, last, seconds])
    names = ("peak MB", "of HF's", "loss, other books", "to HF", "loss, last 20 steps", "s a step")
    print_table({"run": "left", **dict.fromkeys(names, "right")}, rows)


if __name__ == "__main__":
    main()
