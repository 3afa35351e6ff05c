"""What an adapter says about its peer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from fallow.bench.environment import Requirements
from fallow.terminal import Progress


@dataclass(frozen=True)
class Variant:
    """One engine with one form of the model: what ``launch.py`` runs, in which Python, with which model and precision.

    ``variables`` are set in the environment of its worker and of its server. ``for_speed`` and ``for_quality`` say what
    it is asked. ``dense``: without the plan that lies beside the model.
    """

    engine: str
    precision: str
    python: Path
    worker: str
    model: Path
    worker_precision: str = "auto"
    variables: Mapping[str, str] = field(default_factory=dict)
    for_speed: bool = True
    for_quality: bool = False
    dense: bool = False

    @property
    def name(self) -> str:
        return f"{self.engine} {self.precision}"


class Peer(Protocol):
    """An adapter: how its environment is made, how its model is prepared, how its server is started."""

    name: str
    requirements: Requirements

    def variants(self, model: Path, python: Path, progress: Progress | None) -> list[Variant]:
        """The forms of ``model`` that the peer is measured with, prepared where they are not in the cache yet.

        Raises ``PeerError`` where it cannot serve this model.
        """

    def server_command(self, variant: Variant, *, port: int, threads: int, max_context: int) -> list[str]:
        """What starts the peer's OpenAI server on 127.0.0.1; raises ``PeerError`` where it has none."""
