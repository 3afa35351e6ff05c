"""llama.cpp, built for this machine's CPU: the GGUF file as it is, and requantised to the types it is fast with."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

from fallow.bench.environment import PeerError, Requirements
from fallow.bench.peers.base import Variant
from fallow.bench.prepare import gguf_file, prepared, run_worker_script
from fallow.models.checkpoint import open_checkpoint
from fallow.models.tensors import TensorType
from fallow.terminal import Progress

_REQUANTISED = ("Q4_0", "Q8_0", "BF16")
_REQUANTISED_FOR_QUALITY = ("Q4_1", "Q4_K_M")  # of floats: 4 bits a weight and about as many bytes as our q4


class LlamaCpp:
    """llama-cpp-python; its server handles one request at a time."""

    name = "llama.cpp"
    requirements = Requirements(
        ("llama-cpp-python[server]==0.3.36", "numpy"), variables={"CMAKE_ARGS": "-DGGML_NATIVE=ON"}
    )

    def variants(self, model: Path, python: Path, progress: Progress | None) -> list[Variant]:
        source = gguf_file(model)
        if not source.is_file():
            raise PeerError(
                f"{model} is not a GGUF file, which llama.cpp needs: convert it with llama.cpp's own script."
            )
        own = file_precision(source)
        for_quality = _REQUANTISED_FOR_QUALITY if own.is_floating else ()
        found = [Variant(self.name, own.name, python, "llama_cpp", source, for_quality=True)]
        for kind in (*_REQUANTISED, *for_quality):
            if kind != own.name:
                path = self._requantised(source, python, kind, progress)
                for_speed = kind in _REQUANTISED
                found.append(Variant(self.name, kind, python, "llama_cpp", path, for_speed=for_speed, for_quality=True))
        return found

    def server_command(self, variant: Variant, *, port: int, threads: int, max_context: int) -> list[str]:
        options = {
            "model": variant.model,
            "host": "127.0.0.1",
            "port": port,
            "n_threads": threads,
            "n_threads_batch": threads,
            "n_ctx": max_context,
            "flash_attn": True,
        }
        arguments = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
        return [str(variant.python), "-m", "llama_cpp.server", *arguments]

    @staticmethod
    def _requantised(source: Path, python: Path, kind: str, progress: Progress | None) -> Path:
        threads = str(len(os.sched_getaffinity(0)))
        return prepared(
            source,
            f"{kind}.gguf",
            lambda target, log: run_worker_script(python, "requantize", [str(source), str(target), kind, threads], log),
            what=f"requantising the model to {kind} for llama.cpp",
            progress=progress,
        )


def file_precision(source: Path) -> TensorType:
    """The storage type that holds most of a checkpoint's weights outside of the embeddings."""
    elements: Counter[TensorType] = Counter()
    for name, tensor in open_checkpoint(source).tensors.items():
        if name.startswith("layers."):
            elements[tensor.type] += tensor.elements
    return elements.most_common(1)[0][0]
