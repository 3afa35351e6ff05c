"""One of several server processes (``python -m fallow.server.replica``), started by ``fallow.server.replicas``.

The first line of standard input says what to serve; its end says that the parent is gone.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path

from fallow.engine.engine import Engine
from fallow.errors import FallowError
from fallow.plan import SparsityPlan
from fallow.server.process import serve
from fallow.server.record import log_line
from fallow.server.settings import ServerSettings


def _end_with_parent() -> None:
    # Not sys.stdin: a thread that waits in a buffered reader breaks the interpreter's end.
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def main() -> int:
    """Serve until a signal; 0 after a graceful drain, 1 where the model or the port cannot be had."""
    order = json.loads(sys.stdin.buffer.readline())
    settings = ServerSettings(**order["settings"] | {"api_keys": tuple(order["settings"]["api_keys"])})
    try:
        plan = None if order["plan"] is None else SparsityPlan.from_json(order["plan"])
        engine = Engine(**order["engine"], plan=plan)
        threading.Thread(target=_end_with_parent, daemon=True).start()
        try:
            serve(engine, settings, replica=(Path(order["folder"]), order["index"]))
        finally:
            engine.close()
    except FallowError as error:
        log_line({"event": "failed", "error": str(error)})
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
