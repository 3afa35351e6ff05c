"""Our trainer as a worker: the recipe of the first line is trained from its beginning to its end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fallow.bench.training.clock import StepClock
from fallow.bench.worker import Say, do_job
from fallow.errors import FallowError
from fallow.training.loop import StepReport
from fallow.training.recipe import Recipe
from fallow.training.run import train
from fallow.training.watch import DivergedError


def run(job: dict[str, Any], say: Say) -> dict[str, Any]:
    """``job``: ``recipe``, ``folder`` (a new one, which it may fill) and ``threads``."""
    torch.set_num_threads(job["threads"])
    recipe = Recipe.model_validate(job["recipe"], strict=False)
    clock = StepClock(say)

    def on_step(report: StepReport) -> None:
        clock.step_ended(report.steps, report.loss, first_seconds=report.seconds)

    try:
        result = train(recipe, out=Path(job["folder"]), on_step=on_step)
    except DivergedError as error:
        return {"diverged": str(error)}
    if result.validation is None:
        raise FallowError(f"The training was stopped by signal {result.stopped}.")
    return {
        **clock.used(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "tokens": result.tokens,
        "loss": result.validation.loss,
        "validation_tokens": result.validation.tokens,
    }


if __name__ == "__main__":
    do_job(run)
