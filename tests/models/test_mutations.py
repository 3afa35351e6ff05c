"""Damaged model files, 32,500 of them: each opens and reads, or is refused with a ``ModelFileError``.

Each mutation is a function of its number alone, so that a failure can be repeated: the assertion names the number.
"""

from __future__ import annotations

import json
import random
import resource
import shutil
import signal
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import save_file

from fallow.errors import ModelFileError
from fallow.models.checkpoint import expected_shapes, open_checkpoint
from fallow.models.dequantize import dequantize
from fallow.models.gguf import GgufFile
from fallow.models.hf_config import config_from_hf
from fallow.models.info import describe

HIDDEN, HEADS, VOCAB, LAYERS = 32, 2, 8, 1
EXTREMES = (0, 1, 2, 31, 32, 33, 127, 128, 255, 256, 32767, 65535, 65536, (1 << 24) - 1, (1 << 31) - 1, 1 << 31)
EXTREMES += ((1 << 32) - 1, 1 << 32, (1 << 62) + 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 32, (1 << 64) - 1)
TOKENS = (b"-1", b"0", b"1", b"2", b"3", b"1e999", b"-0.0", b"1e-320", b"0.5", b"NaN", b"-Infinity", b"null", b"true")
TOKENS += (b'"x"', b"[]", b"{}", b"[0, 0]", b"9" * 40, b"9" * 5000, b"2147483648", b"9223372036854775807", b"[" * 5000)
VALUES: tuple[Any, ...] = (None, True, False, -1, 0, 1, 2, 3, 64, 1 << 31, 1 << 63, 10**400, 0.5, -2.5, 1e300, 5e-324)
VALUES += (float("nan"), float("inf"), "", "linear", "yarn", "longrope", "dynamic", "llama3", "qwen3", "gemma3")
VALUES += ([], [1.0] * 8, [None], ["full_attention"], {}, {"rope_type": "yarn"}, {"full_attention": {"factor": 2}})


@pytest.fixture(autouse=True)
def bounded() -> Iterator[None]:
    """Nothing hangs, and no file of a few kilobytes makes the process take hundreds of megabytes."""

    def hung(*_: object) -> None:
        raise AssertionError("it hangs")

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    previous = signal.signal(signal.SIGALRM, hung)
    signal.alarm(300)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 << 10  # kilobytes


def weights() -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
    """The tensors of a Llama of one layer, under canonical names."""
    rng = np.random.default_rng(0)
    shapes = expected_shapes(config_from_hf(document(), "config.json"))
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def document() -> dict[str, Any]:
    rope = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    return {
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "head_dim": HIDDEN // HEADS,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "rope_parameters": rope,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": [2],
        "attention_bias": False,
        "sliding_window": None,
        "layer_types": None,
        "query_pre_attn_scalar": 16,
    }


HF_NAMES = {
    "embed_tokens": "model.embed_tokens",
    "norm": "model.norm",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    **{name: f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")},
    **{name: f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")},
}
GGUF_NAMES = {
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "attention_norm": "attn_norm",
    "ffn_norm": "ffn_norm",
}
GGUF_NAMES |= {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
GGUF_NAMES |= {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}


def file_name(name: str, names: dict[str, str], layers: str) -> str:
    stem, _, part = name.rpartition(".")
    return f"{stem.replace('layers', layers)}.{names[part]}.weight" if stem else f"{names[name]}.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(document()))
    tensors = {file_name(name, HF_NAMES, "model.layers"): value for name, value in weights().items()}
    save_file(tensors, tmp_path / "model.safetensors")
    open_checkpoint(tmp_path)
    return tmp_path


@pytest.fixture
def gguf_file(tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e4)
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(2.0)
    writer.add_token_list(["a", "b", "c", "d"])
    writer.add_array("general.flags", [True, False])
    writer.add_array("general.scores", [0.5, 1.5])
    writer.add_tensor("rope_freqs.weight", np.ones(HIDDEN // HEADS // 2, np.float32))
    kinds = [gguf.GGMLQuantizationType[name] for name in ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")]
    for i, (name, value) in enumerate(weights().items()):
        kind = kinds[i % len(kinds)] if value.ndim == 2 else gguf.GGMLQuantizationType.F32
        data = gguf.quants.quantize(value, kind)
        writer.add_tensor(file_name(name, GGUF_NAMES, "blk"), data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    open_checkpoint(path)
    return path


def mutate_bytes(data: bytes, rng: random.Random, header: int) -> bytes:
    """One to three of: cut short, flip a bit, overwrite a number, splice. Mostly in the header, the first bytes."""
    result = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if not result:
            break
        at = rng.randrange(min(header, len(result)) if rng.random() < 0.9 else len(result))
        kind = rng.randrange(6)
        if kind == 0:
            del result[at:]
        elif kind == 1:
            result[at] ^= 1 << rng.randrange(8)
        elif kind in (2, 3):
            value, size = rng.choice((*EXTREMES, len(data), len(data) - 1, rng.getrandbits(64))), rng.choice((1, 4, 8))
            result[at : at + size] = (value & ((1 << 8 * size) - 1)).to_bytes(size, "little")
        elif kind == 4:
            start = rng.randrange(len(result))
            piece = result[start : start + rng.choice((1, 4, 8, 12, 40, 200))]
            result[at : at + rng.choice((0, len(piece)))] = piece
        else:
            del result[at : at + rng.choice((1, 4, 8, 24))]
    return bytes(result)


def mutate_text(data: bytes, rng: random.Random) -> bytes:
    """A JSON text with one of its words or numbers replaced, or its bytes mutated."""
    if rng.random() < 0.4:
        return mutate_bytes(data, rng, len(data))
    starts = [i for i, byte in enumerate(data) if byte in b'0123456789"ntf[{']
    at = rng.choice(starts)
    end = at + 1
    while end < len(data) and data[end] not in b",:]} ":
        end += 1
    return data[:at] + rng.choice(TOKENS) + data[end:]


def mutate_value(value: Any, rng: random.Random) -> Any:
    """A JSON value with one thing in it replaced, removed or added."""
    if isinstance(value, dict) and value and rng.random() < 0.97:
        key = rng.choice(sorted(value))
        choice = rng.random()
        if choice < 0.1:
            return {name: item for name, item in value.items() if name != key}
        if choice < 0.15:
            return value | {rng.choice(sorted(value)): value[key]}
        return value | {key: mutate_value(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.8:
        at = rng.randrange(len(value))
        return [*value[:at], mutate_value(value[at], rng), *value[at + rng.randrange(2) :]]
    if isinstance(value, int) and not isinstance(value, bool) and rng.random() < 0.4:
        return value + rng.choice((-32, -4, -1, 1, 4, 32))
    return rng.choice(VALUES)


def survives(path: Path, what: str) -> bool:
    """Whether a damaged model opens; anything but that and a ``ModelFileError`` with a sentence is a failure."""
    try:
        checkpoint = open_checkpoint(path)
    except ModelFileError as error:
        if not str(error).endswith("."):
            raise AssertionError(f"{what}: {error} is no sentence") from error
        return False
    except BaseException as error:
        raise AssertionError(f"{what}: {error!r}") from error
    try:
        describe(checkpoint).to_json()
        for tensor in checkpoint.tensors.values():
            assert tensor.read().nbytes == tensor.nbytes
            assert dequantize(tensor).shape == tensor.shape
    except ModelFileError:
        pass
    except BaseException as error:
        raise AssertionError(f"{what}: it opened, but {error!r}") from error
    return True


def run(name: str, count: int, path: Path, target: Path, mutate: Callable[[random.Random], bytes]) -> None:
    opened = 0
    for number in range(count):
        # Replaced, not rewritten: the file of the last one may still be open.
        target.unlink()
        target.write_bytes(mutate(random.Random(f"{name} {number}")))
        opened += survives(path, f"mutation {number} of {name}")
    # Both outcomes occur, else the mutations are too wild or too tame to say anything.
    assert 0.01 * count < opened < 0.9 * count


def test_gguf_bytes(gguf_file: Path) -> None:
    data = gguf_file.read_bytes()
    header = min(t.offset for t in GgufFile(gguf_file).tensors.values())
    run("gguf", 12_000, gguf_file, gguf_file, lambda rng: mutate_bytes(data, rng, header))


def test_safetensors_bytes(folder: Path) -> None:
    target = folder / "model.safetensors"
    data = target.read_bytes()
    header = 8 + int(struct.unpack("<Q", data[:8])[0])
    run("safetensors", 6000, folder, target, lambda rng: mutate_bytes(data, rng, header))


def test_safetensors_headers(folder: Path) -> None:
    """The header as JSON, so that its length is right and the numbers in it are what is wrong."""
    target = folder / "model.safetensors"
    data = target.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header, rest = json.loads(data[8 : 8 + size]), data[8 + size :]

    def mutate(rng: random.Random) -> bytes:
        text = (
            json.dumps(mutate_value(header, rng)).encode()
            if rng.random() < 0.6
            else mutate_text(data[8 : 8 + size], rng)
        )
        return struct.pack("<Q", len(text)) + text + rest

    run("safetensors headers", 6000, folder, target, mutate)


def test_configurations(folder: Path) -> None:
    target = folder / "config.json"
    data = target.read_bytes()
    values = json.loads(data)

    def mutate(rng: random.Random) -> bytes:
        if rng.random() < 0.3:
            return mutate_text(data, rng)
        changed = values | {"model_type": rng.choice(("llama", "llama", "mistral", "qwen3", "gemma3", "gemma3_text"))}
        changed["tie_word_embeddings"] = True
        for _ in range(rng.choice((1, 1, 2))):
            changed = mutate_value(changed, rng)
            if not isinstance(changed, dict):
                break
        return json.dumps(changed).encode()

    run("config.json", 6000, folder, target, mutate)


def test_indices(folder: Path) -> None:
    shutil.copy(folder / "model.safetensors", folder / "part.safetensors")
    tensors = [file_name(name, HF_NAMES, "model.layers") for name in weights()]
    target = folder / "model.safetensors.index.json"
    values = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(tensors, "part.safetensors")}
    target.write_text(json.dumps(values))
    data = target.read_bytes()

    def mutate(rng: random.Random) -> bytes:
        return mutate_text(data, rng) if rng.random() < 0.5 else json.dumps(mutate_value(values, rng)).encode()

    run("indices", 2500, folder, target, mutate)
