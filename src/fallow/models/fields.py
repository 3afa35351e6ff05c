"""Numbers out of a file that nobody vouches for: of the right kind and within bounds, or a sentence says why not."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any, Final, overload

from fallow.errors import ModelFileError

MAX_VOCAB_SIZE = 1 << 22
MAX_HIDDEN_SIZE = 1 << 17
MAX_INTERMEDIATE_SIZE = 1 << 20
MAX_LAYERS = 1024
MAX_HEADS = 1024
MAX_HEAD_DIM = 1024
MAX_CONTEXT = 1 << 24
MAX_THETA = 1e15
MIN_FACTOR, MAX_FACTOR = 1e-6, 1e6  # of what scales RoPE


class _Missing(Enum):
    NOT_ALLOWED = 0


_REQUIRED: Final = _Missing.NOT_ALLOWED


class Fields:
    """Typed access to a mapping; ``where`` says in messages what the mapping is. ``None`` counts as missing."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values = values
        self.where = where

    def __contains__(self, name: str) -> bool:
        return self.values.get(name) is not None

    @overload
    def integer(self, name: str, *, high: int, low: int = 1) -> int: ...
    @overload
    def integer(self, name: str, default: int, *, high: int, low: int = 1) -> int: ...
    @overload
    def integer(self, name: str, default: None, *, high: int, low: int = 1) -> int | None: ...

    def integer(self, name: str, default: int | _Missing | None = _REQUIRED, *, high: int, low: int = 1) -> int | None:
        """An integer from ``low`` to ``high``, or the default where the field is missing."""
        value = self._value(name, default)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.wrong(name, f"an integer from {low} to {high}")
        return value

    @overload
    def number(self, name: str, *, high: float, low: float = 0.0) -> float: ...
    @overload
    def number(self, name: str, default: float, *, high: float, low: float = 0.0) -> float: ...
    @overload
    def number(self, name: str, default: None, *, high: float, low: float = 0.0) -> float | None: ...

    def number(
        self, name: str, default: float | _Missing | None = _REQUIRED, *, high: float, low: float = 0.0
    ) -> float | None:
        """A finite number above ``low`` and at most ``high``, or the default where the field is missing."""
        return self._number(name, default, low=low, high=high)

    def _number(self, name: str, default: float | _Missing | None, *, low: float, high: float) -> float | None:
        value = self._value(name, default)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not low < value <= high:
            raise self.wrong(name, f"a number above {low:g}, at most {high:g}")
        return float(value)

    @overload
    def factor(self, name: str) -> float: ...
    @overload
    def factor(self, name: str, default: float) -> float: ...
    @overload
    def factor(self, name: str, default: None) -> float | None: ...

    def factor(self, name: str, default: float | _Missing | None = _REQUIRED) -> float | None:
        """A number above ``MIN_FACTOR`` and at most ``MAX_FACTOR``, or the default where the field is missing."""
        return self._number(name, default, low=MIN_FACTOR, high=MAX_FACTOR)

    def flag(self, name: str, default: bool) -> bool:
        value = self._value(name, default)
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return value

    def text(self, name: str, default: str) -> str:
        value = self._value(name, default)
        if not isinstance(value, str):
            raise self.wrong(name, "a text")
        return value

    def factors(self, name: str, count: int) -> list[float]:
        """``count`` factors, from ``MIN_FACTOR`` to ``MAX_FACTOR``."""
        value = self._value(name, _REQUIRED)
        if not isinstance(value, list) or len(value) != count or not all(_is_factor(v) for v in value):
            raise self.wrong(name, f"a list of {count} numbers from {MIN_FACTOR:g} to {MAX_FACTOR:g}")
        return [float(v) for v in value]

    def nested(self, name: str) -> Fields:
        """The fields of an object inside; an empty one where it is missing."""
        value = self._value(name, {})
        if not isinstance(value, dict):
            raise self.wrong(name, "an object")
        return Fields(value, f"{name} in {self.where}")

    def refuse(self, name: str, what: str) -> None:
        """Raises where the field is there and is not zero, false or empty: it changes the model in an unknown way."""
        if self.values.get(name):
            raise ModelFileError(f"{self.where} asks for {what} ({name}), which is not supported.")

    def wrong(self, name: str, needed: str) -> ModelFileError:
        value = repr(self.values.get(name))
        shown = value if len(value) <= 60 else value[:60] + "..."
        return ModelFileError(f"{name} in {self.where} is {shown}, but it must be {needed}.")

    def _value(self, name: str, default: Any) -> Any:
        value = self.values.get(name)
        if value is not None:
            return value
        if default is _REQUIRED:
            raise ModelFileError(f"{name} is missing in {self.where}.")
        return default


def _is_factor(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and MIN_FACTOR <= value <= MAX_FACTOR


def head_dim(fields: Fields, name: str, hidden_size: int, heads: int) -> int:
    """The size of a head: the field, or where it is missing an equal share of the hidden size. Even, for RoPE."""
    if name not in fields and hidden_size % heads:
        raise ModelFileError(
            f"The hidden size {hidden_size} in {fields.where} is not a multiple of the {heads} heads, "
            f"and {name} does not say how large a head is."
        )
    size = fields.integer(name, hidden_size // heads, low=2, high=MAX_HEAD_DIM)
    if size % 2:
        raise fields.wrong(name, "even")
    return size


def key_value_heads(fields: Fields, name: str, heads: int) -> int:
    """The number of key-value heads (as many as heads where it is missing), which divides the number of heads."""
    count = fields.integer(name, heads, high=MAX_HEADS)
    if heads % count:
        raise fields.wrong(name, f"a divisor of the number of attention heads, {heads}")
    return count
