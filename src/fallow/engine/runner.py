"""Runs steps of a model on the native core: packs the weights, owns the KV pages, returns sampled tokens."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

import numpy as np

from fallow import _native
from fallow.arrays import Float32, Int32
from fallow.engine.batch import SAMPLING_DTYPE, StepBatch, StepResult, greedy
from fallow.engine.program import TILE_ROWS, ProgramBuilder, layout_of
from fallow.engine.trace import Trace, TraceShape
from fallow.errors import FallowError, ModelFileError
from fallow.models.head_screen import HeadScreen
from fallow.models.resting import resting, screen_rule
from fallow.models.rope import longest_context
from fallow.models.structure import without_removed
from fallow.models.tensors import Checkpoint
from fallow.plan import SparsityPlan

if TYPE_CHECKING:
    import numpy.typing as npt

Precision = Literal["auto", "bf16", "q8", "q4"]
PRECISIONS: tuple[Precision, ...] = ("auto", "bf16", "q8", "q4")
LOGITS_BYTES = 64 << 20
SCORED_ROWS = 128
CENTRING_TOKENS = 256


class ModelRunner:
    """One model, its KV cache and its threads. One step at a time, from one thread at a time.

    ``threads``: ``None`` takes the physical cores that the process may use. ``num_pages`` pages of ``page_size``
    tokens hold the keys and values; memory is taken as pages are first written. ``plan`` says what rests;
    ``head_screen`` is what lies beside the weights, where the plan screens the head and nothing else is given. ``isa``
    chooses the instruction set (tests; the best that the CPU runs otherwise).

    Raises ``ModelFileError`` for a checkpoint, ``FallowError`` for an option that cannot be served.
    """

    page_size: int = _native.page_size

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        precision: Precision = "auto",
        threads: int | None = None,
        num_pages: int,
        max_step_tokens: int = 512,
        max_step_sequences: int = 64,
        plan: SparsityPlan | None = None,
        head_screen: HeadScreen | None = None,
        isa: str | None = None,
    ) -> None:
        if precision not in PRECISIONS:
            raise FallowError(f"precision {precision!r} is not known: use one of {', '.join(PRECISIONS)}.")
        if threads is not None and not 1 <= threads <= 1024:
            raise FallowError(f"threads must be from 1 to 1024, not {threads}.")
        self.config = config = checkpoint.config
        self.vocab_size = config.vocab_size
        self.num_pages = num_pages
        self.threads = threads or _native.usable_cores()
        self.max_context = min(longest_context(config.rope, config.max_position_embeddings), num_pages * self.page_size)
        rows = max(max_step_sequences, min(SCORED_ROWS, LOGITS_BYTES // (4 * config.vocab_size)))
        self._max_step_tokens = max_step_tokens
        self._max_logit_rows = rows
        try:
            self._program = _native.Program(
                threads=self.threads,
                isa=isa or _native.available_isas()[0],
                num_heads=config.num_attention_heads,
                num_kv_heads=config.num_key_value_heads,
                head_dim=config.head_dim,
                num_layers=config.num_hidden_layers,
                max_tokens=max_step_tokens,
                max_sequences=max_step_sequences,
                max_logit_rows=rows,
                num_pages=num_pages,
                max_positions=self.max_context,
            )
            plan = plan or SparsityPlan.dense()
            rests, rule = resting(plan, config), screen_rule(plan, config)
            if rule is not None:
                head_screen = head_screen or HeadScreen.beside(checkpoint)
            checkpoint = without_removed(checkpoint, [layer.kept for layer in rests])
            builder = ProgramBuilder(self._program, checkpoint, precision, rests, rule, head_screen)
            layout_of(config)(builder, self.max_context)
            self._program.centre(_centring_tokens(config.vocab_size, min(self.page_size, self.max_context)))
        except FallowError:
            raise
        except (ValueError, MemoryError) as error:
            raise ModelFileError(f"{checkpoint.path} cannot be run: {error or 'not enough memory'}.") from error
        tiles = None if rule is None else -(-config.vocab_size // TILE_ROWS)
        self._trace_shape = TraceShape(
            rests, config.num_key_value_heads, self.page_size, config.intermediate_size, builder.inputs, tiles
        )
        self.precision = precision
        self.precision_report = builder.report
        self.page_bytes: int = self._program.page_bytes
        self.isa: str = self._program.isa

    @property
    def memory_bytes(self) -> int:
        """Bytes of the packed weights and of a full KV cache."""
        return int(self._program.weight_bytes) + self.num_pages * self.page_bytes

    @property
    def weight_bytes(self) -> int:
        return int(self._program.weight_bytes)

    @property
    def head_counts(self) -> tuple[int, int, int]:
        """So far, where the head is screened: tokens chosen so, tiles of the head computed for them (of 16 rows each),
        and tokens for which the shortlist was not enough."""
        return self._program.head_counts

    def head_tiles(self, row: int, *, shortlist: bool = False) -> list[int]:
        """The tiles of the head (16 rows each) that the last step computed for one of its logit rows, or those of its
        shortlist alone."""
        return self._program.head_tiles(row, shortlist=shortlist)

    def step(self, batch: StepBatch) -> StepResult:
        """Computes one step and samples a token for each of its logit rows. Releases the interpreter lock."""
        tokens, logprobs, top_tokens, top_logprobs = self._program.step(
            batch.tokens,
            batch.row_offsets,
            batch.start_positions,
            batch.page_table,
            batch.logit_rows,
            batch.sampling.view(np.uint8).reshape(-1, SAMPLING_DTYPE.itemsize),
            batch.bias_offsets,
            batch.bias_tokens,
            batch.bias_values,
            batch.repeated_offsets,
            batch.repeated_tokens,
            batch.allowed,
            batch.mode,
        )
        return StepResult(tokens, logprobs, top_tokens, top_logprobs)

    def logits(self, tokens: npt.ArrayLike, *, chunk: int = 512) -> Float32:
        """Logits after each token, float32 ``[T, vocab]``. Uses the pages from 0 on: not beside ``step``."""
        return np.concatenate(list(self.logit_blocks(tokens, chunk=chunk)))

    def logit_blocks(self, tokens: npt.ArrayLike, *, first: int = 0, chunk: int = 512) -> Iterator[Float32]:
        """The same from the token ``first`` on, some rows at a time."""
        for rows, start in self._passes(tokens, chunk):
            if start + rows > first:
                yield self._program.logits(rows)[max(first - start, 0) :]

    def score(self, tokens: npt.ArrayLike, *, first: int = 1, chunk: int = 512) -> Float32:
        """Log-probability of each token from ``first`` (at least 1) on, float32 ``[T - first]``. Not beside ``step``,
        as ``logits``."""
        ids = np.asarray(tokens, np.int32)
        scores = np.empty(max(ids.size - 1, 0), np.float32)
        for rows, start in self._passes(ids[:-1], chunk):
            if start + rows >= first:
                targets = ids[start + 1 : start + 1 + rows]
                scores[start : start + rows] = self._program.log_probabilities(np.ascontiguousarray(targets))
        return scores[first - 1 :]

    def trace(
        self,
        tokens: npt.ArrayLike,
        *,
        sampling: npt.NDArray[np.void] | None = None,
        pages: npt.ArrayLike | None = None,
        chunk: int = 512,
    ) -> Trace:
        """What works for each of ``tokens`` of one sequence, and for the choice of a token after the last of them:
        ``sampling`` (``SAMPLING_DTYPE``, ``[C]``) says how it is chosen after each of the last ``C``; None: greedily,
        after all. No result depends on ``chunk``, nor is another than that of a step which is not traced.

        Keys and values go to ``pages``, from 0 on where None are given: not beside ``step`` then. Raises
        ``FallowError`` where there are no tokens, or more than fit the context or a trace of ``MAX_TRACE_BYTES``.
        """
        ids = np.ascontiguousarray(tokens, np.int32)
        if not ids.size:
            raise FallowError("There are no tokens to trace: give one or more.")
        self._check_fits(ids.size)
        sampling = greedy(ids.size) if sampling is None else sampling
        trace = self._trace_shape.empty(ids, len(sampling))
        table = np.arange(self._pages_for(ids.size)) if pages is None else np.asarray(pages)
        table = np.ascontiguousarray(table, np.int32)[None, :]
        step = min(chunk, self._max_step_tokens, self._max_logit_rows)
        for start in range(0, ids.size, step):
            part = slice(start, min(start + step, ids.size))
            first = max(trace.first_choice, start)
            choices = slice(first - trace.first_choice, max(part.stop - trace.first_choice, 0))
            chosen, *_ = self._program.step(
                ids[part],
                np.array([0, part.stop - start], np.int32),
                np.array([start], np.int32),
                table,
                np.arange(first - start, max(part.stop, first) - start, dtype=np.int32),
                sampling[choices].view(np.uint8).reshape(-1, SAMPLING_DTYPE.itemsize),
                pages_read=None if trace.pages is None else trace.pages.packed[part],
                neurons_at_work=None if trace.neurons is None else trace.neurons.packed[part],
                inputs_at_work=None if trace.inputs is None else trace.inputs.packed[part],
                tiles_computed=None if trace.head is None else trace.head.tiles[choices],
            )
            trace.chosen[choices] = chosen
        self._trace_shape.renumber(trace)
        return trace

    def _check_fits(self, count: int) -> None:
        if count > self.max_context:
            raise FallowError(f"{count} tokens do not fit the context of {self.max_context}.")

    def _pages_for(self, count: int) -> int:
        return -(-count // self.page_size)

    def _passes(self, tokens: npt.ArrayLike, chunk: int) -> Iterator[tuple[int, int]]:
        """Feeds one sequence through from position 0; yields how many rows have logits and the first one's position."""
        ids = np.ascontiguousarray(tokens, np.int32)
        self._check_fits(ids.size)
        pages = np.arange(self._pages_for(ids.size), dtype=np.int32)[None, :]
        step = min(chunk, self._max_step_tokens, self._max_logit_rows)
        for start in range(0, ids.size, step):
            rows = min(step, ids.size - start)
            self._program.run(
                ids[start : start + rows],
                np.array([0, rows], np.int32),
                np.array([start], np.int32),
                pages,
                np.arange(rows, dtype=np.int32),
            )
            yield rows, start

    def close(self) -> None:
        """Frees the weights and the KV cache; the runner cannot be used afterwards."""
        del self._program


def _centring_tokens(vocab_size: int, length: int) -> Int32:
    """Sequences of ``length`` tokens over which activations are centred before they are rounded: always the same ones,
    so that bits are too."""
    chosen = random.Random(0)
    tokens = [chosen.randrange(vocab_size) for _ in range(CENTRING_TOKENS // length * length)]
    return np.array(tokens, np.int32)
