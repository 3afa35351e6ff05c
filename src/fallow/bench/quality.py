"""Perplexity of every engine over the very same token windows."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fallow.bench.environment import PeerError
from fallow.bench.peers.base import Variant
from fallow.bench.pool import WorkerPool
from fallow.bench.result import OURS, Quality
from fallow.evaluate.perplexity import result_of, token_windows
from fallow.evaluate.text import standard_library_text
from fallow.models.tokenizer import Tokenizer
from fallow.terminal import Progress

_CHARACTERS_PER_TOKEN = 8  # more than any text has


@dataclass(frozen=True)
class QualityText:
    """A text and its name; by default the standard library's own source, which every machine has."""

    name: str
    content: str

    @classmethod
    def default(cls, max_tokens: int) -> QualityText:
        return cls("python-stdlib", standard_library_text(max_tokens * _CHARACTERS_PER_TOKEN))


def measure_quality(
    pool: WorkerPool,
    variants: Sequence[Variant],
    tokenizer: Tokenizer,
    text: QualityText,
    *,
    window: int,
    max_tokens: int | None,
    scratch: Path,
    progress: Progress | None,
    on_failure: Callable[[Variant, PeerError], None],
) -> list[Quality]:
    """The perplexity of each variant that can give one, on the first ``max_tokens`` of ``text`` in our tokens."""
    windows = token_windows(tokenizer, text.content, window=window, max_tokens=max_tokens)
    file = scratch / "windows.json"
    file.write_text(json.dumps(windows))
    found = []
    for variant in (variant for variant in variants if variant.for_quality):
        what = f"perplexity of {variant.name}"

        def on_progress(done: int, total: int, what: str = what) -> None:
            if progress is not None:
                progress(what, done, total)

        try:
            answer = pool.ask(variant, {"op": "perplexity", "windows": str(file)}, on_progress)
        except PeerError as error:
            if variant.engine == OURS:
                raise
            on_failure(variant, error)
            continue
        result = result_of(tokenizer, windows, answer["nll"])
        found.append(
            Quality(
                variant.engine,
                variant.precision,
                text.name,
                result.perplexity,
                result.bits_per_byte,
                result.tokens,
                window,
            )
        )
    return found
