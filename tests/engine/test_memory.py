"""How large the KV cache is: what was asked for, or what is needed within a share of the memory at hand."""

from __future__ import annotations

from pathlib import Path

import pytest
from reference_runner import config

from fallow.engine import memory
from fallow.engine.memory import available_bytes, kv_cache_pages, page_bytes
from fallow.errors import FallowError

CONFIG = config(4096)
PAGE = 2 * 2 * 16 * 8  # keys and values in bfloat16, heads padded to 16, pages of 8 tokens


def pages(kv_cache_bytes: int | None, *, context: int = 4096, max_sequences: int = 4) -> int:
    return kv_cache_pages(
        CONFIG, page_size=8, context=context, max_sequences=max_sequences, kv_cache_bytes=kv_cache_bytes
    )


def test_what_is_asked_for_is_given() -> None:
    assert page_bytes(CONFIG, 8) == PAGE
    assert pages(10 * PAGE + 5) == 10
    with pytest.raises(FallowError, match="kv_cache_bytes is 100"):
        pages(100)


def test_the_default_follows_the_context_and_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda: None)
    assert pages(None) == 4 * 4096 // 8
    assert pages(None, context=16, max_sequences=100) == 100 * 512 // 8
    monkeypatch.setattr(memory, "available_bytes", lambda: 1000 * PAGE)
    assert pages(None) == 300
    monkeypatch.setattr(memory, "available_bytes", lambda: 0)
    assert pages(None) == 8


def test_the_least_limit_on_the_way_to_the_root_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = tmp_path / "outer" / "inner"
    inner.mkdir(parents=True)
    for folder, limit, usage in ((inner.parent, "5000", "4000"), (inner, "max", "3000")):
        (folder / "memory.max").write_text(limit + "\n")
        (folder / "memory.current").write_text(usage + "\n")
        (folder / "memory.stat").write_text("anon 1\ninactive_file 500\n")
    monkeypatch.setattr(memory, "_CGROUPS", tmp_path)
    proc = tmp_path / "cgroup"
    monkeypatch.setattr(memory, "_PROC_CGROUP", proc)
    proc.write_text("0::/outer/inner\n")
    assert available_bytes() == 1500
    proc.write_text("0::/elsewhere\n")
    assert (available_bytes() or 10**9) > 1500
    proc.write_text("nonsense\n")
    available_bytes()
