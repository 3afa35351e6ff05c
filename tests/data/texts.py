"""Texts that every machine has."""

from __future__ import annotations

import random

WORDS = "the field lies fallow and rests so that next year's corn (12 or 340 of it) may bear more, naïve as it is 麦\n"


def text_of(seed: int, words: int) -> str:
    """Lines of words in an order that the seed decides."""
    generator = random.Random(seed)
    return " ".join(generator.choices(WORDS.split(" "), k=words)).strip() + "."
