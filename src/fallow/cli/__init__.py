"""The command line: one file a command, and the one place where a failure becomes a line and an exit code.

Exit codes: 0 it worked; 1 it failed and one line on stderr says why and what to do; 2 bad usage; 130 Ctrl-C.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one command and exit; no exception and no traceback leaves here.

    ``FALLOW_TRACEBACK=1`` shows the traceback of an error that is ours.
    """
    try:
        sys.exit(_run(sys.argv[1:] if arguments is None else arguments))
    except KeyboardInterrupt:
        # A second Ctrl-C while the interpreter shuts down would print a traceback.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        sys.exit(130)


def _run(arguments: Sequence[str]) -> int:
    from fallow.errors import FallowError

    try:
        from fallow.cli.app import app

        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
        app(arguments, prog_name="fallow", standalone_mode=True)
    except SystemExit as exit_:
        code = exit_.code if isinstance(exit_.code, int) else 0
        return _flush(code)
    except BrokenPipeError:
        return _flush(1)
    except FallowError as error:
        return _fail(str(error))
    except OSError as error:
        return _fail(f"{error.strerror or error}: {error.filename}" if error.filename else str(error))
    except MemoryError:
        return _fail("there is not enough memory: take a smaller model, a shorter context, or --precision q4")
    except Exception as error:
        if os.environ.get("FALLOW_TRACEBACK"):
            raise
        return _fail(
            f"internal error: {type(error).__name__}: {error}; "
            "run it again with FALLOW_TRACEBACK=1 and report what it prints"
        )
    return _flush(0)


def _fail(message: str) -> int:
    print("fallow: " + " ".join(message.split()), file=sys.stderr)
    return _flush(1)


def _flush(code: int) -> int:
    """Flush here, where a reader that has gone (``| head``) is quiet; the interpreter's own flush would not be."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code
