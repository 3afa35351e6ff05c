"""``fallow info``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Annotated

import typer

from fallow.cli.options import DEFAULT_MODEL, Json, Model, Precision, fetch
from fallow.terminal import print_fields, print_json, print_table

if TYPE_CHECKING:
    from fallow.models.info import ModelInfo, TensorClass


def info(
    model: Model = DEFAULT_MODEL,
    precision: Precision = "auto",
    tensors: Annotated[
        bool, typer.Option("--tensors", help="List the tensors too: name, shape, type, and what becomes of them.")
    ] = False,
    json: Json = False,
) -> None:
    """What is in a model: shapes, precision, size, expected bytes and MACs per token."""
    from fallow.models.checkpoint import open_checkpoint
    from fallow.models.info import describe
    from fallow.plan import SparsityPlan

    path = fetch(model)
    described = describe(open_checkpoint(path), precision=precision, plan=SparsityPlan.beside(path))
    if json:
        print_json(described.to_json())
        return
    print_fields(_fields(described))
    if tensors:
        rows = [
            (group.name, group.count, " × ".join(map(str, group.shape)), group.storage, _fate(group))
            for group in described.tensors
        ]
        print_table(
            {"tensor": "left", "count": "right", "shape": "right", "type": "left", "in the engine": "left"}, rows
        )


def _fields(info: ModelInfo) -> dict[str, object]:
    converted = [group for group in info.tensors if group.converted]
    return {
        "model": info.model,
        "architecture": info.architecture,
        "format": info.format,
        "parameters": info.parameters,
        "context": f"{info.context:,} tokens",
        "sliding window": None if info.sliding_window is None else f"{info.sliding_window:,} tokens",
        "layers": info.layers,
        "hidden size": info.hidden_size,
        "intermediate size": info.intermediate_size,
        "attention heads": info.attention_heads,
        "key-value heads": info.key_value_heads,
        "head size": info.head_dim,
        "vocabulary": f"{info.vocab_size:,} tokens",
        "RoPE scaling": info.rope,
        "tied embeddings": info.tied_embeddings,
        "sparsity plan": info.plan,
        "weights": f"{info.weight_bytes:,} bytes",
        "precision": info.precision,
        "kept": _counted((g for g in info.tensors if not g.converted), lambda g: g.storage) or None,
        "converted": _counted(converted, lambda g: f"{g.storage} to {g.engine}")
        or "nothing: blocks stay as they are in the file",
        "read per token": f"{info.bytes_per_token:,} bytes",
        "MACs per token": info.macs_per_token,
        "KV cache": f"{info.kv_bytes_per_token:,} bytes per token",
    }


def _counted(groups: Iterable[TensorClass], of: Callable[[TensorClass], str]) -> str:
    counts: Counter[str] = Counter()
    for group in groups:
        counts[of(group)] += group.count
    return ", ".join(f"{name} ({count} tensor{'s' * (count != 1)})" for name, count in counts.items())


def _fate(group: TensorClass) -> str:
    return f"to {group.engine}" if group.converted else "kept"
