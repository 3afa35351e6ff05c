"""HF ``Trainer`` as a worker, in the environment of the baseline: set up as its documentation has it.

What it trains on are windows that the benchmark has written: inputs and targets, every position of which counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from fallow.bench.training.clock import StepClock
from fallow.bench.worker import Say, do_job


class Windows(Dataset[dict[str, Tensor]]):
    """int32 ``[2, sequences, context]`` in a ``.npy`` file: inputs, and the targets that follow them."""

    def __init__(self, path: str) -> None:
        self._pairs = np.load(path, mmap_mode="r")

    def __len__(self) -> int:
        return int(self._pairs.shape[1])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        inputs, targets = torch.from_numpy(self._pairs[:, index].astype(np.int64))
        # With shift_labels the loss takes them as they are, so that the last position counts too.
        return {"input_ids": inputs, "labels": targets, "shift_labels": targets}


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for the matrices of layers and AdamW for the rest as one optimizer, which is what a ``Trainer`` takes."""

    def __init__(self, muon: torch.optim.Muon, adamw: torch.optim.AdamW) -> None:
        self.parts: tuple[torch.optim.Optimizer, ...] = (muon, adamw)
        super().__init__([group for part in self.parts for group in part.param_groups], {})

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        groups = iter(self.param_groups)
        for part in self.parts:
            # Loading a state, as accelerate does at the start, replaces the groups.
            part.param_groups = [next(groups) for _ in part.param_groups]
            part.step()


class BaselineTrainer(Trainer):
    """Keeps the loss of each step, and makes Muon where it is asked for."""

    def __init__(self, *arguments: Any, settings: dict[str, Any], **options: Any) -> None:
        self.settings = settings
        self.last_loss = math.nan
        super().__init__(*arguments, **options)

    def training_step(self, *arguments: Any, **options: Any) -> Tensor:
        loss: Tensor = super().training_step(*arguments, **options)
        self.last_loss = float(loss)
        return loss

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        if self.settings["optimizer"] == "adamw":
            made: torch.optim.Optimizer = super().create_optimizer(model)
            return made
        settings = self.settings
        assert self.model is not None
        matrices: list[Tensor] = []
        tables: list[Tensor] = []
        vectors: list[Tensor] = []
        for name, parameter in self.model.named_parameters():
            inside = name.startswith("model.layers.")
            (vectors if parameter.ndim < 2 else matrices if inside else tables).append(parameter)
        decay = settings["weight_decay"]
        muon = torch.optim.Muon(
            matrices,
            lr=settings["muon_lr"],
            momentum=settings["muon_momentum"],
            weight_decay=decay,
            adjust_lr_fn="match_rms_adamw",
        )
        adamw = torch.optim.AdamW(
            [{"params": tables, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}],
            lr=settings["lr"],
            betas=(settings["beta1"], settings["beta2"]),
            fused=True,
        )
        self.optimizer = MuonWithAdamW(muon, adamw)
        return self.optimizer


class _Clocked(TrainerCallback):
    def __init__(self, clock: StepClock, trainer: BaselineTrainer) -> None:
        self._clock, self._trainer = clock, trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._clock.begin()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._clock.step_ended(state.max_steps, self._trainer.last_loss)
        if not math.isfinite(self._trainer.last_loss):
            control.should_training_stop = True


def run(job: dict[str, Any], say: Say) -> dict[str, Any]:
    """``job``: ``config`` (a model's ``config.json``), ``settings`` of the baseline, ``train`` and ``valid`` (files of
    windows), ``steps``, ``seed``, ``threads``, and ``folder`` for what the trainer may write; ``weights`` (a file of
    safetensors) in place of random ones where it is given."""
    torch.set_num_threads(job["threads"])
    settings = job["settings"]
    set_seed(job["seed"])
    kind = job["config"].pop("model_type")
    config = AutoConfig.for_model(kind, **job["config"])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
    if job.get("weights"):
        from safetensors.torch import load_model  # noqa: PLC0415  for the tests only

        load_model(model, job["weights"])
    steps = job["steps"]
    arguments = TrainingArguments(
        output_dir=job["folder"],
        use_cpu=not torch.cuda.is_available(),
        max_steps=steps,
        per_device_train_batch_size=settings["batch"],
        per_device_eval_batch_size=8,
        train_sampling_strategy="sequential",  # the windows lie in the order of the seed
        optim="adamw_torch_fused",
        learning_rate=settings["lr"],
        adam_beta1=settings["beta1"],
        adam_beta2=settings["beta2"],
        weight_decay=settings["weight_decay"],
        max_grad_norm=1.0,
        lr_scheduler_type="linear",
        warmup_steps=round(settings["warmup_share"] * steps),
        bf16=settings["precision"] == "bf16",
        torch_compile=settings["compile"],
        seed=job["seed"],
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
    )
    trainer = BaselineTrainer(
        model, arguments, train_dataset=Windows(job["train"]), eval_dataset=Windows(job["valid"]), settings=settings
    )
    clock = StepClock(say)
    trainer.add_callback(_Clocked(clock, trainer))
    trainer.train()
    if not math.isfinite(trainer.last_loss):
        return {"diverged": f"At step {trainer.state.global_step} the loss is {trainer.last_loss}."}
    pairs = np.load(job["valid"], mmap_mode="r")
    return {
        **clock.used(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "tokens": steps * settings["batch"] * int(pairs.shape[2]),
        "loss": trainer.evaluate()["eval_loss"],
        "validation_tokens": int(pairs.shape[1] * pairs.shape[2]),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


if __name__ == "__main__":
    do_job(run)
