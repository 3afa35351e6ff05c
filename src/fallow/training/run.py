"""A recipe carried out: text to shards, shards to steps, and the model's folder at the end."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from fallow.errors import FallowError
from fallow.files import locked_or_refused, write_json
from fallow.models.resting import obstacle_to_resting_neurons
from fallow.models.tensors import RawTensor
from fallow.terminal import Progress
from fallow.training.activity import Activity
from fallow.training.compiler import compiler, has_compiler
from fallow.training.corpus import open_corpus
from fallow.training.distil import open_distillation
from fallow.training.export import export_model
from fallow.training.journal import Journal
from fallow.training.loop import StepReport, Trainer
from fallow.training.lora import add_adapters, export_adapters
from fallow.training.model import new_decoder
from fallow.training.processes import Processes, joined
from fallow.training.recipe import Recipe, load_recipe
from fallow.training.start import digest_of_model, start_decoder, start_path
from fallow.training.validation import Validation

_RECIPE, _ACTIVITY = "recipe.json", "activity.json"


@dataclass(frozen=True)
class TrainResult:
    """``folder`` is the run's, ``model`` the exported one, None where a signal (``stopped``) ended the run early;
    ``activity`` is there where the recipe's report asks for it."""

    folder: Path
    step: int
    steps: int
    tokens: int
    seconds: float
    joules: float
    energy_source: str
    validation: Validation | None
    activity: Activity | None
    model: Path | None
    stopped: int | None


def train(
    recipe: Recipe | str | Path,
    *,
    overrides: Iterable[str] = (),
    out: str | Path | None = None,
    fresh: bool = False,
    on_step: Callable[[StepReport], None] = lambda report: None,
    on_note: Callable[[str], None] = lambda text: None,
    progress: Progress | None = None,
) -> TrainResult:
    """Train what ``recipe`` says (a ``Recipe``, or a TOML file with ``overrides`` such as ``train.tokens=1000`` laid
    over it) in the folder ``out`` (default: ``runs/<name>``).

    A run that is there already goes on from its last checkpoint; ``fresh`` begins again and throws it away. Under
    torchrun all processes call this and train together; the first one reports. Raises ``FallowError`` where the recipe,
    the text or the disk do not allow it, where the folder belongs to another recipe, where another run is in it, or
    where one of the processes fails.
    """
    with joined() as processes:
        recipe = recipe if isinstance(recipe, Recipe) else load_recipe(Path(recipe), overrides)
        folder = Path(out) if out is not None else Path("runs") / recipe.name
        if not processes.is_first:
            on_step, on_note, progress = (lambda report: None), (lambda text: None), None
        try:
            with processes.led(_opened(folder, recipe, fresh=fresh)):
                return _train(recipe, folder, processes, on_step=on_step, on_note=on_note, progress=progress)
        except OSError as error:
            raise FallowError(f"{folder} cannot be written ({error.strerror or error}): use another folder.") from error


def _train(
    recipe: Recipe,
    folder: Path,
    processes: Processes,
    *,
    on_step: Callable[[StepReport], None],
    on_note: Callable[[str], None],
    progress: Progress | None,
) -> TrainResult:
    processes.require_same("The recipe", recipe.model_dump_json())
    processes.require_shared(folder)
    if recipe.train.compile and not has_compiler():
        raise FallowError(
            f"train.compile takes a C++ compiler, and there is no {compiler()} here: install one, name it in the "
            "variable CXX, or set train.compile to false."
        )
    for section, its in (("lora", recipe.lora), ("distil", recipe.distil)):
        if its is not None and processes.count > 1:
            raise FallowError(f"A recipe with [{section}] trains in one process: start it without torchrun.")
    corpus = processes.in_turn(lambda: open_corpus(recipe, progress))
    processes.require_same("The text or its tokenizer", corpus.digest)
    start = start_path(recipe)
    decoder = new_decoder(recipe, corpus.tokenizer) if start is None else start_decoder(recipe, start)
    base, distillation = None, None
    if recipe.lora is not None and start is not None:
        add_adapters(decoder, recipe.lora, seed=recipe.train.seed)
        base = digest_of_model(start)
    if recipe.distil is not None and start is not None:
        distillation = open_distillation(recipe, recipe.distil, decoder, start, corpus.tokenizer)
        base = distillation.digest
        if distillation.stored.frozen:
            on_note(_untouched(distillation.stored.frozen))
    trainer = Trainer(
        recipe,
        decoder,
        corpus,
        folder,
        processes=processes,
        on_note=on_note,
        base=base,
        distillation=distillation,
    )
    if trainer.resume():
        on_note(f"Going on from step {trainer.state.step} of {trainer.steps}.")
    begin, curves = trainer.state.step, recipe.report.tensorboard
    with Journal(folder, step=begin, tensorboard=curves) if processes.is_first else nullcontext() as journal:

        def report(step: StepReport) -> None:
            if journal is not None:
                journal.write(step)
            on_step(step)

        validation = trainer.run(report)
    model = folder / "model"
    activity = None
    if trainer.stopped is None:
        activity = trainer.activity()
        weights = trainer.weights()

        def finish() -> None:
            if activity is not None:
                write_json(folder / _ACTIVITY, activity.to_json())
            if recipe.lora is not None:
                export_adapters(decoder, recipe.lora, str(recipe.model.start), folder / "adapter")
            if distillation is not None:
                distillation.export(weights, model)
                return
            plan = None
            if activity is not None and obstacle_to_resting_neurons(decoder.config) is None:
                plan = activity.plan
            export_model(decoder.config, weights, corpus.tokenizer, model, start=start, plan=plan)

        processes.on_first(finish)
    return TrainResult(
        folder=folder,
        step=trainer.state.step,
        steps=trainer.steps,
        tokens=trainer.state.tokens,
        seconds=trainer.state.seconds,
        joules=trainer.state.joules,
        energy_source=trainer.energy_source,
        validation=validation,
        activity=activity,
        model=model if trainer.stopped is None else None,
        stopped=trainer.stopped,
    )


def _untouched(tensors: Sequence[RawTensor]) -> str:
    types = ", ".join(sorted({tensor.type.name for tensor in tensors}))
    return f"{len(tensors)} tensors ({types}) stay as they are: as they are stored they cannot be trained."


@contextmanager
def _opened(folder: Path, recipe: Recipe, *, fresh: bool) -> Iterator[None]:
    """The folder is this run's alone while the block runs."""
    folder.mkdir(parents=True, exist_ok=True)
    with locked_or_refused(folder / ".lock", f"Another process trains in {folder}: wait for it, or use --out."):
        if fresh:
            for name in ("checkpoints", "tensorboard", "model", "adapter"):
                shutil.rmtree(folder / name, ignore_errors=True)
        _claim(folder, recipe)
        yield


def _claim(folder: Path, recipe: Recipe) -> None:
    """The folder is this recipe's; what is only looked at may change between two sessions of a run."""
    deciding = recipe.model_dump(mode="json", exclude={"report"})
    path = folder / _RECIPE
    if not (folder / "checkpoints").is_dir():
        write_json(path, deciding)
        return
    try:
        before = json.loads(path.read_bytes())
    except (OSError, ValueError):
        raise FallowError(
            f"{path} is missing or damaged, so what is in {folder} cannot be told: use --fresh, or another --out."
        ) from None
    changed = _first_change(before, deciding)
    if changed is not None:
        raise FallowError(
            f"{folder} holds a run with another {changed}: train into another folder with --out, or begin again with "
            "--fresh."
        )


def _first_change(before: object, now: object, name: str = "") -> str | None:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in {**before, **now}:
            found = _first_change(before.get(key), now.get(key), f"{name}.{key}" if name else str(key))
            if found is not None:
                return found
        return None
    return None if before == now else name
