"""From a model to a folder with a plan: calibrate, solve, verify, measure."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fallow.arrays import Float64, Int64
from fallow.engine.engine import Engine
from fallow.engine.runner import ModelRunner, Precision
from fallow.errors import FallowError
from fallow.files import decoded, replacing_folder
from fallow.models.checkpoint import open_checkpoint
from fallow.models.decoder import Decoder
from fallow.models.decoder_weights import load_decoder
from fallow.models.head_screen import SCREEN_FILE, HeadScreen
from fallow.models.info import describe
from fallow.models.rewrite import copy_model
from fallow.models.rope import longest_context
from fallow.models.store import resolve
from fallow.models.tensors import Checkpoint
from fallow.models.tokenizer import load_tokenizer
from fallow.plan import FILE_NAME, SparsityPlan
from fallow.sparsification.heal import ALLOWANCE, Healing
from fallow.sparsification.judge import Judge
from fallow.sparsification.page_prices import page_errors
from fallow.sparsification.picture import PICTURES, draw
from fallow.sparsification.plans import Load, PageChoices
from fallow.sparsification.sensitivity import sensitivities
from fallow.sparsification.solve import choose
from fallow.sparsification.text import Windows, cut, texts_of, written_by, written_to_heal
from fallow.sparsification.vocabulary import OWN_TEXTS, fit_screen, head_rules, screens_head, spared_bytes
from fallow.terminal import Progress

_MOST_TRIES = 6
_CLOSE = 0.85  # of the budget: near enough
_CAUTION = 0.97  # of the price that would be right if prices were: they are nearly


@dataclass(frozen=True)
class Point:
    """A plan that was measured: the share of the keys and values that rests, and what for. ``speedup`` is predicted
    from the bytes that a step reads, ``price`` is what the plan should have cost (nats a token)."""

    resting: float
    perplexity_ratio: float
    speedup: float
    plan: SparsityPlan
    price: float

    def to_json(self) -> dict[str, float]:
        return {"resting": self.resting, "perplexity_ratio": self.perplexity_ratio, "speedup": self.speedup}


@dataclass(frozen=True)
class SparsifyResult:
    """``found`` lies in ``folder`` beside the weights; ``measured`` is how many times faster than dense a step of
    decoding ``load`` is. ``frontier``: the plans that were measured on the way, from the most cautious on, with the
    weights that were healed by so many tokens as ``healed`` says; None: with those of the model."""

    model: str
    folder: Path
    load: Load
    found: Point
    measured: float
    frontier: tuple[Point, ...]
    healed: int | None = None

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
    precision: Precision = "auto",
    threads: int | None = None,
    on_note: Callable[[str], None] = lambda text: None,
    progress: Progress = lambda what, done, total: None,
) -> SparsifyResult:
    """Find the plan that makes decoding ``batch`` sequences of ``context`` tokens fastest while perplexity on held-out
    text rises by no more than ``budget`` (0.01: one percent), and write the model with it to the folder ``out``.

    ``text`` is a file; half of its windows price what may rest, the others verify. None: the model writes it. With
    ``heal`` the weights are tuned under a plan that costs more, by so many tokens, and what they bear then is searched;
    all is relative to the model as it was. The folder ``out`` with ``.healing`` after its name holds what it takes
    meanwhile, so that a killed call goes on. Raises ``FallowError``.
    """
    folder = Path(out)
    if folder.exists():
        raise FallowError(f"{folder} exists already: give another folder, or remove it.")
    if not 0 < budget < 1:
        raise FallowError(f"The budget is {budget}: give a share of perplexity between 0 and 1, such as 0.01 for 1%.")
    path = resolve(model)
    checkpoint = open_checkpoint(path)
    _check_context(checkpoint, context)
    choices = PageChoices.of(checkpoint.config, Load(batch, context))
    if not choices.places:
        raise FallowError("Every layer of the model has a window of its own: no pages can rest.")
    screens = screens_head(checkpoint, choices.load)
    source, own_texts = "text of its own", []
    if text is not None:
        source, windows = Path(text).name, _windows_of(path, Path(text), context)
    provenance = {
        "made_by": "fallow sparsify",
        "calibrated_on": source,
        "budget": f"{budget:.4g}",
        "load": f"batch {batch}, context {context}",
        "weights": _digest(checkpoint),
    }
    healing = None if heal is None else Healing.beside(folder, path, heal, context, provenance)
    if text is None or screens:
        on_note("The model writes text that it is calibrated on.")
        with Engine(path, precision=precision, threads=threads, plan=SparsityPlan.dense()) as engine:
            windows = written_by(engine, context) if text is None else windows
            own_texts = texts_of(engine, *OWN_TEXTS, seed=1) if screens else []
    decoder = load_decoder(checkpoint, context=context).eval().requires_grad_(False)
    prices = _prices(decoder, windows.calibrated, choices, progress)
    head_screen = fit_screen(decoder, checkpoint, [*windows.calibrated, *own_texts]) if screens else None
    del decoder
    weights = describe(checkpoint, precision=precision).bytes_per_token
    cost = Cost(choices, weights, spared_bytes(checkpoint, precision) if screens else 0.0)
    judge = Judge(checkpoint, checkpoint, head_screen, windows.verified, choices.load, precision, threads, progress)
    # What training has brought to rest stays at rest.
    beside = SparsityPlan.beside(path) or SparsityPlan.dense()
    start = replace(beside, attention=None, head=head_rules() if screens else None, provenance=provenance)
    price = None
    if healing is not None:
        if not healing.has_begun:
            costly = _fastest(_search(judge, cost, prices, ALLOWANCE * budget, start, on_note), ALLOWANCE * budget)
            if costly is None or replace(costly.plan, head=None).is_dense:
                raise FallowError(f"Nothing can rest at {ALLOWANCE:g} times the budget: leave the healing out.")
            texts = [windows.before] if windows.before else _written(healing, path, precision, threads)
            healing.begin(costly.plan, costly.price, texts)
        checkpoint, price = healing.run(on_note, progress), healing.price
        if screens:
            healed = load_decoder(checkpoint, context=context).eval().requires_grad_(False)
            head_screen = fit_screen(healed, checkpoint, [*windows.calibrated, *own_texts])
            del healed
        judge = replace(judge, checkpoint=checkpoint, head_screen=head_screen)
        what = {"healed": f"{heal} tokens", "healed_from": provenance["weights"], "weights": _digest(checkpoint)}
        start = replace(start, provenance=provenance | what)
    frontier = _search(judge, cost, prices, budget, start, on_note, price)
    found = _fastest(frontier, budget)
    if found is None and healing is not None:
        raise FallowError(
            f"No plan of the healed model keeps the budget: it lies in {healing.folder}; heal with more tokens of text "
            "like that which is verified, or not at all."
        )
    found = found or Point(0.0, 1.0, cost.speedup(choices.dense), start, 0.0)
    measured = judge.speedup(found.plan)
    ordered = tuple(sorted(frontier, key=lambda point: point.resting))
    with _new_folder(checkpoint, found.plan, head_screen, folder) as partial:
        title = f"{Path(model).name}, batch {batch}, {context:,} tokens of context"
        draw(ordered, found, budget=budget, title=title, folder=partial)
    if healing is not None:
        healing.remove()
    return SparsifyResult(str(model), folder, choices.load, found, measured, ordered, heal)


@dataclass(frozen=True)
class Cost:
    """What a step of decoding reads: the pages of a choice, and weights, of which a plan spares some of the head's."""

    choices: PageChoices
    weights: int
    spared: float

    def speedup(self, chosen: Int64) -> float:
        dense = self.weights + self.choices.bytes_of(self.choices.dense)
        return dense / (self.weights - self.spared + self.choices.bytes_of(chosen))


def _search(  # noqa: PLR0917
    judge: Judge,
    cost: Cost,
    prices: Float64,
    budget: float,
    start: SparsityPlan,
    on_note: Callable[[str], None],
    price: float | None = None,
) -> list[Point]:
    """Plans whose measured perplexity comes nearer and nearer to the budget: prices say which parts are cheap, but what
    all of them cost together is measured. The first plan is that of ``price`` (nats a token; None: of the budget)."""
    choices = cost.choices
    dense_nll = judge.dense_nll()
    allowed = math.log1p(budget)
    price = price or allowed
    points: list[Point] = []
    for _ in range(_MOST_TRIES):
        chosen = choose(prices, choices.bytes_read, price)
        plan = replace(start, attention=choices.rules(chosen))
        excess = judge.nll(plan) - dense_nll
        points.append(Point(choices.resting(chosen), math.exp(excess), cost.speedup(chosen), plan, price))
        on_note(f"{points[-1].resting:.1%} of the keys and values rest: perplexity {math.expm1(excess):+.2%}")
        if _CLOSE * allowed <= excess <= allowed or plan.attention is None:
            break
        price *= _CAUTION * min(max(allowed / max(excess, 1e-9), 0.25), 4.0)
    return points


def _fastest(points: Sequence[Point], budget: float) -> Point | None:
    """Of what was measured within the budget."""
    within = [point for point in points if point.perplexity_ratio <= 1 + budget]
    return max(within, key=lambda point: point.speedup, default=None)


def _written(healing: Healing, model: Path, precision: Precision, threads: int | None) -> list[list[int]]:
    """The model's own text to heal it with."""
    with Engine(model, precision=precision, threads=threads, plan=SparsityPlan.dense()) as engine:
        return written_to_heal(engine, healing.tokens, healing.context)


def _check_context(checkpoint: Checkpoint, context: int) -> None:
    longest = longest_context(checkpoint.config.rope, checkpoint.config.max_position_embeddings) - ModelRunner.page_size
    if not ModelRunner.page_size < context <= longest:
        raise FallowError(f"The context is {context}: take one from {ModelRunner.page_size + 1} to {longest}.")


def _windows_of(model: Path, text: Path, context: int) -> Windows:
    try:
        content = decoded(text.read_bytes(), text)
    except OSError as error:
        raise FallowError(f"{text} cannot be read: {error.strerror}.") from error
    ids = load_tokenizer(model).encode(content, add_special_tokens=False, allow_special=False)
    return cut(ids, context, str(text))


def _prices(decoder: Decoder, windows: Sequence[Sequence[int]], choices: PageChoices, progress: Progress) -> Float64:
    """Nats a token of each choice, ``[places, choices]``; the last one, of all pages, costs none."""
    weighed = sensitivities(decoder, windows, torch.Generator().manual_seed(0))
    nats = (page_errors(decoder, windows, progress=progress) * weighed[:, None, None]).numpy()
    rows = np.array([nats[layer, head] for layer, head in choices.places])
    return np.concatenate((rows, np.zeros((len(rows), 1))), 1)


def _digest(checkpoint: Checkpoint) -> str:
    """SHA-256 of the weights, tensor by tensor."""
    digest = hashlib.sha256()
    for name, tensor in sorted(checkpoint.tensors.items()):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(tensor.read()).data)
    return digest.hexdigest()


@contextmanager
def _new_folder(
    checkpoint: Checkpoint, plan: SparsityPlan, head_screen: HeadScreen | None, folder: Path
) -> Iterator[Path]:
    """The model's files, the plan and what it needs, in a folder that more can be written to; when the block ends it is
    complete, and where it raises not there."""
    with replacing_folder(folder) as partial:
        copy_model(checkpoint, {}, partial, without=(FILE_NAME, SCREEN_FILE, *PICTURES))
        plan.save(partial / FILE_NAME)
        if head_screen is not None:
            head_screen.save(partial)
        yield partial
