"""Conversations out of Python source: questions about public names, answered by their docstrings."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator

_SHORTEST, _LONGEST = 24, 1600  # characters of an answer
_Documented = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def questions(source: str, module: str) -> Iterator[tuple[str, str]]:
    """A question and its answer for ``module`` and each public class, function and method in ``source`` that says what
    it is for, in the order of the file. Nothing is imported. Raises ``SyntaxError`` where it is not Python."""
    tree = ast.parse(source)
    yield from _answered(f"What is the Python module {module} for?", tree)
    yield from _of_body(tree, module, in_class=False)


def _of_body(parent: ast.Module | ast.ClassDef, prefix: str, *, in_class: bool) -> Iterator[tuple[str, str]]:
    for node in parent.body:
        if not isinstance(node, _Documented) or node.name.startswith("_"):
            continue
        name = f"{prefix}.{node.name}"
        if isinstance(node, ast.ClassDef):
            yield from _answered(f"What is the class {name} in Python?", node)
            yield from _of_body(node, name, in_class=True)
        else:
            yield from _answered(f"What does the {'method' if in_class else 'function'} {name} do in Python?", node)


def _answered(question: str, node: ast.Module | _Documented) -> Iterator[tuple[str, str]]:
    text = inspect.cleandoc(ast.get_docstring(node, clean=False) or "").strip()
    if _SHORTEST <= len(text) <= _LONGEST:
        yield question, text
