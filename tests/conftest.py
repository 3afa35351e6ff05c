"""What many tests need: a real model, the shared data, and a tiny random model of each family."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3")
VOCAB_SIZE = 320

_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """As many as there are cores that may be used, whatever the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1


def pytest_configure() -> None:
    """Each of several processes has its share of the cores, and what it starts has too: engines whose threads wait for
    each other on the same cores would take many times as long."""
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker is None or not hasattr(os, "sched_setaffinity"):
        return
    from fallow.server.replicas import split_cores

    shares = split_cores(sorted(os.sched_getaffinity(0)), int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))
    share = shares[int(worker.removeprefix("gw"))]
    if share is not None:
        os.sched_setaffinity(0, share)


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The file of SmolLM2-135M-Instruct, Q4_1: ``$FALLOW_TEST_GGUF``, or the store's, pulled where it is not there."""
    named = os.environ.get("FALLOW_TEST_GGUF")
    if named:
        return Path(named)
    from fallow.errors import FallowError
    from fallow.models.store import resolve

    try:
        return resolve("smollm2-135m")
    except FallowError as error:
        pytest.skip(f"SmolLM2-135M-Instruct cannot be had ({error}): set FALLOW_TEST_GGUF to its file.")


@pytest.fixture(scope="session")
def smollm2_reader(smollm2_gguf: Path) -> Any:
    """The same file as the ``gguf`` package reads it, once: it takes seconds."""
    import gguf

    return gguf.GGUFReader(smollm2_gguf)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of texts and traces beside the repository."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("../shared/data is not there: this test needs its texts.")
    return folder


_CAPITALS = """\
task: capitals
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "The capital of {{{{country}}}} is"
doc_to_target: " {{{{capital}}}}"
generation_kwargs: {{until: [".", ",", "\\n"], max_gen_toks: 4}}
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture(scope="session")
def capitals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task file of lm-eval with three questions. SmolLM2 solves two: the last answer is wrong in the file."""
    folder = tmp_path_factory.mktemp("capitals")
    rows = {"France": "Paris", "Italy": "Rome", "Spain": "Lisbon"}
    data = folder / "capitals.jsonl"
    data.write_text("".join(json.dumps({"country": c, "capital": t}) + "\n" for c, t in rows.items()))
    task = folder / "capitals.yaml"
    task.write_text(_CAPITALS.format(data=data))
    return task


@pytest.fixture(scope="session")
def tiny_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A Hugging Face folder of a small random model for each of ``FAMILIES``, with a tokenizer and a chat template.

    All weights are numbers that bfloat16 holds; Llama and Mistral are saved as float32, the others as bfloat16, and
    Llama in several files. Norms and biases are random too, so that a model without them answers otherwise.
    """
    folder = tmp_path_factory.mktemp("tiny")
    for seed, family in enumerate(FAMILIES):
        _save_tiny_model(family, seed, folder / family)
        _save_tokenizer(folder / family)
    return {family: folder / family for family in FAMILIES}


def _tiny_config(family: str) -> Any:
    import transformers

    sizes = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    if family == "llama":
        scaling = {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
        return transformers.LlamaConfig(**sizes, rope_parameters=scaling)
    if family == "mistral":
        return transformers.MistralConfig(**sizes, sliding_window=24)
    if family == "qwen2":
        window = {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 2}
        return transformers.Qwen2Config(**sizes, **window)
    if family == "qwen3":
        return transformers.Qwen3Config(**sizes, head_dim=32, tie_word_embeddings=True)
    sizes |= {"num_hidden_layers": 7}
    return transformers.Gemma3TextConfig(**sizes, head_dim=32, sliding_window=24, query_pre_attn_scalar=24)


def _save_tiny_model(family: str, seed: int, folder: Path) -> None:
    import torch
    import transformers

    generator = torch.Generator().manual_seed(seed)
    dtype = torch.float32 if family in ("llama", "mistral") else torch.bfloat16
    model = transformers.AutoModelForCausalLM.from_config(_tiny_config(family)).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                values = noise * 0.2 + (0.0 if family == "gemma3" else 1.0)
            elif "embed_tokens" in name:
                values = noise * (0.125 if family == "gemma3" else 0.5)
            else:
                values = noise * (0.2 if parameter.dim() == 1 else 1.5 * parameter.shape[-1] ** -0.5)
            parameter.copy_(values.to(torch.bfloat16))
    model.save_pretrained(folder, max_shard_size="200KB" if family == "llama" else "1GB")


def _save_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([Path(json.__file__).read_text(encoding="utf-8")], trainer)
    assert backend.get_vocab_size() == VOCAB_SIZE
    backend.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>", "chat_template": _CHATML}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **names}))
