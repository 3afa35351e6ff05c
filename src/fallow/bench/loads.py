"""What is measured: how many prompts of which length, and how many tokens each."""

from __future__ import annotations

from collections.abc import Sequence
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
            return f"prefill {self.context:,}" + (f" ×{self.batch}" if self.batch > 1 else "")
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
KINDS = ("prefill", "decode")
_PIECE = 256  # tokens of a prompt that an engine reads in one step, or more
_MOST_SEQUENCES, _MOST_TOKENS = 1024, 1 << 20


def loads_of(name: str | Sequence[Load], max_context: int) -> tuple[Load, ...]:
    """The loads of the set ``"full"``, ``"quick"`` or ``"none"`` that fit a model of ``max_context`` tokens, or those
    that are given.

    Raises ``FallowError`` for another name, where none of a set fits, and where one that is given does not.
    """
    if not isinstance(name, str):
        for load in name:
            if load.context + load.tokens > max_context:
                raise FallowError(
                    f"{load.title} takes {load.context + load.tokens:,} tokens of context, but the model has "
                    f"{max_context:,}: measure a shorter one."
                )
        return tuple(dict.fromkeys(name))
    sets: dict[str, tuple[Load, ...]] = {"full": FULL, "quick": QUICK, "none": ()}
    if name not in sets:
        raise FallowError(f"There are no loads named {name!r}: use one of {', '.join(sets)}.")
    loads = tuple(load for load in sets[name] if load.context + load.tokens <= max_context)
    if not loads and sets[name]:
        raise FallowError(f"The model's context of {max_context} tokens is too short for any of the {name} loads.")
    return loads


def load_named(text: str) -> Load:
    """``prefill:1:2048`` or ``decode:8:7680``: what, how many prompts, of how many tokens. Raises ``ValueError`` where
    it is something else."""
    kind, *numbers = text.split(":")
    if kind not in KINDS or len(numbers) != 2 or not all(n.isascii() and n.isdigit() and int(n) > 0 for n in numbers):
        raise ValueError(f"{text!r} is no load: use KIND:BATCH:CONTEXT, such as prefill:1:2048 or decode:8:7680")
    batch, context = map(int, numbers)
    if batch > _MOST_SEQUENCES or context > _MOST_TOKENS:
        raise ValueError(f"{text!r} is too large a load: at most {_MOST_SEQUENCES} prompts of {_MOST_TOKENS:,} tokens")
    if kind == "prefill":
        return Load("prefill", batch, context, 1)
    while_others_are_read = (batch - 1) * -(-context // _PIECE)  # an engine that decodes beside prompts gives these
    return Load("decode", batch, context, (32 if context > 512 else 48) + while_others_are_read)
