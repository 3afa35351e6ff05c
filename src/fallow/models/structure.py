"""The axis ``structure``: what is left of a model when heads, neurons or whole blocks are taken out of it for good."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from fallow.arrays import Bytes, Float32, Int64
from fallow.errors import FallowError, ModelFileError
from fallow.models.config import ModelConfig
from fallow.models.dequantize import dequantize
from fallow.models.quantize import quantize_q8_0
from fallow.models.tensors import Checkpoint, RawTensor, TensorType
from fallow.plan import KV_HEAD, LayerRule, SparsityPlan

NEURON_GROUP = 32
"""Neurons that are taken out together: the columns of a block in most formats."""
NEURONS = "neurons."
"""With a number: what a target calls such a group."""


@dataclass(frozen=True)
class Kept:
    """Which of a layer's KV heads are left, each with the query heads that share it, and which of its neurons; None:
    all. Of a block without any nothing is left: it adds nothing to the residual stream."""

    kv_heads: tuple[int, ...] | None = None
    neurons: tuple[int, ...] | None = None


def kept_parts(plan: SparsityPlan, config: ModelConfig) -> list[Kept]:
    """Of each layer what is left. A rule ``removed`` has the target ``attention`` or ``ffn`` (the block), ``kv_head.0``
    or ``neurons.0`` (the first ``NEURON_GROUP`` of them) and so on; without a layer it is for all. Raises
    ``ModelFileError`` where a target is none of these, ``FallowError`` where the model cannot do without it."""
    heads: list[set[int]] = [set() for _ in range(config.num_hidden_layers)]
    neurons: list[set[int]] = [set() for _ in range(config.num_hidden_layers)]
    for rule in plan.rules("structure"):
        of_heads, of_neurons = _removed(rule, config)
        for layer in rule.layers(config.num_hidden_layers):
            heads[layer].update(of_heads)
            neurons[layer].update(of_neurons)
    if config.gate_quantile is not None and any(0 < len(gone) < config.intermediate_size for gone in neurons):
        raise FallowError(
            "The plan takes neurons out of a model whose statistical top-k compares each with all others: take out "
            "whole networks (the target ffn), or none."
        )
    return [
        Kept(_left(gone, config.num_key_value_heads), _left(gone_neurons, config.intermediate_size))
        for gone, gone_neurons in zip(heads, neurons, strict=True)
    ]


def without_removed(checkpoint: Checkpoint, kept: Sequence[Kept]) -> Checkpoint:
    """The checkpoint, whose layers have the rows and columns alone that are left. Columns are those of the file where
    whole blocks are left, and rounded to Q8_0 anew where they are not. Blocks of which nothing is left stay."""
    config, tensors = checkpoint.config, dict(checkpoint.tensors)
    shared = config.num_attention_heads // config.num_key_value_heads
    for layer, parts in enumerate(kept):
        rows: dict[str, Int64] = {}
        columns: dict[str, Int64] = {}
        if parts.kv_heads:
            queries = spans(parts.kv_heads, shared * config.head_dim)
            keys = spans(parts.kv_heads, config.head_dim)
            rows |= {"q_proj": queries, "k_proj": keys, "v_proj": keys}
            columns |= {"o_proj": queries, "value_embeddings": keys}
        if parts.neurons:
            neurons = np.array(parts.neurons, np.int64)
            rows |= {"gate_proj": neurons, "up_proj": neurons}
            columns |= {"down_proj": neurons}
        for select, chosen in ((_rows, rows), (_columns, columns)):
            for part, numbers in chosen.items():
                name = f"layers.{layer}.{part}"
                if name in tensors:
                    tensors[name] = select(tensors[name], numbers)
                if select is _rows and f"{name}.bias" in tensors:
                    tensors[f"{name}.bias"] = _elements(tensors[f"{name}.bias"], numbers)
    return replace(checkpoint, tensors=tensors)


def _removed(rule: LayerRule, config: ModelConfig) -> tuple[range, range]:
    """The KV heads and the neurons that a rule takes out."""
    heads, none = config.num_key_value_heads, range(0)
    groups = config.intermediate_size // NEURON_GROUP
    if rule.target == "attention":
        return range(heads), none
    if rule.target == "ffn":
        return none, range(config.intermediate_size)
    if (head := rule.numbered(KV_HEAD, heads)) is not None:
        return range(head, head + 1), none
    if (group := rule.numbered(NEURONS, groups)) is not None:
        return none, range(group * NEURON_GROUP, (group + 1) * NEURON_GROUP)
    raise ModelFileError(
        f"The plan's axis structure has the target {rule.target!r}: use attention or ffn, "
        f"{KV_HEAD}0 to {KV_HEAD}{heads - 1}, or {NEURONS}0 to {NEURONS}{groups - 1}."
    )


def _left(gone: set[int], count: int) -> tuple[int, ...] | None:
    return tuple(number for number in range(count) if number not in gone) if gone else None


def spans(parts: Sequence[int], width: int) -> Int64:
    """The numbers of rows that belong to ``parts``, each of ``width``."""
    return (np.array(parts, np.int64)[:, None] * width + np.arange(width)).reshape(-1)


def _rows(tensor: RawTensor, numbers: Int64) -> RawTensor:
    def read() -> Bytes:
        return np.ascontiguousarray(tensor.read()[numbers])

    return replace(tensor, shape=(len(numbers), tensor.shape[1]), read=read, place=None)


def _elements(vector: RawTensor, numbers: Int64) -> RawTensor:
    def read() -> Bytes:
        return _as_floats(dequantize(vector).reshape(1, -1)[:, numbers])

    return replace(vector, type=TensorType.F32, shape=(len(numbers),), read=read, place=None)


def _columns(matrix: RawTensor, numbers: Int64) -> RawTensor:
    size = matrix.type.block_elements
    shape = (matrix.shape[0], len(numbers))
    blocks = numbers[::size] // size
    if np.array_equal(spans(blocks.tolist(), size), numbers):

        def read_blocks() -> Bytes:
            stored = matrix.read().reshape(shape[0], -1, matrix.type.block_bytes)
            return np.ascontiguousarray(stored[:, blocks].reshape(shape[0], -1))

        return replace(matrix, shape=shape, read=read_blocks, place=None)
    kind = TensorType.F32 if len(numbers) % TensorType.Q8_0.block_elements else TensorType.Q8_0

    def read_anew() -> Bytes:
        values = np.ascontiguousarray(dequantize(matrix).reshape(matrix.shape)[:, numbers])
        return _as_floats(values) if kind is TensorType.F32 else quantize_q8_0(values)

    return replace(matrix, type=kind, shape=shape, read=read_anew, place=None)


def _as_floats(values: Float32) -> Bytes:
    return np.ascontiguousarray(values, np.float32).view(np.uint8)
