"""The gradient of a batch, in parts and clipped."""

from __future__ import annotations

import torch
from torch import Tensor

from fallow.data.windows import Batch
from fallow.models.decoder import Decoder
from fallow.training.loss import cross_entropy
from fallow.training.processes import ALONE, Processes
from fallow.training.sharding import whole


class Step:
    """Gradients of batches for one decoder, at most ``micro_batch`` sequences at once in each process."""

    def __init__(
        self, decoder: Decoder, *, micro_batch: int | None, clip: float | None, processes: Processes = ALONE
    ) -> None:
        self.decoder = decoder
        self.micro_batch = micro_batch
        self.clip = clip
        self.processes = processes

    def gradients(self, batch: Batch) -> tuple[float, float]:
        """Leaves the gradient of the mean loss in ``grad``; the loss (nats a token) and the gradient's norm before
        clipping. A batch in which no target counts has the loss 0 and no gradient.

        ``batch`` is this process's share, of one size in all of them; what comes out is that of all shares together.
        """
        device = self.decoder.head.device
        sequences = len(batch.inputs)
        targets = torch.from_numpy(batch.counted_targets()).to(device)
        count = self.processes.total(int((targets >= 0).sum()))
        size = self.micro_batch or sequences
        loss = 0.0
        for first in range(0, sequences, size):
            part = slice(first, first + size)
            inputs = torch.from_numpy(batch.inputs[part]).to(device)
            documents = None if batch.documents is None else torch.from_numpy(batch.documents[part]).to(device)
            hidden = self.decoder(inputs, documents)
            nll = cross_entropy(
                hidden.flatten(0, 1),
                self.decoder.head,
                targets[part].flatten(),
                softcap=self.decoder.config.logit_softcap,
                compiled=self.decoder.is_compiled,
            )
            mean = nll / max(count, 1)
            mean.backward()  # type: ignore[no-untyped-call]
            loss += float(mean.detach())
        return self.processes.total(loss), self._norm()

    def _norm(self) -> float:
        parameters = [p for p in self.decoder.parameters() if p.grad is not None]
        norm: Tensor = whole(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
        if self.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.clip, norm)
        return float(norm)
