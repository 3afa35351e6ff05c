"""What is in a model and what the engine makes of it: sizes, storage, expected bytes and multiplications a token."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from fallow.errors import FallowError
from fallow.models.tensors import Checkpoint, RawTensor, TensorType
from fallow.plan import SparsityPlan

PRECISIONS = ("auto", "bf16", "q8", "q4")
TABLES = ("embed_tokens", "value_embeddings")  # last parts of the names of what a token reads one row of
VOCABULARY = (*TABLES, "lm_head")
KV_BYTES = 2  # keys and values are bfloat16


@dataclass(frozen=True)
class EngineForm:
    """How the engine holds a matrix. ``codes`` bits of a weight; ``bits`` with scales and offsets.

    ``head_bits`` come on top where the matrix is the head: the sums of the weights of each group.
    """

    name: str
    codes: int
    bits: float
    head_bits: float = 0.0


BF16 = EngineForm("bf16", 16, 16.0)
Q8_GROUPS = EngineForm("8-bit groups of 32", 8, 9.5, 1.5)

# What becomes of each storage type in its own precision. Codes of 5 and 6 bits are held in 8, the values unchanged.
OWN_FORMS: Mapping[TensorType, EngineForm] = {
    TensorType.F32: BF16,
    TensorType.F16: BF16,
    TensorType.BF16: BF16,
    TensorType.Q4_0: EngineForm("Q4_0", 4, 4.5, 1.0),
    TensorType.Q4_1: EngineForm("Q4_1", 4, 5.0, 1.5),
    TensorType.Q5_0: EngineForm("8-bit, same values", 8, 8.5, 1.0),
    TensorType.Q5_1: EngineForm("8-bit, same values", 8, 9.0, 1.5),
    TensorType.Q8_0: EngineForm("Q8_0", 8, 8.5, 1.0),
    TensorType.Q4_K: EngineForm("Q4_K", 4, 5.5, 1.5),
    TensorType.Q5_K: EngineForm("8-bit, same values", 8, 9.5, 1.5),
    TensorType.Q6_K: EngineForm("8-bit, same values", 8, 10.0, 2.0),
}


def engine_form(type: TensorType, precision: str, *, vocabulary: bool = False) -> EngineForm:
    """What the engine holds a matrix of this storage type as; ``vocabulary``: embeddings or the head.

    Raises ``FallowError`` for an unknown precision.
    """
    if precision not in PRECISIONS:
        raise FallowError(f"precision {precision!r} is not known: use one of {', '.join(PRECISIONS)}.")
    if precision == "bf16":
        return BF16
    if precision == "q8" and type is not TensorType.Q8_0:
        return Q8_GROUPS
    if precision == "q4" and type.block_elements == 1:
        return OWN_FORMS[TensorType.Q8_0 if vocabulary else TensorType.Q4_1]
    return OWN_FORMS[type]


@dataclass(frozen=True)
class TensorClass:
    """Tensors of one role, shape and storage type; ``layers.*`` stands for all layers that have it so.

    ``converted``: the engine holds them otherwise than the file does, as ``engine`` says.
    """

    name: str
    count: int
    shape: tuple[int, ...]
    storage: str
    bytes: int
    engine: str
    converted: bool


@dataclass(frozen=True)
class ModelInfo:
    """A model in numbers. Bytes and multiply-accumulates a token are those of decoding one token at context 0.

    ``bytes_per_token`` is what the weights make the engine read, in the form in which it holds them;
    ``kv_bytes_per_token`` is what a token of context takes in the KV cache.
    """

    model: str
    architecture: str
    format: str
    parameters: int
    precision: str
    plan: str | None
    context: int
    layers: int
    hidden_size: int
    intermediate_size: int
    attention_heads: int
    key_value_heads: int
    head_dim: int
    vocab_size: int
    sliding_window: int | None
    rope: str
    tied_embeddings: bool
    weight_bytes: int
    bytes_per_token: int
    macs_per_token: int
    kv_bytes_per_token: int
    tensors: tuple[TensorClass, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self) | {"tensors": [asdict(group) | {"shape": list(group.shape)} for group in self.tensors]}


def describe(checkpoint: Checkpoint, *, precision: str = "auto", plan: SparsityPlan | None = None) -> ModelInfo:
    """What ``checkpoint`` holds, and what the engine would make of it at ``precision``; counts are those of the dense
    model, whatever ``plan`` lets rest.

    Raises ``FallowError`` where the precision is unknown. No tensor is read.
    """
    config, tensors = checkpoint.config, checkpoint.tensors
    head = "embed_tokens" if config.tie_word_embeddings else "lm_head"
    tables = [t for t in tensors.values() if _part(t.name) in TABLES]
    matrices = [t for t in tensors.values() if _is_matrix(t) and (t.name == head or t not in tables)]
    numbers = [t for t in tensors.values() if not _is_matrix(t)]
    read = sum(held_bytes(t, precision, is_head=t.name == head) for t in matrices)
    read += sum(4 * t.elements for t in numbers)
    # Of each table the row of the token itself.
    read += sum(held_bytes(t, precision, is_head=False) // config.vocab_size for t in tables)
    windows = [window for window in config.layer_windows if window is not None]
    path = checkpoint.path
    return ModelInfo(
        model=path.stem if checkpoint.format == "gguf" else path.resolve().name,
        architecture=config.architecture,
        format=checkpoint.format,
        parameters=sum(t.elements for t in tensors.values()),
        precision=precision,
        plan=None if plan is None else plan.summary,
        context=config.max_position_embeddings,
        layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        attention_heads=config.num_attention_heads,
        key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        vocab_size=config.vocab_size,
        sliding_window=windows[0] if windows else None,
        rope=config.rope.scaling,
        tied_embeddings=config.tie_word_embeddings,
        weight_bytes=sum(t.nbytes for t in tensors.values()),
        bytes_per_token=read,
        macs_per_token=sum(t.elements for t in matrices),
        kv_bytes_per_token=2 * KV_BYTES * config.num_hidden_layers * config.num_key_value_heads * config.head_dim,
        tensors=_classes(tensors, precision),
    )


def _part(name: str) -> str:
    """A tensor's name without its layer."""
    return name.rpartition(".")[2]


def _is_matrix(tensor: RawTensor) -> bool:
    """Whether the engine packs it; the rest are numbers of single operations, held as float32."""
    return len(tensor.shape) == 2 and tensor.name != "residual_mixes"


def held_bytes(tensor: RawTensor, precision: str, *, is_head: bool) -> int:
    """Of a matrix in the form in which the engine holds it; ``is_head``: with what the head has beside it."""
    form = engine_form(tensor.type, precision, vocabulary=_part(tensor.name) in VOCABULARY)
    extra = form.head_bits if is_head else 0.0
    return int(tensor.elements * (form.bits + extra) / 8)


def _classes(tensors: Mapping[str, RawTensor], precision: str) -> tuple[TensorClass, ...]:
    groups: dict[tuple[str, tuple[int, ...], TensorType], list[RawTensor]] = defaultdict(list)
    for tensor in tensors.values():
        layer, _, part = tensor.name.removeprefix("layers.").partition(".")
        name = f"layers.*.{part}" if tensor.name.startswith("layers.") else layer
        groups[name, tensor.shape, tensor.type].append(tensor)
    classes = []
    for (name, shape, type), members in groups.items():
        # What is not packed becomes float32, which holds what any float type holds.
        form = engine_form(type, precision, vocabulary=_part(name) in VOCABULARY)
        engine = form.name if _is_matrix(members[0]) else "F32"
        classes.append(
            TensorClass(
                name=name,
                count=len(members),
                shape=shape,
                storage=type.name,
                bytes=sum(member.nbytes for member in members),
                engine=engine,
                converted=engine.upper() != type.name,
            )
        )
    return tuple(classes)
