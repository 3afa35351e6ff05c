"""One training of one side, from a fresh worker to a record."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fallow.bench.environment import Requirements, peer_python
from fallow.bench.training.process import do_job
from fallow.bench.training.records import Record
from fallow.bench.training.sides import Side, check_close
from fallow.bench.training.windows import evaluated_windows, write_train, write_valid
from fallow.data.windows import bits_per_byte
from fallow.errors import FallowError
from fallow.meter.machine import commit, machine
from fallow.models.hf_document import hf_document
from fallow.terminal import Progress
from fallow.training.corpus import Corpus, open_corpus
from fallow.training.model import config_of

REQUIREMENTS = Requirements(("torch==2.13.0", "transformers==5.23.0", "accelerate==1.15.0"))
_PEER = "trainer"


def corpus_digest(corpus: Corpus) -> str:
    """Of the texts and the tokenizer, wherever they lie."""
    parts = [corpus.train.shards.index.fingerprint, corpus.valid.shards.index.fingerprint]
    parts.append(corpus.train.shards.index.tokenizer)
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


@dataclass
class Runner:
    """Trains sides of one recipe. ``parameters`` are those of our model; ``jobs`` trainings run at a time, of
    ``threads`` each. On a GPU where a trainer's PyTorch sees one."""

    corpus: Corpus
    parameters: int
    threads: int
    jobs: int = 1
    progress: Progress | None = None

    def __post_init__(self) -> None:
        self._python: Path | None = None
        self._digest = corpus_digest(self.corpus)

    def identity(self, side: Side) -> Record:
        """What a record is found by: see ``records.IDENTITY``."""
        return {
            "side": side.name,
            "config": side.config,
            "seed": side.recipe.train.seed,
            "tokens": side.tokens,
            "corpus": self._digest,
        }

    def run(self, side: Side, label: str) -> Record:
        """Train ``side`` to the end of its schedule and evaluate it.

        Loss in nats a token; None with the reason in ``diverged`` where it was lost. ``quiet`` says that this process
        had its normal priority and ran one training at a time: only then are seconds and joules worth reading. Joules
        are None on an ``accelerator``, which the meter does not see. Raises ``FallowError``.
        """
        corpus = open_corpus(side.recipe)  # in the order of its seed
        count = evaluated_windows(side.recipe, corpus.valid)
        started = time.time()
        with tempfile.TemporaryDirectory(prefix="fallow-bench-") as name:
            train = self._ours if side.baseline is None else self._theirs
            said, text_bytes = train(side, corpus, count, Path(name), label)
        record = {
            **self.identity(side),
            "diverged": said.get("diverged"),
            "loss": None,
            "bits_per_byte": None,
            **_performance(said),
            "threads": self.threads,
            "quiet": self.jobs == 1 and os.getpriority(os.PRIO_PROCESS, 0) <= 0,
            "machine": machine(),
            "commit": commit(),
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
        }
        if record["diverged"] is None:
            expected = count * corpus.valid.context
            if said["validation_tokens"] != expected:
                raise FallowError(
                    f"{side.name} was evaluated on {said['validation_tokens']} tokens, not on {expected}."
                )
            nll = said["loss"] * said["validation_tokens"]
            record |= {"loss": said["loss"], "bits_per_byte": bits_per_byte(nll, text_bytes)}
        return record

    def python(self) -> Path:
        """The baseline's interpreter; its environment is made the first time."""
        self._python = self._python or peer_python(_PEER, REQUIREMENTS, self.progress)
        return self._python

    def _ours(self, side: Side, corpus: Corpus, count: int, folder: Path, label: str) -> tuple[dict[str, Any], int]:
        unseen = {
            "evaluate_every": 0,
            "sample_every": 0,
            "checkpoint_every": 0,
            "activity_tokens": 0,
            "tensorboard": False,
        }
        recipe = side.recipe.model_copy(update={"report": side.recipe.report.model_copy(update=unseen)})
        job = {
            "recipe": recipe.model_dump(mode="json"),
            "folder": str(folder / "run"),
            "threads": self.threads,
        }
        said = do_job("our_trainer", job, python=None, log=folder / "log", on_progress=self._told(label))
        scored = corpus.valid.in_order(0, count).counted_targets()
        return said, corpus.valid.bytes_of(scored)

    def _theirs(self, side: Side, corpus: Corpus, count: int, folder: Path, label: str) -> tuple[dict[str, Any], int]:
        settings = side.baseline
        assert settings is not None
        steps = -(-settings.tokens // (corpus.train.context * settings.batch))
        write_train(folder / "train.npy", corpus.train, steps * settings.batch)
        text_bytes = write_valid(folder / "valid.npy", corpus.valid, count)
        config = hf_document(config_of(side.recipe.model, corpus.tokenizer, corpus.train.context))
        job = {
            "config": {key: value for key, value in config.items() if key not in ("architectures", "dtype")},
            "settings": settings.model_dump(mode="json"),
            "train": str(folder / "train.npy"),
            "valid": str(folder / "valid.npy"),
            "steps": steps,
            "seed": side.recipe.train.seed,
            "threads": self.threads,
            "folder": str(folder / "run"),
        }
        said = do_job("hf_trainer", job, python=self.python(), log=folder / "log", on_progress=self._told(label))
        if "parameters" in said:
            check_close("parameters", self.parameters, said["parameters"], side.name)
        return said, text_bytes

    def _told(self, label: str) -> Callable[[int, int], None]:
        def tell(done: int, total: int) -> None:
            if self.progress is not None:
                self.progress(label, done, total)

        return tell


def _performance(said: dict[str, Any]) -> dict[str, Any]:
    if "diverged" in said:
        return {}
    names = ("steps", "seconds", "compile_seconds", "joules", "energy_source", "peak_memory_bytes", "accelerator")
    rate = said["tokens"] / said["seconds"]
    found = {"trained_tokens": said["tokens"], "tokens_per_s": rate, **{name: said[name] for name in names}}
    return found if said["accelerator"] is None else found | {"joules": None, "energy_source": None}
