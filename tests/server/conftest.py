"""Real servers on a free port: one with the real small model, one with a tiny random model where text is no matter."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import tokenizers
from safetensors.numpy import save_file
from tokenizers import decoders, models, pre_tokenizers

from fallow.engine.engine import Engine
from fallow.server.process import Server, bind, url_of
from fallow.server.settings import ServerSettings

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class RunningServer:
    """A server on a thread of this process."""

    def __init__(self, engine: Engine, **settings: Any) -> None:
        self.engine = engine
        self.socket = bind("127.0.0.1", 0)
        self.socket.listen(512)  # so that a client may connect before the thread has begun
        self.url = url_of(self.socket)
        self.server = Server(engine, ServerSettings(log_requests=False, **settings))
        self.thread = threading.Thread(target=lambda: self.server.run(sockets=[self.socket]), daemon=True)
        self.thread.start()
        self.http = httpx.Client(base_url=self.url, timeout=120)

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=120)

    def async_client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120)

    def until_idle(self, seconds: float = 30.0) -> None:
        """Wait until the engine has nothing to do any more."""
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            stats = self.engine.stats()
            if stats.running == stats.waiting == 0:
                return
            time.sleep(0.02)
        pytest.fail(f"The engine is not idle after {seconds} s: {self.engine.stats()}.")

    def stop(self) -> None:
        self.http.close()
        self.server.begin_drain()
        self.server.begin_drain()
        self.thread.join(20)
        assert not self.thread.is_alive()


def write_tiny_model(folder: Path) -> Path:
    """A Llama of two layers with random weights and a tokenizer of single bytes, as a Hugging Face folder."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {text: i for i, text in enumerate(["<|endoftext|>", "<|im_start|>", "<|im_end|>", *alphabet])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    vocab, hidden, inner, heads, kv_heads, head_dim = 288, 128, 256, 2, 1, 64
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "chat_template": CHAT_TEMPLATE})
    )
    random = np.random.default_rng(0)

    def weight(rows: int, columns: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        return (random.standard_normal((rows, columns)) * columns**-0.5).astype(np.float32)

    tensors = {"model.embed_tokens.weight": weight(vocab, hidden), "model.norm.weight": np.ones(hidden, np.float32)}
    for layer in range(2):
        prefix = f"model.layers.{layer}"
        tensors |= {
            f"{prefix}.input_layernorm.weight": np.ones(hidden, np.float32),
            f"{prefix}.post_attention_layernorm.weight": np.ones(hidden, np.float32),
            f"{prefix}.self_attn.q_proj.weight": weight(heads * head_dim, hidden),
            f"{prefix}.self_attn.k_proj.weight": weight(kv_heads * head_dim, hidden),
            f"{prefix}.self_attn.v_proj.weight": weight(kv_heads * head_dim, hidden),
            f"{prefix}.self_attn.o_proj.weight": weight(hidden, heads * head_dim),
            f"{prefix}.mlp.gate_proj.weight": weight(inner, hidden),
            f"{prefix}.mlp.up_proj.weight": weight(inner, hidden),
            f"{prefix}.mlp.down_proj.weight": weight(hidden, inner),
        }
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def tiny_engine(tiny_model: Path) -> Iterator[Engine]:
    engine = Engine(str(tiny_model), max_num_seqs=64, max_queue=512)
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def tiny(tiny_engine: Engine) -> Iterator[RunningServer]:
    """A server with the tiny model, as ``tiny``."""
    running = RunningServer(tiny_engine, served_model_name="tiny", price_per_hour=1.5)
    yield running
    running.stop()


@pytest.fixture
def tiny_server(tiny_engine: Engine) -> Iterator[Callable[..., RunningServer]]:
    """Starts servers with the tiny model and settings of their own."""
    started: list[RunningServer] = []

    def start(engine: Engine = tiny_engine, **settings: Any) -> RunningServer:
        started.append(RunningServer(engine, served_model_name="tiny", **settings))
        return started[-1]

    yield start
    for running in started:
        running.stop()


@pytest.fixture(scope="session")
def smollm2(smollm2_gguf: Path) -> Iterator[RunningServer]:
    """A server with the real small model, as ``smollm2``."""
    engine = Engine(str(smollm2_gguf), max_context=2048, max_num_seqs=8)
    running = RunningServer(engine, served_model_name="smollm2")
    yield running
    running.stop()
    engine.close()
