"""Recipes: one sentence for each mistake, overrides, and the ones that the repository brings."""

from __future__ import annotations

from pathlib import Path

import pytest

from fallow.errors import FallowError
from fallow.training.recipe import load_recipe

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
        ("colour=red", "colour is not known"),
        ("name.first=a", "name"),
        ("tokens", "write section.key=value"),
    ],
)
def test_a_mistake_is_a_sentence(recipe_file: Path, override: str, named: str):
    with pytest.raises(FallowError) as error:
        load_recipe(recipe_file, [override])
    assert named in str(error.value)
    assert "\n" not in str(error.value)


def test_overrides(recipe_file: Path):
    recipe = load_recipe(recipe_file, ["train.tokens=1000", "name=other", "report.tensorboard=false"])
    assert (recipe.train.tokens, recipe.name, recipe.report.tensorboard) == (1000, "other", False)


def test_files_that_are_no_recipe(tmp_path: Path):
    with pytest.raises(FallowError, match="cannot be read"):
        load_recipe(tmp_path / "nowhere.toml")
    (tmp_path / "broken.toml").write_text("[model\n")
    with pytest.raises(FallowError, match="is not TOML"):
        load_recipe(tmp_path / "broken.toml")
    (tmp_path / "empty.toml").write_text("")
    with pytest.raises(FallowError, match="name is missing"):
        load_recipe(tmp_path / "empty.toml")
