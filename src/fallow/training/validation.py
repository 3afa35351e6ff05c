"""The loss on text that is not trained on, and in bits per byte, which tokenizers have in common."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fallow.data.windows import Windows, bits_per_byte
from fallow.errors import FallowError
from fallow.models.decoder import Decoder
from fallow.training.loss import cross_entropy
from fallow.training.processes import ALONE, Processes


@dataclass(frozen=True)
class Validation:
    """``loss`` in nats a token; ``tokens`` were scored, which stand for ``text_bytes``."""

    loss: float
    tokens: int
    text_bytes: int

    @property
    def bits_per_byte(self) -> float:
        return bits_per_byte(self.loss * self.tokens, self.text_bytes)


@torch.no_grad()
def validate(
    decoder: Decoder, windows: Windows, *, tokens: int, batch: int, processes: Processes = ALONE
) -> Validation:
    """Over the first windows of the validation text, as many as hold ``tokens``, ``batch`` at a time, which the
    processes share."""
    count = min(max(tokens // windows.context, 1), len(windows))
    count = count // batch * batch or count  # whole batches: a compiled model would be compiled again for a part
    device = decoder.head.device
    nll, scored, text_bytes = 0.0, 0, 0
    for first in range(0, count, batch):
        part = processes.share(windows.in_order, first, min(batch, count - first))
        documents = None if part.documents is None else torch.from_numpy(part.documents).to(device)
        hidden = decoder(torch.from_numpy(part.inputs).to(device), documents)
        targets = part.counted_targets()
        nll += float(
            cross_entropy(
                hidden.flatten(0, 1),
                decoder.head,
                torch.from_numpy(targets).to(device).flatten(),
                softcap=decoder.config.logit_softcap,
            )
        )
        scored += int((targets >= 0).sum())
        text_bytes += windows.bytes_of(targets)
    nll, scored, text_bytes = processes.total(nll), processes.total(scored), processes.total(text_bytes)
    if scored == 0:
        raise FallowError(
            f"{windows.shards.index.source}: in its first {count} windows no token counts, so nothing can be validated."
        )
    return Validation(nll / scored, scored, text_bytes)
