"""The text that a model is calibrated on: cut into windows, or written by the model itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fallow.data.sources import texts_in
from fallow.engine.engine import Engine
from fallow.engine.sampling import SamplingParams
from fallow.errors import FallowError
from fallow.evaluate.text import spread
from fallow.models.tokenizer import Tokenizer
from fallow.terminal import Progress

_CALIBRATED, _VERIFIED = (6144, 6), (16_384, 12)
"""How many tokens price what may rest, and how many verify it, and in how many windows at least: texts are unlike each
other;"""
_MOST = 96
"""and at most. Half as many where the model writes them."""
_AT_ONCE = 8  # texts that the model writes to be healed with


@dataclass(frozen=True)
class Question:
    """Token ids of a prompt and of the answer to it."""

    prompt: list[int]
    answer: list[int]

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.answer

    @property
    def answers(self) -> range:
        """The positions whose next token belongs to the answer."""
        return range(len(self.prompt) - 1, len(self.prompt) + len(self.answer) - 1)


@dataclass(frozen=True)
class Windows:
    """Token ids of ``context`` each: ``calibrated`` prices what may rest, ``verified`` are kept from it. ``others`` is
    all that is not verified, in pieces; empty where the model has written the windows."""

    calibrated: list[list[int]]
    verified: list[list[int]]
    others: Sequence[list[int]] = ()


def windows_in(path: Path, tokenizer: Tokenizer, context: int, progress: Progress) -> Windows:
    """Of the file's documents. Raises ``FallowError`` as ``texts_in`` and ``cut`` do."""
    documents: list[list[int]] = []
    for text in texts_in(path):
        documents.append(tokenizer.encode(text, add_special_tokens=False, allow_special=False))
        progress("reading documents", len(documents), None)
    return cut(documents, context, str(path))


def cut(documents: Sequence[list[int]], context: int, source: str) -> Windows:
    """Every other window for calibration, those between for verification, and of either as many as are wanted, spread
    over all documents; none reaches over the end of one. Raises ``FallowError`` where there are not two."""
    places = [
        (number, start) for number, ids in enumerate(documents) for start in range(0, len(ids) - context + 1, context)
    ]
    if len(places) < 2:
        tokens = ", ".join(f"{len(ids):,}" for ids in sorted(documents, key=len, reverse=True)[:2])
        raise FallowError(
            f"{source} has too little text for a context of {context:,} tokens: two windows of as many are needed, "
            f"one of them to verify the plan, or a document of {2 * context:,} tokens; its longest have {tokens}. Give "
            "more text, or a shorter context."
        )
    calibrated = spread(range(0, len(places), 2), _count(_CALIBRATED, context))
    verified = spread(range(1, len(places), 2), _count(_VERIFIED, context))
    kept = {places[i] for i in verified}

    def window(place: int) -> list[int]:
        number, start = places[place]
        return documents[number][start : start + context]

    others = [
        piece
        for number, ids in enumerate(documents)
        for piece in _between(ids, [start for start in range(0, len(ids), context) if (number, start) in kept], context)
    ]
    return Windows([window(place) for place in calibrated], [window(place) for place in verified], others)


def _between(ids: list[int], starts: Sequence[int], context: int) -> Iterator[list[int]]:
    """What windows of ``ids`` that begin at ``starts`` leave, in pieces."""
    for end, start in zip([0, *(start + context for start in starts)], [*starts, len(ids)], strict=True):
        if end < start:
            yield ids[end:start]


def _count(wanted: tuple[int, int], context: int) -> int:
    tokens, fewest = wanted
    return min(max(tokens // context, fewest), _MOST)


def written_by(engine: Engine, context: int) -> Windows:
    """Windows that the model writes from the beginning of a text, at temperature 1."""
    calibrated, verified = (-(-_count(wanted, context) // 2) for wanted in (_CALIBRATED, _VERIFIED))
    windows = texts_of(engine, calibrated + verified, context)
    return Windows(windows[:calibrated], windows[calibrated:])


def written_to_heal(engine: Engine, tokens: int, context: int) -> list[list[int]]:
    """Other texts of ``context`` tokens, as many as have ``tokens``, and one for the token after the last window."""
    rounds = -(-tokens // (_AT_ONCE * context))
    texts = (texts_of(engine, _AT_ONCE, context, seed=_AT_ONCE * (number + 1)) for number in range(rounds))
    return [text for some in texts for text in some][: -(-tokens // context) + 1]


def texts_of(engine: Engine, count: int, length: int, *, seed: int = 0) -> list[list[int]]:
    """So many texts of ``length`` tokens that the model writes at temperature 1."""
    begin = engine.tokenizer.encode("") or [engine.tokenizer.bos_token_id or 0]
    params = SamplingParams(n=count, temperature=1.0, seed=seed, max_tokens=length - len(begin), ignore_eos=True)
    return [begin + list(output.token_ids) for output in engine.generate([begin], params)[0].outputs]
