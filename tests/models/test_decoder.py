"""The PyTorch decoder against ``transformers``, for every family, and its own options."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

from fallow.models.checkpoint import open_checkpoint
from fallow.models.decoder import Decoder
from fallow.models.decoder_weights import load_decoder


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma3"])
def test_the_logits_of_transformers(tiny_checkpoints: dict[str, Path], family: str):
    folder = tiny_checkpoints[family]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ours = load_decoder(open_checkpoint(folder), context=64)
    tokens = torch.randint(3, ours.config.vocab_size, (2, 40), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(ours(tokens)), theirs(tokens).logits, rtol=1e-4, atol=1e-4)


def random_decoder(folder: Path, **changes: object) -> Decoder:
    config = replace(open_checkpoint(folder).config, **changes)
    decoder = Decoder(config, context=64)
    decoder.initialise(torch.Generator().manual_seed(1))
    return decoder


def test_attention_stays_within_a_document(tiny_checkpoints: dict[str, Path]):
    decoder = random_decoder(tiny_checkpoints["qwen3"])
    first, second = torch.randint(3, 300, (1, 9)), torch.randint(3, 300, (1, 14))
    both = torch.cat((first, second), 1)
    documents = torch.tensor([[0] * 9 + [1] * 14])
    with torch.no_grad():
        together = decoder(both, documents)
        torch.testing.assert_close(together[:, :9], decoder(first), rtol=1e-4, atol=1e-5)
        # Rotary positions are relative: those of the second text begin at 9 and change nothing.
        torch.testing.assert_close(together[:, 9:], decoder(second), rtol=1e-3, atol=1e-4)
        assert not torch.allclose(decoder(both)[:, 9:], together[:, 9:], atol=1e-3)


def test_a_bag_is_the_mean_of_its_embeddings(tiny_checkpoints: dict[str, Path]):
    decoder = random_decoder(tiny_checkpoints["qwen3"], value_embedding_layers=(1,))
    with torch.no_grad():
        decoder.layers[1].value_embeddings.weight.normal_(0, 0.1)
        tokens = torch.randint(3, 300, (2, 9))
        torch.testing.assert_close(decoder(tokens[..., None].expand(-1, -1, 3)), decoder(tokens), rtol=1e-4, atol=1e-5)
        bags = torch.randint(3, 300, (2, 9, 3))
        means, value_means = (
            table(bags).mean(2) for table in (decoder.embed_tokens, decoder.layers[1].value_embeddings)
        )
        expected = decoder(bags)
        # A vocabulary of these bags: number i is bag i.
        decoder.embed_tokens.weight[:18] = means.flatten(0, 1)
        decoder.layers[1].value_embeddings.weight[:18] = value_means.flatten(0, 1)
        torch.testing.assert_close(decoder(torch.arange(18).view(2, 9)), expected, rtol=1e-4, atol=1e-5)


def test_layers_computed_again_give_the_same_gradients(tiny_checkpoints: dict[str, Path]):
    decoder = random_decoder(tiny_checkpoints["gemma3"])
    tokens = torch.randint(3, 300, (2, 20))
    gradients = []
    for again in (False, True):
        decoder.checkpoint_layers = again
        decoder.zero_grad()
        decoder(tokens).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in decoder.parameters() if parameter.grad is not None])
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


def test_a_soft_cap_bounds_the_logits(tiny_checkpoints: dict[str, Path]):
    decoder = random_decoder(tiny_checkpoints["llama"], logit_softcap=3.0)
    hidden = 100 * torch.randn(5, decoder.config.hidden_size)
    logits = decoder.logits(hidden)
    plain = torch.nn.functional.linear(hidden, decoder.head)
    torch.testing.assert_close(logits, 3 * torch.tanh(plain / 3))


def test_statistical_top_k_leaves_the_share(tiny_checkpoints: dict[str, Path]):
    decoder = random_decoder(tiny_checkpoints["llama"], hidden_act="relu", active_share=0.1, intermediate_size=1024)
    plain = random_decoder(tiny_checkpoints["llama"], hidden_act="relu", intermediate_size=1024)
    x = torch.randn(2, 30, decoder.config.hidden_size)
    layer = decoder.layers[0]
    neurons = layer.neurons(x)
    assert (neurons != 0).float().mean() == pytest.approx(0.1, abs=0.01)
    assert (plain.layers[0].neurons(x) != 0).float().mean() == pytest.approx(0.5, abs=0.05)
    gate = layer.gate_proj(x)
    threshold = gate.mean(-1, keepdim=True) + 1.2815515655 * gate.std(-1, correction=0, keepdim=True)
    torch.testing.assert_close(neurons, torch.relu(gate - threshold) * layer.up_proj(x), rtol=1e-4, atol=1e-5)
