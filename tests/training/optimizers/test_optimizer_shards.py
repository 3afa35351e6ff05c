"""Two processes with FSDP2: the weights of one process, or a refusal with its reason."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from small_problems import rule
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from fallow.errors import FallowError
from fallow.training.optimizers.build import build_optimizers, state_bytes
from fallow.training.optimizers.fused import FusedUpdates
from fallow.training.recipe import OptimizerRecipe

RULES = {
    "adamw": [rule("adamw", "*", weight_decay=0.1)],
    "muon": [rule("muon", "*proj.weight", lr=0.02, weight_decay=0.1), rule("adamw", "*")],
    "normuon": [
        rule("muon", "*proj.weight", lr=0.02, variance=0.9, cautious=True, weight_decay=0.1),
        rule("adamw", "*"),
    ],
    "scale": [rule("scale", "*proj.weight", "embed_tokens.weight"), rule("scale", "lm_head.weight", momentum=0.9)],
}


class Model(nn.Module):
    """Sizes that two processes cannot share evenly."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(11, 6)
        self.up_proj = nn.Linear(6, 9, bias=False)
        self.down_proj = nn.Linear(9, 6, bias=False)
        self.lm_head = nn.Linear(6, 11, bias=False)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(0.0, 0.3, generator=generator)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed_tokens(tokens)
        logits: Tensor = self.lm_head(x + self.down_proj(torch.tanh(self.up_proj(x))))
        return logits


def trained(model: Model, rules: list[OptimizerRecipe]) -> tuple[dict[str, Tensor], int]:
    """The weights after a few steps, whole, and the bytes of state here."""
    optimizers = build_optimizers(model.named_parameters(), rules)
    tokens = torch.arange(40) % 11
    for _ in range(4):
        nn.functional.cross_entropy(model(tokens), (tokens * 3) % 11).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    weights = {name: p.detach() for name, p in model.named_parameters()}
    whole = {name: w.full_tensor() if isinstance(w, DTensor) else w for name, w in weights.items()}
    return whole, state_bytes(optimizers)


def refusal(call: Callable[[], object]) -> str:
    try:
        call()
    except FallowError as error:
        return str(error)
    return "not refused"


def worker(rank: int, folder: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    for name, rules in RULES.items():
        found, held = trained(fully_shard(Model(), mesh=mesh), rules)
        expected, whole = trained(Model(), rules)
        for where, weights in expected.items():
            torch.testing.assert_close(found[where], weights, msg=lambda text, at=(name, where): f"{at}: {text}")
        assert held < 0.75 * whole, (name, held, whole)
    sharded = fully_shard(Model(), mesh=mesh)
    for kind, options in (("apollo", {"rank": 2}), ("apollo-mini", {}), ("galore", {"rank": 2})):
        build = partial(build_optimizers, sharded.named_parameters(), [rule(kind, "*", **options)])
        assert "projects whole matrices" in refusal(build)
    optimizers = build_optimizers(sharded.named_parameters(), RULES["adamw"])
    message = refusal(lambda: FusedUpdates(optimizers, clip=None, micro_batches=1))
    assert "sharded parameters (FSDP2) are not supported; train in one process" in message
    dist.destroy_process_group()


def test_two_processes_have_the_weights_of_one(tmp_path: Path) -> None:
    mp.spawn(worker, (str(tmp_path),), nprocs=2)
