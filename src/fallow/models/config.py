"""What a decoder-only model is: sizes and choices, the same whatever file it came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import NormalDist


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding of one kind of layer (RoFormer, arXiv 2104.09864).

    ``scaling`` is one of ``none``, ``linear``, ``dynamic``, ``yarn``, ``llama3``, ``longrope``;
    ``parameters`` holds the numbers of that kind under their Hugging Face names.
    ``frequency_factors`` divides each of the ``rotary_dim / 2`` frequencies (GGUF ``rope_freqs``).
    """

    theta: float = 10000.0
    rotary_dim: int = 64
    scaling: str = "none"
    parameters: Mapping[str, float | int | list[float]] = field(default_factory=dict)
    frequency_factors: tuple[float, ...] | None = None


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and choices of a decoder of the Llama, Mistral, Qwen2, Qwen3 or Gemma 3 family, or of our own (``fallow``),
    whose variants are the fields at the end.

    ``layer_windows[i]`` is the sliding window of layer ``i`` in tokens (a token sees itself and
    the ``window - 1`` before it), or ``None`` where the layer sees everything. Layers with a window
    use ``rope_local`` where it is set. ``attention_scale`` multiplies the query-key products;
    ``embedding_scale`` multiplies the embeddings.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: RopeConfig
    attention_scale: float
    tie_word_embeddings: bool
    layer_windows: tuple[int | None, ...]
    rope_local: RopeConfig | None = None
    hidden_act: str = "silu"  # or "gelu_tanh", "relu", "relu2" (the square of relu)
    attention_bias: bool = False  # q, k, v
    attention_out_bias: bool = False  # o
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm of each head's query and key before RoPE
    post_norms: bool = False  # RMSNorm of a block's output before it is added (Gemma 3)
    embedding_scale: float = 1.0
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    gated_mlp: bool = True  # down(act(gate(x)) * up(x)); without a gate down(act(up(x)))
    value_embedding_layers: tuple[int, ...] = ()  # layers whose values gain an embedding of their token
    residual_mixes: bool = False  # each layer begins with a mix of its input and of the model's embeddings
    logit_softcap: float | None = None  # logits become cap * tanh(logits / cap) (arXiv 2408.00118)
    active_share: float | None = None  # of each layer's neurons for a token, by statistical top-k on the gate

    @property
    def gate_quantile(self) -> float | None:
        """Where ``active_share`` is there: how many standard deviations above the mean of a token's gates the threshold
        lies, so that this share of a normal distribution is above it (arXiv 2506.06644, section 3)."""
        return None if self.active_share is None else NormalDist().inv_cdf(1 - self.active_share)
