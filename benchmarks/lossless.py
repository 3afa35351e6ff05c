"""What drafts under a plan are worth where the dense model verifies them: tokens a second of a model dense, under its
plan, and lossless.

    fallow sparsify smollm2-135m --context 4096 --out lean
    python benchmarks/lossless.py lean --context 4096

Answers after stretches of books. The sides take turns in one process, the median over the turns counts; tokens a second
are those of all sequences from the first token of the last one to the end of the first one, so that prompts are no part
of it. The answers of the dense and the lossless side must be the same; in a turn before, which is not timed, their
log-probabilities too.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from queue import SimpleQueue
from statistics import median

from fallow.data.sources import open_source
from fallow.engine.engine import Engine, RequestDelta
from fallow.engine.sampling import SamplingParams
from fallow.plan import SparsityPlan
from fallow.terminal import print_table

SIDES = ("dense", "sparse", "lossless")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a folder with a plan")
    parser.add_argument("--context", type=int, default=4096, help="tokens of each prompt")
    parser.add_argument("--batch", type=int, default=1, help="sequences at once")
    parser.add_argument("--tokens", type=int, default=192, help="that each sequence writes")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="the folder of the books")
    options = parser.parse_args()
    if SparsityPlan.beside(options.model) is None:
        parser.error(f"{options.model} has no plan")
    with ExitStack() as stack:
        engines = [stack.enter_context(_engine(side, options)) for side in SIDES]
        texts = _texts(engines[0], options)
        speeds: dict[str, list[float]] = {side: [] for side in SIDES}
        for turn in range(options.turns + 1):
            first = turn * options.batch
            prompts = [texts[i % len(texts)] for i in range(first, first + options.batch)]
            answers = {}
            for side, engine in zip(SIDES, engines, strict=True):
                # Log-probabilities take the whole head, where the plan would screen it.
                answers[side], speed = _answers(engine, prompts, options, logprobs=None if turn else 0)
                if turn:
                    speeds[side].append(speed)
            if answers["lossless"] != answers["dense"]:
                raise SystemExit(f"turn {turn}: the lossless answers are not those of the dense model")
        drafted, accepted = (getattr(engines[2].stats(), f"{name}_tokens") for name in ("drafted", "accepted"))
    rows = [
        (
            side,
            f"{median(speeds[side]):.1f}",
            f"{min(speeds[side]):.1f} to {max(speeds[side]):.1f}",
            f"{median(a / b for a, b in zip(speeds[side], speeds['dense'], strict=True)):.2f}",
        )
        for side in SIDES
    ]
    print_table({"side": "left", "tokens/s": "right", "turns": "right", "times dense": "right"}, rows)
    share = f"{accepted / drafted:.1%} of {drafted:,} drafted tokens" if drafted else "no tokens"
    print(f"Batch {options.batch}, context {options.context}: {share} accepted; the answers are the dense ones.")


def _engine(side: str, options: argparse.Namespace) -> Engine:
    return Engine(
        options.model,
        threads=options.threads,
        max_context=options.context + options.tokens,
        max_num_seqs=options.batch,
        prefix_caching=False,
        plan=SparsityPlan.dense() if side == "dense" else None,
        speculation="self" if side == "lossless" else None,
    )


def _texts(engine: Engine, options: argparse.Namespace) -> list[list[int]]:
    documents = [document.text for document in open_source(str(options.data / "books-valid.jsonl.gz")).documents()]
    texts = [engine.tokenizer.encode(text[20_000:][: 8 * options.context]) for text in documents]
    return [tokens[: options.context] for tokens in texts if len(tokens) >= options.context]


def _answers(
    engine: Engine, prompts: Sequence[Sequence[int]], options: argparse.Namespace, *, logprobs: int | None
) -> tuple[list[tuple[list[int], list[float]]], float]:
    """What each prompt is answered with, and the tokens a second while all of them are being written."""
    deltas: SimpleQueue[tuple[int, float, RequestDelta]] = SimpleQueue()
    params = SamplingParams(
        temperature=options.temperature, seed=0, max_tokens=options.tokens, ignore_eos=True, logprobs=logprobs
    )

    def receiver(number: int) -> None:
        engine.submit(prompts[number], params, lambda delta: deltas.put((number, time.perf_counter(), delta)))

    for number in range(len(prompts)):
        receiver(number)
    told: list[tuple[int, float, RequestDelta]] = []
    while sum(delta.finish_reason is not None for _, _, delta in told) < len(prompts):
        told.append(deltas.get())
    began = max(min(when for n, when, _ in told if n == number) for number in range(len(prompts)))
    ended = min(when for _, when, delta in told if delta.finish_reason is not None)
    written = sum(len(delta.token_ids) for _, when, delta in told if began < when <= ended)
    answers: list[tuple[list[int], list[float]]] = [([], []) for _ in prompts]
    for number, _, delta in told:
        tokens, logs = answers[number]
        tokens += delta.token_ids
        logs += [entry.logprob for entry in delta.logprobs or []]
    return answers, written / (ended - began)


if __name__ == "__main__":
    main()
