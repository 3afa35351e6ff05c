"""The baseline of ``tuning_memory.py``: HF ``Trainer`` as its documentation has it, in the Python of its environment.

usage: python tuning_baseline.py JOB.json. What the run was goes to the path that the job calls ``result``.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments


class Windows(Dataset[dict[str, Tensor]]):
    """int32 ``[sequences, 2, context]`` in a ``.npy`` file: inputs, and the targets that follow them."""

    def __init__(self, path: str) -> None:
        self._pairs = np.load(path, mmap_mode="r")

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        inputs, targets = torch.from_numpy(self._pairs[index].astype(np.int64))
        # With shift_labels the loss takes them as they are, so that the last position counts too.
        return {"input_ids": inputs, "labels": targets, "shift_labels": targets}


def main() -> None:
    job: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(job["threads"])
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    arguments = TrainingArguments(
        output_dir=job["out"],
        use_cpu=True,
        max_steps=job["steps"],
        per_device_train_batch_size=1,
        train_sampling_strategy="sequential",  # both sides see the windows in one order
        learning_rate=job["lr"],
        lr_scheduler_type="linear",
        warmup_steps=round(job["warmup_share"] * job["steps"]),
        bf16=True,
        activation_checkpointing=job["activation_checkpointing"],
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=Windows(job["windows"]))
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    trainer.save_model(job["out"])
    Path(job["result"]).write_text(json.dumps({"losses": losses, "seconds": seconds, "optimizer": arguments.optim}))


if __name__ == "__main__":
    main()
