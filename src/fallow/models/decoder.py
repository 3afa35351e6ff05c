"""The decoder in PyTorch: what is trained, and the reference that the native engine is held against.

One module for the families of the engine and for our own variants; a ``ModelConfig`` says which. Parameters have the
names of ``Checkpoint`` (``layers.0.q_proj.weight``), and norm weights multiply as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F  # noqa: N812  the name that everybody knows
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fallow.models.attention import blocks_are_faster, causal_attention
from fallow.models.config import ModelConfig
from fallow.models.page_choice import attention_to_chosen_pages
from fallow.models.resting import Resting, resting, screen_rule
from fallow.models.rope import rope_table
from fallow.models.structure import Kept
from fallow.plan import SparsityPlan

_INITIAL_STD = 0.02
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}
Rope = tuple[Tensor, Tensor]
"""Cosines and sines, float32 ``[tokens, 1, head_dim / 2]`` each."""


class Linear(nn.Linear):
    """A linear layer that computes in the type of its input, whatever type its weights are kept in."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.type_as(x), None if self.bias is None else self.bias.type_as(x))


class RMSNorm(nn.Module):
    """Root mean square normalisation (arXiv 1910.07467) in float32; the result has the type of the input."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps) * self.weight).type_as(x)


class Layer(nn.Module):
    """Attention with shared key-value heads (arXiv 2305.13245) and rotary positions (arXiv 2104.09864), then a
    feed-forward network: with a gate SwiGLU, GeGLU or ReGLU (arXiv 2002.05202), of which statistical top-k may leave a
    few (arXiv 2506.06644), without one ReLU² (arXiv 2109.08668).
    """

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        hidden, inner, eps = config.hidden_size, config.intermediate_size, config.rms_norm_eps
        width, kv_width = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.head_dim = config.head_dim
        self.attention_scale = config.attention_scale
        self.rests = Resting()
        self.activation = _ACTIVATIONS[config.hidden_act]
        self.gate_quantile = config.gate_quantile
        self.attention_norm = RMSNorm(hidden, eps)
        self.q_proj = Linear(hidden, width, bias=config.attention_bias)
        self.k_proj = Linear(hidden, kv_width, bias=config.attention_bias)
        self.v_proj = Linear(hidden, kv_width, bias=config.attention_bias)
        self.o_proj = Linear(width, hidden, bias=config.attention_out_bias)
        self.q_norm = RMSNorm(config.head_dim, eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, eps) if config.qk_norm else nn.Identity()
        self.attention_post_norm = RMSNorm(hidden, eps) if config.post_norms else nn.Identity()
        self.ffn_norm = RMSNorm(hidden, eps)
        self.gate_proj = Linear(hidden, inner, bias=config.mlp_bias) if config.gated_mlp else None
        self.up_proj = Linear(hidden, inner, bias=config.mlp_bias)
        self.down_proj = Linear(inner, hidden, bias=config.mlp_bias)
        self.ffn_post_norm = RMSNorm(hidden, eps) if config.post_norms else nn.Identity()
        has_values = index in config.value_embedding_layers
        self.value_embeddings = nn.Embedding(config.vocab_size, kv_width) if has_values else None

    def forward(self, x: Tensor, tokens: Tensor, rope: Rope, mask: Tensor | None) -> Tensor:
        """``x [batch, tokens, hidden]``; ``mask`` (True: may be seen) where plain causality is not all."""
        kept = self.rests.kept
        if kept.kv_heads != ():
            x = x + self.attention_post_norm(self._attention(self.attention_norm(x), tokens, rope, mask))
        if kept.neurons != ():
            neurons = self._resting("down_proj", self.neurons(self.ffn_norm(x)))
            x = x + self.ffn_post_norm(self.down_proj(neurons))
        return x

    def neurons(self, x: Tensor) -> Tensor:
        """The inner activations of the feed-forward network, ``[batch, tokens, intermediate]``."""
        up: Tensor = self.up_proj(x)
        if self.gate_proj is None:
            return self._at_work(self.activation(up))
        gate = self.gate_proj(x)
        if self.gate_quantile is not None:
            gate = _above_threshold(gate, self.gate_quantile)
        return self._at_work(self.activation(gate)) * up

    def _at_work(self, activated: Tensor) -> Tensor:
        kept = _only(self.rests.kept.neurons, activated)
        return _largest(self.rests.most_neurons, _beyond(self.rests.neurons, kept))

    def _resting(self, linear: str, x: Tensor) -> Tensor:
        """The input of a linear layer without what rests of it."""
        return _beyond(self.rests.inputs.get(linear), x)

    def queries_keys_values(self, x: Tensor, tokens: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """Of normalised ``x [batch, tokens, hidden]``, each ``[batch, heads, tokens, head_dim]``."""
        shape = (*x.shape[:2], -1, self.head_dim)  # [batch, tokens, heads, head_dim]
        values = self.v_proj(x)
        if self.value_embeddings is not None:
            values = values + _embedded(self.value_embeddings, tokens).type_as(values)
        q = _rotated(self.q_norm(self.q_proj(x).view(shape)), rope)
        k = _rotated(self.k_norm(self.k_proj(x).view(shape)), rope)
        return q.transpose(1, 2), k.transpose(1, 2), values.view(shape).transpose(1, 2)

    def _attention(self, x: Tensor, tokens: Tensor, rope: Rope, mask: Tensor | None) -> Tensor:
        q, k, v = self.queries_keys_values(x, tokens, rope)
        grouped = q.shape[1] != k.shape[1]
        if self.rests.pages is not None:
            attended = attention_to_chosen_pages(q, k, v, self.rests.pages, self.attention_scale, mask=mask)
        elif mask is None and not grouped and blocks_are_faster(q):
            attended = causal_attention(q, k, v, self.attention_scale)
        else:
            attended = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.attention_scale, enable_gqa=grouped
            )
        # [batch, tokens, KV heads, queries that share one, head_dim]
        by_heads = attended.transpose(1, 2).reshape(*x.shape[:2], k.shape[1], -1, self.head_dim)
        attended = self._resting("o_proj", _only(self.rests.kept.kv_heads, by_heads, 2).flatten(2))
        out: Tensor = self.o_proj(attended)
        return out


def _only(numbers: Sequence[int] | None, x: Tensor, dim: int = -1) -> Tensor:
    """``x`` with zeros for what has other ``numbers`` along a dimension; None: as it is."""
    if numbers is None:
        return x
    chosen = torch.tensor(numbers, device=x.device)
    return torch.zeros_like(x).index_copy(dim, chosen, x.index_select(dim, chosen))


def _beyond(threshold: float | None, x: Tensor) -> Tensor:
    """``x`` with zeros for what is not beyond the threshold."""
    return x if not threshold else torch.where(x.abs() <= threshold, 0, x)


def _largest(count: int | None, x: Tensor) -> Tensor:
    """``x`` with zeros for all but the ``count`` largest magnitudes of a row; where the last of these has equals that
    are not among them, for it and them too."""
    if count is None or count >= x.shape[-1]:
        return x
    sizes = x.abs()
    return torch.where(sizes <= sizes.topk(count + 1, -1).values[..., -1:], 0, x)


def _embedded(embeddings: nn.Embedding, tokens: Tensor) -> Tensor:
    """``[batch, tokens, width]``; of a bag the mean."""
    found: Tensor = embeddings(tokens)
    return found if tokens.ndim == 2 else found.mean(2)


def _above_threshold(x: Tensor, quantile: float) -> Tensor:
    """What of each value lies above its row's mean and ``quantile`` standard deviations, else zero (Spark Transformer's
    statistical top-k, arXiv 2506.06644, section 3); statistics are float32, the result has the type of the input."""
    wide = x.float()
    deviation, mean = torch.std_mean(wide, -1, correction=0, keepdim=True)
    return F.relu(wide - (mean + quantile * deviation)).type_as(x)


def _rotated(x: Tensor, rope: Rope) -> Tensor:
    """Both halves of each head rotated, ``[batch, tokens, heads, head_dim]``."""
    cosine, sine = rope
    first, second = x.float().chunk(2, -1)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), -1).type_as(x)


class Decoder(nn.Module):
    """Token ids → hidden states → logits. Activations are of type ``compute``; parameters stay what they are."""

    def __init__(
        self, config: ModelConfig, *, compute: torch.dtype = torch.float32, context: int | None = None
    ) -> None:
        """For sequences of up to ``context`` tokens; None: as many as the configuration allows."""
        super().__init__()
        self.config = config
        self.compute = compute
        self.is_compiled = False
        self.checkpoint_layers = False  # compute each layer again in the backward pass: less memory, a third more work
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, index) for index in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        tied = config.tie_word_embeddings
        self.lm_head = None if tied else Linear(config.hidden_size, config.vocab_size, bias=False)
        # Of each layer: how much of the stream it keeps, and how much of the embeddings it sees again.
        mixes = torch.tensor([[1.0, 0.0]]).repeat(config.num_hidden_layers, 1)
        self.residual_mixes = nn.Parameter(mixes) if config.residual_mixes else None
        self.context = context or config.max_position_embeddings
        for name, rope in (("rope", config.rope), ("rope_local", config.rope_local)):
            table = None if rope is None else torch.from_numpy(rope_table(rope, self.context))  # [context, rotary_dim]
            self.register_buffer(name, table, persistent=False)

    def initialise(self, generator: torch.Generator, *, zero_outputs: bool = False) -> None:
        """Normal weights with a standard deviation of 0.02, outputs of blocks by 1 / sqrt(2 layers) of it (GPT-2), or
        zero with ``zero_outputs`` (Zhang et al., arXiv 1901.09321); value embeddings zero."""
        output_std = 0.0 if zero_outputs else _INITIAL_STD / math.sqrt(2 * len(self.layers))
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                part = name.removesuffix(".weight").rsplit(".", 1)[-1]
                if part.endswith("norm") or part == "residual_mixes":
                    continue
                if part in ("bias", "value_embeddings"):
                    parameter.zero_()
                else:
                    std = output_std if part in ("o_proj", "down_proj") else _INITIAL_STD
                    parameter.normal_(0.0, std, generator=generator)

    def obey(self, plan: SparsityPlan) -> None:
        """Let rest what ``plan`` says, in place of any plan before; how it screens the head changes no logits. Raises
        ``FallowError`` where it does not fit."""
        screen_rule(plan, self.config)
        for layer, rests in zip(self.layers, resting(plan, self.config), strict=True):
            assert isinstance(layer, Layer)
            layer.rests = rests

    def compile_layers(self) -> None:
        """Compile each layer by itself: those that are alike share what was compiled for the first. Layers that choose
        pages or of which parts are removed stay as they are: hardly two of them are alike."""
        self.is_compiled = True
        for layer in self.layers:
            assert isinstance(layer, Layer)
            if layer.rests.pages is None and layer.rests.kept == Kept():
                layer.compile()

    @property
    def down_projections(self) -> list[Linear]:
        """Of each layer: what the neurons of its feed-forward network go into, where hooks see them."""
        return [layer.down_proj for layer in self.layers if isinstance(layer, Layer)]

    @property
    def head(self) -> Tensor:
        """The matrix of the logits, ``[vocab, hidden]``."""
        return self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def forward(self, tokens: Tensor, documents: Tensor | None = None) -> Tensor:
        """``tokens`` int64 ``[batch, tokens]`` → normalised hidden states ``[batch, tokens, hidden]``; or bags of them,
        ``[batch, tokens, bag]``, each of which is one position (``SuperpositionRecipe``).

        ``documents`` numbers the documents of each sequence, ``[batch, tokens]``: attention stays within one.
        """
        config = self.config
        x = first = _embedded(self.embed_tokens, tokens).to(self.compute) * config.embedding_scale
        masks: dict[int | None, Tensor | None] = {}
        for index, layer in enumerate(self.layers):
            window = config.layer_windows[index]
            if window not in masks:
                masks[window] = _mask(tokens, documents, window)
            if self.residual_mixes is not None:
                mix = self.residual_mixes[index].type_as(x)
                x = mix[0] * x + mix[1] * first
            arguments = (x, tokens, self._rope(window, tokens.shape[1]), masks[window])
            again = self.checkpoint_layers and torch.is_grad_enabled()
            x = checkpoint(layer, *arguments, use_reentrant=False) if again else layer(*arguments)
        hidden: Tensor = self.norm(x)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits ``[..., vocab]`` of hidden states, capped softly where the model is (arXiv 2408.00118)."""
        logits = F.linear(hidden, self.head.type_as(hidden)).float()
        cap = self.config.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def _rope(self, window: int | None, tokens: int) -> Rope:
        local = window is not None and self.config.rope_local is not None
        table = self.get_buffer("rope_local" if local else "rope")[:tokens, None, :]
        cosine, sine = table.chunk(2, -1)
        return cosine, sine


def _mask(tokens: Tensor, documents: Tensor | None, window: int | None) -> Tensor | None:
    """Who may see whom, bool ``[batch or 1, 1, tokens, tokens]``; None where causality is all."""
    count = tokens.shape[1]
    if documents is None and (window is None or window >= count):
        return None
    distance = torch.arange(count, device=tokens.device)
    distance = distance[:, None] - distance[None, :]
    seen = (distance >= 0) & (distance < (window or count))
    if documents is None:
        return seen[None, None]
    return (seen & (documents[:, :, None] == documents[:, None, :]))[:, None]
