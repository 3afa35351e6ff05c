"""Engines over the small exact model and over the real one, under the same tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from lean_model import HEAD, lean_model, pages
from reference_runner import ReferenceRunner, byte_tokenizer

from fallow.engine.engine import Engine
from fallow.plan import SparsityPlan

StartEngine = Callable[..., Engine]


@pytest.fixture(scope="session")
def lean_smollm2(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with SmolLM2 and a plan that is harsh enough to be wrong at times."""
    plan = SparsityPlan(attention=pages(1, 0, 1), head=HEAD)
    return lean_model(smollm2_gguf, tmp_path_factory.mktemp("lean"), plan)


@pytest.fixture(params=["reference", "smollm2"])
def start_engine(request: pytest.FixtureRequest) -> Iterator[StartEngine]:
    """``start_engine(pages=..., **options)``: engines that share nothing; each must end without a page in use."""
    engines: list[Engine] = []
    model: Path | None = request.getfixturevalue("smollm2_gguf") if request.param == "smollm2" else None

    def start(*, pages: int, **options: Any) -> Engine:
        if model is None:
            if options.pop("plan", None) is not None:
                pytest.skip("the small exact model has no plan")
            # Pages of 8 tokens here, of 32 in the native core.
            engine = Engine.over(ReferenceRunner(4 * pages, repeating=True), byte_tokenizer(), **options)
        else:
            page_bytes = 30 * 3 * 64 * 2 * 2 * (32 if options.get("plan") is None else 33)
            engine = Engine(model, kv_cache_bytes=pages * page_bytes, **options)
            assert engine.stats().pages_total == pages
        engines.append(engine)
        return engine

    yield start
    for engine in engines:
        assert engine.drain(60)
        stats = engine.stats()
        assert stats.pages_used == stats.running == stats.waiting == 0
        engine.scheduler.check()
        engine.close()
