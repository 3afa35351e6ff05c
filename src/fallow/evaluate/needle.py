"""Retrieval from a long context: a number is hidden in a document that is written for it, and asked for at its end
(the "needle in a haystack" of G. Kamradt, 2023)."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fallow.errors import FallowError
from fallow.evaluate import TRIALS
from fallow.models.tokenizer import Tokenizer
from fallow.terminal import Progress

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
_DIGITS = 5
_ANSWER_TOKENS = 12  # a space and the digits, however they are cut
_AT_ONCE = 4  # documents whose keys and values are there together

_WHO = ("The baker", "A fisherman", "The old teacher", "My neighbour", "The young doctor", "A carpenter", "The captain",
        "The gardener", "A traveller", "The painter", "The miller", "A shepherd")  # fmt: skip
_WHAT = ("walked", "waited", "sat", "slept", "sang", "worked", "stood", "talked", "wrote a letter", "told a story",
         "looked for a key", "ate some bread")  # fmt: skip
_WHERE = ("by the river", "in the market", "under an oak", "near the church", "on the bridge", "behind the mill",
          "at the harbour", "in the kitchen", "on the hill", "beside the road", "in the garden",
          "at the gate")  # fmt: skip
_WHEN = ("before sunrise", "all morning", "until noon", "after the rain", "in the evening", "for an hour",
         "during the storm", "on a cold day", "late at night", "in early spring", "at harvest time",
         "once the bells had rung")  # fmt: skip
_TOWNS = ("Alderwick", "Bramcote", "Corvale", "Dunmere", "Elsfield", "Farnholt", "Gosdale", "Harrowby", "Ingleton",
          "Kelmouth", "Lorbeck", "Marsden", "Norwell", "Ostham", "Pendrift", "Quarley")  # fmt: skip


@dataclass(frozen=True)
class Needle:
    """A prompt of token ids, and the digits that should follow it."""

    prompt: list[int]
    answer: str


@dataclass(frozen=True)
class NeedleResult:
    """Of ``trials`` documents of ``context`` tokens at each depth (0: at the beginning, 1: before the question), the
    share of answers that were right."""

    context: int
    trials: int
    accuracies: dict[float, float]
    tokens: int  # of all prompts

    @property
    def accuracy(self) -> float:
        return sum(self.accuracies.values()) / len(self.accuracies)


def needles(tokenizer: Tokenizer, context: int, depth: float, trials: int, *, seed: int = 0) -> list[Needle]:
    """Documents that with their answers have ``context`` tokens or a few less. The same for the same arguments, and
    other ones at every depth. Raises ``FallowError`` where the context is too short for a document."""
    draw = random.Random(f"{seed} {context} {depth}")
    return [_needle(tokenizer, context, depth, draw) for _ in range(trials)]


def _needle(tokenizer: Tokenizer, context: int, depth: float, draw: random.Random) -> Needle:
    town = draw.choice(_TOWNS)
    answer = "".join(draw.choices("123456789", k=_DIGITS))
    hidden = f" The secret number of {town} is {answer}."
    question = f" What is the secret number of {town}? The secret number of {town} is"
    sentences = [_sentence(draw) for _ in range(max(context // 8, 1))]  # more than there is room for

    def prompt(count: int) -> list[int]:
        before = round(depth * count)
        return tokenizer.encode("".join((*sentences[:before], hidden, *sentences[before:count], question)).lstrip())

    low, high = 1, len(sentences)  # the most sentences that fit
    if len(prompt(low)) + _ANSWER_TOKENS > context:
        raise FallowError(f"A context of {context} tokens has no room for a document: give more.")
    while low < high:
        middle = (low + high + 1) // 2
        if len(prompt(middle)) + _ANSWER_TOKENS <= context:
            low = middle
        else:
            high = middle - 1
    return Needle(prompt(low), answer)


def _sentence(draw: random.Random) -> str:
    return " " + " ".join(draw.choice(words) for words in (_WHO, _WHAT, _WHERE, _WHEN)) + "."


Answers = Callable[[list[list[int]], int], list[str]]
"""What a model writes greedily after each of some prompts of token ids, in so many tokens at most."""


def find_needles(
    answers: Answers,
    tokenizer: Tokenizer,
    *,
    context: int,
    trials: int = TRIALS,
    depths: Sequence[float] = DEPTHS,
    seed: int = 0,
    progress: Progress = lambda what, done, total: None,
) -> NeedleResult:
    """Ask for ``trials`` needles in ``context`` tokens at each of ``depths``. An answer is right where it begins with
    the digits. Raises ``FallowError`` as ``needles`` does."""
    accuracies: dict[float, float] = {}
    tokens = 0
    for number, depth in enumerate(depths):
        asked = needles(tokenizer, context, depth, trials, seed=seed)
        right = 0
        for first in range(0, trials, _AT_ONCE):
            progress("looking for needles", number * trials + first, len(depths) * trials)
            part = asked[first : first + _AT_ONCE]
            texts = answers([needle.prompt for needle in part], _ANSWER_TOKENS)
            right += sum(text.strip().startswith(needle.answer) for needle, text in zip(part, texts, strict=True))
        accuracies[depth] = right / trials
        tokens += sum(len(needle.prompt) for needle in asked)
    return NeedleResult(context, trials, accuracies, tokens)
