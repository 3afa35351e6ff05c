"""A decoder as a Hugging Face folder: ``transformers`` loads it, and so does the engine.

What Llama or Qwen3 can express is written as theirs. Our own variants are written as ``fallow``, beside a copy of
``modeling_fallow.py``, which ``transformers`` runs with ``trust_remote_code=True``.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from fallow.data.tokenizers import save_tokenizer
from fallow.files import replacing_folder, sync_file, write_json
from fallow.models.checkpoint import hf_tensor_names
from fallow.models.config import ModelConfig
from fallow.models.decoder_weights import parameter_name
from fallow.models.tokenizer import Tokenizer

MODELLING_FILE = "modeling_fallow.py"
_ACTIVATIONS = {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu", "relu2": "relu2"}


def export_model(
    config: ModelConfig,
    parameters: Mapping[str, Tensor],
    tokenizer: Tokenizer,
    folder: Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Write the model to ``folder``, which is complete or as it was. ``parameters`` have the decoder's names.

    Raises ``OSError`` where the disk has no room.
    """
    document = hf_config_of(config, dtype)
    with replacing_folder(folder) as partial:
        tensors = {
            file_name: parameters[parameter_name(name)].detach().to(dtype).contiguous()
            for name, file_name in hf_tensor_names(config).items()
        }
        save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
        sync_file(partial / "model.safetensors")
        write_json(partial / "config.json", document)
        ends = list(config.eos_token_ids)
        write_json(partial / "generation_config.json", {"bos_token_id": config.bos_token_id, "eos_token_id": ends})
        save_tokenizer(tokenizer, partial)
        if document["model_type"] == "fallow":
            shutil.copyfile(Path(__file__).with_name(MODELLING_FILE), partial / MODELLING_FILE)


def family_of(config: ModelConfig) -> str:
    """The ``model_type`` that a decoder without windows, biases and post-norms is written as."""
    own = not config.gated_mlp or config.value_embedding_layers or config.residual_mixes or config.logit_softcap
    if own or config.active_share or config.hidden_act != "silu":
        return "fallow"
    return "qwen3" if config.qk_norm else "llama"


def hf_config_of(config: ModelConfig, dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    """``config.json`` of a decoder that was trained here."""
    family = family_of(config)
    names = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM", "fallow": "FallowForCausalLM"}
    document: dict[str, Any] = {
        "architectures": [names[family]],
        "model_type": family,
        "dtype": str(dtype).removeprefix("torch."),
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": _ACTIVATIONS[config.hidden_act],
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope.theta,
        "tie_word_embeddings": config.tie_word_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids),
    }
    if family == "fallow":
        module = MODELLING_FILE.removesuffix(".py")
        document |= {
            "auto_map": {"AutoConfig": f"{module}.FallowConfig", "AutoModelForCausalLM": f"{module}.FallowForCausalLM"},
            "qk_norm": config.qk_norm,
            "gated_mlp": config.gated_mlp,
            "value_embedding_layers": list(config.value_embedding_layers),
            "residual_mixes": config.residual_mixes,
            "logit_softcap": config.logit_softcap,
            "active_share": config.active_share,
        }
    return document
