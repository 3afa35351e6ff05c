"""Texts for measuring: some of many, the marks of WikiText undone, and a text that every machine has."""

from __future__ import annotations

import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

_T = TypeVar("_T")

# WikiText's word-level form splits words and numbers at these (Merity et al., arXiv 1609.07843).
_WIKITEXT_MARKS = {" @-@ ": "-", " @,@ ": ",", " @.@ ": "."}


def spread(items: Sequence[_T], count: int) -> list[_T]:
    """``count`` of them, or all, as far apart as can be."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def undo_wikitext_marks(text: str) -> str:
    """``text`` with WikiText's `` @-@ ``, `` @,@ `` and `` @.@ `` written as ``-``, ``,`` and ``.`` again.

    ``<unk>`` and the spaces before punctuation stay; a text without the marks is returned as it is.
    """
    for mark, character in _WIKITEXT_MARKS.items():
        text = text.replace(mark, character)
    return text


def standard_library_text(characters: int) -> str:
    """The first ``characters`` of the Python standard library's own source on this machine, modules in name order.

    Packages (``json/``) come after the modules that are single files, tests are left out.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    files = [*sorted(folder.glob("*.py")), *sorted(folder.glob("*/*.py"))]
    pieces: list[str] = []
    length = 0
    for file in files:
        if length >= characters:
            break
        if file.parent.name in ("test", "tests", "site-packages", "idlelib"):
            continue
        piece = file.read_text(encoding="utf-8", errors="replace")
        pieces.append(piece)
        length += len(piece)
    return "".join(pieces)[:characters]
