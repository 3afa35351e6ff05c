"""The training loop: steps, what is looked at between them, and how a run ends and goes on.

A run is a function of its recipe and its folder: where it is in its data follows from the number of the step, so a run
that was killed goes on from its last checkpoint to the same bits.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from fallow.errors import FallowError
from fallow.models.decoder import Decoder
from fallow.training.activity import Activity, measure_activity
from fallow.training.checkpoints import Checkpoint, Checkpoints
from fallow.training.corpus import Corpus
from fallow.training.distil import Distillation
from fallow.training.ema import WeightAverage
from fallow.training.energy import StepMeter
from fallow.training.flops import flops_per_token, peak_flops
from fallow.training.lora import merged_weights
from fallow.training.optimizers.build import build_optimizers
from fallow.training.optimizers.fused import FusedUpdates
from fallow.training.optimizers.seeds import draw_of
from fallow.training.processes import ALONE, Processes
from fallow.training.recipe import Recipe
from fallow.training.rest import RestPenalty
from fallow.training.sample import greedy_tokens
from fallow.training.schedule import BatchSize, LearningRate
from fallow.training.sharding import place, reshard, whole_on_first
from fallow.training.step import Step
from fallow.training.validation import Validation, validate
from fallow.training.watch import DivergedError, LossWatch

_MOST_ROLLBACKS = 3


@dataclass(frozen=True)
class StepReport:
    """One step of all processes. ``loss`` in nats a token (of a recipe with [distil] the divergence from the teacher),
    ``bits_per_byte`` of the batch by the corpus's bytes a token, ``seconds`` since the run began (all its sessions),
    ``joules`` of this step; ``validation``, ``activity`` and ``sample`` where they were due."""

    step: int
    steps: int
    tokens: int
    loss: float
    bits_per_byte: float
    gradient_norm: float
    lr: float
    tokens_per_s: float
    mfu: float
    joules: float
    seconds: float
    validation: Validation | None = None
    activity: Activity | None = None
    sample: str | None = None

    def to_json(self) -> dict[str, Any]:
        values = {
            name: value for name, value in self.__dict__.items() if name not in ("validation", "activity", "sample")
        }
        if self.validation is not None:
            values["validation"] = {
                "loss": self.validation.loss,
                "bits_per_byte": self.validation.bits_per_byte,
                "tokens": self.validation.tokens,
            }
        if self.activity is not None:
            values["activity"] = self.activity.to_json()
        return values | ({"sample": self.sample} if self.sample is not None else {})


@dataclass
class RunState:
    """The numbers that a checkpoint keeps beside the tensors."""

    step: int = 0
    tokens: int = 0
    skipped: int = 0  # sequences that were left out after a rollback
    rollbacks: int = 0
    seconds: float = 0.0
    joules: float = 0.0
    validation: float | None = None  # bits per byte, the last one
    losses: list[float] = field(default_factory=list)  # of the last steps, for the watch
    base: str | None = None  # the digest of what adapters belong to, or a student


class Trainer:
    """A decoder, its optimizers and where the run is. ``on_note`` gets a sentence where something happened that a
    person should know. Where there are several ``processes``, each has a trainer, and they go in step."""

    def __init__(
        self,
        recipe: Recipe,
        decoder: Decoder,
        corpus: Corpus,
        folder: Path,
        *,
        processes: Processes = ALONE,
        on_note: Callable[[str], None] = lambda text: None,
        base: str | None = None,
        distillation: Distillation | None = None,
    ) -> None:
        """``base`` is the digest of the model that the decoder's adapters belong to, where it has some: checkpoints
        hold nothing else then; of a student with its ``distillation`` that of both. Raises ``FallowError`` where the
        recipe's optimizers do not fit the decoder, or its batch the processes."""
        self.recipe, self.decoder, self.corpus, self.processes = recipe, decoder, corpus, processes
        self._distillation = distillation
        self._on_note = on_note
        train = recipe.train
        if train.batch % processes.count:
            raise FallowError(
                f"train.batch is {train.batch}, which {processes.count} processes cannot share evenly: take a multiple "
                "of their number."
            )
        place(decoder, processes, compiled=train.compile)
        self.optimizers = build_optimizers(decoder.named_parameters(), recipe.optimizer)
        sequences = max(train.tokens // recipe.data.context, 1)
        if (bags := recipe.superposition) is not None:
            self.batches, self.steps = BatchSize.superposed(sequences, train.batch, bags.bag, bags.share)
        else:
            self.batches, self.steps = BatchSize.planned(sequences, train.batch, train.first_batch, train.ramp_share)
        self.rate = LearningRate(
            train.schedule,
            self.steps,
            warmup=round(train.warmup_share * self.steps),
            decay=round(train.decay_share * self.steps),
            final=train.final_share,
        )
        self.average = WeightAverage(decoder, train.ema) if train.ema is not None else None
        self.checkpoints = Checkpoints(folder / "checkpoints", recipe.report.keep_checkpoints, processes)
        self.state = RunState(base=base)
        self._watch = LossWatch()
        clip, fused = train.clip or None, None
        if train.fused_update:
            micro_batches = -(-train.batch // (train.micro_batch or train.batch))
            fused = FusedUpdates(self.optimizers, clip=clip, micro_batches=micro_batches)
        self._step = Step(
            decoder,
            self.optimizers,
            micro_batch=train.micro_batch,
            clip=clip,
            fused=fused,
            distillation=distillation,
            processes=processes,
        )
        self._rest = RestPenalty(decoder, recipe.rest, self.steps) if recipe.rest.l1 else None
        self._meter = StepMeter(processes, on_note)
        self._flops = flops_per_token(decoder, recipe.data.context)
        if distillation is not None:
            place(distillation.teacher, processes, compiled=train.compile)
            self._flops += flops_per_token(distillation.teacher, recipe.data.context, forward_only=True)
        self._peak = processes.total(peak_flops(decoder.compute, processes.device))
        self._signal = 0  # that came to this process
        self._stopped_by: int | None = None  # what came to one of them, known to all
        self._saved_step: int | None = None
        self._last_validation: Validation | None = None  # of the step that was just taken
        self._last_activity: Activity | None = None
        if train.checkpoint_activations:
            decoder.checkpoint_layers = True

    def resume(self) -> bool:
        """Go on from the newest checkpoint that is whole; False where there is none."""
        checkpoint = self.checkpoints.latest()
        for damaged in self.checkpoints.damaged:
            self._on_note(f"The checkpoint {damaged} is damaged: the one before it is used.")
        if checkpoint is None:
            return False
        self._restore(checkpoint)
        return True

    def run(self, on_step: Callable[[StepReport], None]) -> Validation | None:
        """Train to the end, every step reported to ``on_step``, or until SIGTERM or SIGINT; then a checkpoint is
        written and ``stopped`` is set.

        The last validation, None where it was stopped. Raises ``FallowError`` where the loss is lost or a checkpoint
        cannot be written.
        """
        with self._signals():
            while self.state.step < self.steps and self._stopped_by is None:
                self._one_step(on_step)
                self._stopped_by = max(self.processes.gathered(self._signal)) or None
                every = self.recipe.report.checkpoint_every
                if every and self.state.step % every == 0 and self.state.step < self.steps:
                    self._save()
            if self.state.step != self._saved_step:
                self._save()
            self.checkpoints.wait()
        return None if self.stopped else self._last_validation or self.validate()

    @property
    def stopped(self) -> int | None:
        """The signal that ended the run early."""
        return self._stopped_by if self.state.step < self.steps else None

    @property
    def energy_source(self) -> str:
        """Where the joules come from: ``fallow.training.energy.StepMeter.source``."""
        return self._meter.source

    def validate(self) -> Validation:
        """On the validation text, with the averaged weights where there are some."""
        with self._evaluated_weights():
            return validate(
                self.decoder,
                self.corpus.valid,
                tokens=self.recipe.report.evaluate_tokens,
                batch=self.recipe.train.micro_batch or self.recipe.train.batch,
                processes=self.processes,
            )

    def activity(self) -> Activity | None:
        """Which neurons work at the end of the run; None where the recipe's report does not ask for it."""
        if not self.recipe.report.activity_tokens:
            return None
        return self._last_activity or self.measure_activity()

    def measure_activity(self) -> Activity:
        """Which feed-forward neurons work, on the validation text, with the averaged weights where there are some."""
        with self._evaluated_weights():
            return measure_activity(self.decoder, self.corpus.valid, self.recipe.report.activity_tokens)

    def weights(self) -> dict[str, torch.Tensor]:
        """What is exported, adapters multiplied out: the averaged weights where there are some. The first process gets
        them, the others nothing."""
        if self.recipe.lora is not None:
            with self._evaluated_weights():
                return merged_weights(self.decoder)
        own = {name: parameter.detach() for name, parameter in self.decoder.named_parameters()}
        return whole_on_first(own if self.average is None else self.average.weights, self.processes)

    def _one_step(self, on_step: Callable[[StepReport], None]) -> None:
        state, recipe = self.state, self.recipe
        before = self._meter.reading()
        size = self.batches.at(state.step)
        first = self.batches.before(state.step) + state.skipped
        batch = self.processes.share(self.corpus.train.batch, first, size)
        bag = self.batches.bag_at(state.step)
        if bag > 1:
            batch = batch.in_bags(bag)
        elif self.batches.bagged == state.step:
            self._watch = LossWatch()  # what is learnt is another thing now, and so is its loss
        if self._rest is not None:
            self._rest.prepare(state.step, size * recipe.data.context // bag)
        if recipe.lora is not None and recipe.lora.dropout:
            torch.manual_seed(draw_of(recipe.train.seed, state.step))  # what is dropped follows from the step
        factor = self.rate.factor(state.step)
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            group["lr"] = group["initial_lr"] * factor
        taken = self._step.take(batch, self._watch)
        if taken.complaint is not None:
            self._bad_step(taken.complaint, size)
            return
        if self.average is not None:
            self.average.update(state.step)
        seconds, joules = self._meter.since(before)
        tokens = size * recipe.data.context
        state.step += 1
        state.tokens += tokens
        state.seconds += seconds
        state.joules += joules
        report = recipe.report
        last = state.step == self.steps
        due = report.evaluate_every and (state.step % report.evaluate_every == 0 or last)
        validation = self.validate() if due else None
        self._last_validation = validation
        self._last_activity = self.measure_activity() if due and report.activity_tokens else None
        if validation is not None:
            state.validation = validation.bits_per_byte
        sampled = report.sample_every and (state.step % report.sample_every == 0 or last)
        on_step(
            StepReport(
                step=state.step,
                steps=self.steps,
                tokens=state.tokens,
                loss=taken.loss,
                bits_per_byte=self.corpus.bits_per_byte(taken.loss),
                gradient_norm=taken.gradient_norm,
                lr=recipe.optimizer[0].lr * factor,
                tokens_per_s=tokens / seconds,
                mfu=tokens // bag * self._flops / seconds / self._peak,
                joules=joules,
                seconds=state.seconds,
                validation=validation,
                activity=self._last_activity,
                sample=self._sample() if sampled else None,
            )
        )

    def _bad_step(self, complaint: str, size: int) -> None:
        """Stop with the reason, or go back to the last checkpoint and leave these sequences out."""
        step = self.state.step
        sentence = f"At step {step + 1} {complaint}"
        self.checkpoints.wait()
        checkpoint = self.checkpoints.latest()
        if self.recipe.train.on_bad_step == "stop" or checkpoint is None or self.state.rollbacks >= _MOST_ROLLBACKS:
            kept = f"the checkpoint of step {checkpoint.step} is kept" if checkpoint else "there is no checkpoint yet"
            raise DivergedError(f'{sentence}; {kept}. Lower the learning rate, or set train.on_bad_step = "rollback".')
        rollbacks, skipped = self.state.rollbacks + 1, self.state.skipped
        self._restore(checkpoint)
        # Sequences from the checkpoint to the bad batch, it included, are not seen again.
        passed = self.batches.before(step) + size - self.batches.before(checkpoint.step)
        self.state.rollbacks, self.state.skipped = rollbacks, skipped + passed
        for parameter in self.decoder.parameters():
            parameter.grad = None
        self._on_note(f"{sentence}: back to step {checkpoint.step}, with other text.")

    def _tensors(self) -> dict[str, Any]:
        only_trained = StateDictOptions(ignore_frozen_params=self.state.base is not None)
        model, optimizers = get_state_dict(self.decoder, self.optimizers, options=only_trained)
        average = {"average": self.average.weights} if self.average is not None else {}
        return {"model": model, "optimizers": optimizers, **average}

    def _save(self) -> None:
        self.state.losses = list(self._watch.losses)
        self.checkpoints.save(self.state.step, self._tensors(), dict(self.state.__dict__))
        self._saved_step = self.state.step

    def _restore(self, checkpoint: Checkpoint) -> None:
        if checkpoint.run.get("base") != self.state.base:
            start, distil = self.recipe.model.start, self.recipe.distil
            beside = "" if distil is None else f", or to another teacher than {distil.teacher} or another plan"
            raise FallowError(
                f"The checkpoint {checkpoint.folder} belongs to another model than {start}{beside}, which has changed: "
                "put it back, or begin again with --fresh."
            )
        tensors = self._tensors()
        checkpoint.load_into(tensors)
        set_state_dict(
            self.decoder,
            self.optimizers,
            model_state_dict=tensors["model"],
            optim_state_dict=tensors["optimizers"],
            options=StateDictOptions(strict=self.state.base is None),
        )
        self.state = RunState(**checkpoint.run)
        self._saved_step = checkpoint.step
        self._watch = LossWatch(self.state.losses)

    def _sample(self) -> str:
        tokenizer = self.corpus.tokenizer
        prompt = self.recipe.report.sample_prompt
        if self.corpus.train.shards.index.has_answers:
            asked = tokenizer.apply_chat_template([{"role": "user", "content": prompt}])
            ids, prompt = tokenizer.encode(asked, add_special_tokens=False), ""
        else:
            ids = tokenizer.encode(prompt) or [min(tokenizer.eos_token_ids, default=0)]
        with self._evaluated_weights():
            new = greedy_tokens(
                self.decoder,
                ids,
                self.recipe.report.sample_tokens,
                tokenizer.eos_token_ids,
                agreed=lambda token: self.processes.on_first(lambda: token),
            )
        return prompt + tokenizer.decode(new)

    @contextmanager
    def _evaluated_weights(self) -> Iterator[None]:
        self.decoder.eval()
        try:
            with (
                self.average.in_place() if self.average is not None else nullcontext(),
                self._distillation.stored.in_place() if self._distillation is not None else nullcontext(),
            ):
                yield
                reshard(self.decoder)
        finally:
            self.decoder.train()

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT end the run after the step; a second one at once. Only the main thread can listen.

        Where one of several processes fails, torchrun sends SIGTERM to the others: they do not listen to it then, since
        one of them may be about to say why it ends.
        """

        def stop(number: int, frame: object) -> None:
            if self._signal:
                raise KeyboardInterrupt
            self._signal = number
            self._on_note("Stopping after this step, with a checkpoint.")

        try:
            before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
        except ValueError:  # in another thread
            before = {}
        try:
            yield
        except Exception:
            if before and self.processes.count > 1:
                before[signal.SIGTERM] = signal.SIG_IGN
            raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
