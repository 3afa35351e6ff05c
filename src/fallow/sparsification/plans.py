"""Plans of the axis ``attention``, and what they make a step of decoding read."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fallow.arrays import Float64, Int64
from fallow.engine.runner import ModelRunner
from fallow.models.config import ModelConfig
from fallow.plan import LayerRule
from fallow.sparsification.page_prices import COUNTS, RECENT_PAGES, SINK_PAGES

_ELEMENT_BYTES = 2  # bfloat16
_ALL = 1 << 30  # pages: more than any context has


@dataclass(frozen=True)
class Load:
    """What decoding is made fast for: ``batch`` sequences of ``context`` tokens each."""

    batch: int
    context: int


@dataclass(frozen=True)
class PageChoices:
    """The KV heads of layers that see the whole context: at each, how many pages it reads, one of ``COUNTS`` or all.

    ``places`` are (layer, KV head) in order; ``bytes_read [places, choices]`` are those of a step of ``load``.
    """

    places: tuple[tuple[int, int], ...]
    bytes_read: Float64
    load: Load

    @staticmethod
    def of(config: ModelConfig, load: Load) -> PageChoices:
        full = [layer for layer, window in enumerate(config.layer_windows) if window is None]
        places = tuple((layer, head) for layer in full for head in range(config.num_key_value_heads))
        pages = -(-load.context // ModelRunner.page_size)
        ends = min(SINK_PAGES + RECENT_PAGES, pages)
        row = 2 * config.head_dim * _ELEMENT_BYTES  # a token's key and value, and a page's summary
        read = np.minimum(np.array(COUNTS) + ends, pages) * ModelRunner.page_size * row + pages * row
        every = load.batch * np.append(read, pages * ModelRunner.page_size * row).astype(np.float64)
        return PageChoices(places, np.tile(every, (len(places), 1)), load)

    def bytes_of(self, chosen: Int64) -> float:
        return float(self.bytes_read[np.arange(len(chosen)), chosen].sum())

    @property
    def dense(self) -> Int64:
        return np.full(len(self.places), len(COUNTS))

    def resting(self, chosen: Int64) -> float:
        """The share of the keys and values of the places that a step does not read."""
        return 1 - self.bytes_of(chosen) / self.bytes_of(self.dense)

    def rules(self, chosen: Int64) -> tuple[LayerRule, ...] | None:
        """Of the axis ``attention``. Layers in which all heads read everything have no rule."""
        counts = dict(zip(self.places, ([*COUNTS, _ALL][choice] for choice in chosen), strict=True))
        sparse = {layer for (layer, _), count in counts.items() if count != _ALL}
        rules = tuple(
            LayerRule(
                "top_pages",
                layer,
                f"kv_head.{head}",
                {"sink_pages": SINK_PAGES, "recent_pages": RECENT_PAGES, "top_pages": count},
            )
            for (layer, head), count in counts.items()
            if layer in sparse
        )
        return rules or None
