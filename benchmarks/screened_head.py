"""What a screened head is worth: how often its shortlist holds the token that the whole head would choose, how often
more had to be computed, and the time of the head and of whole steps of decoding.

    fallow sparsify smollm2-135m --out lean
    python benchmarks/screened_head.py lean

Tokens are chosen greedily, one sequence a step, after every token of two texts and along the model's own answers.
Draws at temperature 1 after one text are compared with the distribution by chi-square; its deviate is that of the
normal distribution (Wilson and Hilferty). The time of a head is that of a step less that of the same model without
one, the median over turns.
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np
from step_parts import Side, step_milliseconds

from fallow.data.sources import open_source
from fallow.engine.batch import SAMPLING_DTYPE, StepBatch
from fallow.engine.engine import Engine
from fallow.engine.program import TILE_ROWS, DecoderProgram
from fallow.engine.runner import ModelRunner
from fallow.engine.sampling import SamplingParams
from fallow.models.checkpoint import open_checkpoint
from fallow.models.tensors import Checkpoint
from fallow.models.tokenizer import Tokenizer
from fallow.plan import SparsityPlan
from fallow.sparsification.timing import pages_of
from fallow.terminal import print_table

CONTEXT = 512
BATCHES = (1, 2, 4, 8, 16)
QUESTIONS = (
    "Why do farmers let a field lie fallow?", "Write a story about a lighthouse.", "How does a bicycle stay upright?",
    "List ten facts about whales.", "Write a Python function that sorts a list.", "Tell me about the city of Lisbon.",
    "Give me a recipe for bread.", "Describe the water cycle to a child.",
)  # fmt: skip


class WithoutHead(DecoderProgram):
    """The same model without a head: its hidden states are the logits."""

    def _head(self, table: int) -> None:
        self._program.finish(self._x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a folder with a plan that screens the head")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="the folder of the texts")
    parser.add_argument("--windows", type=int, default=8, help=f"of {CONTEXT} tokens, of each text")
    parser.add_argument("--draws", type=int, default=8000, help="after each of three texts")
    parser.add_argument("--turns", type=int, default=25)
    options = parser.parse_args()
    plan = SparsityPlan.beside(options.model)
    if plan is None or not plan.rules("head"):
        parser.error(f"{options.model} has no plan that screens the head")
    alone = SparsityPlan(head=plan.head)
    with Engine(options.model, plan=SparsityPlan.dense(), max_num_seqs=8) as engine:
        texts = _texts(engine.tokenizer, options.data, options.windows)
        texts["its own answers"] = _answers(engine)
    checkpoint = open_checkpoint(options.model)
    rows = [_agreement_row(checkpoint, alone, name, windows) for name, windows in texts.items()]
    names = ("tokens", "in the shortlist", "same token", "needed more", "of the head")
    print_table({"after": "left", **dict.fromkeys(names, "right")}, rows)
    print_table(
        {"draws": "right", "bins": "right", "chi-square": "right", "deviate": "right", "needed more": "right"},
        [_draw_row(checkpoint, alone, window[:64], options.draws) for window in texts["books"][:3]],
    )
    windows = [window for name in texts for window in texts[name]]
    rows = [_time_row(checkpoint, alone, windows, batch, options.turns) for batch in BATCHES]
    names = ("whole ms", "screened ms", "ratio", "whole head ms", "screened head ms", "share")
    print_table({"batch": "right", **dict.fromkeys(names, "right")}, rows)


def _texts(tokenizer: Tokenizer, data: Path, windows: int) -> dict[str, list[list[int]]]:
    wikitext = (data / "wikitext-2-test.txt").read_text(encoding="utf-8")
    books = [document.text[20_000:60_000] for document in open_source(str(data / "books-valid.jsonl.gz")).documents()]
    found = {}
    for name, text in (("WikiText-2 test", wikitext), ("books", "".join(books))):
        ids = tokenizer.encode(text[: 8 * CONTEXT * windows], add_special_tokens=False)
        found[name] = [ids[start : start + CONTEXT] for start in range(0, windows * CONTEXT, CONTEXT)]
    return found


def _answers(engine: Engine) -> list[list[int]]:
    prompts = [
        engine.tokenizer.encode(engine.tokenizer.chat_template.render([{"role": "user", "content": question}]))
        for question in QUESTIONS
        if engine.tokenizer.chat_template is not None
    ]
    params = SamplingParams(temperature=0, max_tokens=CONTEXT - max(map(len, prompts)), ignore_eos=True)
    return [
        prompt + list(output.outputs[0].token_ids)
        for prompt, output in zip(prompts, engine.generate(prompts, params), strict=True)
    ]


def _agreement_row(
    checkpoint: Checkpoint, plan: SparsityPlan, name: str, windows: list[list[int]]
) -> tuple[object, ...]:
    tokens = listed = same = 0
    with ExitStack() as stack:
        dense, sparse = (
            stack.enter_context(closing(ModelRunner(checkpoint, num_pages=pages_of(CONTEXT), plan=rules)))
            for rules in (SparsityPlan.dense(), plan)
        )
        for window in windows:
            for position, token in enumerate(window):
                expected, chosen = (int(_step(runner, token, position)) for runner in (dense, sparse))
                tokens += 1
                same += expected == chosen
                listed += expected // TILE_ROWS in sparse.head_tiles(0, shortlist=True)
        _, tiles, doubtful = sparse.head_counts
    share = tiles * TILE_ROWS / tokens / checkpoint.config.vocab_size
    cells = (listed / tokens, same / tokens, doubtful / tokens, share)
    return name, f"{tokens:,}", *(f"{cell:.2%}" for cell in cells)


def _step(runner: ModelRunner, token: int, position: int) -> int:
    sampling = np.zeros(1, SAMPLING_DTYPE)
    sampling["top_p"], sampling["repetition_penalty"], sampling["logprobs"] = 1, 1, -1
    pages = np.arange(pages_of(CONTEXT), dtype=np.int32)[None]
    one = np.array([0], np.int32)
    batch = StepBatch(
        np.array([token], np.int32), np.array([0, 1], np.int32), np.array([position], np.int32), pages, one, sampling
    )
    return int(runner.step(batch).tokens[0])


def _draw_row(checkpoint: Checkpoint, plan: SparsityPlan, text: list[int], draws: int) -> tuple[object, ...]:
    """The text is read once; its last token again and again."""
    rows = BATCHES[-1]
    with ExitStack() as stack:
        dense, sparse = (
            stack.enter_context(closing(ModelRunner(checkpoint, num_pages=pages_of(CONTEXT), plan=rules)))
            for rules in (SparsityPlan.dense(), plan)
        )
        logits = dense.logits(text)[-1].astype(np.float64)
        sparse.logits(text)
        counts = np.zeros(checkpoint.config.vocab_size)
        sampling = np.zeros(rows, SAMPLING_DTYPE)
        sampling["temperature"], sampling["top_p"], sampling["repetition_penalty"], sampling["logprobs"] = 1, 1, 1, -1
        # All rows write the same keys and values of the last token into the same page.
        pages = np.tile(np.arange(pages_of(len(text)), dtype=np.int32), (rows, 1))
        offsets = np.arange(rows + 1, dtype=np.int32)
        positions = np.full(rows, len(text) - 1, np.int32)
        tokens = np.full(rows, text[-1], np.int32)
        for first in range(0, draws, rows):
            sampling["draw"] = np.arange(first, first + rows)
            batch = StepBatch(tokens, offsets, positions, pages, offsets[1:] - 1, sampling)
            np.add.at(counts, sparse.step(batch).tokens, 1)
        screened, _, doubtful = sparse.head_counts
    expected = np.exp(logits - logits.max())
    expected *= counts.sum() / expected.sum()
    often = expected >= 5
    observed, mean = (np.append(values[often], values[~often].sum()) for values in (counts, expected))
    statistic = float(((observed - mean) ** 2 / mean).sum())
    degrees = len(mean) - 1
    spread = 2 / (9 * degrees)
    deviate = ((statistic / degrees) ** (1 / 3) - (1 - spread)) / spread**0.5
    return f"{counts.sum():,.0f}", len(mean), f"{statistic:.1f}", f"{deviate:+.2f}", f"{doubtful / screened:.1%}"


def _time_row(
    checkpoint: Checkpoint, plan: SparsityPlan, windows: list[list[int]], batch: int, turns: int
) -> tuple[object, ...]:
    sides = Side(checkpoint), Side(checkpoint, plan), Side(checkpoint, layout=WithoutHead)
    times = step_milliseconds(sides, windows, batch=batch, context=CONTEXT // 2, turns=turns)
    whole, screened, without = times.T
    head, left = whole - without, screened - without
    cells = (whole, screened, whole / screened, head, left)
    return batch, *(f"{np.median(cell):.2f}" for cell in cells), f"{np.median(left / head):.1%}"


if __name__ == "__main__":
    main()
