"""Our side of ``tuning_memory.py``, each part in a process of its own.

usage: python tuning_parts.py PART JOB.json. What the part found takes the place of the job.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fallow.models.checkpoint import open_checkpoint
from fallow.models.decoder_weights import load_decoder
from fallow.training.corpus import open_corpus
from fallow.training.export import export_model
from fallow.training.loop import StepReport
from fallow.training.recipe import Recipe, load_recipe
from fallow.training.run import train as run
from fallow.training.start import start_decoder, start_path
from fallow.training.validation import validate

RECIPE = Path(__file__).parents[1] / "recipes" / "tune-lean.toml"
SCORED_TOKENS = 32_768


def prepare(train: str, valid: str, work: str, steps: int) -> dict[str, Any]:
    """The tokenized books, the windows of all steps, and the model as a float32 folder for the baseline."""
    recipe = _recipe(train, valid)
    assert recipe.train.batch == 1, "the baseline has one window a step"
    corpus = open_corpus(recipe)
    batch = corpus.train.batch(0, steps)
    np.save(Path(work) / "windows.npy", np.stack((batch.inputs, batch.targets), 1).astype(np.int32))
    path = start_path(recipe)
    assert path is not None
    decoder = start_decoder(recipe, path)
    parameters = dict(decoder.named_parameters())
    export_model(decoder.config, parameters, corpus.tokenizer, Path(work) / "start", dtype=torch.float32)
    return {}


def tune(train: str, valid: str, out: str, overrides: list[str], steps: int) -> dict[str, Any]:
    recipe = _recipe(train, valid, *overrides)
    recipe = recipe.model_copy(
        update={"train": recipe.train.model_copy(update={"tokens": steps * recipe.data.context})}
    )
    reports: list[StepReport] = []
    result = run(recipe, out=out, on_step=reports.append)
    return {"losses": [report.loss for report in reports], "seconds": result.seconds}


def score(train: str, valid: str, model: str) -> dict[str, Any]:
    """The loss of a tuned model (nats a token) on windows of books that neither side has seen."""
    recipe = _recipe(train, valid)
    decoder = load_decoder(open_checkpoint(model), compute=torch.bfloat16, context=recipe.data.context)
    found = validate(decoder, open_corpus(recipe).valid, tokens=SCORED_TOKENS, batch=1)
    return {"valid_loss": found.loss, "valid_tokens": found.tokens}


def _recipe(train: str, valid: str, *overrides: str) -> Recipe:
    return load_recipe(RECIPE, [f"data.train={train}", f"data.valid={valid}", *overrides])


if __name__ == "__main__":
    part, job = {"prepare": prepare, "tune": tune, "score": score}[sys.argv[1]], Path(sys.argv[2])
    job.write_text(json.dumps(part(**json.loads(job.read_text()))))
