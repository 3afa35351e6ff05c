"""The layers are what docs/architecture.md says: imports go down only, and every module has its place on the page."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
PACKAGE = REPOSITORY / "src" / "fallow"
PAGE = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")
ABOVE = {
    **{
        "cli": 7,
        "server": 6,
        "bench": 6,
        "sparsification": 5,
        "training": 4,
        "engine": 3,
        "evaluate": 3,
        "meter": 3,
        "data": 3,
    },
    **{"models": 2, "plan.py": 1, "files.py": 1},
}
# What needs PyTorch; nothing else may import it, nor one of these modules, so that what serves stays without it.
_WITH_TORCH = ("attention", "decoder", "decoder_weights", "page_choice")
WITH_TORCH = {"bench", "training", "sparsification", *(f"models/{name}.py" for name in _WITH_TORCH)}


def section(layer: str) -> str:
    return PAGE.partition(f"\n## {layer}")[2].partition("\n## ")[0]


def test_every_module_has_its_place():
    for path in sorted(PACKAGE.rglob("*.py")):
        layer, *rest = path.relative_to(PACKAGE).parts
        if rest and (path.name != "__init__.py" or layer == "cli"):
            assert f"`{'/'.join(rest)}`" in section(layer), path
        elif not rest and not path.name.startswith("__"):
            assert f"`{path.name}`" in section("At the bottom"), path


def test_every_native_file_has_its_place():
    folder = REPOSITORY / "native" / "src"
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        assert f"`{path.relative_to(folder).as_posix()}`" in section("native"), path


def imports(path: Path) -> Iterator[str]:
    """The modules of fallow that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            yield from [node.module] if node.module != "fallow" else [f"fallow.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_imports_go_down():
    for path in PACKAGE.rglob("*.py"):
        layer = path.relative_to(PACKAGE).parts[0]
        if path.parent == PACKAGE and path.name.startswith("__"):
            continue  # the names of the package, and its command line
        for module in imports(path):
            root, _, rest = module.partition(".")
            uses_torch = root == "torch" or module.removeprefix("fallow.models.") in _WITH_TORCH
            place = path.relative_to(PACKAGE).as_posix()
            assert not uses_torch or {layer, place} & WITH_TORCH, f"{path} imports PyTorch"
            other = rest.partition(".")[0]
            if root == "fallow" and other != layer:
                assert ABOVE.get(layer, 0) > ABOVE.get(other, 0), f"{path} imports {module}"
