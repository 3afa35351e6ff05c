"""The text that a model is calibrated on: cut into windows, or written by the model itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from fallow.engine.engine import Engine
from fallow.engine.sampling import SamplingParams
from fallow.errors import FallowError

_CALIBRATED, _VERIFIED = 6144, 16_384
"""How many tokens price what may rest, and how many verify it;"""
_FEWEST, _MOST = 3, 96
"""and how many windows either are at least and at most. Half as many where the model writes them."""
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


def cut(ids: list[int], context: int, source: str) -> Windows:
    """Every other window for calibration, those between for verification, and of either as many as are wanted, spread
    over the whole text: it may be several, one after the other. Raises ``FallowError`` where there are not two."""
    windows = [ids[start : start + context] for start in range(0, len(ids) - context + 1, context)]
    if len(windows) < 2:
        raise FallowError(
            f"{source} has {len(ids):,} tokens: with a context of {context:,} at least {2 * context:,} are needed, "
            "half of them to verify the plan. Give more text, or a shorter context."
        )
    calibrated = _spread(range(0, len(windows), 2), _count(_CALIBRATED, context))
    verified = _spread(range(1, len(windows), 2), _count(_VERIFIED, context))
    ends = [-1, *verified, len(windows)]
    others = [ids[(end + 1) * context : start * context] for end, start in pairwise(ends) if end + 1 < start]
    return Windows([windows[i] for i in calibrated], [windows[i] for i in verified], others)


def _spread(numbers: range, count: int) -> list[int]:
    """``count`` of them, or all, as far apart as can be."""
    count = min(count, len(numbers))
    return [numbers[i * len(numbers) // count] for i in range(count)]


def _count(tokens: int, context: int) -> int:
    return min(max(tokens // context, _FEWEST), _MOST)


def written_by(engine: Engine, context: int) -> Windows:
    """Windows that the model writes from the beginning of a text, at temperature 1."""
    calibrated, verified = (-(-_count(tokens, context) // 2) for tokens in (_CALIBRATED, _VERIFIED))
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
