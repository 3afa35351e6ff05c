"""Writes a GGUF file as a float32 Hugging Face folder.   usage: FILE.gguf OUT   (needs transformers, torch, gguf)"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def dequantize(source: Path, out: Path) -> None:
    """The weights as transformers reads them, under a config that says nothing of a quantisation any more."""
    where = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    loaded: Any = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    stale = ("quantization_config", "transformers_version", "dtype", "torch_dtype", "_name_or_path", "architectures")
    settings = {key: value for key, value in loaded.config.to_dict().items() if key not in stale}
    plain = type(loaded)(type(loaded.config)(**settings))
    plain.load_state_dict(loaded.state_dict())
    plain.to(torch.float32).save_pretrained(out)
    AutoTokenizer.from_pretrained(**where).save_pretrained(out)


if __name__ == "__main__":
    dequantize(Path(sys.argv[1]), Path(sys.argv[2]))
