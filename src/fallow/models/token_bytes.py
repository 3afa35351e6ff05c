"""The bytes of every token, side by side."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import overload


class TokenBytes(Sequence[bytes]):
    """What each token adds to a text: a sequence of bytes in one block.

    A list of as many objects would take ten times the memory of their content, in a process that serves a small model.
    """

    __slots__ = ("_content", "_offsets")

    def __init__(self, pieces: Iterable[bytes]) -> None:
        pieces = list(pieces)
        self._content = b"".join(pieces)
        self._offsets = array("I", accumulate(map(len, pieces), initial=0))

    def __len__(self) -> int:
        return len(self._offsets) - 1

    @overload
    def __getitem__(self, index: int) -> bytes: ...
    @overload
    def __getitem__(self, index: slice) -> list[bytes]: ...
    def __getitem__(self, index: int | slice) -> bytes | list[bytes]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if index < 0:
            raise IndexError("token ids begin at 0")
        return self._content[self._offsets[index] : self._offsets[index + 1]]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TokenBytes):
            return NotImplemented
        return self._offsets == other._offsets and self._content == other._content

    __hash__ = None  # type: ignore[assignment]
