"""The processes that train one model together: who they are, what they tell each other, and which sequences are whose.

``torchrun`` starts them. Each calls the same functions in the same order, so what depends on a value that may differ
between them (a clock, a signal, what is on a disk) is decided by all or by the first.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import Store
from torch.distributed.rendezvous import rendezvous

from fallow.data.windows import Batch
from fallow.errors import FallowError

# For what one does while others wait: a corpus is prepared, a checkpoint is checked. A process that has gone is noticed
# by its closed connections, or by torchrun, long before.
_PATIENCE = timedelta(days=1)

T = TypeVar("T")
Number = TypeVar("Number", int, float)


class EndedElsewhereError(FallowError):
    """The run ended because of another process, which says why."""


@dataclass(frozen=True)
class Conversation:
    """What processes tell each other. Every one makes the same calls in the same order; a process alone does not talk.

    Values must pickle.
    """

    rank: int = 0
    count: int = 1
    group: dist.ProcessGroup | None = None  # None where there is one process

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def gathered(self, value: T) -> list[T]:
        """The value of every process, by rank."""
        values = [value] * self.count
        if self.group is not None:
            dist.all_gather_object(values, value, group=self.group)
        return values

    def total(self, value: Number) -> Number:
        """The sum over all processes, the same bits on each."""
        return sum(self.gathered(value))

    def on_first(self, work: Callable[[], T]) -> T:
        """What ``work`` gives on the first process, while the others wait for it; they raise what it raises."""
        if self.group is None:
            return work()
        outcome: list[Any] = [None, None]
        if self.is_first:
            try:
                outcome[0] = work()
            except (FallowError, OSError) as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, group=self.group, group_src=0)
        value, failure = outcome
        if failure is not None:
            raise failure
        found: T = value
        return found

    def in_turn(self, work: Callable[[], T]) -> T:
        """What ``work`` gives here, done by the first process before the others, who find what it made."""
        made: list[T] = []
        self.on_first(lambda: made.append(work()))
        return made[0] if made else work()

    @contextmanager
    def led(self, block: AbstractContextManager[T]) -> Iterator[T]:
        """The first process enters and leaves ``block`` for all: none is in it before or after that, and where it
        cannot be entered or left, all raise."""
        with ExitStack() as stack:
            yield self.on_first(lambda: stack.enter_context(block))
            self.on_first(stack.close)


@dataclass(frozen=True)
class Processes(Conversation):
    """All that train one model, and what is this one's part. ``mesh`` is what parameters are cut over.

    ``measured`` are the process ids of which this one measures the energy: all on its host where it is the first there,
    else none. ``background`` is a conversation beside this one, for another thread.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    mesh: DeviceMesh | None = None
    measured: tuple[int, ...] = field(default_factory=lambda: (os.getpid(),))
    background: Conversation = field(default_factory=Conversation)

    def share(self, read: Callable[[int, int], Batch], first: int, count: int) -> Batch:
        """This process's part of the sequences ``first`` to ``first + count``, of which ``read(first, count)`` gives
        any. Every part is of one size; where they overlap for that, a sequence's targets count in one of them."""
        size = -(-count // self.count)
        begin = first + self.rank * size
        start = min(begin, first + count - size)
        batch = read(start, size)
        if start == begin:
            return batch
        counted = np.ones(batch.targets.shape, bool) if batch.scored is None else batch.scored.copy()
        counted[: begin - start] = False
        return replace(batch, scored=counted)

    def require_same(self, what: str, value: str) -> None:
        """Raises ``FallowError`` where ``value`` is not that of the first process everywhere."""
        (_, expected), *others = self.gathered((socket.gethostname(), value))
        for rank, (host, found) in enumerate(others, 1):
            if found != expected:
                raise FallowError(
                    f"{what} of process {rank} (on {host}) is not that of the first process: give all hosts the same."
                )

    def require_shared(self, folder: Path) -> None:
        """Raises ``FallowError`` where a process does not see what the first one writes into ``folder``."""
        with self.led(_marked(folder)) as mark:
            seen = self.gathered((socket.gethostname(), (folder / mark).exists()))
        for rank, (host, sees) in enumerate(seen):
            if not sees:
                raise FallowError(
                    f"{folder} of process {rank} (on {host}) is not that of the first process: all write into one "
                    "folder, so name one with --out that is on a disk which all hosts share."
                )


@contextmanager
def _marked(folder: Path) -> Iterator[str]:
    """The name of a file that is in ``folder`` while the block runs."""
    with NamedTemporaryFile(dir=folder, prefix=".shared-") as file:
        yield Path(file.name).name


ALONE = Processes()


def is_first() -> bool:
    """Whether this process is the one that speaks: the first of those that torchrun started, or the only one."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def joined() -> Iterator[Processes]:
    """The processes that torchrun started together with this one, or this one alone.

    When one of them raises, all end, and one says why: the others raise ``EndedElsewhereError``. Raises ``FallowError``
    where they cannot find each other.
    """
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = _device(local)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Processes(device=device)
        return
    try:
        store, rank, count = next(rendezvous("env://"))
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=count
        )
        processes = _joined(rank, count, device)
    except (ValueError, RuntimeError) as error:
        raise FallowError(
            f"The processes cannot find each other ({_line(error)}): start them with torchrun, and where hosts have "
            "several networks name one with GLOO_SOCKET_IFNAME."
        ) from error
    try:
        yield processes
    except Exception as error:
        if not _is_first_to_fail(store):
            raise EndedElsewhereError("Another process of this run failed and says why.") from error
        if _is_lost_connection(error):
            raise FallowError(
                f"Process {rank} lost another one, which was killed or has lost its network ({_line(error)}): the same "
                "command goes on from the last checkpoint."
            ) from error
        raise
    dist.destroy_process_group()


def _joined(rank: int, count: int, device: torch.device) -> Processes:
    group, background = (dist.new_group(backend="gloo", timeout=_PATIENCE) for _ in range(2))
    found = Conversation(rank, count, group).gathered((socket.gethostname(), os.getpid()))
    here = tuple(pid for host, pid in found if host == socket.gethostname())
    return Processes(
        rank,
        count,
        group,
        device=device,
        mesh=init_device_mesh(device.type, (count,)),
        measured=here if here[0] == os.getpid() else (),
        background=Conversation(rank, count, background),
    )


def _device(local: int) -> torch.device:
    """The GPU of this process, or the processor where there is none."""
    gpus = torch.cuda.device_count()
    if not gpus:
        return torch.device("cpu")
    if local >= gpus:
        raise FallowError(f"There are {gpus} GPUs for more processes: start {gpus} with --nproc-per-node.")
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def _is_first_to_fail(store: Store) -> bool:
    try:
        failures: int = store.add("fallow/failed", 1)
    except RuntimeError:  # the store has gone with its host
        return True
    return failures == 1


def _is_lost_connection(error: Exception) -> bool:
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _line(error: Exception) -> str:
    """The first sentence of a message, without the place in the source that stands before it."""
    text = re.sub(r"^\[[^\]]*\] ", "", " ".join(str(error).split()))
    return text.partition(". ")[0].rstrip(".")[:200]
