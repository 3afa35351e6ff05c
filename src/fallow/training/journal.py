"""What a run leaves for people and machines: one JSON line a step, and TensorBoard's curves."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType

from torch.utils.tensorboard import SummaryWriter

from fallow.training.loop import StepReport


class Journal:
    """``steps.jsonl`` and ``tensorboard/`` in the folder of a run. Lines beyond ``step``, which a run that was killed
    had written after its last checkpoint, are taken back when it goes on."""

    def __init__(self, folder: Path, *, step: int, tensorboard: bool) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "steps.jsonl"
        kept = _lines_up_to(path, step)
        self._file = path.open("w", encoding="utf-8")
        self._file.writelines(kept)
        self._curves = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1) if tensorboard else None

    def write(self, report: StepReport) -> None:
        self._file.write(json.dumps(report.to_json()) + "\n")
        self._file.flush()
        if self._curves is None:
            return
        for name in ("loss", "bits_per_byte", "gradient_norm", "lr", "tokens_per_s", "mfu", "joules"):
            self._curves.add_scalar(f"train/{name}", getattr(report, name), report.step)
        if report.validation is not None:
            self._curves.add_scalar("validation/loss", report.validation.loss, report.step)
            self._curves.add_scalar("validation/bits_per_byte", report.validation.bits_per_byte, report.step)
        if report.activity is not None:
            self._curves.add_scalar("activity/resting", report.activity.resting, report.step)
            for index, layer in enumerate(report.activity.layers):
                for name in ("mean", "p99", "union_8", "union_32", "dead"):
                    count = getattr(layer, name)
                    if count is not None:
                        self._curves.add_scalar(f"activity_{name}/layer_{index}", count / layer.neurons, report.step)
        if report.sample is not None:
            self._curves.add_text("sample", report.sample, report.step)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()
        if self._curves is not None:
            self._curves.close()


def _lines_up_to(path: Path, step: int) -> list[str]:
    """Whole lines of steps up to ``step``; the last line of a killed run may be cut short."""
    if not path.is_file():
        return []
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            number = json.loads(line)["step"]
        except (ValueError, KeyError, TypeError):
            break
        if not isinstance(number, int) or number > step:
            break
        kept.append(line)
    return kept
