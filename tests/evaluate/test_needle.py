"""Needles: where they lie in their documents, and a real model that finds them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fallow.engine.engine import Engine
from fallow.engine.sampling import SamplingParams
from fallow.errors import FallowError
from fallow.evaluate.needle import DEPTHS, find_needles, needles
from fallow.models.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(smollm2_gguf: Path) -> Tokenizer:
    return load_tokenizer(smollm2_gguf)


@pytest.mark.parametrize("context", [80, 300, 2000])
@pytest.mark.parametrize("depth", DEPTHS)
def test_the_number_lies_where_it_should(tokenizer: Tokenizer, context: int, depth: float) -> None:
    for needle in needles(tokenizer, context, depth, 3):
        assert context - 40 < len(needle.prompt) + 12 <= context
        text = tokenizer.decode(needle.prompt)
        hidden, question = re.search(r"The secret number of (\w+) is (\d+)\.", text), text.rfind(" What is the secret")
        assert hidden is not None
        assert hidden[2] == needle.answer
        assert text.count(needle.answer) == 1
        assert text.endswith(f"The secret number of {hidden[1]} is")
        assert hidden.start() / question == pytest.approx(depth, abs=80 / context + 0.3 * (context < 100))


def test_documents_are_drawn_by_the_seed(tokenizer: Tokenizer) -> None:
    first, again, other, deeper = (
        needles(tokenizer, 200, depth, 4, seed=seed) for depth, seed in ((0.5, 1), (0.5, 1), (0.5, 2), (1.0, 1))
    )
    assert first == again
    assert len({needle.answer for part in (first, other, deeper) for needle in part}) == 12


def test_a_context_without_room_is_a_sentence(tokenizer: Tokenizer) -> None:
    with pytest.raises(FallowError, match="no room"):
        needles(tokenizer, 40, 0.5, 1)


def test_a_model_finds_what_is_there_and_nothing_else(smollm2_gguf: Path) -> None:
    with Engine(smollm2_gguf, max_context=256, max_num_seqs=4) as engine:

        def answers(prompts: list[list[int]], tokens: int) -> list[str]:
            outputs = engine.generate(prompts, SamplingParams(temperature=0, max_tokens=tokens))
            return [output.outputs[0].text for output in outputs]

        def shifted(prompts: list[list[int]], tokens: int) -> list[str]:
            first, *others = answers(prompts, tokens)
            return [*others, first]  # each gets the answer of the next

        result = find_needles(answers, engine.tokenizer, context=256, trials=3, depths=(0.0, 1.0))
        assert result.tokens <= 2 * 3 * 256
        assert result.accuracy > 0.6
        assert find_needles(shifted, engine.tokenizer, context=256, trials=3, depths=(0.0, 1.0)).accuracy == 0
