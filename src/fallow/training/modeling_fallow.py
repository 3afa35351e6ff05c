"""The decoder of Fallow for ``transformers``: load the folder with ``trust_remote_code=True``.

It stands alone, because a copy of it lies beside the weights: Llama's layers with the variants that ``config.json``
asks for (ReGLU, ReLU², statistical top-k, normalised queries and keys, value embeddings, residual mixes, a soft cap on
the logits).
"""

from __future__ import annotations

from statistics import NormalDist
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

_ACTIVATIONS = {
    "silu": F.silu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}


class FallowConfig(PretrainedConfig):
    model_type = "fallow"

    def __init__(
        self,
        vocab_size: int = 8192,
        hidden_size: int = 384,
        intermediate_size: int = 1024,
        num_hidden_layers: int = 8,
        num_attention_heads: int = 6,
        num_key_value_heads: int = 6,
        head_dim: int = 64,
        hidden_act: str = "silu",
        max_position_embeddings: int = 512,
        rms_norm_eps: float = 1e-6,
        rope_theta: float = 10_000.0,
        qk_norm: bool = False,
        gated_mlp: bool = True,
        value_embedding_layers: tuple[int, ...] = (),
        residual_mixes: bool = False,
        logit_softcap: float | None = None,
        active_share: float | None = None,
        tie_word_embeddings: bool = True,
        **others: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.hidden_act = hidden_act
        self.max_position_embeddings = max_position_embeddings
        self.rms_norm_eps = rms_norm_eps
        self.rope_theta = rope_theta
        self.qk_norm = qk_norm
        self.gated_mlp = gated_mlp
        self.value_embedding_layers = list(value_embedding_layers)
        self.residual_mixes = residual_mixes
        self.logit_softcap = logit_softcap
        self.active_share = active_share
        super().__init__(tie_word_embeddings=tie_word_embeddings, **others)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps) * self.weight).type_as(x)


class Attention(nn.Module):
    def __init__(self, config: FallowConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        width, kv_width = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        has_values = layer in config.value_embedding_layers
        self.value_embeddings = nn.Embedding(config.vocab_size, kv_width) if has_values else None

    def forward(self, x: Tensor, tokens: Tensor, positions: Tensor, mask: Tensor, cache: Cache | None) -> Tensor:
        shape = (*x.shape[:2], -1, self.config.head_dim)
        values = self.v_proj(x)
        if self.value_embeddings is not None:
            values = values + self.value_embeddings(tokens)
        q = self._rotated(self.q_norm(self.q_proj(x).view(shape)), positions).transpose(1, 2)
        k = self._rotated(self.k_norm(self.k_proj(x).view(shape)), positions).transpose(1, 2)
        v = values.view(shape).transpose(1, 2)
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
        return self.o_proj(out.transpose(1, 2).reshape(*x.shape[:2], -1))

    def _rotated(self, x: Tensor, positions: Tensor) -> Tensor:
        half = torch.arange(0, self.config.head_dim, 2, dtype=torch.float64, device=x.device) / self.config.head_dim
        frequencies = (self.config.rope_theta**-half).float()
        angles = positions[..., None].float() * frequencies  # [batch, tokens, head_dim / 2]
        cosine, sine = angles.cos()[:, :, None], angles.sin()[:, :, None]
        first, second = x.float().chunk(2, -1)
        return torch.cat((first * cosine - second * sine, second * cosine + first * sine), -1).type_as(x)


class MLP(nn.Module):
    def __init__(self, config: FallowConfig) -> None:
        super().__init__()
        self.activation = _ACTIVATIONS[config.hidden_act]
        share = config.active_share
        self.quantile = None if share is None else NormalDist().inv_cdf(1 - share)
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(hidden, inner, bias=False) if config.gated_mlp else None
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        up = self.up_proj(x)
        if self.gate_proj is None:
            return self.down_proj(self.activation(up))
        gate = self.gate_proj(x)
        if self.quantile is not None:  # only what lies so many deviations above the mean of a token's gates
            deviation, mean = torch.std_mean(gate.float(), -1, correction=0, keepdim=True)
            gate = F.relu(gate.float() - (mean + self.quantile * deviation)).type_as(gate)
        return self.down_proj(self.activation(gate) * up)


class Layer(nn.Module):
    def __init__(self, config: FallowConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, tokens: Tensor, positions: Tensor, mask: Tensor, cache: Cache | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), tokens, positions, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class FallowPreTrainedModel(PreTrainedModel):
    config_class = FallowConfig
    base_model_prefix = "model"
    _supports_sdpa = True


class FallowModel(FallowPreTrainedModel):
    def __init__(self, config: FallowConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.residual_mixes = nn.Parameter(torch.ones(config.num_hidden_layers, 2)) if config.residual_mixes else None
        self.post_init()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        past = cache.get_seq_length() if cache is not None else 0
        new, count = input_ids.shape[1], past + input_ids.shape[1]
        device = input_ids.device
        rows = torch.arange(past, count, device=device)[:, None]
        mask = (torch.arange(count, device=device)[None, :] <= rows)[None, None]  # [1, 1, new, all]
        positions = rows.T.expand(len(input_ids), new)
        if attention_mask is not None:  # padding is not seen, and positions begin after it
            seen = attention_mask.bool()
            mask = (mask & seen[:, None, None, :]) | torch.eye(count, dtype=torch.bool, device=device)[past:]
            positions = (seen.long().cumsum(-1) - 1).clamp_min(0)[:, past:]
        x = first = self.embed_tokens(input_ids)
        for i, layer in enumerate(self.layers):
            if self.residual_mixes is not None:
                x = self.residual_mixes[i, 0] * x + self.residual_mixes[i, 1] * first
            x = layer(x, input_ids, positions, mask, cache)
        return self.norm(x)


class FallowForCausalLM(FallowPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: FallowConfig) -> None:
        super().__init__(config)
        self.model = FallowModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **others: Any,
    ) -> CausalLMOutputWithPast:
        cache = DynamicCache() if use_cache and past_key_values is None else past_key_values
        hidden = self.model(input_ids, attention_mask, cache)
        logits = self.lm_head(hidden[:, -logits_to_keep:]).float()
        if self.config.logit_softcap:
            logits = self.config.logit_softcap * torch.tanh(logits / self.config.logit_softcap)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)
