"""A step: the gradient of a batch, in parts and clipped, a look at it, and the update after or in the backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from fallow.data.windows import Batch
from fallow.models.decoder import Decoder
from fallow.training.distil import Distillation
from fallow.training.loss import cross_entropy
from fallow.training.optimizers.fused import FusedUpdates
from fallow.training.optimizers.shards import own_part
from fallow.training.processes import ALONE, Processes
from fallow.training.sharding import whole
from fallow.training.watch import LossWatch, first_bad_gradient, gradient_complaint


@dataclass(frozen=True)
class StepResult:
    """Of all processes: ``loss`` in nats a token, the gradient's norm before clipping, and what is wrong with them,
    where anything is."""

    loss: float
    gradient_norm: float
    complaint: str | None


class Step:
    """Steps of one decoder and its optimizers, at most ``micro_batch`` sequences at once in each process; the loss is
    that of ``distillation`` where there is one."""

    def __init__(
        self,
        decoder: Decoder,
        optimizers: Sequence[Optimizer],
        *,
        micro_batch: int | None,
        clip: float | None,
        fused: FusedUpdates | None = None,
        distillation: Distillation | None = None,
        processes: Processes = ALONE,
    ) -> None:
        self.decoder = decoder
        self.optimizers = optimizers
        self.micro_batch = micro_batch
        self.clip = clip
        self.fused = fused
        self.distillation = distillation
        self.processes = processes

    def take(self, batch: Batch, watch: LossWatch) -> StepResult:
        """One update at the rates that the optimizers have. ``batch`` is this process's share, of one size in all, and
        may be in bags.

        Where ``watch`` complains about the loss, no weight has changed. Where it complains about the gradient, none has
        either, unless updates are fused: then parameters nearer the loss than the bad gradient have had theirs.
        """
        if self.fused is not None:
            return self._take_fused(batch, watch, self.fused)
        loss, norm = self.gradients(batch)
        complaint = watch.complaint(loss, norm)
        if complaint is not None:
            where = self._first_bad_gradient()
            return StepResult(loss, norm, complaint + (f", first in {where}" if where else ""))
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return StepResult(loss, norm, None)

    def gradients(self, batch: Batch) -> tuple[float, float]:
        """Leaves the gradient of the mean loss in ``grad``; the loss (nats a token) and the gradient's norm before
        clipping. A batch in which no target counts has the loss 0 and no gradient.

        ``batch`` is this process's share, of one size in all of them; what comes out is that of all shares together.
        """
        sequences = len(batch.inputs)
        count = self.processes.total(_counted(batch))
        bag = batch.inputs.shape[2] if batch.inputs.ndim == 3 else 1
        size = self.micro_batch * bag if self.micro_batch else sequences  # as many positions as without bags
        loss = 0.0
        with nullcontext() if self.distillation is None else self.distillation.stored.in_place():
            for first in range(0, sequences, size):
                mean = self._loss(batch, slice(first, first + size)) / max(count, 1)
                mean.backward()  # type: ignore[no-untyped-call]
                loss += float(mean.detach())
        return self.processes.total(loss), self._norm()

    def _take_fused(self, batch: Batch, watch: LossWatch, fused: FusedUpdates) -> StepResult:
        mean = self._loss(batch, slice(None)) / max(_counted(batch), 1)
        loss = float(mean.detach())
        complaint = watch.complaint(loss, 0.0)  # the gradient's norm is not known before the weights have changed
        if complaint is not None:
            return StepResult(loss, 0.0, complaint)
        norm, bad = fused.backward(mean)
        complaint = gradient_complaint(loss, norm)
        if bad is not None:
            complaint = f"{complaint}, first in {next(n for n, p in self.decoder.named_parameters() if p is bad)}"
        return StepResult(loss, norm, complaint)

    def _loss(self, batch: Batch, part: slice) -> Tensor:
        """The summed loss of some of the sequences."""
        device = self.decoder.head.device
        inputs = torch.from_numpy(batch.inputs[part]).to(device)
        documents = None if batch.documents is None else torch.from_numpy(batch.documents[part]).to(device)
        targets = torch.from_numpy(batch.counted_targets()[part]).to(device)
        if self.distillation is not None:
            return self.distillation.loss(self.decoder, inputs, documents, targets >= 0)
        hidden = self.decoder(inputs, documents)
        return cross_entropy(
            hidden.flatten(0, 1),
            self.decoder.head,
            targets.flatten(0, 1),
            softcap=self.decoder.config.logit_softcap,
            compiled=self.decoder.is_compiled,
        )

    def _first_bad_gradient(self) -> str | None:
        """In the order of the parameters, whichever process has the part with it."""
        parts = {name: p.grad if p.grad is None else own_part(p.grad) for name, p in self.decoder.named_parameters()}
        found = {name for name in self.processes.gathered(first_bad_gradient(parts.items())) if name is not None}
        return next((name for name in parts if name in found), None)

    def _norm(self) -> float:
        parameters = [p for p in self.decoder.parameters() if p.grad is not None]
        norm: Tensor = whole(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
        if self.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.clip, norm)
        return float(norm)


def _counted(batch: Batch) -> int:
    """Targets that count."""
    return int((batch.counted_targets() >= 0).sum())
