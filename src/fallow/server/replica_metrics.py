"""One ``/metrics`` for several replicas: the kernel picks who answers, so whoever does asks the others.

Each replica also listens on a Unix socket ``INDEX.sock`` in a folder that all of them know. Every sample gets the
label ``replica``; sums over it are Prometheus' work.
"""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

_TIMEOUT_SECONDS = 2.0
_MAX_BYTES = 4 << 20
OWN_PATH = "/metrics/replica"
_SAMPLE = re.compile(r"([a-zA-Z_:][a-zA-Z0-9_:]*)(\{)?(.*)")


async def gather(folder: Path) -> bytes:
    """The metrics of every replica that answers, as one text."""
    sockets = sorted(folder.glob("*.sock"), key=lambda path: path.stem.zfill(8))
    texts = await asyncio.gather(*(_fetch(path) for path in sockets))
    return merge({path.stem: text for path, text in zip(sockets, texts, strict=True) if text is not None})


async def _fetch(path: Path) -> str | None:
    try:
        async with asyncio.timeout(_TIMEOUT_SECONDS):
            reader, writer = await asyncio.open_unix_connection(path, limit=_MAX_BYTES)
            try:
                writer.write(b"GET %s HTTP/1.0\r\nhost: replica\r\n\r\n" % OWN_PATH.encode())
                answer = await reader.read(-1)
            finally:
                writer.close()
    except (OSError, TimeoutError):  # it is starting, or has ended: its samples are missing this time
        return None
    head, _, body = answer.partition(b"\r\n\r\n")
    return body.decode() if b" 200 " in head.split(b"\r\n", 1)[0] else None


def merge(texts: dict[str, str]) -> bytes:
    """Several texts in the Prometheus format as one: a family is declared once, with all its samples after it."""
    families: dict[str, tuple[list[str], list[str]]] = {}  # name → declaration, samples
    for replica, text in texts.items():
        declaration: list[str] = []
        samples: list[str] = []
        for line in text.splitlines():
            if line.startswith("# HELP "):
                declaration, samples = families.setdefault(line.split(" ", 3)[2], ([], []))
            if line.startswith("#"):
                if line not in declaration:
                    declaration.append(line)
            elif sample := _SAMPLE.fullmatch(line):
                name, labelled, rest = sample.groups()
                samples.append(f'{name}{{replica="{replica}"{"," + rest if labelled else "}" + rest}')
    lines = [line for declaration, samples in families.values() for line in (*declaration, *samples)]
    return ("\n".join(lines) + "\n").encode()
