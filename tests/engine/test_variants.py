"""Our own architecture in a folder, through the native engine and through PyTorch: each variant by itself, and all."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fallow import _native
from fallow.engine.runner import ModelRunner, Precision
from fallow.errors import ModelFileError
from fallow.models.checkpoint import expected_shapes, open_checkpoint
from fallow.models.dequantize import dequantize
from fallow.models.hf_config import config_from_hf
from fallow.models.info import describe
from fallow.plan import LayerRule, SparsityPlan

torch = pytest.importorskip("torch")

SIZES: dict[str, Any] = {
    "model_type": "fallow",
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
ALL = {
    "hidden_act": "relu2",
    "gated_mlp": False,
    "qk_norm": True,
    "value_embedding_layers": [2, 0],
    "residual_mixes": True,
    "logit_softcap": 2.0,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "swiglu": {"hidden_act": "silu", "qk_norm": True},
    "geglu": {"hidden_act": "gelu_pytorch_tanh"},
    "reglu": {"hidden_act": "relu"},
    "relu2": {"hidden_act": "relu2", "gated_mlp": False},
    "top_k": {"hidden_act": "relu", "active_share": 0.1},
    "top_k_of_geglu": {"hidden_act": "gelu_pytorch_tanh", "active_share": 0.3},
    "value_embeddings": {"value_embedding_layers": [0, 2]},
    "residual_mixes": {"residual_mixes": True},
    "logit_softcap": {"logit_softcap": 2.0},
    "all": ALL,
    "all_tied": ALL | {"tie_word_embeddings": True},
}
# What the file of a layer's part is called: as Llama's, and one of our own.
PARTS = {
    "attention_norm": "input_layernorm",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "o_proj": "self_attn.o_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "value_embeddings": "self_attn.value_embeddings",
    "ffn_norm": "post_attention_layernorm",
    "gate_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "down_proj": "mlp.down_proj",
}
# Errors of a logit, as a share of the logits' standard deviation. With bfloat16, which keeps 8 bits, activations, keys,
# values and probabilities are rounded; weights are in it already. With 8 bits random weights are rounded too.
TOLERANCES: dict[Precision, float] = {"bf16": 0.05, "q8": 0.1}


def file_name(parameter: str) -> str:
    if parameter == "lm_head.weight":
        return parameter
    if not parameter.startswith("layers."):
        return f"model.{parameter}"
    _, index, part, kind = parameter.split(".")
    return f"model.layers.{index}.{PARTS[part]}.{kind}"


def random_decoder(document: dict[str, Any]) -> Any:
    """Every number random, norms and mixes too, and one that bfloat16 holds."""
    from fallow.models.decoder import Decoder

    decoder = Decoder(config_from_hf(document, "config.json")).eval()
    generator = torch.Generator().manual_seed(len(document))
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            if name == "residual_mixes":
                values = values * 0.3 + torch.tensor([0.9, 0.6])
            elif "norm" in name:
                values = values * 0.2 + 1.0
            elif "embed" in name:
                values *= 0.5
            else:
                values *= 1.5 * parameter.shape[-1] ** -0.5
            parameter.copy_(values.bfloat16())
    return decoder


def save(decoder: Any, document: dict[str, Any], folder: Path) -> Path:
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(document))
    weights = {file_name(name): p.detach().bfloat16().contiguous() for name, p in decoder.named_parameters()}
    save_file(weights, folder / "model.safetensors")
    return folder


def logits_of(decoder: Any, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return np.asarray(decoder.logits(decoder(torch.from_numpy(tokens)[None]))[0].numpy())


def error(result: np.ndarray, expected: np.ndarray) -> float:
    return float(np.sqrt(np.mean((result - expected) ** 2)) / expected.std())


def random_tokens(count: int) -> np.ndarray:
    return np.random.default_rng(5).integers(0, SIZES["vocab_size"], count)


@pytest.mark.parametrize("isa", _native.available_isas())
@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_match_the_decoder(variant: str, precision: Precision, isa: str, tmp_path: Path) -> None:
    document = SIZES | VARIANTS[variant]
    decoder = random_decoder(document)
    tokens = random_tokens(200)
    expected = logits_of(decoder, tokens)
    checkpoint = open_checkpoint(save(decoder, document, tmp_path))
    runner = ModelRunner(checkpoint, precision=precision, num_pages=8, threads=2, isa=isa)
    result = runner.logits(tokens)
    assert error(result, expected) < TOLERANCES[precision]
    # A wrong mask, rotation or norm changes late tokens more than early ones.
    assert error(result[150:], expected[150:]) < TOLERANCES[precision]
    if "logit_softcap" in document:
        assert np.abs(result).max() < document["logit_softcap"] * (1 + 1e-6)


@pytest.mark.parametrize("variant", ["swiglu", "reglu", "top_k", "value_embeddings", "residual_mixes", "logit_softcap"])
def test_a_variant_left_out_is_no_small_error(variant: str) -> None:
    from fallow.models.decoder import Decoder

    decoder = random_decoder(SIZES | VARIANTS[variant])
    plain = Decoder(config_from_hf(SIZES, "config.json")).eval()
    plain.load_state_dict(decoder.state_dict(), strict=False)
    tokens = random_tokens(50)
    assert error(logits_of(plain, tokens), logits_of(decoder, tokens)) > 3 * max(TOLERANCES.values())


ZEROS = SparsityPlan(ffn=(LayerRule("zeros"),))


@pytest.mark.parametrize("isa", _native.available_isas())
@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize("variant", ["reglu", "relu2", "top_k", "top_k_of_geglu", "all"])
def test_neurons_that_are_zero_rest(variant: str, precision: Precision, isa: str, tmp_path: Path) -> None:
    document = SIZES | VARIANTS[variant]
    decoder = random_decoder(document)
    tokens = random_tokens(200)
    checkpoint = open_checkpoint(save(decoder, document, tmp_path))
    runner = ModelRunner(checkpoint, precision=precision, num_pages=8, threads=2, isa=isa, plan=ZEROS)
    assert error(runner.logits(tokens), logits_of(decoder, tokens)) < TOLERANCES[precision]
    assert "by neuron" in runner.precision_report["layers.0.down_proj"]


SMALL = {
    "threshold": {"swiglu": 0.4, "geglu": 0.4, "reglu": 0.4, "relu2": 1.5},
    "top_k": {"swiglu": 60, "geglu": 60, "reglu": 60, "relu2": 20},
}


@pytest.mark.parametrize("rule", SMALL)
@pytest.mark.parametrize("variant", ["swiglu", "geglu", "reglu", "relu2"])
def test_neurons_that_are_small_rest_in_the_decoder_too(variant: str, rule: str, tmp_path: Path) -> None:
    name = "k" if rule == "top_k" else rule
    plan = SparsityPlan(ffn=(LayerRule(rule, parameters={name: SMALL[rule][variant]}),))
    document = SIZES | VARIANTS[variant]
    decoder = random_decoder(document)
    tokens = random_tokens(200)
    dense = logits_of(decoder, tokens)
    checkpoint = open_checkpoint(save(decoder, document, tmp_path))
    decoder.obey(plan)
    expected = logits_of(decoder, tokens)
    result = ModelRunner(checkpoint, precision="bf16", num_pages=8, threads=2, plan=plan).logits(tokens)
    # Of gates of nearly the same size rounding may leave another one: such a token is wrong by more than it.
    errors = [np.median([error(*rows) for rows in zip(x, expected, strict=True)]) for x in (result, dense)]
    assert errors[0] < TOLERANCES["bf16"]
    assert errors[1] > 2 * TOLERANCES["bf16"]


PLANS = {"dense": None, "zeros": ZEROS, "so many": SparsityPlan(ffn=(LayerRule("top_k", parameters={"k": 30}),))}


@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize(
    ("variant", "plan"),
    [*itertools.product(["reglu", "top_k", "all", "all_tied"], ["dense", "zeros"]), ("reglu", "so many")],
)
def test_the_same_bits_with_any_number_of_threads_and_rows(
    variant: str, precision: Precision, plan: str, tmp_path: Path
) -> None:
    document = SIZES | VARIANTS[variant]
    checkpoint = open_checkpoint(save(random_decoder(document), document, tmp_path))
    tokens = random_tokens(150)

    def logits(threads: int, rows: int) -> np.ndarray:
        runner = ModelRunner(
            checkpoint, precision=precision, threads=threads, num_pages=8, max_step_tokens=rows, plan=PLANS[plan]
        )
        try:
            return runner.logits(tokens, chunk=rows)
        finally:
            runner.close()

    alone = logits(1, 150)
    for threads, rows in [(1, 1), (1, 5), (2, 1), (2, 7), (2, 13), (2, 130), (3, 1), (3, 17), (3, 20), (3, 64)]:
        np.testing.assert_array_equal(logits(threads, rows), alone, err_msg=f"{threads} threads, {rows} rows a step")


def test_a_gate_of_its_own(tmp_path: Path) -> None:
    # Tiles of sixteen rows cannot be interleaved where the height is no multiple of it.
    document = SIZES | VARIANTS["reglu"] | {"intermediate_size": 168}
    decoder = random_decoder(document)
    tokens = random_tokens(100)
    runner = ModelRunner(open_checkpoint(save(decoder, document, tmp_path)), num_pages=4, threads=2)
    assert error(runner.logits(tokens), logits_of(decoder, tokens)) < TOLERANCES["bf16"]


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_reglu_of_another_family_matches_transformers(family: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    kind = {"llama": transformers.LlamaConfig, "qwen3": transformers.Qwen3Config}[family]
    sizes = {name: value for name, value in SIZES.items() if name not in ("model_type", "rope_theta")}
    model = transformers.AutoModelForCausalLM.from_config(kind(**sizes, hidden_act="relu")).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 1.5 * parameter.shape[-1] ** -0.5)
    model = model.bfloat16().float()
    model.save_pretrained(tmp_path)
    tokens = random_tokens(100)
    with torch.no_grad():
        expected = model(torch.from_numpy(tokens)[None]).logits[0].numpy()
    runner = ModelRunner(open_checkpoint(tmp_path), precision="bf16", num_pages=4, threads=2)
    assert error(runner.logits(tokens), expected) < TOLERANCES["bf16"]


def test_a_folder_holds_what_the_decoder_has(tmp_path: Path) -> None:
    document = SIZES | ALL
    decoder = random_decoder(document)
    checkpoint = open_checkpoint(save(decoder, document, tmp_path))
    assert {name: tensor.shape for name, tensor in checkpoint.tensors.items()} == expected_shapes(checkpoint.config)
    parameters = {name.removesuffix(".weight"): p.detach().numpy() for name, p in decoder.named_parameters()}
    assert checkpoint.tensors.keys() == parameters.keys()
    for name, values in parameters.items():
        assert np.array_equal(dequantize(checkpoint.tensors[name]), values), name


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"residual_mixes": False}, "'model.residual_mixes', which a model of its kind does not have"),
        ({"value_embedding_layers": [0]}, "'model.layers.2.self_attn.value_embeddings.weight', which a model of its"),
        ({"value_embedding_layers": [0, 1]}, "'model.layers.1.self_attn.value_embeddings.weight' is missing"),
        ({"gated_mlp": True, "hidden_act": "relu"}, "'model.layers.0.mlp.gate_proj.weight' is missing"),
        ({"qk_norm": False}, "'model.layers.[0-2].self_attn.[qk]_norm.weight', which a model of its kind does not"),
        ({"vocab_size": 319}, r"shape \[320, 64\], but its configuration needs \[319, 64\]"),
    ],
)
def test_weights_that_are_not_those_of_the_configuration(changes: dict[str, Any], match: str, tmp_path: Path) -> None:
    save(random_decoder(SIZES | ALL), SIZES | ALL | changes, tmp_path)
    with pytest.raises(ModelFileError, match=match):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(("precision", "table_bits"), [("auto", 16), ("bf16", 16), ("q8", 9.5), ("q4", 8.5)])
@pytest.mark.parametrize("tied", [False, True])
def test_what_info_says_is_what_the_engine_packs(
    precision: Precision, table_bits: float, tied: bool, tmp_path: Path
) -> None:
    # An even number of groups: of an odd one half a pair of offsets is padding, which is not counted.
    document = SIZES | ALL | {"tie_word_embeddings": tied, "intermediate_size": 192}
    checkpoint = open_checkpoint(save(random_decoder(document), document, tmp_path))
    runner = ModelRunner(checkpoint, precision=precision, num_pages=4)
    info = describe(checkpoint, precision=precision)
    # Tables of which a token reads a row: the embeddings (a tied head reads them all too) and two of values.
    row = int(64 * table_bits / 8)
    tables = 2 if tied else 3
    numbers = 3 * (2 * 64 + 2 * 32) + 64 + 3 * 2  # norms of layers, the last norm, mixes
    assert info.bytes_per_token == runner.weight_bytes - tables * 320 * row + 3 * row + 4 * numbers
    layer = 64 * (2 * 128 + 2 * 64) + 2 * 64 * 192
    assert info.macs_per_token == 3 * layer + 320 * 64
    assert info.parameters == sum(tensor.elements for tensor in checkpoint.tensors.values())
    groups = {group.name: group for group in info.tensors}
    assert (groups["layers.*.value_embeddings"].count, groups["layers.*.value_embeddings"].shape) == (2, (320, 64))
    assert (groups["residual_mixes"].engine, groups["residual_mixes"].shape) == ("F32", (3, 2))
    codes = "bf16" if table_bits == 16 else "q8"
    assert runner.precision_report["layers.2.value_embeddings"] == f"BF16 as {codes}"
    assert runner.precision_report.keys() == {
        name for name, tensor in checkpoint.tensors.items() if len(tensor.shape) == 2 and name != "residual_mixes"
    }
