"""From a model to a folder with a plan: calibrate, solve, verify, measure."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fallow.engine.engine import Engine
from fallow.engine.runner import ModelRunner, Precision
from fallow.errors import FallowError
from fallow.files import replacing_folder
from fallow.models.checkpoint import open_checkpoint
from fallow.models.decoder import Decoder
from fallow.models.decoder_weights import load_decoder
from fallow.models.head_screen import SCREEN_FILE
from fallow.models.info import describe
from fallow.models.rewrite import copy_model
from fallow.models.rope import longest_context
from fallow.models.store import resolve
from fallow.models.tensors import Checkpoint
from fallow.models.tokenizer import load_tokenizer
from fallow.plan import FILE_NAME, SparsityPlan
from fallow.sparsification.choices import Load
from fallow.sparsification.floor import Floor
from fallow.sparsification.heal import ALLOWANCE, Healing
from fallow.sparsification.judge import Judge
from fallow.sparsification.kinds import Kinds
from fallow.sparsification.page_choices import PageChoices
from fallow.sparsification.picture import PICTURES, draw
from fallow.sparsification.removal_choices import can_be_removed
from fallow.sparsification.search import Menu, Point, Search, fastest
from fallow.sparsification.text import Windows, texts_of, windows_in, written_by, written_to_heal
from fallow.sparsification.vocabulary import OWN_TEXTS, fit_screen, head_rules, screens_head, spared_bytes
from fallow.sparsification.weight_choices import groups_in_parts
from fallow.terminal import Progress

_SMALLER_BUDGETS = (1.0, 0.5, 0.25)  # of the budget, where plans do not reach the floor of a task


@dataclass(frozen=True)
class SparsifyResult:
    """``found`` lies in ``folder`` beside the weights; ``measured`` is how many times faster than dense a step of
    decoding ``load`` is. ``frontier``: the plans that were measured on the way, from the most cautious on, with the
    weights that were healed by so many tokens as ``healed`` says; None: with those of the model. ``accuracy``: of the
    plan in the task that was given."""

    model: str
    folder: Path
    load: Load
    found: Point
    measured: float
    frontier: tuple[Point, ...]
    healed: int | None = None
    accuracy: float | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "folder": str(self.folder),
            "plan": self.found.plan.to_json(),
            "perplexity_ratio": self.found.perplexity_ratio,
            "speedup": {"predicted": self.found.speedup, "measured": self.measured},
            "frontier": [point.to_json() for point in self.frontier],
            "load": asdict(self.load),
            "healed_tokens": self.healed,
            "accuracy": self.accuracy,
        }


def sparsify(
    model: str | Path,
    *,
    out: str | Path,
    budget: float = 0.01,
    text: str | Path | None = None,
    batch: int = 1,
    context: int = 4096,
    heal: int | None = None,
    task: str | None = None,
    floor: float | None = None,
    limit: int | None = None,
    remove: bool = False,
    precision: Precision = "auto",
    threads: int | None = None,
    on_note: Callable[[str], None] = lambda text: None,
    progress: Progress = lambda what, done, total: None,
) -> SparsifyResult:
    """Find the plan that makes decoding ``batch`` sequences of ``context`` tokens fastest while perplexity on held-out
    text rises by no more than ``budget`` (0.01: one percent), and write the model with it to the folder ``out``.

    ``text`` is a file of text, or of documents (JSONL, Parquet); of the windows within these half price what may rest,
    the others verify. None: the model writes it. With ``heal`` the weights are tuned under a plan that costs more, by
    so many tokens, and what they bear then is searched; all is relative to the model as it was. The folder ``out`` with
    ``.healing`` after its name holds what it takes meanwhile, so that a killed call goes on. With ``task``, a task of
    lm-eval, its file, or ``needle``, a plan must also reach an accuracy of ``floor`` (0 to 1) in its first ``limit``
    questions, or documents at each depth; needles in other documents price pages too. With ``remove`` heads and neurons
    may be taken out for good. Raises ``FallowError``.
    """
    folder = Path(out)
    if folder.exists():
        raise FallowError(f"{folder} exists already: give another folder, or remove it.")
    if not 0 < budget < 1:
        raise FallowError(f"The budget is {budget}: give a share of perplexity between 0 and 1, such as 0.01 for 1%.")
    wanted = _floor(task, floor, limit, context)
    path = resolve(model)
    checkpoint = open_checkpoint(path)
    _check_context(checkpoint, context)
    load = Load(batch, context)
    screens = screens_head(checkpoint, load)
    # What training has brought to rest stays at rest.
    beside = SparsityPlan.beside(path) or SparsityPlan.dense()
    learnt = beside.rules("ffn") or beside.rules("input")
    kinds = Kinds(
        checkpoint,
        load,
        precision,
        threads,
        pages=None in checkpoint.config.layer_windows,
        in_parts=[] if learnt else groups_in_parts(checkpoint, precision, load),
        removed=can_be_removed(checkpoint.config) if remove and not learnt else (),
    )
    if not (kinds or screens):
        raise FallowError("Every layer of the model has a window of its own, and nothing else of it can rest.")
    source, own_texts = "text of its own", []
    if text is not None:
        source, windows = Path(text).name, windows_in(Path(text), load_tokenizer(path), context, progress)
    provenance = {
        "made_by": "fallow sparsify",
        "calibrated_on": source,
        "budget": f"{budget:.4g}",
        "load": f"batch {batch}, context {context}",
        "weights": _digest(checkpoint),
        **({"floor": f"{wanted.accuracy:.4g} of {Path(wanted.task).name}"} if wanted else {}),
        **({"removed": "heads and neurons may be"} if remove else {}),
    }
    healing = None if heal is None else Healing.beside(folder, path, heal, context, provenance)
    judge = Judge(checkpoint, checkpoint, None, (), load, precision, threads, progress)
    if wanted is not None:
        _check_floor(judge, wanted, on_note)
    questions = wanted.questions(load_tokenizer(path)) if wanted else []
    if text is None or screens:
        on_note("The model writes text that it is calibrated on.")
        with Engine(path, precision=precision, threads=threads, plan=SparsityPlan.dense()) as engine:
            windows = written_by(engine, context) if text is None else windows
            own_texts = texts_of(engine, *OWN_TEXTS, seed=1) if screens else []
    head = head_rules() if screens else None
    start = replace(beside, attention=None, structure=None, head=head, provenance=provenance)
    decoder = _decoder(checkpoint, context)
    choices = kinds.priced(decoder, windows.calibrated, questions, progress)
    head_screen = fit_screen(decoder, checkpoint, [*windows.calibrated, *own_texts]) if screens else None
    del decoder
    keys_and_values = sum(kind.bytes for kind in choices if isinstance(kind, PageChoices))
    read = describe(checkpoint, precision=precision).bytes_per_token + keys_and_values
    menu = Menu(choices, read, spared_bytes(checkpoint, precision, load) if screens else 0.0)
    search = Search(replace(judge, head_screen=head_screen, windows=windows.verified), menu, start, on_note)
    if healing is not None:
        search = _healed(search, healing, budget, windows, own_texts)
    frontier, found, accuracy = _found(search, budget, healing.price if healing else None, wanted)
    if found is None and healing is not None:
        raise FallowError(
            f"No plan of the healed model keeps the budget: it lies in {healing.folder}; heal with more tokens of text "
            "like that which is verified, or not at all."
        )
    found = found or search.nothing
    measured = search.judge.speedup(found.plan)
    ordered = tuple(sorted(frontier, key=lambda point: point.resting))
    with _new_folder(search.judge, found.plan, folder) as unfinished:
        title = f"{Path(model).name}, batch {batch}, {context:,} tokens of context"
        draw(ordered, found, budget=budget, title=title, folder=unfinished)
    if healing is not None:
        healing.remove()
    return SparsifyResult(str(model), folder, load, found, measured, ordered, heal, accuracy)


def _decoder(checkpoint: Checkpoint, context: int) -> Decoder:
    """For windows of text, and for what the model writes."""
    longest = max(context, OWN_TEXTS[1])
    return load_decoder(checkpoint, context=longest).eval().requires_grad_(False)


def _floor(task: str | None, floor: float | None, limit: int | None, context: int) -> Floor | None:
    if task is None and floor is None and limit is None:
        return None
    if task is None or floor is None:
        raise FallowError("A task needs a floor, and a floor or a limit a task: give both, such as arc_easy and 0.4.")
    if not 0 <= floor <= 1:
        raise FallowError(f"The floor is {floor}: give an accuracy from 0 to 1.")
    return Floor(task, floor, context, limit)


def _check_floor(judge: Judge, floor: Floor, on_note: Callable[[str], None]) -> None:
    accuracy = judge.accuracy(SparsityPlan.dense(), floor, dense=True)
    on_note(f"Dense, the model solves {accuracy:.1%} of {floor.task}.")
    if accuracy < floor.accuracy:
        raise FallowError(
            f"The dense model solves {accuracy:.1%} of {floor.task}, which is below the floor of {floor.accuracy:.1%}: "
            "give a lower one."
        )


def _found(
    search: Search, budget: float, price: float | None, floor: Floor | None
) -> tuple[list[Point], Point | None, float | None]:
    """All points that were measured, the fastest of them within the budget that reaches the floor, and its accuracy
    there."""
    if not search.menu.kinds:
        return [], None, None
    if floor is None:
        frontier = search.points(budget, price)
        return frontier, fastest(frontier, budget), None
    frontier, refused = [], []
    for share in _SMALLER_BUDGETS:
        frontier += search.points(share * budget, None if price is None else share * price)
        while (point := fastest([p for p in frontier if p not in refused], budget)) is not None:
            accuracy = search.judge.accuracy(point.plan, floor)
            search.on_note(f"{point.resting:.1%} at rest: {accuracy:.1%} of {floor.task}.")
            if accuracy >= floor.accuracy:
                return frontier, point, accuracy
            refused.append(point)
    return frontier, None, None


def _healed(
    search: Search, healing: Healing, budget: float, windows: Windows, own_texts: Sequence[Sequence[int]]
) -> Search:
    """The search with the weights that are healed under a plan of it."""
    judge = search.judge
    if not healing.has_begun:
        costly = fastest(search.points(ALLOWANCE * budget), ALLOWANCE * budget)
        if costly is None or costly.resting == 0:
            raise FallowError(f"Nothing can rest at {ALLOWANCE:g} times the budget: leave the healing out.")
        texts = windows.others or _written(healing, judge.precision, judge.threads)
        healing.begin(costly.plan, costly.price, texts)
    checkpoint, head_screen = healing.run(search.on_note, judge.progress), None
    if judge.head_screen is not None:
        decoder = _decoder(checkpoint, judge.load.context)
        head_screen = fit_screen(decoder, checkpoint, [*windows.calibrated, *own_texts])
    before = search.start.provenance
    what = {"healed": f"{healing.tokens} tokens", "healed_from": before["weights"], "weights": _digest(checkpoint)}
    return replace(
        search,
        judge=replace(judge, checkpoint=checkpoint, head_screen=head_screen),
        start=replace(search.start, provenance={**before, **what}),
    )


def _written(healing: Healing, precision: Precision, threads: int | None) -> list[list[int]]:
    """The model's own text to heal it with."""
    with Engine(healing.model, precision=precision, threads=threads, plan=SparsityPlan.dense()) as engine:
        return written_to_heal(engine, healing.tokens, healing.context)


def _check_context(checkpoint: Checkpoint, context: int) -> None:
    longest = longest_context(checkpoint.config.rope, checkpoint.config.max_position_embeddings) - ModelRunner.page_size
    if not ModelRunner.page_size < context <= longest:
        raise FallowError(f"The context is {context}: take one from {ModelRunner.page_size + 1} to {longest}.")


def _digest(checkpoint: Checkpoint) -> str:
    """SHA-256 of the weights, tensor by tensor."""
    digest = hashlib.sha256()
    for name, tensor in sorted(checkpoint.tensors.items()):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(tensor.read()).data)
    return digest.hexdigest()


@contextmanager
def _new_folder(judge: Judge, plan: SparsityPlan, folder: Path) -> Iterator[Path]:
    """The model's files, the plan and what it needs, in a folder that more can be written to; when the block ends it is
    complete, and where it raises not there."""
    with replacing_folder(folder) as unfinished:
        copy_model(judge.checkpoint, {}, unfinished, without=(FILE_NAME, SCREEN_FILE, *PICTURES))
        plan.save(unfinished / FILE_NAME)
        if judge.head_screen is not None:
            judge.head_screen.save(unfinished)
        yield unfinished
