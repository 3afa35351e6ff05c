"""The sides of the comparison: which trainings there are, what each is, and whether they may be compared."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fallow.bench.training.settings import BaselineSettings, checked_baseline, load_baseline
from fallow.errors import FallowError
from fallow.models.checkpoint import open_checkpoint
from fallow.models.hf_document import family_of
from fallow.models.info import ModelInfo, describe
from fallow.models.tokenizer import Tokenizer
from fallow.training.export import export_model
from fallow.training.model import config_of, new_decoder
from fallow.training.recipe import Recipe, checked, load_recipe

OURS, FREE, BASELINE, BASELINE_MUON = "ours", "free", "baseline", "baseline_muon"
TOLERANCE = 0.02


@dataclass(frozen=True)
class Side:
    """``recipe`` says the model and the data, and of our sides how they train; ``baseline`` says that of the others."""

    name: str
    recipe: Recipe
    baseline: BaselineSettings | None = None

    @property
    def tokens(self) -> int:
        """Of the whole training."""
        return self.recipe.train.tokens if self.baseline is None else self.baseline.tokens

    @property
    def config(self) -> dict[str, Any]:
        """What decides about the loss besides the text, the seed and the number of tokens; defaults are left out."""
        recipe = self.recipe.model_dump(
            mode="json",
            exclude_defaults=True,
            exclude={"name": True, "report": True, "data": {"train", "valid"}, "train": {"tokens", "seed"}},
        )
        if self.baseline is None:
            return recipe
        baseline = self.baseline.model_dump(mode="json", exclude_defaults=True, exclude={"tokens"})
        return {"model": recipe.get("model", {}), "data": recipe.get("data", {}), "baseline": baseline}

    def with_settings(self, changes: Mapping[str, Any], *, tokens: int, seed: int) -> Side:
        """This side with other values: keys of a baseline's file, or of a recipe (``optimizer.0.lr``).

        Raises ``FallowError`` where there is no such key.
        """
        where = f"{self.name} with {', '.join(f'{key}={value}' for key, value in changes.items())}"
        train = self.recipe.train.model_copy(update={"seed": seed})
        recipe = self.recipe.model_copy(update={"train": train})
        if self.baseline is None:
            document = recipe.model_dump(mode="json")
            for key, value in {**changes, "train.tokens": tokens}.items():
                _put(document, key, value)
            return replace(self, recipe=checked(Recipe, document, where))
        document = self.baseline.model_dump(mode="json") | dict(changes) | {"tokens": tokens}
        return replace(self, recipe=recipe, baseline=checked_baseline(document, where))


def load_sides(recipe_file: Path, overrides: Iterable[str] = ()) -> dict[str, Side]:
    """The sides of ``NAME.toml``: it is ours; beside it may lie ``NAME-free.toml``, of another architecture, and in
    ``baselines/`` lie ``NAME-adamw.toml`` and perhaps ``NAME-muon.toml``. ``overrides`` are of the recipe.

    All are evaluated on the recipe's text. Raises ``FallowError``.
    """
    recipe = load_recipe(recipe_file, overrides)
    name, folder = recipe_file.stem, recipe_file.parent
    baselines = folder / "baselines"
    sides = {BASELINE: Side(BASELINE, recipe, load_baseline(baselines / f"{name}-adamw.toml"))}
    muon = baselines / f"{name}-muon.toml"
    if muon.is_file():
        sides[BASELINE_MUON] = Side(BASELINE_MUON, recipe, load_baseline(muon))
    sides[OURS] = Side(OURS, recipe)
    free = folder / f"{name}-free.toml"
    if free.is_file():
        other = load_recipe(free).model_copy(update={"data": recipe.data, "report": recipe.report})
        sides[FREE] = Side(FREE, other)
    return sides


def check_models(sides: Mapping[str, Side], tokenizer: Tokenizer) -> int:
    """The parameters of our model. Raises ``FallowError`` where the baseline could not be what it has to be, or the
    free architecture differs in parameters by more than 2% or costs 2% more to serve."""
    recipe = sides[OURS].recipe
    config = config_of(recipe.model, tokenizer, recipe.data.context)
    if family_of(config) == "fallow":
        raise FallowError(
            f"{recipe.name} has an architecture that transformers does not have, so there is no baseline for it: "
            f"put it into {recipe.name}-free.toml."
        )
    if recipe.data.isolate_documents:
        raise FallowError(
            f"{recipe.name} keeps attention within documents, which the baseline does not: "
            "set data.isolate_documents to false."
        )
    ours = _described(recipe, tokenizer)
    if FREE in sides:
        free = _described(sides[FREE].recipe, tokenizer)
        check_close("parameters", ours.parameters, free.parameters, FREE)
        for what, own, other in (
            ("multiply-accumulates a token", ours.macs_per_token, free.macs_per_token),
            ("bytes a token", ours.bytes_per_token, free.bytes_per_token),
        ):
            if other > own * (1 + TOLERANCE):
                raise FallowError(f"free has {other:,} {what} against {own:,}: it may cost 2% more to serve, no more.")
    return ours.parameters


def check_close(what: str, ours: int, theirs: int, side: str) -> None:
    """Raises ``FallowError`` where two counts differ by more than 2%."""
    if abs(theirs - ours) > TOLERANCE * ours:
        raise FallowError(f"{side} has {theirs:,} {what} against {ours:,}: no more than 2% may lie between them.")


def _described(recipe: Recipe, tokenizer: Tokenizer) -> ModelInfo:
    """The untrained model as ``fallow info`` counts it."""
    decoder = new_decoder(recipe, tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        export_model(decoder.config, dict(decoder.named_parameters()), tokenizer, Path(folder) / "model")
        return describe(open_checkpoint(Path(folder) / "model"))


def _put(document: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    place: Any = document
    try:
        for part in path:
            place = place[int(part) if isinstance(place, list) else part]
        place[int(last) if isinstance(place, list) else last] = value
    except (KeyError, IndexError, ValueError, TypeError):
        raise FallowError(f"{key} is no key of the recipe: write it as in optimizer.0.lr or train.batch.") from None
