"""What is measured: how many prompts of which length, and how many tokens each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fallow.errors import FallowError


@dataclass(frozen=True)
class Load:
    """``batch`` random prompts of ``context`` tokens, handed in at once, and ``tokens`` new tokens of each.

    ``prefill`` asks how fast the prompt is read (until the first new token), ``decode`` how fast tokens follow while
    all sequences are running. A load that takes only a moment is repeated ``repeats`` times in one turn, of which the
    median counts.
    """

    kind: Literal["prefill", "decode"]
    batch: int
    context: int
    tokens: int
    repeats: int = 1

    @property
    def positions(self) -> int:
        """Tokens in the KV cache at the end."""
        return self.batch * (self.context + self.tokens)

    @property
    def is_long(self) -> bool:
        """Long enough that a pass only to warm up would cost more than it gives."""
        return self.batch * self.context > 4096

    @property
    def title(self) -> str:
        if self.kind == "prefill":
            return f"prefill {self.context:,}"
        return f"decode ×{self.batch}" + (f" at {self.context:,}" if self.context > 128 else "")


FULL: tuple[Load, ...] = (
    Load("prefill", 1, 512, 1, repeats=3),
    Load("decode", 1, 128, 64, repeats=3),
    Load("decode", 4, 128, 64, repeats=3),
    Load("decode", 8, 128, 48, repeats=3),
    Load("decode", 16, 128, 48),
    Load("decode", 32, 128, 48),
    Load("decode", 1, 4096, 32),
    Load("decode", 1, 7680, 32),
)
QUICK = tuple(load for load in FULL if load.context <= 512 and load.batch in (1, 8))
MEMORY = FULL[1]


def loads_of(name: str, max_context: int) -> tuple[Load, ...]:
    """The loads of the set ``"full"``, ``"quick"`` or ``"none"`` that fit a model of ``max_context`` tokens.

    Raises ``FallowError`` for another name, and where none fits.
    """
    sets: dict[str, tuple[Load, ...]] = {"full": FULL, "quick": QUICK, "none": ()}
    if name not in sets:
        raise FallowError(f"There are no loads named {name!r}: use one of {', '.join(sets)}.")
    loads = tuple(load for load in sets[name] if load.context + load.tokens <= max_context)
    if not loads and sets[name]:
        raise FallowError(f"The model's context of {max_context} tokens is too short for any of the {name} loads.")
    return loads
