"""Recipes: one sentence for each mistake, overrides, and the ones that the repository brings."""

from __future__ import annotations

from pathlib import Path

import pytest

from fallow.errors import FallowError
from fallow.models.checkpoint import open_checkpoint
from fallow.training.loop import StepReport
from fallow.training.recipe import load_recipe
from fallow.training.run import train

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.toml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_recipes_of_the_repository(path: Path):
    assert load_recipe(path).name == path.stem


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("train.tokenz=5", "train.tokenz is not known: did you mean tokens?"),
        ("train.tokens=0", "train.tokens is 0"),
        ("train.tokens=many", "train.tokens is 'many'"),
        ("model.activation=swish", "model.activation is 'swish'"),
        ("model.hidden_size=33", "model.hidden_size is 33"),
        ("data.valid_share=0.9", "data.valid_share is 0.9"),
        ("superposition.bag=5", "5, which does not divide data.context = 32"),
        ("superposition.bag=1", "superposition.bag is 1"),
        ("superposition.bag=4; data.isolate_documents=true", "set data.isolate_documents to false"),
        ("superposition.bag=4; train.first_batch=2", "leave train.first_batch out"),
        ("colour=red", "colour is not known"),
        ("name.first=a", "name"),
        ("tokens", "write section.key=value"),
        ("optimizer.7.lr=1", "7 is no section of the recipe"),
        ("optimizer.first.lr=1", "first is no section of the recipe"),
        ("optimizer.lr=1", "name one by its number, as in optimizer.0.lr"),
    ],
)
def test_a_mistake_is_a_sentence(recipe_file: Path, override: str, named: str):
    with pytest.raises(FallowError) as error:
        load_recipe(recipe_file, override.split("; "))
    assert named in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["c4-60m", pytest.param("c4-130m", marks=pytest.mark.slow)])
def test_ten_steps_of_the_c4_recipes(name: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Their model but for its vocabulary, their schedule and their optimizers, on a text that is here."""
    monkeypatch.setenv("FALLOW_HOME", str(text.parent / "home"))
    small = ["data.vocab_size=320", "train.tokens=5120", "train.batch=2", "train.micro_batch=1", "train.compile=false"]
    report = ["report.evaluate_every=5", "report.evaluate_tokens=1024", "report.tensorboard=false"]
    path = next(path for path in RECIPES if path.stem == name)
    recipe = load_recipe(path, [f"data.train={text}", f"data.valid={text}", *small, *report])
    steps: list[StepReport] = []
    result = train(recipe, out=tmp_path / "run", on_step=steps.append)
    assert [step.step for step in steps] == list(range(1, 11))
    assert steps[-1].validation.loss < steps[4].validation.loss < 6
    assert steps[0].lr == pytest.approx(0.5 * 0.001)
    assert 0.0001 < steps[-1].lr < 0.00011
    config = open_checkpoint(result.model).config
    assert config.architecture == "llama"
    assert (config.hidden_size, config.tie_word_embeddings) == (recipe.model.hidden_size, False)


def test_a_recipe_and_its_dense_twin():
    dense, rest = (load_recipe(path) for path in RECIPES if path.stem in ("books-30m", "rest-30m"))
    assert rest.rest.l1 > 0 == dense.rest.l1
    assert rest.model_copy(update={"name": dense.name, "rest": dense.rest}) == dense


def test_overrides(recipe_file: Path):
    overrides = ["train.tokens=1000", "name=other", "report.tensorboard=false", "optimizer.0.lr=0.25"]
    recipe = load_recipe(recipe_file, overrides)
    assert (recipe.train.tokens, recipe.name, recipe.report.tensorboard) == (1000, "other", False)
    assert recipe.optimizer[0].lr == 0.25


def test_files_that_are_no_recipe(tmp_path: Path):
    with pytest.raises(FallowError, match="cannot be read"):
        load_recipe(tmp_path / "nowhere.toml")
    (tmp_path / "broken.toml").write_text("[model\n")
    with pytest.raises(FallowError, match="is not TOML"):
        load_recipe(tmp_path / "broken.toml")
    (tmp_path / "empty.toml").write_text("")
    with pytest.raises(FallowError, match="name is missing"):
        load_recipe(tmp_path / "empty.toml")
