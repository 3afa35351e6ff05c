"""How many feed-forward neurons work: counts of what is not exactly zero, on text that is not trained on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fallow.data.windows import Windows
from fallow.models.decoder import Decoder
from fallow.plan import LayerRule, SparsityPlan

_BATCH = 8  # windows at once
# The most neurons at work, as a share, for which taking them one by one is sure to be faster than all at once: they are
# read in pieces and computed in float32.
_WORTH_SKIPPING = 0.1


@dataclass(frozen=True)
class LayerActivity:
    """Of one layer's ``neurons``: how many work for a token (``mean``, and ``p99``, its 99th percentile over tokens),
    how many for any of 8 and of 32 consecutive tokens, on average (None: windows are shorter), and how many for none
    (``dead``)."""

    neurons: int
    mean: float
    p99: float
    union_8: float | None
    union_32: float | None
    dead: int


@dataclass(frozen=True)
class Activity:
    """Each layer's, measured over ``tokens``."""

    layers: tuple[LayerActivity, ...]
    tokens: int

    @property
    def resting(self) -> float:
        """The share of all feed-forward neurons that rest for a token, on average."""
        return 1 - sum(layer.mean for layer in self.layers) / sum(layer.neurons for layer in self.layers)

    @property
    def plan(self) -> SparsityPlan:
        """What is worth skipping: in each layer where few neurons work, those that are zero."""
        rules = tuple(
            LayerRule("zeros", number)
            for number, layer in enumerate(self.layers)
            if layer.mean <= _WORTH_SKIPPING * layer.neurons
        )
        where = {"made_by": "fallow train", "measured_on": f"{self.tokens} tokens of validation text"}
        return SparsityPlan(ffn=rules, provenance=where) if rules else SparsityPlan.dense()

    def to_json(self) -> dict[str, Any]:
        return {"resting": self.resting, "tokens": self.tokens, "layers": [asdict(layer) for layer in self.layers]}


class _Counter:
    """What one layer's neurons did so far."""

    def __init__(self) -> None:
        self.per_token: list[Tensor] = []
        self.unions: dict[int, list[Tensor]] = {8: [], 32: []}
        self.ever: Tensor | None = None

    def see(self, module: nn.Module, arguments: tuple[Tensor]) -> None:
        """A hook before the projection that neurons ``[batch, tokens, intermediate]`` go into."""
        active = arguments[0] != 0
        self.per_token.append(active.sum(-1).flatten().cpu())
        for size, counts in self.unions.items():
            whole = active.shape[1] // size * size
            groups = active[:, :whole].reshape(len(active), -1, size, active.shape[2]).any(2)  # [batch, groups, ...]
            counts.append(groups.sum(-1).flatten().cpu())
        now = active.flatten(0, 1).any(0)
        self.ever = now if self.ever is None else self.ever | now

    def result(self) -> LayerActivity:
        assert self.ever is not None, "a layer has seen some tokens"
        per_token = torch.cat(self.per_token).double()
        unions = (torch.cat(counts).double() for counts in self.unions.values())
        union_8, union_32 = (float(counts.mean()) if len(counts) else None for counts in unions)
        return LayerActivity(
            neurons=len(self.ever),
            mean=float(per_token.mean()),
            p99=float(per_token.quantile(0.99)),
            union_8=union_8,
            union_32=union_32,
            dead=int((~self.ever).sum()),
        )


@torch.no_grad()
def measure_activity(decoder: Decoder, windows: Windows, tokens: int) -> Activity:
    """Over the first ``windows`` that hold ``tokens``; the decoder runs as it was before it was compiled, if it was."""
    count = min(max(tokens // windows.context, 1), len(windows))
    device = decoder.head.device
    with _counting(decoder) as counters, torch.compiler.set_stance("force_eager"):
        for first in range(0, count, _BATCH):
            part = windows.in_order(first, min(_BATCH, count - first))
            documents = None if part.documents is None else torch.from_numpy(part.documents).to(device)
            decoder(torch.from_numpy(part.inputs).to(device), documents)
    return Activity(tuple(counter.result() for counter in counters), count * windows.context)


@contextmanager
def _counting(decoder: Decoder) -> Iterator[list[_Counter]]:
    """A counter for each layer, at work within the block."""
    counters = [_Counter() for _ in decoder.layers]
    hooks = [
        projection.register_forward_pre_hook(counter.see)
        for projection, counter in zip(decoder.down_projections, counters, strict=True)
    ]
    try:
        yield counters
    finally:
        for hook in hooks:
            hook.remove()
