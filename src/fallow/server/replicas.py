"""``--replicas N``: N server processes, each with its own engine, behind one port.

The kernel spreads connections over the processes (SO_REUSEPORT, Linux 3.9). This parent holds the port, starts them,
passes signals on, and starts one again that ended by itself.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

from fallow.errors import FallowError
from fallow.plan import SparsityPlan
from fallow.server.process import bind, url_of
from fallow.server.record import log_line
from fallow.server.settings import ServerSettings

_HEALTHY_SECONDS = 30.0  # a replica that lives this long was fine: its end is not counted against the others
_MAX_QUICK_ENDS = 3
_POLL_SECONDS = 0.1
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class _Replica:
    def __init__(self, index: int, order: Mapping[str, Any], cores: Sequence[int] | None) -> None:
        self.index = index
        self._order = json.dumps({**order, "index": index}).encode() + b"\n"
        self._cores = cores
        self.quick_ends = 0
        self.start()

    def start(self) -> None:
        self.started = time.monotonic()
        # A session of its own: Ctrl-C reaches the parent alone, which passes it on once.
        self.process = subprocess.Popen(
            [sys.executable, "-m", "fallow.server.replica"],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        if self._cores:
            os.sched_setaffinity(self.process.pid, self._cores)
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(self._order)
            self.process.stdin.flush()  # left open: its end tells the replica that the parent is gone
        except BrokenPipeError:  # it ended at once; the parent's loop sees that
            pass


def split_cores(cores: Sequence[int], replicas: int) -> list[Sequence[int] | None]:
    """An equal share of the cores for each replica; ``None`` for all where there are fewer cores than replicas."""
    if len(cores) < replicas:
        return [None] * replicas
    return [cores[i * len(cores) // replicas : (i + 1) * len(cores) // replicas] for i in range(replicas)]


def serve_replicas(
    engine_options: Mapping[str, Any], settings: ServerSettings, *, replicas: int, plan: SparsityPlan | None = None
) -> int:
    """Run ``replicas`` servers of ``Engine(**engine_options, plan=plan)`` on one port; returns the exit code when all
    have ended.

    ``engine_options`` must be plain JSON values. The code is 0 after a signal and a graceful drain, 1 where a replica
    could not be kept running. Raises ``FallowError`` where the port is taken or the system lacks SO_REUSEPORT.
    """
    if not hasattr(os, "sched_setaffinity"):
        raise FallowError("Several replicas need Linux: start one server a port here, behind a load balancer.")
    if replicas < 1:
        raise FallowError(f"replicas is {replicas}: it must be at least 1.")
    with (
        tempfile.TemporaryDirectory(prefix="fallow-") as folder,  # readable for this user only
        bind(settings.host, settings.port, reuse_port=True) as reserved,  # never listens, so it gets no connections
    ):
        settings = dataclasses.replace(settings, port=reserved.getsockname()[1])
        order = {
            "engine": dict(engine_options),
            "plan": None if plan is None else plan.to_json(),
            "settings": dataclasses.asdict(settings),
            "folder": folder,
        }
        shares = split_cores(sorted(os.sched_getaffinity(0)), replicas)
        log_line({"event": "replicas", "count": replicas, "url": url_of(reserved)})
        signals: list[int] = []
        before = {number: signal.signal(number, lambda got, _: signals.append(got)) for number in _SIGNALS}
        running = [_Replica(index, order, cores) for index, cores in enumerate(shares)]
        try:
            return _watch(running, signals)
        finally:
            for replica in running:
                if replica.process.poll() is None:
                    replica.process.kill()
                replica.process.wait()
            for number, handler in before.items():
                signal.signal(number, handler)


def _watch(replicas: list[_Replica], signals: list[int]) -> int:
    code, ending = 0, False
    while True:
        while signals:
            number = signals.pop(0)
            ending = True
            _tell(replicas, number)
        alive = 0
        for replica in replicas:
            status = replica.process.poll()
            if status is None:
                alive += 1
            elif not ending:
                log_line({"event": "replica_ended", "replica": replica.index, "status": status})
                quick = time.monotonic() - replica.started < _HEALTHY_SECONDS
                replica.quick_ends = replica.quick_ends + 1 if quick else 0
                if replica.quick_ends >= _MAX_QUICK_ENDS:
                    code, ending = 1, True
                    _tell(replicas, signal.SIGTERM)
                else:
                    replica.start()
                alive += 1
        if ending and alive == 0:
            # A replica that was still loading its model ends by the signal itself.
            graceful = (0, *(-number for number in _SIGNALS))
            return code if all(replica.process.returncode in graceful for replica in replicas) else 1
        time.sleep(_POLL_SECONDS)


def _tell(replicas: list[_Replica], number: int) -> None:
    for replica in replicas:
        if replica.process.poll() is None:
            replica.process.send_signal(number)
