"""Kernels, programs and the executor of the Fallow engine (native/src)."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

_Source = tuple[str, npt.NDArray[np.uint8]]
_Floats = npt.NDArray[np.float32]
_Ints = npt.NDArray[np.int32]
_Bools = npt.NDArray[np.bool_]
_Sampled = tuple[_Ints, _Floats, _Ints, _Floats]

class PackedForm(TypedDict):
    codes: str  # "q4", "q8" or "bf16"
    group: int
    scales: str  # "none", "f16" or "f32"
    pairs: int
    bytes: int
    out_features: int
    in_features: int

page_size: int
screen_directions: int

def available_isas() -> list[str]: ...
def usable_cores() -> int: ...
def release_free_memory() -> None: ...

class Signs:
    def __init__(
        self, out_features: int, in_features: int, directions: _Ints, sizes: _Floats, *, first_columns: int
    ) -> None: ...
    def put_rows(self, first: int, along: _Floats, positive: _Bools, scales: _Floats, deviations: _Floats) -> None: ...

class Program:
    def __init__(
        self,
        *,
        threads: int,
        isa: str,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        num_layers: int,
        max_tokens: int,
        max_sequences: int,
        max_logit_rows: int,
        num_pages: int,
        max_positions: int,
    ) -> None: ...
    def buffer(self, width: int) -> int: ...
    def vector(self, values: _Floats) -> int: ...
    def weights(
        self,
        sources: Sequence[_Source],
        in_features: int,
        *,
        interleave: bool = False,
        asymmetric: bool = False,
        precision: str = "own",
        layout: str = "tiles",
    ) -> int: ...
    def neuron_weights(
        self, up: _Source | None, down: _Source, count: int, *, precision: str, gate: _Source | None = None
    ) -> int: ...
    def signs(self, signs: Signs) -> int: ...
    def describe(self, weights: int) -> PackedForm: ...
    def activations_for(self, weights: int) -> int: ...
    def embed(self, weights: int, out: int, scale: float = 1.0, *, column: int = 0, add: bool = False) -> None: ...
    def norm(self, x: int, weight: int, out: int, eps: float) -> None: ...
    def norm_quantise(self, x: int, weight: int, out: Sequence[int], eps: float, *, kept: int = -1) -> None: ...
    def quantise(self, x: int, out: int, *, threshold: float = 0.0, recorded: bool = False) -> None: ...
    def linear(
        self,
        activations: int,
        weights: int,
        out: int,
        *,
        bias: int = -1,
        column: int = 0,
        epilogue: str = "store",
        gates: int = -1,
        activation: str = "silu",
        threshold: float = 0.0,
    ) -> None: ...
    def rope(
        self,
        qkv: int,
        table: int,
        rotary_dim: int,
        *,
        q_norm: int = -1,
        k_norm: int = -1,
        eps: float = 0.0,
        layer: int,
        kv_heads: int | None = None,
    ) -> None: ...
    def attention(
        self,
        out: int,
        *,
        layer: int,
        kv_heads: int | None = None,
        window: int,
        scale: float,
        sink_pages: int = 0,
        recent_pages: int = 0,
        top_pages: Sequence[int] = (),
        context_pages: int | None = None,
    ) -> None: ...
    def add(self, x: int, out: int) -> None: ...
    def gate(self, gate: int, up: int, out: int, *, activation: str) -> None: ...
    def mix(self, x: int, first: int, out: int, *, keep: float, again: float) -> None: ...
    def soft_cap(self, x: int, cap: float) -> None: ...
    def above_threshold(self, x: int, quantile: float) -> None: ...
    def keep_largest(self, x: int, count: int, *, activation: str) -> None: ...
    def neurons(self, x: int, gates: int, weights: int, *, activation: str, threshold: float) -> None: ...
    def spread(self, x: int, weights: int, out: int, *, threshold: float = 0.0) -> None: ...
    def gather(self, x: int, out: int) -> None: ...
    def screen(self, x: int, signs: int, out: int, *, cap: float = 0.0) -> None: ...
    def look_again(self, logits: int, *, tiles: int) -> None: ...
    def shortlist(self, logits: int, *, tiles: int) -> None: ...
    def rescore(self, activations: int, weights: int, out: int, *, cap: float = 0.0) -> None: ...
    def finish(self, logits: int) -> None: ...
    def centre(self, tokens: _Ints) -> None: ...
    def run(
        self, tokens: _Ints, row_offsets: _Ints, start_positions: _Ints, page_table: _Ints, logit_rows: _Ints
    ) -> None: ...
    def step(
        self,
        tokens: _Ints,
        row_offsets: _Ints,
        start_positions: _Ints,
        page_table: _Ints,
        logit_rows: _Ints,
        sampling: npt.NDArray[np.uint8],
        bias_offsets: _Ints | None = None,
        bias_tokens: _Ints | None = None,
        bias_values: _Floats | None = None,
        repeated_offsets: _Ints | None = None,
        repeated_tokens: _Ints | None = None,
        allowed: npt.NDArray[np.uint32] | None = None,
        mode: str = "plan",
        *,
        pages_read: npt.NDArray[np.uint8] | None = None,
        neurons_at_work: npt.NDArray[np.uint8] | None = None,
        inputs_at_work: npt.NDArray[np.uint8] | None = None,
        tiles_computed: _Ints | None = None,
    ) -> _Sampled: ...
    def log_probabilities(self, targets: _Ints) -> _Floats: ...
    def logits(self, rows: int) -> _Floats: ...
    @property
    def weight_bytes(self) -> int: ...
    @property
    def page_bytes(self) -> int: ...
    @property
    def head_counts(self) -> tuple[int, int, int]: ...
    def head_tiles(self, row: int, *, shortlist: bool = False) -> list[int]: ...
    @property
    def isa(self) -> str: ...

kernels: Any
