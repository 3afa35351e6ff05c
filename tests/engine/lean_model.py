"""SmolLM2 with a plan beside it, for tests of what a plan lets rest and what it must not change."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fallow.models.checkpoint import open_checkpoint
from fallow.models.head_screen import DIRECTIONS, HeadScreen, mean_products
from fallow.plan import LayerRule, SparsityPlan


def pages(*tops: int) -> tuple[LayerRule, ...]:
    """One sink, one recent page, and so many of each KV head."""
    return tuple(
        LayerRule("top_pages", None, f"kv_head.{head}", {"sink_pages": 1, "recent_pages": 1, "top_pages": top})
        for head, top in enumerate(tops)
    )


CANDIDATES = 256
HEAD = (LayerRule("screen", parameters={"rank": DIRECTIONS, "candidates": CANDIDATES}),)


def lean_model(weights: Path, folder: Path, plan: SparsityPlan) -> Path:
    """A folder with the weights and a plan that screens the head, and the screen."""
    torch = pytest.importorskip("torch")
    from fallow.models.decoder_weights import load_decoder

    (folder / "model.gguf").symlink_to(weights)
    plan.save(folder / "plan.json")
    checkpoint = open_checkpoint(weights)
    decoder = load_decoder(checkpoint, context=128)
    texts = np.random.default_rng(1).integers(3, checkpoint.config.vocab_size, (4, 64)).tolist()
    with torch.no_grad():
        states = [decoder(torch.tensor(text)[None])[0].numpy() for text in texts]
    HeadScreen.fit(mean_products(iter(states)), checkpoint.head).save(folder)
    return folder
