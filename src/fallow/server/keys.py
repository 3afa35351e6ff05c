"""Where API keys come from."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from fallow.errors import FallowError

_MAX_FILE_BYTES = 1 << 20


def load_api_keys(given: Sequence[str] = (), file: str | Path | None = None) -> tuple[str, ...]:
    """The keys of ``given``, of the environment variable FALLOW_API_KEY (comma-separated) and of ``file``, in order.

    ``file`` has one key a line; empty lines and those that begin with ``#`` are left out. Raises ``FallowError``
    where the file cannot be read or has no key in it.
    """
    keys = [*given, *os.environ.get("FALLOW_API_KEY", "").split(",")]
    if file is not None:
        try:
            with Path(file).open("rb") as opened:
                text = opened.read(_MAX_FILE_BYTES + 1).decode()
        except (OSError, UnicodeDecodeError) as error:
            raise FallowError(f"The file of API keys {file} cannot be read: {error}.") from None
        if len(text) > _MAX_FILE_BYTES:
            raise FallowError(f"The file of API keys {file} is over {_MAX_FILE_BYTES} bytes: is it the right one?")
        lines = [line.strip() for line in text.splitlines()]
        in_file = [line for line in lines if line and not line.startswith("#")]
        if not in_file:
            raise FallowError(f"The file of API keys {file} has no key in it: write one a line.")
        keys += in_file
    return tuple(dict.fromkeys(key.strip() for key in keys if key.strip()))
