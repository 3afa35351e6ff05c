"""A model in a few lines of numpy, to test everything above the native core within seconds.

Its keys and values are hashes of the token, its position and all that came before, kept in pages as the page table
says, and its logits are hashes of what is read back from there. So a wrong page, a wrong position, a page shared that
should not be, a chunk cut wrongly or a draft that left something behind changes what it writes. Steps that break the
contract of ``StepBatch`` fail, and so do those that read what another step drafted and are no draft themselves.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from fallow.engine.batch import SAMPLING_DTYPE, StepBatch, StepResult
from fallow.models.config import ModelConfig, RopeConfig
from fallow.models.tokenizer import Tokenizer

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
VOCAB_SIZE = 288  # more rows than the tokenizer has tokens, and whole words of 32 bits
U64 = np.uint64


def mix(x: Any) -> Any:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014), elementwise."""
    with np.errstate(over="ignore"):
        x = np.asarray(x, U64) + U64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> U64(30))) * U64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> U64(27))) * U64(0x94D049BB133111EB)
        return x ^ (x >> U64(31))


def byte_tokenizer() -> Tokenizer:
    """One token a byte, and three special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {text: i for i, text in enumerate([*SPECIAL, *alphabet])}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL)
    import json

    return Tokenizer(json.loads(backend.to_str()), bos_token_id=1, eos_token_ids=[2])


def config(max_context: int) -> ModelConfig:
    return ModelConfig(
        architecture="llama",
        vocab_size=VOCAB_SIZE,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=max_context,
        rms_norm_eps=1e-5,
        rope=RopeConfig(),
        attention_scale=1.0,
        tie_word_embeddings=True,
        layer_windows=(None,),
        eos_token_ids=(2,),
    )


class ReferenceRunner:
    """``spread`` makes the distributions sharper; ``repeating`` makes drafts by prompt lookup come true. Of the model's
    own drafts the share ``harsh`` of the rows is wrong."""

    page_size = 8

    def __init__(
        self,
        num_pages: int,
        *,
        max_context: int = 512,
        spread: float = 8.0,
        repeating: bool = False,
        harsh: float = 0.0,
    ) -> None:
        self.config = config(max_context)
        self.vocab_size = VOCAB_SIZE
        self.num_pages = num_pages
        self.max_context = max_context
        self.spread = spread
        self.repeating = repeating
        self.harsh = harsh
        self.steps = 0
        self.fail_at: set[int] = set()
        self.closed = False
        random = np.random.default_rng(0)
        self.cache = random.integers(0, 2**63, (num_pages, self.page_size), U64)
        self.drafted = np.zeros((num_pages, self.page_size), bool)

    def step(self, batch: StepBatch) -> StepResult:
        self.steps += 1
        if self.steps in self.fail_at:
            raise RuntimeError("the reference runner was told to fail")
        self._check(batch)
        sequences = len(batch.start_positions)
        writers: dict[int, int] = {}
        states = np.zeros(len(batch.tokens), U64)
        size = self.page_size
        for s in range(sequences):
            first, last = batch.row_offsets[s], batch.row_offsets[s + 1]
            start = int(batch.start_positions[s])
            end = start + last - first
            pages = batch.page_table[s, : -(-end // size)]
            assert ((pages >= 0) & (pages < self.num_pages)).all(), "a page is outside the pool"
            assert len(set(pages.tolist())) == len(pages), "a page is twice in a table"
            for page in pages[start // size :].tolist():
                assert writers.setdefault(page, s) == s, "two sequences write to one page"
            for row in range(first, last):
                position = start + row - first
                entries = self.cache[pages].reshape(-1)
                with np.errstate(over="ignore"):
                    if self.repeating:
                        # Two bits of each of the last three tokens decide: the text soon runs in a circle.
                        entry = mix(position) + U64(batch.tokens[row])
                        entries[position] = entry
                        recent = np.arange(max(position - 2, 0), position + 1, dtype=U64)
                        states[row] = mix(
                            ((entries[recent] - mix(recent)) % U64(4) * U64(4) ** (position - recent)).sum()
                        )
                    else:
                        before = mix(entries[:position] + np.arange(position, dtype=U64)).sum(dtype=U64)
                        entry = mix(mix(batch.tokens[row]) + mix(position) + before)
                        states[row] = mix(entry + before)
                    self.cache[pages[position // size], position % size] = entry
                self._draft(batch, row, position, states)
                self.drafted[pages[position // size], position % size] = batch.mode == "draft"
                assert batch.mode == "draft" or not self.drafted[pages].reshape(-1)[: position + 1].any()
        for s in range(sequences):
            start, rows = int(batch.start_positions[s]), batch.row_offsets[s + 1] - batch.row_offsets[s]
            read = set(batch.page_table[s, : -(-(start + rows) // size)].tolist())
            assert all(writers.get(page, s) == s for page in read), "a page is read while another sequence writes to it"
        return self._sample(batch, states[batch.logit_rows])

    def _draft(self, batch: StepBatch, row: int, position: int, states: Any) -> None:
        with np.errstate(over="ignore"):
            if batch.mode == "draft" and float(mix(position + mix(batch.tokens[row])) >> U64(11)) / 2**53 < self.harsh:
                states[row] = mix(states[row])

    def _check(self, batch: StepBatch) -> None:
        for array in (batch.tokens, batch.row_offsets, batch.start_positions, batch.page_table, batch.logit_rows):
            assert array.dtype == np.int32
            assert array.flags.c_contiguous
        assert batch.sampling.dtype == SAMPLING_DTYPE
        assert batch.sampling.flags.c_contiguous
        assert batch.row_offsets[0] == 0
        assert batch.row_offsets[-1] == len(batch.tokens)
        assert (np.diff(batch.row_offsets) > 0).all()
        assert len(batch.row_offsets) == len(batch.start_positions) + 1 == len(batch.page_table) + 1
        assert (np.diff(batch.logit_rows) > 0).all()
        assert len(batch.sampling) == len(batch.logit_rows)
        assert ((batch.tokens >= 0) & (batch.tokens < self.vocab_size)).all()
        for row in batch.page_table:
            used = int((row >= 0).sum())
            assert (row[used:] == -1).all(), "unused entries of a page table are -1"

    def _sample(self, batch: StepBatch, states: Any) -> StepResult:
        rows = len(states)
        ids = np.arange(self.vocab_size, dtype=U64)
        most = int(batch.sampling["logprobs"].max(initial=0))
        result = StepResult(
            np.zeros(rows, np.int32),
            np.zeros(rows, np.float32),
            np.zeros((rows, most), np.int32),
            np.zeros((rows, most), np.float32),
        )
        for row in range(rows):
            with np.errstate(over="ignore"):
                logits = (mix(mix(ids) + states[row]) >> U64(40)).astype(np.float64) / 2**24 * self.spread
            logprobs = logits - np.logaddexp.reduce(logits)
            order = np.argsort(-logprobs, kind="stable")[:most]
            token = self._draw(batch, row, logits)
            result.tokens[row] = token
            if batch.sampling["logprobs"][row] < 0:
                continue
            result.logprobs[row] = logprobs[token]
            result.top_tokens[row] = order
            result.top_logprobs[row] = logprobs[order]
        return result

    def _draw(self, batch: StepBatch, row: int, logits: Any) -> int:
        how = batch.sampling[row]
        logits = logits.copy()
        if batch.repeated_offsets is not None and batch.repeated_tokens is not None:
            seen = batch.repeated_tokens[batch.repeated_offsets[row] : batch.repeated_offsets[row + 1]]
            assert len(set(seen.tolist())) == len(seen)
            penalty = how["repetition_penalty"]
            logits[seen] = np.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
        else:
            assert how["repetition_penalty"] == 1
        if batch.bias_offsets is not None and batch.bias_tokens is not None and batch.bias_values is not None:
            part = slice(batch.bias_offsets[row], batch.bias_offsets[row + 1])
            np.add.at(logits, batch.bias_tokens[part], batch.bias_values[part].astype(np.float64))
        if batch.allowed is not None:
            bits = np.unpackbits(batch.allowed[row].view(np.uint8), bitorder="little")[: self.vocab_size]
            logits[bits == 0] = -np.inf
        if how["temperature"] == 0:
            return int(np.argmax(logits))
        order = np.argsort(-logits, kind="stable")
        if how["top_k"]:
            order = order[: how["top_k"]]
        weights = np.exp((logits[order] - logits[order[0]]) / how["temperature"])
        weights /= weights.sum()
        kept = (np.cumsum(weights) - weights < how["top_p"]) & (weights >= how["min_p"] * weights[0])
        kept[0] = True
        sums = np.cumsum(np.where(kept, weights, 0))
        with np.errstate(over="ignore"):
            uniform = float(mix(mix(how["seed"]) + how["draw"]) >> U64(11)) / 2**53
        return int(order[np.searchsorted(sums, uniform * sums[-1], side="right").clip(0, len(order) - 1)])

    def close(self) -> None:
        self.closed = True
