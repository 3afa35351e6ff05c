"""Parameters that FSDP2 has cut into shards (``DTensor``), for optimizers that need whole matrices."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def own_part(tensor: Tensor) -> Tensor:
    """The shard that this process holds, sharing its memory; a tensor that is not sharded is its own part."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gathered(part: Tensor, like: Tensor) -> Tensor:
    """The whole matrix, of which every process has a part where it has that of ``like``."""
    if not isinstance(like, DTensor):
        return part
    shards = DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return shards.full_tensor()


def part_of(whole: Tensor, like: Tensor) -> Tensor:
    """The part of a matrix that every process has whole, where this process has that of ``like``."""
    if not isinstance(like, DTensor):
        return whole
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None).to_local()
