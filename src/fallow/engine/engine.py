"""The engine: text in, text out, many requests at once on one model."""

from __future__ import annotations

import gc
import os
import queue
import uuid
import weakref
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from fallow.engine.call import Call
from fallow.engine.detokenize import Detokenizer
from fallow.engine.loop import Runner, StepLoop
from fallow.engine.memory import kv_cache_pages
from fallow.engine.outputs import (
    CompletionOutput,
    EngineStats,
    FinishReason,
    RequestDelta,
    RequestOutput,
    TokenLogprob,
)
from fallow.engine.own_draft import require_own_drafts
from fallow.engine.pages import PageManager
from fallow.engine.pays import Pays
from fallow.engine.replay import traced_answer
from fallow.engine.sampling import SamplingParams
from fallow.engine.scheduler import Scheduler
from fallow.engine.sequence import Request
from fallow.engine.sequence import Sequence as EngineSequence
from fallow.engine.speculate import DRAFT_ROWS, Speculation
from fallow.engine.trace import Trace
from fallow.errors import FallowError, RequestError
from fallow.models.checkpoint import open_checkpoint
from fallow.models.config import ModelConfig
from fallow.models.rope import longest_context
from fallow.models.store import resolve
from fallow.models.tokenizer import Tokenizer, load_tokenizer
from fallow.plan import SparsityPlan

if TYPE_CHECKING:
    from fallow.engine.constraint import GrammarVocabulary

__all__ = [
    "CompletionOutput",
    "Engine",
    "EngineStats",
    "FinishReason",
    "RequestDelta",
    "RequestOutput",
    "TokenLogprob",
]

MAX_SEQUENCES = 1024
MAX_CHUNK = 1 << 16


class Engine:
    """Serves one model on this machine's cores. All methods may be called on any thread.

    ``model`` is a known name, a hub id, a GGUF file or a Hugging Face folder. ``precision`` is that of
    ``ModelRunner``. ``max_context`` (tokens of prompt and output) and ``kv_cache_bytes`` follow from the model and the
    memory at hand. A step computes ``max_num_seqs`` sequences and ``prefill_chunk`` tokens at most; ``max_queue``
    requests may wait for their turn. None of these, nor ``prefix_caching`` or ``speculation``, changes an output; but
    with the speculation ``self`` it is the dense model's, which verifies what the model drafts under its ``plan``.

    Raises ``ModelFileError`` where the model cannot be loaded and ``FallowError`` for options that cannot be met.
    """

    def __init__(
        self,
        model: str | Path = "smollm2-135m",
        *,
        precision: Literal["auto", "bf16", "q8", "q4"] = "auto",
        threads: int | None = None,
        max_context: int | None = None,
        kv_cache_bytes: int | None = None,
        max_num_seqs: int = 64,
        prefill_chunk: int = 512,
        max_queue: int = 1024,
        prefix_caching: bool = True,
        speculation: Speculation | None = None,
        plan: SparsityPlan | None = None,
    ) -> None:
        _check_options(max_num_seqs, prefill_chunk, max_queue, max_context, speculation)
        path = resolve(model)
        plan = plan or SparsityPlan.beside(path)
        if speculation == "self":
            require_own_drafts(plan, _name_of(model))
        # The native core is loaded here: ``over`` does not need it.
        from fallow import _native  # noqa: PLC0415
        from fallow.engine.runner import ModelRunner  # noqa: PLC0415

        checkpoint = open_checkpoint(path)
        tokenizer = load_tokenizer(path)
        gc.collect()
        _native.release_free_memory()  # tens of megabytes, of which the tokenizer was made: the weights come next
        config = checkpoint.config
        tokenizer.check_vocabulary(config.vocab_size, _name_of(model))
        context = longest_context(config.rope, config.max_position_embeddings)
        num_pages = kv_cache_pages(
            config,
            page_size=ModelRunner.page_size,
            summaries=plan is not None and bool(plan.rules("attention")),
            context=min(context, max_context or context),
            max_sequences=max_num_seqs,
            kv_cache_bytes=kv_cache_bytes,
        )
        runner = ModelRunner(
            checkpoint,
            precision=precision,
            threads=threads,
            num_pages=num_pages,
            max_step_tokens=max(prefill_chunk, max_num_seqs + DRAFT_ROWS),
            max_step_sequences=max_num_seqs + (DRAFT_ROWS if speculation else 0),
            plan=plan,
        )
        _native.release_free_memory()
        self._begin(
            runner,
            tokenizer,
            model_name=_name_of(model),
            max_context=max_context,
            max_num_seqs=max_num_seqs,
            prefill_chunk=prefill_chunk,
            max_queue=max_queue,
            prefix_caching=prefix_caching,
            speculation=speculation,
        )

    @classmethod
    def over(
        cls,
        runner: Any,
        tokenizer: Tokenizer,
        *,
        model_name: str = "model",
        max_context: int | None = None,
        max_num_seqs: int = 64,
        prefill_chunk: int = 512,
        max_queue: int = 1024,
        prefix_caching: bool = True,
        speculation: Speculation | None = None,
    ) -> Engine:
        """An engine over a runner that exists, which it owns and closes: a ``ModelRunner`` or one with its methods.

        The runner must take steps of ``max(prefill_chunk, max_num_seqs + 32)`` tokens and, with speculation,
        ``max_num_seqs + 32`` rows with logits; with speculation ``self`` it must heed the mode of a step.
        """
        _check_options(max_num_seqs, prefill_chunk, max_queue, max_context, speculation)
        tokenizer.check_vocabulary(runner.vocab_size, model_name)
        engine = cls.__new__(cls)
        engine._begin(
            runner,
            tokenizer,
            model_name=model_name,
            max_context=max_context,
            max_num_seqs=max_num_seqs,
            prefill_chunk=prefill_chunk,
            max_queue=max_queue,
            prefix_caching=prefix_caching,
            speculation=speculation,
        )
        return engine

    def _begin(
        self,
        runner: Any,
        tokenizer: Tokenizer,
        *,
        model_name: str,
        max_context: int | None,
        max_num_seqs: int,
        prefill_chunk: int,
        max_queue: int,
        prefix_caching: bool,
        speculation: Speculation | None,
    ) -> None:
        self.runner = runner
        self.tokenizer = tokenizer
        self.config: ModelConfig = runner.config
        self.model_name = model_name
        capacity = runner.num_pages * runner.page_size
        self.max_context: int = min(runner.max_context, capacity, max_context or capacity)
        self._prefix_caching = prefix_caching
        self._speculation = speculation
        self._eos = frozenset(tokenizer.eos_token_ids) | frozenset(self.config.eos_token_ids)
        self._grammars: GrammarVocabulary | None = None
        self._grammars_lock = Lock()
        self.scheduler = Scheduler(
            PageManager(runner.num_pages, runner.page_size, keep_unused=prefix_caching),
            max_sequences=max_num_seqs,
            max_step_tokens=max(prefill_chunk, max_num_seqs),
            max_context=self.max_context,
            vocab_size=runner.vocab_size,
            describe=_describer(tokenizer),
            pays=Pays() if speculation == "self" else None,
        )
        self._loop = StepLoop(cast(Runner, runner), self.scheduler, max_queue=max_queue)
        self._finalizer = weakref.finalize(self, self._loop.close)

    def submit(
        self,
        prompt: str | Sequence[int],
        sampling_params: SamplingParams | None,
        on_delta: Callable[[RequestDelta], None],
    ) -> str:
        """Queue a prompt (text, or token ids as they are) and return the request's id.

        ``on_delta`` is called on the engine's thread, possibly before this returns, and must not block. Every choice
        ends with one delta that has a ``finish_reason``. Raises ``RequestError`` where the request cannot be served
        and ``OverloadedError`` where the queue is full.
        """
        return self._submit(prompt, sampling_params, on_delta, wait=False)

    def _submit(
        self,
        prompt: str | Sequence[int],
        sampling_params: SamplingParams | None,
        on_delta: Callable[[RequestDelta], None],
        *,
        wait: bool,
    ) -> str:
        params = sampling_params or SamplingParams()
        params.check_vocabulary(self.runner.vocab_size)
        tokens = self._prompt_tokens(prompt)
        if params.seed is None:
            params = replace(params, seed=int.from_bytes(os.urandom(8), "little"))
        room = self.max_context - len(tokens)
        request = Request(
            uuid.uuid4().hex,
            self._loop.next_number(),
            params,
            tokens,
            on_delta,
            salt=b"" if self._prefix_caching else os.urandom(16),
        )
        stop_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self._eos)
        vocabulary = self._grammar_vocabulary() if params.constraint is not None else None
        for index in range(params.n):
            constraint = None
            if params.constraint is not None and vocabulary is not None:
                constraint = params.constraint.start(vocabulary)
            request.sequences.append(
                EngineSequence(
                    request,
                    index,
                    max_length=len(tokens) + min(room, params.max_tokens or room),
                    stop_ids=stop_ids,
                    detokenizer=Detokenizer(
                        self.tokenizer.token_bytes, tuple(params.stop), params.include_stop_str_in_output
                    ),
                    constraint=constraint,
                    speculation=self._speculation,
                )
            )
        request.unfinished = params.n
        self._loop.submit(request, wait=wait)
        return request.request_id

    def _prompt_tokens(self, prompt: str | Sequence[int]) -> array[int]:
        vocab_size = self.runner.vocab_size
        if isinstance(prompt, str):
            ids: Sequence[int] = self.tokenizer.encode(prompt)
            beyond = max(ids, default=0)
            if beyond >= vocab_size:
                raise RequestError(
                    f"The prompt holds {self.tokenizer.token_text(beyond)!r:.40}, a token that this model cannot read: "
                    "leave it out.",
                    param="prompt",
                )
        else:
            ids = prompt
            for token in ids:
                if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab_size:
                    raise RequestError(
                        f"The prompt holds {token!r:.40}, but token ids run from 0 to {vocab_size - 1}.",
                        param="prompt",
                    )
        if not ids:
            raise RequestError("The prompt is empty: give at least one token.", param="prompt")
        if len(ids) + 1 > self.max_context:
            raise RequestError(
                f"The prompt has {len(ids)} tokens, but this engine's context is {self.max_context} tokens for the "
                "prompt and the answer together: shorten the prompt.",
                param="prompt",
                code="context_length_exceeded",
            )
        return array("i", ids)

    def _grammar_vocabulary(self) -> GrammarVocabulary:
        with self._grammars_lock:
            if self._grammars is None:
                from fallow.engine.constraint import GrammarVocabulary  # noqa: PLC0415  6 MB that most engines do without

                self._grammars = GrammarVocabulary(self.tokenizer, self.runner.vocab_size)
            return self._grammars

    def cancel(self, request_id: str) -> None:
        """End a request soon; its choices end with ``"cancelled"``. A request that has ended stays as it is."""
        self._loop.cancel(request_id)

    def generate(
        self,
        prompts: str | Sequence[str] | Sequence[Sequence[int]],
        sampling_params: SamplingParams | None = None,
    ) -> list[RequestOutput]:
        """Answer all prompts and return when the last is done, in their order.

        Waits where the queue is full. Raises as ``submit``, and ``FallowError`` where the engine fails at a prompt.
        """
        calls: list[Call] = []
        try:
            for prompt in [prompts] if isinstance(prompts, str) else prompts:
                calls.append(Call(self, prompt, sampling_params))
            return [call.result() for call in calls]
        finally:
            for call in calls:
                call.cancel()

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        sampling_params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> RequestOutput:
        """Answer a conversation under the model's own chat template. Raises as ``generate``."""
        try:
            text = self.tokenizer.apply_chat_template(messages, tools=tools)
            call = Call(self, self.tokenizer.encode(text, add_special_tokens=False), sampling_params)
        except RequestError as error:
            if error.param == "prompt":
                error.param = "messages"
            raise
        try:
            return call.result()
        finally:
            call.cancel()

    def trace(self, prompt: str | Sequence[int], sampling_params: SamplingParams | None = None) -> Trace:
        """Answer a prompt, and give what worked for each token of it and of the answer (docs/explain.md).

        ``tokens`` are those that were computed, all but the last of the answer, and ``chosen`` is the answer. When it
        is there, all is computed once more, to the same bits, and recorded; other requests wait for that. Raises as
        ``generate``, and ``OverloadedError`` where there are not enough pages left.
        """
        return traced_answer(self, prompt, sampling_params or SamplingParams())

    def stream(
        self, prompt: str | Sequence[int], sampling_params: SamplingParams | None = None
    ) -> Iterator[RequestDelta]:
        """The deltas of one request as they come; closing the iterator early cancels it. Raises as ``submit``."""
        deltas: queue.SimpleQueue[RequestDelta] = queue.SimpleQueue()
        request_id = self.submit(prompt, sampling_params, deltas.put)
        return self._deltas(request_id, deltas, (sampling_params or SamplingParams()).n)

    def _deltas(
        self, request_id: str, deltas: queue.SimpleQueue[RequestDelta], unfinished: int
    ) -> Iterator[RequestDelta]:
        try:
            while unfinished:
                delta = deltas.get()
                unfinished -= delta.finish_reason is not None
                yield delta
        finally:
            if unfinished:
                self.cancel(request_id)

    def stats(self) -> EngineStats:
        """Counts of this moment and totals from the start."""
        return self._loop.stats()

    def drain(self, timeout: float | None = None) -> bool:
        """Take no more requests and wait (seconds) until all that were taken have ended; whether they have."""
        return self._loop.drain(timeout)

    def close(self) -> None:
        """Cancel what runs and free the model. Idempotent."""
        self._finalizer()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _name_of(model: str | Path) -> str:
    """How clients call the model: the name it was asked for by, or that of its file or folder."""
    path = Path(model)
    if not path.exists():
        return str(model)
    return path.name.removesuffix(".gguf") or path.resolve().name


def _describer(tokenizer: Tokenizer) -> Callable[[int], tuple[str, bytes]]:
    """The text of a token as it is shown and the bytes that it adds; the model can have more rows than tokens."""

    @cache
    def describe(token_id: int) -> tuple[str, bytes]:
        raw = tokenizer.token_bytes[token_id] if token_id < tokenizer.vocab_size else b""
        return tokenizer.token_text(token_id), raw

    return describe


def _check_options(
    max_num_seqs: int, prefill_chunk: int, max_queue: int, max_context: int | None, speculation: str | None
) -> None:
    limits = {
        "max_num_seqs": (max_num_seqs, MAX_SEQUENCES),
        "prefill_chunk": (prefill_chunk, MAX_CHUNK),
        "max_queue": (max_queue, 2**31 - 1),
        "max_context": (2 if max_context is None else max_context, 2**31 - 1),
    }
    for name, (value, most) in limits.items():
        least = 2 if name == "max_context" else 1
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise FallowError(f"{name} must be a whole number from {least} to {most}, not {value!r}.")
    if speculation is not None and speculation not in get_args(Speculation):
        raise FallowError(f"speculation must be None, 'prompt-lookup' or 'self', not {speculation!r}.")
