"""All that may rest in a model under a load, priced and with what it spares on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch

from fallow.engine.runner import Precision
from fallow.models.decoder import Decoder
from fallow.models.tensors import Checkpoint
from fallow.sparsification.choices import Choices, Either, LayerChoices, Load
from fallow.sparsification.page_choices import PageChoices
from fallow.sparsification.page_prices import page_errors
from fallow.sparsification.partial_reads import partial_times
from fallow.sparsification.removal_choices import Part, RemovalChoices
from fallow.sparsification.removal_prices import removal_errors
from fallow.sparsification.sensitivity import sensitivities
from fallow.sparsification.text import Question
from fallow.sparsification.weight_choices import WeightChoices
from fallow.sparsification.weight_prices import weight_errors
from fallow.terminal import Progress

_ANSWERED = 0.2


@dataclass(frozen=True)
class Kinds:
    """What is asked of ``checkpoint``: whether pages are chosen, of which weights a step reads a part (as
    ``groups_in_parts``), and which parts may be taken out."""

    checkpoint: Checkpoint
    load: Load
    precision: Precision
    threads: int | None
    pages: bool
    in_parts: Sequence[tuple[str, ...]]
    removed: Sequence[Part]

    def __bool__(self) -> bool:
        return bool(self.pages or self.in_parts or self.removed)

    def priced(
        self, decoder: Decoder, windows: Sequence[Sequence[int]], questions: Sequence[Question], progress: Progress
    ) -> tuple[Choices, ...]:
        """What there is to choose, at prices in nats a token of ``windows``. The share ``_ANSWERED`` of the price of
        pages is that of the answers to ``questions``, if any: few tokens of a text need what stands far back."""
        weighed = sensitivities(decoder, windows, torch.Generator().manual_seed(0)).numpy()
        kinds: list[Choices] = []
        if self.pages:
            nats = page_errors(decoder, windows, progress=progress).numpy()
            if questions:
                tokens, answers = [q.tokens for q in questions], [torch.tensor(q.answers) for q in questions]
                nats += _ANSWERED * (page_errors(decoder, tokens, answers, progress=progress).numpy() - nats)
            nats *= weighed[:-1, None, None]
            kinds.append(PageChoices.of(self.checkpoint.config, self.load, nats))
        of_attention: list[LayerChoices] = []
        of_networks: list[LayerChoices] = []
        if self.removed:
            heads, neurons = removal_errors(decoder, windows, progress=progress)
            of_attention.append(RemovalChoices.of("heads", self.checkpoint, self.precision, heads, weighed))
            if "neurons" in self.removed:
                of_networks.append(RemovalChoices.of("neurons", self.checkpoint, self.precision, neurons, weighed))
        if self.in_parts:
            errors = weight_errors(decoder, windows, progress=progress)
            progress("timing weights", 0, None)
            times = cache(partial(partial_times, threads=self.threads))  # layers are alike
            for group in self.in_parts:
                some = WeightChoices.of(group, self.checkpoint, self.precision, errors, weighed, times)
                (of_attention if group == ("o_proj",) else of_networks).append(some)
        for found in (of_attention, of_networks):
            if found:
                kinds.append(found[0] if len(found) == 1 else Either.of(found))
        return tuple(kinds)
