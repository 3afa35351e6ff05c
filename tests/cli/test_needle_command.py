"""``fallow eval MODEL needle``."""

from __future__ import annotations

import json
from pathlib import Path

from fallow.evaluate.needle import DEPTHS


def test_needles_as_a_table_and_as_json(fallow, smollm2_gguf: Path) -> None:
    command = ["eval", str(smollm2_gguf), "needle", "--context", "128", "--trials", "1"]
    found = json.loads(fallow(*command, "--json").stdout)
    assert (found["task"], found["context"], found["trials"], found["perplexity"]) == ("needle", 128, 1, None)
    assert [depth["depth"] for depth in found["depths"]] == list(DEPTHS)
    assert "found" in fallow(*command).stdout
