"""The text that a model is calibrated on: cut into windows, or written by the model itself."""

from __future__ import annotations

from dataclasses import dataclass

from fallow.engine.engine import Engine
from fallow.engine.sampling import SamplingParams
from fallow.errors import FallowError

CALIBRATED, VERIFIED = 3, 3
"""Windows at most for each."""
_WRITTEN = 2  # of each, where the model writes them


@dataclass(frozen=True)
class Windows:
    """Token ids of ``context`` each: ``calibrated`` prices what may rest, ``verified`` are kept from it."""

    calibrated: list[list[int]]
    verified: list[list[int]]


def cut(ids: list[int], context: int, source: str) -> Windows:
    """The first windows for calibration, the last ones for verification. Raises ``FallowError`` where there are not
    two."""
    windows = [ids[start : start + context] for start in range(0, len(ids) - context + 1, context)]
    if len(windows) < 2:
        raise FallowError(
            f"{source} has {len(ids):,} tokens: with a context of {context:,} at least {2 * context:,} are needed, "
            "half of them to verify the plan. Give more text, or a shorter context."
        )
    half = len(windows) // 2
    return Windows(windows[:half][:CALIBRATED], windows[half:][-VERIFIED:])


def written_by(engine: Engine, context: int) -> Windows:
    """Windows that the model writes from the beginning of a text, at temperature 1."""
    windows = texts_of(engine, 2 * _WRITTEN, context)
    return Windows(windows[:_WRITTEN], windows[_WRITTEN:])


def texts_of(engine: Engine, count: int, length: int, *, seed: int = 0) -> list[list[int]]:
    """So many texts of ``length`` tokens that the model writes at temperature 1."""
    begin = engine.tokenizer.encode("") or [engine.tokenizer.bos_token_id or 0]
    params = SamplingParams(n=count, temperature=1.0, seed=seed, max_tokens=length - len(begin), ignore_eos=True)
    return [begin + list(output.token_ids) for output in engine.generate([begin], params)[0].outputs]
