"""Text of a sequence as its tokens arrive: whole characters only, stop strings never half shown."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

_utf8_decoder = codecs.getincrementaldecoder("utf-8")


class Detokenizer:
    """The text of one sequence, token by token.

    The pieces together are ``b"".join(token_bytes[i] ...).decode(errors="replace")``, cut at the stop string that is
    complete first (of two that are complete at the same character, the one that begins first). A piece never ends in
    the middle of a character, nor in what may still become a stop string. Ids beyond ``token_bytes`` add nothing.
    """

    __slots__ = ("_decode", "_firsts", "_held", "_include_stop", "_longest", "_stop", "_token_bytes", "stopped")

    def __init__(self, token_bytes: Sequence[bytes], stop: tuple[str, ...] = (), include_stop: bool = False) -> None:
        self._token_bytes = token_bytes
        self._decode = _utf8_decoder(errors="replace").decode
        self._stop = tuple(text for text in stop if text)
        self._firsts = frozenset(text[0] for text in self._stop)
        self._longest = max(map(len, self._stop), default=0)
        self._include_stop = include_stop
        self._held = ""
        self.stopped: str | None = None

    def feed(self, token_id: int) -> tuple[str, str | None]:
        """The text that is certain now, and the stop string that ended the sequence, or None."""
        try:
            text = self._decode(self._token_bytes[token_id])
        except IndexError:
            return "", self.stopped
        return self._scan(text) if self._stop else (text, None)

    def finish(self) -> str:
        """What was held back; the sequence ends here. A character that is cut off becomes U+FFFD."""
        text = self._decode(b"", True)
        if self._stop:
            text, stopped = self._scan(text)
            if stopped is None:
                text += self._held
            self._held = ""
        return text

    def _scan(self, new: str) -> tuple[str, str | None]:
        if self.stopped is not None:
            return "", self.stopped
        text = self._held + new
        if self._firsts.isdisjoint(text):
            self._held = ""
            return text, None
        ends = [(start + len(stop), start, stop) for stop in self._stop if (start := text.find(stop)) >= 0]
        if ends:
            end, start, self.stopped = min(ends)
            self._held = ""
            return text[: end if self._include_stop else start], self.stopped
        for start in range(max(0, len(text) - self._longest + 1), len(text)):
            if text[start] in self._firsts and any(stop.startswith(text[start:]) for stop in self._stop):
                self._held = text[start:]
                return text[:start], None
        self._held = ""
        return text, None
