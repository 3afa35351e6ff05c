"""One server process: the socket, the signals, and a graceful end."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import signal
import socket
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvicorn

from fallow.errors import FallowError
from fallow.server.app import create_app
from fallow.server.record import log_line
from fallow.server.settings import ServerSettings

if TYPE_CHECKING:
    from types import FrameType

    from fallow.engine.engine import Engine

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_POLL_SECONDS = 0.05
_BACKLOG = 2048


class Server(uvicorn.Server):
    """uvicorn, which on the first signal goes on to answer while it drains, and on the second one stops at once.

    While it drains, ``/health`` and new requests get 503, so a load balancer can see it; uvicorn by itself would
    close its socket at once. Requests that are not done after ``drain_timeout`` seconds are ended with an error.
    """

    def __init__(
        self,
        engine: Engine,
        settings: ServerSettings,
        *,
        on_ready: Callable[[str], Any] | None = None,
        replica_folder: Path | None = None,
    ) -> None:
        self._settings = settings
        self._model = settings.served_model_name or engine.model_name
        self._on_ready = on_ready
        app = create_app(engine, settings, replica_folder=replica_folder)
        self._gateway = app.state.gateway
        self._hurry = False
        super().__init__(
            uvicorn.Config(
                app,
                access_log=False,
                log_config=None,
                log_level="warning",
                lifespan="on",
                server_header=False,
                timeout_graceful_shutdown=5,
                ws="none",
                backlog=_BACKLOG,
            )
        )

    def begin_drain(self) -> None:
        """Refuse what is new, finish what was begun, then end; the second call ends at once.

        Safe in a signal handler and on any thread.
        """
        self._hurry = self._gateway.draining
        self._gateway.draining = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        # Only now, when a signal would already be a graceful one.
        assert sockets
        url = url_of(sockets[0])
        log_line({"event": "ready", "url": url, "model": self._model})
        if self._on_ready is not None:
            self._on_ready(url)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.begin_drain()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        # Not uvicorn's own, which raises the signal again at the end: a drained server ends with exit code 0.
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    async def main_loop(self) -> None:
        ends: float | None = None
        loop = asyncio.get_running_loop()
        ticks = 0
        while not await self.on_tick(ticks):
            ticks = (ticks + 1) % 864000
            await asyncio.sleep(_POLL_SECONDS)
            if not self._gateway.draining:
                continue
            if ends is None:
                ends = loop.time() + self._settings.drain_timeout
                log_line({"event": "draining", "in_flight": self._gateway.in_flight})
            if self._gateway.in_flight == 0 or self._hurry or loop.time() >= ends:
                self._gateway.stop()
                self.should_exit = True


def bind(host: str, port: int, *, reuse_port: bool = False) -> socket.socket:
    """A socket at ``host:port`` (0: any free port). Raises ``FallowError`` where that is not possible."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if reuse_port:
                bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            bound.bind(address)
        except BaseException:
            bound.close()
            raise
    except (OSError, OverflowError) as error:
        raise FallowError(f"Cannot listen on {host}:{port}: {error}. Choose another with --host or --port.") from None
    bound.set_inheritable(False)
    return bound


def url_of(bound: socket.socket) -> str:
    """Where clients reach a bound socket."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(
    engine: Engine,
    settings: ServerSettings | None = None,
    *,
    replica: tuple[Path, int] | None = None,
    on_ready: Callable[[str], Any] | None = None,
    **options: Any,
) -> None:
    """Serve ``engine`` over HTTP until SIGTERM or SIGINT; returns after a graceful drain. The caller closes the engine.

    ``options`` are fields of ``ServerSettings`` (``host``, ``port``, ``api_keys``, ...) and win over ``settings``.
    ``on_ready(url)`` is called once clients may connect; with ``port=0`` the URL has the port that was free.
    ``replica`` is the folder of the replicas' sockets and the index of this one, which shares its port with them
    (``serve_replicas``). Raises ``FallowError`` where the port is taken and
    ``ValueError`` where an option is wrong.
    """
    settings = dataclasses.replace(settings or ServerSettings(), **options)
    _log_as_json()
    folder, index = replica or (None, 0)
    server = Server(engine, settings, on_ready=on_ready, replica_folder=folder)
    with contextlib.ExitStack() as sockets:
        bound = [sockets.enter_context(bind(settings.host, settings.port, reuse_port=folder is not None))]
        if folder is not None:
            bound.append(sockets.enter_context(_bind_unix(folder / f"{index}.sock")))
        server.run(sockets=bound)


class _JsonLines(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        entry = {"event": record.name, "level": record.levelname.lower(), "message": record.getMessage()}
        if record.exc_info and record.exc_info[1]:
            entry["error"] = "".join(traceback.format_exception(record.exc_info[1]))
        log_line(entry)


def _log_as_json() -> None:
    """The warnings of uvicorn and of the engine in the form of all the other lines."""
    for name in ("uvicorn", "fallow"):
        logger = logging.getLogger(name)
        logger.handlers = [_JsonLines()]
        logger.propagate = False


def _bind_unix(path: Path) -> socket.socket:
    bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        path.unlink(missing_ok=True)  # left by a replica with this index that was killed
        bound.bind(str(path))
    except OSError as error:
        bound.close()
        raise FallowError(f"Cannot listen on {path}: {error}. Set TMPDIR to a short path that exists.") from None
    return bound
