"""Which tokens of which sequences are in the next step, and what becomes of the tokens that it samples.

Continuous batching (Orca, OSDI 2022) with chunked prefill beside decoding (Sarathi-Serve, arXiv 2403.02310): every
decoding sequence has its row in every step, and prompts fill what is left of the step's tokens, first come first
served. When pages run out, the sequence that came last is set back: it gives its pages up, keeps what it wrote, and is
computed again later, to the same bits.
"""

from __future__ import annotations

import time
from array import array
from bisect import insort
from collections import deque
from collections.abc import Callable
from statistics import mean

from fallow.engine.batch import StepBatch, StepResult
from fallow.engine.outputs import FinishReason, RequestDelta, TokenLogprob, TopToken
from fallow.engine.own_draft import OwnDraft
from fallow.engine.pages import PageManager
from fallow.engine.pays import Pays, load_of
from fallow.engine.running import Chunk, RunningSet
from fallow.engine.sequence import Request, Sequence
from fallow.engine.speculate import DRAFT_ROWS

Event = tuple[Request, RequestDelta]
DescribeToken = Callable[[int], tuple[str, bytes]]
"""The text of a token as it is shown, and the bytes that it adds."""
Scores = tuple[list[float], list[list[int]], list[list[float]]]


class Scheduler:
    """``schedule`` gives a step, ``commit`` takes its result; one thread at a time.

    ``max_step_tokens`` bounds the rows of a step and must be at least ``max_sequences``; rows with logits are at most
    ``max_sequences + DRAFT_ROWS``. ``pages_in_reserve`` stay available when a sequence is admitted beside others, so
    that these need not set it back at once. ``pays`` is given where the model drafts for itself: it says how far, by
    the seconds of ``clock`` that steps took. All steps that do not draft are dense then.
    """

    def __init__(
        self,
        pages: PageManager,
        *,
        max_sequences: int,
        max_step_tokens: int,
        max_context: int,
        vocab_size: int,
        describe: DescribeToken,
        pays: Pays | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.pages = pages
        self.max_sequences = max_sequences
        self.max_step_tokens = max_step_tokens
        self.pages_in_reserve = 1 + pages.num_pages // 100
        self.running = RunningSet(
            max_sequences=max_sequences,
            max_pages=pages.pages_for(max_context),
            page_size=pages.page_size,
            vocab_size=vocab_size,
        )
        self.prefilling: list[Sequence] = []
        self.waiting: deque[Sequence] = deque()  # in order
        self.begun: list[Request] = []  # since somebody cleared it
        self._describe = describe
        self._chunks: list[Chunk] = []
        self._drafts: list[array[int]] | None = None  # to be verified
        self._pays = pays
        self._clock = clock
        self._drafting: list[tuple[Sequence, OwnDraft]] = []  # one more token each
        self._load = load_of(0, 0)
        self._began = 0.0
        self.prompt_tokens = 0
        self.generated_tokens = 0
        self.prefix_hits = 0
        self.preemptions = 0
        self.drafted_tokens = 0
        self.accepted_tokens = 0

    @property
    def num_running(self) -> int:
        return len(self.prefilling) + len(self.running)

    @property
    def has_work(self) -> bool:
        return bool(self.running.sequences or self.prefilling or self.waiting)

    def add(self, request: Request) -> None:
        """Queue the sequences of a request."""
        self.waiting.extend(request.sequences)

    def stop(self, request: Request, reason: FinishReason, error: str | None = None) -> list[Event]:
        """End what is unfinished of a request and give its pages back."""
        events = []
        for sequence in request.sequences:
            # A sequence that has ended but holds pages is from a step that failed before anybody was told.
            if sequence.finish_reason is None or sequence.pages:
                self._remove(sequence)
                events.append((request, sequence.finish(reason, error)))
        return events

    def running_requests(self) -> list[Request]:
        return list(dict.fromkeys(sequence.request for sequence in [*self.prefilling, *self.running.sequences]))

    def schedule(self) -> StepBatch | None:
        """The next step, or None where there is nothing to do."""
        self._began = self._clock()
        self._give_pages()
        self._chunks, self._drafts, self._drafting = [], None, []
        budget = self.max_step_tokens - len(self.running)
        if self._pays is not None:
            return self._schedule_dense(self._pays, budget)
        if self.prefilling or self.waiting:
            self._chunks = self._plan_chunks(budget)
        else:
            self._drafts = self._draft(budget)
        if not self._chunks and not self.running.sequences:
            return None
        return self.running.build(self._chunks, self._drafts)

    def _schedule_dense(self, pays: Pays, budget: int) -> StepBatch | None:
        """The next step where the model drafts for itself: one that drafts under the plan, or a dense one, which
        verifies what has been drafted."""
        running = self.running
        own = [(sequence, sequence.own_draft) for sequence in running.sequences if sequence.own_draft is not None]
        drafted = sum(len(draft.tokens) for _, draft in own)
        if self.prefilling or self.waiting:
            self._chunks = self._plan_chunks(max(budget - drafted, 0))
        if not self._chunks:
            self._load = load_of(len(running), running.cached_tokens)
            if own and not any(draft.wanted for _, draft in own):
                self._begin_round(pays, own, budget)
            self._drafting = [(sequence, draft) for sequence, draft in own if len(draft.tokens) < draft.wanted]
            if self._drafting:
                return running.build_draft(self._drafting)
        if not self._chunks and not running.sequences:
            return None
        if drafted:
            drafts = (sequence.own_draft for sequence in running.sequences)
            self._drafts = [draft.tokens if draft is not None else _NO_DRAFT for draft in drafts]
        batch = running.build(self._chunks, self._drafts)
        batch.mode = "dense"
        return batch

    def _begin_round(self, pays: Pays, own: list[tuple[Sequence, OwnDraft]], budget: int) -> None:
        """Say how many tokens of each sequence are to be drafted, within its pages and what it may still write."""
        running = self.running
        rates = [draft.rate for _, draft in own]
        most = min(DRAFT_ROWS, budget) // len(own)
        length = pays.length(self._load, rates, len(running) - len(own), most)
        for sequence, draft in own:
            draft.wanted = min(length, sequence.max_length - len(sequence.tokens) - 1)
            free = running.free_positions(sequence.slot)
            if free < draft.wanted and self.pages.available_pages > self.pages_in_reserve:
                self._register(sequence, len(sequence.tokens) - 1)
                running.give_page(sequence, self.pages.allocate())
                free += self.pages.page_size
            draft.wanted = min(draft.wanted, free)

    def _give_pages(self) -> None:
        """A page for the next token of every decoding sequence, setting others back where there is none."""
        while slots := self.running.slots_without_page():
            # The earliest first; a sequence that is set back moves others to other slots, so look again.
            for sequence in sorted((self.running.sequences[slot] for slot in slots), key=_order):
                self._register(sequence, len(sequence.tokens) - 1)
                if not self.pages.available_pages:
                    self._set_back(max([*self.prefilling, *self.running.sequences], key=_order))
                    break
                self.running.give_page(sequence, self.pages.allocate())

    def _set_back(self, sequence: Sequence) -> None:
        self._remove(sequence)
        insort(self.waiting, sequence, key=_order)
        self.preemptions += 1

    def _draft(self, budget: int) -> list[array[int]] | None:
        """For each slot the tokens to try, or None where no slot has any."""
        room = min(DRAFT_ROWS - len(self.running), budget)
        if room <= 0 or not self.running.drafting:
            return None
        drafts = []
        for slot, sequence in enumerate(self.running.sequences):
            if sequence.lookup is None:
                drafts.append(_NO_DRAFT)
                continue
            # The draft stays within the pages at hand; its last token is followed by one more.
            limit = min(room, self.running.free_positions(slot), sequence.max_length - len(sequence.tokens) - 1)
            draft = sequence.lookup.draft(limit) if limit > 0 else _NO_DRAFT
            room -= len(draft)
            drafts.append(draft)
        return drafts if any(drafts) else None

    def _plan_chunks(self, budget: int) -> list[Chunk]:
        """Chunks of prompts, in order; only the last one can be incomplete."""
        chunks: list[Chunk] = []
        computing: set[bytes] = set()
        for sequence in self.prefilling:
            budget = self._plan_chunk(sequence, budget, chunks, computing)
        while budget > 0 and self.waiting and self.num_running < self.max_sequences:
            sequence = self.waiting[0]
            if not self._admit(sequence, computing):
                break
            self.waiting.popleft()
            self.prefilling.append(sequence)
            budget = self._plan_chunk(sequence, budget, chunks, computing)
        return chunks

    def _plan_chunk(self, sequence: Sequence, budget: int, chunks: list[Chunk], computing: set[bytes]) -> int:
        length = min(budget, len(sequence.tokens) - sequence.computed)
        if length:
            chunks.append((sequence, length))
        computing.update(sequence.digests[sequence.registered :])
        return budget - length

    def _admit(self, sequence: Sequence, computing: set[bytes]) -> bool:
        """Give a sequence all pages of the tokens it has, shared ones as far as there are any."""
        pages, count = self.pages, len(sequence.tokens)
        self._name_pages(sequence)
        limit = min((count - 1) // pages.page_size, len(sequence.digests))  # the last token is computed in any case
        shared = pages.lookup(sequence.digests, limit)
        # A page that another sequence computes right now is worth waiting for: choices of one request, equal prompts.
        if len(shared) < limit and sequence.digests[len(shared)] in computing:
            return False
        new = pages.pages_for(count) - len(shared)
        if not pages.can_take(shared, new + (self.pages_in_reserve if self.num_running else 0)):
            return False
        pages.share(shared)
        sequence.pages = shared + [pages.allocate() for _ in range(new)]
        sequence.registered = len(shared)
        sequence.computed = len(shared) * pages.page_size
        request = sequence.request
        if not request.begun:
            request.begun = True
            self.begun.append(request)
            request.cached_tokens = sequence.computed
            self.prompt_tokens += sequence.prompt_length
            self.prefix_hits += sequence.computed
        self._count(sequence, 1)
        return True

    def _count(self, sequence: Sequence, change: int) -> None:
        if sequence.edits is not None:
            self.running.edited += change
        if sequence.constraint is not None:
            self.running.masked += change
        if sequence.drafts:
            self.running.drafting += change

    def _name_pages(self, sequence: Sequence) -> None:
        """Digests of the full pages of a sequence, unless nobody could share them."""
        if self.pages.keep_unused or len(sequence.request.sequences) > 1:
            self.pages.chain(sequence.digests, sequence.tokens, sequence.request.salt)

    def _register(self, sequence: Sequence, computed: int) -> None:
        """Make the full pages of the first ``computed`` tokens known to the prefix index."""
        full = computed // self.pages.page_size
        if full > len(sequence.digests):
            self._name_pages(sequence)
        full = min(full, len(sequence.digests))
        for i in range(sequence.registered, full):
            self.pages.register(sequence.pages[i], sequence.digests[i])
        sequence.registered = max(sequence.registered, full)

    def _remove(self, sequence: Sequence) -> None:
        """Take a sequence out of wherever it is; full pages stay in the cache, the others are free."""
        if sequence.slot >= 0:
            # The last token was sampled but not computed.
            self._register(sequence, len(sequence.tokens) - 1)
            self.running.leave(sequence)
        elif sequence.pages:
            self.prefilling.remove(sequence)
        else:
            self.waiting.remove(sequence)
            return
        self._count(sequence, -1)
        self.pages.release(sequence.pages)
        sequence.pages = []
        sequence.registered = sequence.computed = 0
        if sequence.own_draft is not None:
            sequence.own_draft.clear()

    def commit(self, result: StepResult) -> list[Event]:
        """Take the sampled tokens: what each sequence is told. Sequences that end have given their pages back."""
        running = self.running
        if self._pays is not None:
            self._note_seconds(self._pays)
        if self._drafting:
            for (sequence, draft), token in zip(self._drafting, result.tokens.tolist(), strict=True):
                draft.add(token, is_last=token in sequence.stop_ids)
            return []
        for sequence, length in self._chunks:
            sequence.computed += length
            self._register(sequence, sequence.computed)
            if sequence.computed == len(sequence.tokens):
                running.join(sequence)
        if self._chunks:
            self.prefilling = [sequence for sequence in self.prefilling if sequence.slot < 0]
        if self._drafts is not None:
            return self._commit_drafts(result, self._drafts)
        running.advance(result.tokens)
        events: list[Event] = []
        ended = []
        scores: Scores | None = None
        sequences = running.sequences
        for row, token in enumerate(result.tokens.tolist()):
            sequence = sequences[row]
            text = sequence.append(token)
            logprobs = None
            if sequence.request.params.logprobs is not None:
                scores = scores or _scores(result)
                logprobs = [self._logprob(scores, row, token, sequence.request.params.logprobs)]
            events.append((sequence.request, sequence.delta(text, [token], logprobs)))
            if sequence.finish_reason is not None:
                ended.append(sequence)
        self.generated_tokens += len(events)
        for sequence in ended:
            self._remove(sequence)
        return events

    def _note_seconds(self, pays: Pays) -> None:
        """How long the step took; one with a prompt in it says nothing of others."""
        seconds = self._clock() - self._began
        if self._drafting:
            pays.saw_draft(self._load, seconds)
        elif self._drafts is not None and not self._chunks:
            pays.saw_verification(self._load, mean(len(draft) for draft in self._drafts if draft), seconds)
        elif not self._chunks:
            pays.saw_plain(self._load, seconds)

    def _commit_drafts(self, result: StepResult, drafts: list[array[int]]) -> list[Event]:
        """Row by row as long as the draft foretold the token, which is the one that would be drawn without it."""
        tokens = result.tokens.tolist()
        events: list[Event] = []
        ended = []
        scores: Scores | None = None
        row = 0
        for slot, sequence in enumerate(self.running.sequences):
            draft = drafts[slot] if slot < len(drafts) else _NO_DRAFT
            wanted = sequence.request.params.logprobs
            texts: list[str] = []
            logprobs: list[TokenLogprob] | None = None if wanted is None else []
            taken: list[int] = []
            for i in range(1 + len(draft)):
                token = tokens[row + i]
                taken.append(token)
                texts.append(sequence.append(token))
                if logprobs is not None and wanted is not None:
                    scores = scores or _scores(result)
                    logprobs.append(self._logprob(scores, row + i, token, wanted))
                if sequence.finish_reason is not None or i == len(draft) or token != draft[i]:
                    break
            row += 1 + len(draft)
            if draft:
                if sequence.lookup is not None:
                    sequence.lookup.observe(len(draft), len(taken) - 1)
                if sequence.own_draft is not None:
                    sequence.own_draft.observe(len(draft), len(taken) - 1)
                    sequence.own_draft.clear()
                self.drafted_tokens += len(draft)
                self.accepted_tokens += len(taken) - 1
            self.running.advance_one(slot, taken[-1], len(taken))
            self.generated_tokens += len(taken)
            events.append((sequence.request, sequence.delta("".join(texts), taken, logprobs)))
            if sequence.finish_reason is not None:
                ended.append(sequence)
        for sequence in ended:
            self._remove(sequence)
        return events

    def _logprob(self, scores: Scores, row: int, token: int, count: int) -> TokenLogprob:
        describe = self._describe
        logprobs, top_tokens, top_logprobs = scores
        top: list[TopToken] = []
        if count:
            top = [(i, *describe(i), p) for i, p in zip(top_tokens[row][:count], top_logprobs[row], strict=False)]
        return TokenLogprob(token, *describe(token), logprobs[row], top)

    def check(self) -> None:
        """Assert every invariant of the queues and the pages."""
        sequences = [*self.prefilling, *self.running.sequences]
        self.pages.check(sequence.pages for sequence in sequences)
        assert list(self.waiting) == sorted(self.waiting, key=_order)
        assert all(not sequence.pages and sequence.slot < 0 for sequence in self.waiting)
        assert all(sequence.slot < 0 for sequence in self.prefilling)
        assert [sequence.slot for sequence in self.running.sequences] == list(range(len(self.running)))
        assert self.running.edited == sum(sequence.edits is not None for sequence in sequences)
        assert self.running.drafting == sum(sequence.drafts for sequence in sequences)
        assert self.running.masked == sum(sequence.constraint is not None for sequence in sequences)


_NO_DRAFT: array[int] = array("i")


def _order(sequence: Sequence) -> tuple[int, int]:
    return sequence.order


def _scores(result: StepResult) -> Scores:
    """The log-probabilities of all rows as lists: numbers one by one out of arrays are slow."""
    return result.logprobs.tolist(), result.top_tokens.tolist(), result.top_logprobs.tolist()
