"""A state that was saved and read again goes on to the same bits."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from small_problems import MATRIX_RULES, rules_of, tiny_decoder, train
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim import Optimizer

from fallow.models.decoder import Decoder
from fallow.training.optimizers.build import build_optimizers

Run = tuple[Decoder, list[Optimizer]]


def new_run(name: str) -> Run:
    decoder = tiny_decoder(zero_outputs=True)
    optimizers = build_optimizers(decoder.named_parameters(), rules_of(name))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if "refresh" in group:
                group["refresh"] = 3
    return decoder, optimizers


def through_torch_save(run: Run, fresh: Run, folder: Path) -> None:
    file = io.BytesIO()
    torch.save([run[0].state_dict(), *(optimizer.state_dict() for optimizer in run[1])], file)
    file.seek(0)
    weights, *states = torch.load(file)
    fresh[0].load_state_dict(weights)
    for optimizer, state in zip(fresh[1], states, strict=True):
        optimizer.load_state_dict(state)


def through_distributed_checkpoint(run: Run, fresh: Run, folder: Path) -> None:
    model, states = get_state_dict(*run)
    dcp.save({"model": model, "optimizers": states}, checkpoint_id=folder, no_dist=True)
    model, states = get_state_dict(*fresh)
    tensors = {"model": model, "optimizers": states}
    dcp.load(tensors, checkpoint_id=folder, no_dist=True)
    set_state_dict(*fresh, model_state_dict=tensors["model"], optim_state_dict=tensors["optimizers"])


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("through", [through_torch_save, through_distributed_checkpoint])
@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("name", MATRIX_RULES)
def test_the_next_steps_have_the_same_bits(
    name: str, steps: int, through: Callable[[Run, Run, Path], None], tmp_path: Path
) -> None:
    run, fresh = new_run(name), new_run(name)
    train(*run, range(steps))
    through(run, fresh, tmp_path)
    more = range(steps, steps + 4)
    assert train(*run, more) == train(*fresh, more)
    for (where, parameter), other in zip(run[0].named_parameters(), fresh[0].parameters(), strict=True):
        assert torch.equal(parameter, other), where
