"""OpenVINO GenAI: the model exported by optimum-intel with its weights in int8 and in int4."""

from __future__ import annotations

import os
from pathlib import Path

from fallow.bench.environment import PeerError, Requirements, run
from fallow.bench.peers.base import Variant
from fallow.bench.prepare import as_hf_folder, prepared, worker_environment
from fallow.terminal import Progress

_FORMATS = {"int8": (), "int4": ("--group-size", "32", "--ratio", "1.0")}


class OpenVino:
    """Its continuous-batching pipeline; it brings no OpenAI server."""

    name = "openvino"
    requirements = Requirements(
        (
            "torch==2.13.0",
            "optimum==2.3.0",
            "optimum-intel[openvino]==2.2.0",
            "openvino==2026.4.1",
            "openvino-genai==2026.4.1.0",
            "accelerate",
            "gguf",
        ),
        uninstall=("torchvision",),  # a build that may not fit this torch, and breaks the import then
    )

    def variants(self, model: Path, python: Path, progress: Progress | None) -> list[Variant]:
        folder = as_hf_folder(model, python, progress)
        found = []
        for name, options in _FORMATS.items():
            exported = self._exported(folder, python, name, options, progress)
            found.append(Variant(self.name, name, python, "openvino", exported))
        return found

    def server_command(self, variant: Variant, *, port: int, threads: int, max_context: int) -> list[str]:
        raise PeerError("OpenVINO GenAI brings no OpenAI server: its model server is a product of its own.")

    @staticmethod
    def _exported(folder: Path, python: Path, name: str, options: tuple[str, ...], progress: Progress | None) -> Path:
        program = [str(python), "-m", "optimum.commands.optimum_cli", "export", "openvino"]
        task = ["--task", "text-generation-with-past"]
        environment = worker_environment(python)
        environment.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
        return prepared(
            folder,
            f"openvino-{name}",
            lambda target, log: run(
                f"the export to {name}",
                [*program, "--model", str(folder), *task, "--weight-format", name, *options, str(target)],
                log,
                environment,
            ),
            what=f"exporting the model to OpenVINO {name}",
            progress=progress,
        )
