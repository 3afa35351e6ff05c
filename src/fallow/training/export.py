"""A decoder as a Hugging Face folder: ``transformers`` loads it, and so does the engine.

What a family of ``transformers`` can express is written as its. Our own variants are written as ``fallow``, beside a
copy of ``modeling_fallow.py``, which ``transformers`` runs with ``trust_remote_code=True``.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from fallow.data.tokenizers import save_tokenizer
from fallow.files import replacing_folder, sync_file, write_json
from fallow.models.checkpoint import hf_tensor_names
from fallow.models.config import ModelConfig
from fallow.models.decoder_weights import parameter_name
from fallow.models.hf_document import MODELLING_FILE, hf_document
from fallow.models.tokenizer import Tokenizer
from fallow.plan import FILE_NAME, SparsityPlan

# What a model's folder says about its tokenizer beyond what ours keeps: tokens to pad with, classes, merges.
_CARRIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)


def export_model(
    config: ModelConfig,
    parameters: Mapping[str, Tensor],
    tokenizer: Tokenizer,
    folder: Path,
    *,
    start: Path | None = None,
    dtype: torch.dtype = torch.bfloat16,
    plan: SparsityPlan | None = None,
) -> None:
    """Write the model to ``folder``, which is complete or as it was. ``parameters`` have the decoder's names; the files
    about the tokenizer and about generating come from ``start``, the model that was tuned, where it is a folder that
    has them; ``plan`` lies beside the weights where something may rest.

    Raises ``OSError`` where the disk has no room, and ``FallowError`` where no family of ``transformers`` fits.
    """
    document = hf_document(config, str(dtype).removeprefix("torch."))
    with replacing_folder(folder) as partial:
        tensors = {
            file_name: _as_stored(config, name, parameters[parameter_name(name)].detach()).to(dtype).contiguous()
            for name, file_name in hf_tensor_names(config).items()
        }
        save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
        sync_file(partial / "model.safetensors")
        write_json(partial / "config.json", document)
        ends = list(config.eos_token_ids)
        write_json(partial / "generation_config.json", {"bos_token_id": config.bos_token_id, "eos_token_id": ends})
        if start is not None and (start / "tokenizer.json").is_file():
            for name in filter(lambda name: (start / name).is_file(), _CARRIED):
                shutil.copyfile(start / name, partial / name)
                sync_file(partial / name)
        else:
            save_tokenizer(tokenizer, partial)
        if plan is not None and not plan.is_dense:
            plan.save(partial / FILE_NAME)
        if document["model_type"] == "fallow":
            shutil.copyfile(Path(__file__).with_name(MODELLING_FILE), partial / MODELLING_FILE)


def _as_stored(config: ModelConfig, name: str, parameter: Tensor) -> Tensor:
    """Files of Gemma hold its norms less one, by which they multiply."""
    return parameter.float() - 1 if config.architecture == "gemma3" and name.endswith("norm") else parameter
