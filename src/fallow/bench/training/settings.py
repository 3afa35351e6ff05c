"""The settings of a baseline, typed: HF ``Trainer`` with AdamW, or with Muon for the matrices of layers."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from fallow.errors import FallowError
from fallow.training.recipe import Section, checked, read_toml


class BaselineSettings(Section):
    """How the baseline trains; what it trains is the recipe's. The rate rises over ``warmup_share`` of the steps and
    falls linearly to zero, gradients are clipped at a norm of 1, weights begin as transformers initialises them.

    ``lr`` is AdamW's. With Muon it is that of the embeddings and norms, and ``muon_lr`` that of the matrices, with
    updates of AdamW's size (Moonlight, arXiv 2502.16982).
    """

    optimizer: Literal["adamw", "muon"]
    tokens: int = Field(ge=1)
    batch: int = Field(ge=1)  # sequences a step
    lr: float = Field(gt=0)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    weight_decay: float = Field(0.1, ge=0)
    muon_lr: float | None = Field(None, gt=0)
    muon_momentum: float = Field(0.95, ge=0, lt=1)
    warmup_share: float = Field(0.02, ge=0, le=1)
    precision: Literal["bf16", "fp32"] = "bf16"
    compile: bool = True


def load_baseline(path: Path) -> BaselineSettings:
    """Raises ``FallowError`` with a sentence for each mistake."""
    return checked_baseline(read_toml(path), f"The baseline {path}")


def checked_baseline(document: dict[str, object], where: str) -> BaselineSettings:
    """``document`` as settings. Raises ``FallowError``."""
    settings = checked(BaselineSettings, document, where)
    if (settings.optimizer == "muon") != (settings.muon_lr is not None):
        raise FallowError(f"{where} cannot be used: muon_lr belongs to the optimizer muon, and only to it.")
    return settings
