"""Finished trainings, one JSON object a line: what was done once is not done again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fallow.errors import FallowError
from fallow.files import append_json_line, whole_lines

Record = dict[str, Any]
IDENTITY = ("side", "config", "seed", "tokens", "corpus")
_ONLY_SPEED = "compile"  # of a configuration: the losses are the same without it


class Records:
    """A file of records. ``path`` need not be there yet."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def all(self) -> list[Record]:
        """In the order in which they were added. Raises ``FallowError`` where the file is not what was written."""
        return [self._parsed(number, line) for number, line in enumerate(whole_lines(self.path), 1)]

    def find(self, wanted: Mapping[str, Any], *, same_speed: bool) -> Record | None:
        """The last record with the ``IDENTITY`` of ``wanted``; unless ``same_speed``, whatever was compiled."""
        key = _key(wanted, same_speed=same_speed)
        return next((found for found in reversed(self.all()) if _key(found, same_speed=same_speed) == key), None)

    def add(self, record: Record) -> None:
        """Append ``record``; it is on disk when this returns."""
        append_json_line(self.path, record)

    def _parsed(self, number: int, line: bytes) -> Record:
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict) or not record.keys() >= set(IDENTITY):
            raise FallowError(f"{self.path}, line {number}: this is no record of a training; remove the line.")
        return record


def _key(record: Mapping[str, Any], *, same_speed: bool) -> str:
    identity = {name: record[name] for name in IDENTITY}
    return json.dumps(identity if same_speed else _without_speed(identity), sort_keys=True)


def _without_speed(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_speed(inner) for name, inner in value.items() if name != _ONLY_SPEED}
    return value
