"""What a benchmark found, and the JSON object of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

OURS = "fallow"
DENSE = " dense"
"""After a precision of ours that was measured without the plan of the model."""


@dataclass(frozen=True)
class Run:
    """One engine at one load. ``tokens_per_s`` counts prompt tokens for ``prefill``, new tokens of the whole batch for
    ``decode``, and new tokens within the latency objective for ``trace``. ``None`` where it was not measured.

    ``spread`` is (largest - smallest) / median of the repetitions' speeds. ``details`` of a trace has its replays;
    of ``decode`` ``together`` is false where sequences hardly ran at once: then the speed is that of the whole run.
    """

    engine: str
    precision: str
    load: str
    batch: int | None
    context: int | None
    tokens_per_s: float
    ttft_s: float | None
    peak_memory_bytes: int | None
    joules_per_token: float | None
    energy_source: str | None
    usd_per_million_output_tokens: float | None
    repetitions: int = 1
    spread: float | None = None
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def is_apart(self) -> bool:
        """Whether the speed is that of the whole run, prompts among it."""
        return self.details.get("together") is False


@dataclass(frozen=True)
class Quality:
    """Perplexity of one engine on one text: ``tokens`` scored in windows of ``window``."""

    engine: str
    precision: str
    text: str
    perplexity: float
    bits_per_byte: float
    tokens: int
    window: int


@dataclass(frozen=True)
class Ratio:
    """Our best precision over the best peer at one load: above 1 means that we are faster."""

    load: str
    batch: int | None
    context: int | None
    ours: str
    best_peer: str
    ratio: float


@dataclass(frozen=True)
class PlanRatio:
    """Ours with the plan of the model over ours without it, in one precision at one load: ``speed`` above 1 means that
    it is faster, ``joules`` below 1 that a token takes less."""

    precision: str
    load: str
    batch: int | None
    context: int | None
    speed: float
    joules: float | None


@dataclass(frozen=True)
class Skipped:
    """A peer, or one precision of it, that was not measured, and why."""

    peer: str
    reason: str


@dataclass
class BenchResult:
    """Everything one benchmark found. ``price_source`` and ``energy_method`` say where money and joules come from."""

    model: str
    machine: dict[str, Any]
    usd_per_hour: float
    price_source: str
    energy_method: str
    runs: list[Run] = field(default_factory=list)
    quality: list[Quality] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)

    @property
    def ratios(self) -> list[Ratio]:
        """One ratio for each load that both we and a peer were measured at."""
        loads: dict[tuple[str, int | None, int | None], list[Run]] = {}
        for run in self.runs:
            loads.setdefault((run.load, run.batch, run.context), []).append(run)
        found = []
        for (load, batch, context), runs in loads.items():
            # At a trace an engine can be without any rate that it bears.
            ours = [run for run in runs if run.engine == OURS and run.tokens_per_s > 0]
            peers = [run for run in runs if run.engine != OURS and run.tokens_per_s > 0]
            if ours and peers:
                best, best_peer = (max(side, key=lambda run: run.tokens_per_s) for side in (ours, peers))
                found.append(
                    Ratio(
                        load,
                        batch,
                        context,
                        best.precision,
                        f"{best_peer.engine} {best_peer.precision}",
                        best.tokens_per_s / best_peer.tokens_per_s,
                    )
                )
        return found

    @property
    def plan_ratios(self) -> list[PlanRatio]:
        """One for each load and precision that was measured with the plan and without."""
        runs = {(run.precision, run.load, run.batch, run.context): run for run in self.runs if run.engine == OURS}
        found = []
        for (precision, load, batch, context), run in runs.items():
            dense = runs.get((precision + DENSE, load, batch, context))
            if dense is not None and dense.tokens_per_s > 0:
                energies = run.joules_per_token, dense.joules_per_token
                joules = energies[0] / energies[1] if energies[0] is not None and energies[1] else None
                speed = run.tokens_per_s / dense.tokens_per_s
                found.append(PlanRatio(precision, load, batch, context, speed, joules))
        return found

    def to_json(self) -> dict[str, Any]:
        """The object that ``fallow bench --json`` prints."""
        ratios = [asdict(ratio) for ratio in self.ratios]
        return {**asdict(self), "ratios": ratios, "plan_ratios": [asdict(ratio) for ratio in self.plan_ratios]}
