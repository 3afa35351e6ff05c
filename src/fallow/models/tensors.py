"""Tensors as they lie in a checkpoint: a type, a shape and bytes that are read when they are needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from math import prod
from pathlib import Path

from fallow.arrays import Bytes, Int64
from fallow.models.config import ModelConfig


class TensorType(Enum):
    """Storage types: (name, elements in a block, bytes in a block)."""

    F32 = ("F32", 1, 4)
    F16 = ("F16", 1, 2)
    BF16 = ("BF16", 1, 2)
    Q4_0 = ("Q4_0", 32, 18)
    Q4_1 = ("Q4_1", 32, 20)
    Q5_0 = ("Q5_0", 32, 22)
    Q5_1 = ("Q5_1", 32, 24)
    Q8_0 = ("Q8_0", 32, 34)
    Q4_K = ("Q4_K", 256, 144)
    Q5_K = ("Q5_K", 256, 176)
    Q6_K = ("Q6_K", 256, 210)

    @property
    def block_elements(self) -> int:
        return self.value[1]

    @property
    def block_bytes(self) -> int:
        return self.value[2]

    @property
    def is_floating(self) -> bool:
        """Whether each element is a number of its own rather than a code in a block."""
        return self.block_elements == 1


@dataclass(frozen=True)
class Place:
    """Where the bytes that ``RawTensor.read`` gives lie: in the file ``path`` from ``offset`` on, cut into as many rows
    as ``order`` has numbers, of which number ``order[i]`` is read as the ``i``-th; None: as they lie."""

    path: Path
    offset: int
    order: Int64 | None = None


@dataclass(frozen=True)
class RawTensor:
    """One tensor of a checkpoint.

    ``shape`` is row-major: ``(out_features, in_features)`` for a matrix, ``(n,)`` for a vector.
    ``read()`` returns its bytes, ``uint8 [rows, bytes per row]`` (one row for a vector), and raises
    ``ModelFileError`` where the file ends too early. ``place`` is None where they are not the file's own.
    """

    name: str
    type: TensorType
    shape: tuple[int, ...]
    read: Callable[[], Bytes]
    place: Place | None = None

    @property
    def elements(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.elements // self.type.block_elements * self.type.block_bytes


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk, whatever its format, under one set of tensor names.

    Names: ``embed_tokens``, ``residual_mixes``, ``norm``, ``lm_head`` (absent where the embeddings are
    tied), and for each layer ``layers.{i}.``: ``attention_norm``, ``q_proj``, ``k_proj``, ``v_proj``,
    ``value_embeddings``, ``o_proj``, ``q_norm``, ``k_norm``, ``attention_post_norm``, ``ffn_norm``,
    ``gate_proj``, ``up_proj``, ``down_proj``, ``ffn_post_norm``; biases end in ``.bias``
    (``layers.0.q_proj.bias``). ``value_embeddings`` has a row ``[kv_heads * head_dim]`` for each token;
    row ``i`` of ``residual_mixes`` is how much of its input layer ``i`` keeps, and how much of the
    embeddings it sees again.
    Rows of ``q_proj`` and ``k_proj`` are in Hugging Face order (RoPE rotates halves), and norm weights
    multiply as they are (Gemma's ``1 + w`` is already applied), whatever the file does.
    """

    path: Path
    format: str  # "gguf" or "safetensors"
    config: ModelConfig
    tensors: Mapping[str, RawTensor]

    @property
    def head(self) -> RawTensor:
        """The matrix of the logits, ``[vocab, hidden]``."""
        return self.tensors["embed_tokens" if self.config.tie_word_embeddings else "lm_head"]
