"""``transformers`` on PyTorch: bfloat16 and float32 for speed, float32 as the reference of quality."""

from __future__ import annotations

from pathlib import Path

from fallow.bench.environment import PeerError, Requirements
from fallow.bench.peers.base import Variant
from fallow.bench.prepare import as_hf_folder
from fallow.terminal import Progress


class Transformers:
    """A forward pass a step; no server."""

    name = "transformers"
    requirements = Requirements(("torch==2.13.0", "transformers==5.23.0", "accelerate", "gguf"))

    def variants(self, model: Path, python: Path, progress: Progress | None) -> list[Variant]:
        folder = as_hf_folder(model, python, progress)
        return [
            Variant(
                self.name,
                label,
                python,
                "transformers",
                folder,
                worker_precision=dtype,
                for_quality=dtype == "float32",
            )
            for label, dtype in (("fp32", "float32"), ("bf16", "bfloat16"))
        ]

    def server_command(self, variant: Variant, *, port: int, threads: int, max_context: int) -> list[str]:
        raise PeerError("transformers is measured without a server.")
