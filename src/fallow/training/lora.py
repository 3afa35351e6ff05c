"""LoRA (arXiv 2106.09685) through ``peft``: small matrices beside those of a model that stays as it is."""

from __future__ import annotations

from fnmatch import fnmatchcase
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor

from fallow.errors import FallowError
from fallow.files import replacing_folder, sync_file
from fallow.models.checkpoint import hf_tensor_names
from fallow.models.decoder import Decoder, Linear
from fallow.training.recipe import LoraRecipe

if TYPE_CHECKING:
    from peft import LoraConfig

_ADAPTER = "default"
_MARKS = (".base_layer", f".{_ADAPTER}")  # what peft adds to names


def add_adapters(decoder: Decoder, recipe: LoraRecipe, *, seed: int) -> None:
    """Put adapters of the recipe's rank beside the linear layers that its ``targets`` match (``layers.0.q_proj``); they
    begin with no effect. All else is frozen, its matrices held in the type of the products.

    Raises ``FallowError`` where ``peft`` is missing or no layer matches.
    """
    if find_spec("peft") is None:
        raise FallowError("A recipe with [lora] needs peft, which is not installed: pip install 'fallow[train]'.")
    from peft import inject_adapter_in_model  # noqa: PLC0415  seconds, and most runs have no adapters

    names = [name for name, part in decoder.layers.named_modules(prefix="layers") if isinstance(part, Linear)]
    chosen = [name for name in names if any(fnmatchcase(name, pattern) for pattern in recipe.targets)]
    if not chosen:
        raise FallowError(
            f"lora.targets ({', '.join(recipe.targets)}) matches no linear layer of the model: "
            f"they are called {names[0]} and so on."
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(_config(recipe, chosen), decoder)
    for name, parameter in decoder.named_parameters():
        parameter.requires_grad_(_is_adapter(name))
        if not _is_adapter(name) and parameter.ndim == 2:
            parameter.data = parameter.data.to(decoder.compute)


def merged_weights(decoder: Decoder) -> dict[str, Tensor]:
    """The decoder's weights with its adapters multiplied out, under the names that they had without them."""
    from peft.tuners.lora import Linear as Adapted  # noqa: PLC0415

    deltas = {
        name: part.get_delta_weight(_ADAPTER) for name, part in decoder.named_modules() if isinstance(part, Adapted)
    }
    weights = {}
    for name, parameter in decoder.named_parameters():
        if not _is_adapter(name):
            plain = name.replace(_MARKS[0], "")
            delta = deltas.get(plain.removesuffix(".weight")) if plain.endswith(".weight") else None
            weights[plain] = parameter.detach() if delta is None else parameter.detach().float() + delta.detach()
    return weights


def export_adapters(decoder: Decoder, recipe: LoraRecipe, start: str, folder: Path) -> None:
    """Write the adapters to ``folder`` as ``peft`` does, under the names that ``transformers`` has for the layers of
    the model ``start``. Raises ``OSError`` where the disk has no room."""
    files = {name: file.removesuffix(".weight") for name, file in hf_tensor_names(decoder.config).items()}
    tensors, targets = {}, set()
    for name, parameter in decoder.named_parameters():
        if _is_adapter(name):
            layer, _, matrix = name.replace(_MARKS[1], "").partition(".lora_")
            tensors[f"base_model.model.{files[layer]}.lora_{matrix}"] = parameter.detach().contiguous()
            targets.add(files[layer])
    config = _config(recipe, sorted(targets))
    config.base_model_name_or_path = start
    config.task_type = "CAUSAL_LM"
    config.inference_mode = True
    with replacing_folder(folder) as partial:
        config.save_pretrained(str(partial))
        save_file(tensors, partial / "adapter_model.safetensors", metadata={"format": "pt"})
        for path in partial.iterdir():
            sync_file(path)


def _is_adapter(name: str) -> bool:
    return ".lora_" in name


def _config(recipe: LoraRecipe, targets: list[str]) -> LoraConfig:
    from peft import LoraConfig  # noqa: PLC0415

    alpha = recipe.alpha or 2 * recipe.rank
    return LoraConfig(r=recipe.rank, lora_alpha=alpha, lora_dropout=recipe.dropout, target_modules=targets)
