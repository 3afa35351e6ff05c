"""The axis ``attention``: how many pages each KV head reads."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fallow.arrays import Float64, Int64
from fallow.engine.runner import ModelRunner
from fallow.models.config import ModelConfig
from fallow.plan import KV_HEAD, LayerRule
from fallow.sparsification.choices import Choices, Load, Rules
from fallow.sparsification.page_prices import COUNTS, RECENT_PAGES, SINK_PAGES

_ELEMENT_BYTES = 2  # bfloat16
_ALL = 1 << 30  # pages: more than any context has


@dataclass(frozen=True)
class PageChoices(Choices):
    """Of the KV heads of layers that see the whole context: one of ``COUNTS`` pages, or all. ``places`` are (layer, KV
    head) in order, ``pages`` those of the context that the prices are for."""

    places: tuple[tuple[int, int], ...]
    pages: int

    @staticmethod
    def of(config: ModelConfig, load: Load, nats: Float64) -> PageChoices:
        """For what they cost, ``nats [layers, KV heads, len(COUNTS)]``."""
        full = [layer for layer, window in enumerate(config.layer_windows) if window is None]
        places = tuple((layer, head) for layer in full for head in range(config.num_key_value_heads))
        pages = -(-load.context // ModelRunner.page_size)
        ends = min(SINK_PAGES + RECENT_PAGES, pages)
        row = 2 * config.head_dim * _ELEMENT_BYTES  # a token's key and value, and a page's summary
        some = np.minimum(np.array(COUNTS) + ends, pages) * ModelRunner.page_size * row + pages * row
        read = load.batch * np.append(some, pages * ModelRunner.page_size * row).astype(np.float64)
        prices = np.array([[*nats[place], 0.0] for place in places]).reshape(len(places), len(COUNTS) + 1)
        every = np.tile(read, (len(places), 1))
        return PageChoices(every, every[:, -1:] - every, prices, places, pages)

    @property
    def what(self) -> str:
        return "keys and values"

    def rules(self, chosen: Int64) -> Rules:
        """Layers in which all heads read everything have no rule."""
        counts = dict(zip(self.places, ([*COUNTS, _ALL][choice] for choice in chosen), strict=True))
        sparse = {layer for (layer, _), count in counts.items() if count != _ALL}
        shared = {"sink_pages": SINK_PAGES, "recent_pages": RECENT_PAGES, "context_pages": self.pages}
        rules = tuple(
            LayerRule("top_pages", layer, f"{KV_HEAD}{head}", shared | {"top_pages": count})
            for (layer, head), count in counts.items()
            if layer in sparse
        )
        return {"attention": rules} if rules else {}
