"""Whole runs under torchrun: the curve of one process, checkpoints for any number of them, ends that all share."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fallow.data.windows import Batch
from fallow.models.checkpoint import open_checkpoint
from fallow.models.dequantize import dequantize
from fallow.training.processes import Processes
from fallow.training.recipe import load_recipe
from fallow.training.run import train

STEPS = 30
# Signals the process with a number (0: that which reports) when a step is reported.
SIGNALLED = """
import os, sys
from pathlib import Path
from fallow.training.run import train
recipe, out, step, rank, number = sys.argv[1:]
pids = Path(out + "-pids")
pids.mkdir(exist_ok=True)
(pids / os.environ.get("RANK", "0")).write_text(str(os.getpid()))
def on_step(report):
    if report.step == int(step):
        os.kill(int((pids / rank).read_text()), int(number))
result = train(recipe, out=out, on_step=on_step, on_note=print)
print(f"ended at {result.step} by {result.stopped}\\n", end="")  # in one piece, as others print too
"""
ADAMW = '{kind = "adamw", parameters = ["*"], lr = 0.003}'
GALORE = '{kind = "galore", parameters = ["layers.*_proj.weight"], rank = 8, lr = 0.003}'


def torchrun(processes: int, *program: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.run([*command, *map(str, program)], capture_output=True, text=True, check=False, timeout=900)


def signalled(tmp_path: Path, processes: int, recipe: Path, out: Path, *when: int) -> subprocess.CompletedProcess[str]:
    """``when``: the step, the process and the signal."""
    script = tmp_path / "signalled.py"
    script.write_text(SIGNALLED)
    return torchrun(processes, script, recipe, out, *map(str, when))


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    tensors = open_checkpoint(folder / "model").tensors
    return {name: torch.from_numpy(dequantize(tensor)) for name, tensor in tensors.items()}


def own_sentences(done: subprocess.CompletedProcess[str]) -> list[str]:
    """What the processes said, without torchrun's own report."""
    return [line for line in done.stderr.splitlines() if line.startswith("fallow: ")]


def test_two_processes_with_adamw_have_the_curve_and_the_weights_of_one(recipe_file: Path, tmp_path: Path):
    options = [
        f"optimizer=[{ADAMW}]",
        "model.value_embedding_layers=[1]",
        "model.residual_mixes=true",
        "train.ema=0.9",
        "train.micro_batch=3",
        "report.sample_every=10",
        "report.sample_prompt=the",
        "report.tensorboard=false",
    ]
    train(load_recipe(recipe_file, options), out=tmp_path / "one")
    sets = [word for option in options for word in ("--set", option)]
    done = torchrun(2, "-m", "fallow", "train", recipe_file, "--out", tmp_path / "two", "--json", *sets)
    assert done.returncode == 0, done.stderr
    one, two = ([json.loads(line) for line in (tmp_path / n / "steps.jsonl").open()] for n in ("one", "two"))
    said = [json.loads(line) for line in done.stdout.splitlines()]  # by one process
    assert said[:-1] == two
    assert said[-1]["final"]
    assert said[-1]["model"] == str(tmp_path / "two" / "model")
    for key, tolerance in (("loss", 1e-5), ("gradient_norm", 1e-3)):
        assert [step[key] for step in two] == pytest.approx([step[key] for step in one], rel=tolerance), key
    assert two[-1]["validation"]["loss"] == pytest.approx(one[-1]["validation"]["loss"], rel=1e-5)
    assert two[-1]["validation"]["tokens"] == one[-1]["validation"]["tokens"]
    assert len(one[-1]["sample"]) > len("the")
    for name, tensor in weights(tmp_path / "one").items():
        torch.testing.assert_close(weights(tmp_path / "two")[name], tensor, rtol=2e-2, atol=2e-3)


def test_a_signal_to_one_of_two_ends_both_and_one_process_goes_on_from_there(recipe_file: Path, tmp_path: Path):
    recipe_file.write_text(recipe_file.read_text().replace('"fp32"', '"bf16"'))
    whole = train(recipe_file, out=tmp_path / "whole")
    done = signalled(tmp_path, 2, recipe_file, tmp_path / "run", 7, 1, signal.SIGTERM)
    assert done.returncode == 0, done.stderr
    stopped = {line for line in done.stdout.splitlines() if line.startswith("ended")}
    assert len(stopped) == 1, "both after the same step"
    step = len(losses(tmp_path / "run"))
    assert 7 <= step <= 9
    assert stopped == {f"ended at {step} by {int(signal.SIGTERM)}"}
    notes: list[str] = []
    train(recipe_file, out=tmp_path / "run", on_note=notes.append)
    assert notes == [f"Going on from step {step} of {STEPS}."]
    assert losses(tmp_path / "run") == pytest.approx(losses(whole.folder), rel=1e-2)


@pytest.mark.slow
def test_a_checkpoint_goes_on_with_any_number_of_processes(recipe_file: Path, tmp_path: Path):
    whole = train(recipe_file, out=tmp_path / "whole")
    for step, processes in ((6, 1), (12, 2), (18, 4)):
        done = signalled(tmp_path, processes, recipe_file, tmp_path / "run", step, 0, signal.SIGTERM)
        assert f"ended at {step} by {int(signal.SIGTERM)}" in done.stdout, done.stderr
        files = list((tmp_path / "run" / "checkpoints" / f"step-{step:08d}").glob("*.distcp"))
        assert len(files) == processes
    done = torchrun(2, "-m", "fallow", "train", recipe_file, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "run") == pytest.approx(losses(whole.folder), rel=1e-2)
    assert open_checkpoint(tmp_path / "run" / "model").tensors.keys() == weights(whole.folder).keys()


@pytest.mark.slow
def test_a_process_that_is_killed_ends_all_with_one_sentence(recipe_file: Path, tmp_path: Path):
    script = tmp_path / "killed.py"
    script.write_text("import os, sys\nfrom fallow.cli import main\n" + KILLED_AT_A_STEP)
    done = torchrun(2, script, "train", recipe_file, "--out", tmp_path / "run")
    assert done.returncode == 1
    (sentence,) = own_sentences(done)
    assert "lost another one" in sentence
    done = torchrun(2, "-m", "fallow", "train", recipe_file, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert re.search(r"Going on from step 1[05] of 30\.", done.stderr)


# The second process kills itself in step 17: the checkpoint of step 10 was complete before that of step 15 was begun.
KILLED_AT_A_STEP = """
import signal
from fallow.training.step import Step
gradients, calls = Step.gradients, []
def killed(self, batch):
    calls.append(batch)
    if len(calls) == 17 and self.processes.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return gradients(self, batch)
Step.gradients = killed
main()
"""


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("train.batch=9", "train.batch is 9, which 2 processes cannot share evenly"),
        pytest.param("train.batches=9", "train.batches is not known", marks=pytest.mark.slow),
        pytest.param("data.train=/nowhere", "/nowhere", marks=pytest.mark.slow),
        pytest.param(f"optimizer=[{GALORE}, {ADAMW}]", "GaLore projects whole matrices", marks=pytest.mark.slow),
    ],
)
def test_what_cannot_be_trained_is_one_sentence_of_all(recipe_file: Path, tmp_path: Path, override: str, named: str):
    done = torchrun(2, "-m", "fallow", "train", recipe_file, "--out", tmp_path / "run", "--set", override)
    assert done.returncode == 1
    (sentence,) = own_sentences(done)
    assert named in sentence


@pytest.mark.slow
def test_two_hosts_train_together(recipe_file: Path, tmp_path: Path):
    """As docs/train.md says, each host an agent of its own; here both are this machine."""
    whole = train(recipe_file, out=tmp_path / "whole")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}", "--rdzv-id", "fields"]
    command += ["-m", "fallow", "train", str(recipe_file), "--out", str(tmp_path / "run")]
    agents = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = [agent.communicate(timeout=900)[1] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], errors
    assert losses(tmp_path / "run") == pytest.approx(losses(whole.folder), rel=1e-2)


# Each line that a process prints begins with its number.
TOLD = """
import resource, signal, sys
from contextlib import contextmanager
from pathlib import Path
import torch
from fallow.errors import FallowError
from fallow.training.checkpoints import Checkpoints
from fallow.training.processes import joined
folder = Path(sys.argv[1])
def said(call):
    try:
        return call()
    except FallowError as error:
        return str(error)
def fails():
    raise FallowError("It cannot be.")
def enters(block):
    with processes.led(block):
        return "entered"
@contextmanager
def closed():
    fails()
    yield
with joined() as processes:
    def say(what):
        print(f"{processes.rank} {what}\\n", end="", flush=True)
    say(said(lambda: processes.on_first(fails)))
    say(said(lambda: processes.in_turn(fails)))
    say(said(lambda: enters(closed())))
    say(processes.in_turn(lambda: (folder / "made").exists() or (folder / "made").touch()))
    say(processes.total(processes.rank + 1))
    say(said(lambda: processes.require_same("The text", "same")))
    say(said(lambda: processes.require_same("The text", str(processes.rank))))
    own = folder / str(processes.rank)
    own.mkdir()
    say(said(lambda: processes.require_shared(folder)))
    say(said(lambda: processes.require_shared(own)))
    checkpoints = Checkpoints(folder / "checkpoints", 2, processes)
    checkpoints.save(1, {"w": torch.ones(8)}, {})
    checkpoints.wait()
    if processes.rank == 1:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    checkpoints.save(2, {str(processes.rank): torch.ones(1 << 20)}, {})
    say(said(checkpoints.wait))
    say([checkpoints.latest().step, *checkpoints.steps()])
"""


@pytest.mark.slow
def test_what_one_process_cannot_do_all_are_told(tmp_path: Path):
    script = tmp_path / "told.py"
    script.write_text(TOLD)
    done = torchrun(2, script, tmp_path)
    assert done.returncode == 0, done.stderr
    first, second = ([line[2:] for line in done.stdout.splitlines() if line[0] == rank] for rank in "01")
    assert first[:3] == second[:3] == ["It cannot be."] * 3
    assert (first[3], second[3]) == ("None", "True"), "the second finds what the first made"
    assert first[4:6] == second[4:6] == ["3", "None"]
    assert (first[6], first[9:]) == (second[6], second[9:])
    assert first[6].startswith("The text of process 1 (on ")
    assert (first[7], second[7]) == ("None", "None")
    assert second[8].startswith(f"{tmp_path / '1'} of process 1 (on ")
    assert first[9].startswith(f"A checkpoint cannot be written to {tmp_path / 'checkpoints'}: File too large")
    assert first[10] == "[1, 1]"


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("masked", [False, True])
def test_shares_have_one_size_and_count_every_target_once(count: int, masked: bool):
    def read(first: int, number: int) -> Batch:
        rows = np.arange(first, first + number)[:, None].repeat(4, axis=1)
        assert first >= 5
        assert first + number <= 5 + 7
        return Batch(rows, rows, scored=rows % 2 == 0 if masked else None)

    parts = [Processes(rank=rank, count=count).share(read, 5, 7) for rank in range(count)]
    assert {len(part.inputs) for part in parts} == {-(-7 // count)}
    targets = np.concatenate([part.counted_targets() for part in parts])
    found = sorted(targets[targets >= 0].tolist())
    assert found == [row for row in range(5, 12) if not masked or row % 2 == 0 for _ in range(4)]
