"""What is written is complete or not there, and one process at a time works."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import BinaryIO

import pytest

from fallow.errors import FallowError
from fallow.files import (
    append_json_line,
    locked,
    locked_or_refused,
    move_into_place,
    replacing,
    replacing_folder,
    whole_lines,
    write_json,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def half_written(file: BinaryIO) -> None:
    file.write(b"two")
    raise KeyboardInterrupt


def process(code: str, *arguments: Path) -> subprocess.Popen[str]:
    """Another Python that has said its first line."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    started = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert started.stdout is not None
    assert started.stdout.readline() == "ready\n"
    return started


def kill(started: subprocess.Popen[str]) -> None:
    started.kill()
    started.communicate(timeout=30)


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with replacing(path) as file:
        file.write(b"one")
        assert not path.exists()
    (tmp_path / "other").write_bytes(b"")
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode
    with pytest.raises(KeyboardInterrupt), replacing(path) as file:
        half_written(file)
    assert path.read_bytes() == b"one"
    assert names(tmp_path) == ["file", "other"]


def test_a_killed_writer_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"one")
    code = (
        "import sys, time; from pathlib import Path; from fallow.files import replacing\n"
        "with replacing(Path(sys.argv[1])) as file:\n"
        "    file.write(b'two'); file.flush(); print('ready', flush=True); time.sleep(60)"
    )
    kill(process(code, path))
    assert path.read_bytes() == b"one"


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    place = tmp_path / "deep" / "folder"
    with replacing_folder(place) as partial:
        (partial / "a").write_text("1")
        assert not place.exists()
    with pytest.raises(KeyboardInterrupt), replacing_folder(place) as partial, (partial / "b").open("wb") as file:
        half_written(file)
    assert names(place) == ["a"]
    with replacing_folder(place) as partial:
        (partial / "b").write_text("2")
    assert names(place) == ["b"]
    assert names(place.parent) == ["folder"]


def test_what_a_killed_process_left_behind_is_removed(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from fallow.files import replacing_folder\n"
        "with replacing_folder(Path(sys.argv[1])) as partial:\n"
        "    (partial / 'half').write_text('1'); print('ready', flush=True); time.sleep(60)"
    )
    place = tmp_path / "folder"
    kill(process(code, place))
    assert names(tmp_path) == [".folder.partial"]
    with replacing_folder(place) as partial:
        assert names(partial) == []
    assert names(tmp_path) == ["folder"]


def test_a_move_that_fails_puts_back_what_was_there(tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    (place / "a").write_text("1")
    with pytest.raises(FileNotFoundError):
        move_into_place(tmp_path / "absent", place)
    assert (place / "a").read_text() == "1"
    assert names(tmp_path) == ["place"]


def test_a_lock_holds_one_process_and_goes_with_it(tmp_path: Path) -> None:
    path = tmp_path / "locks" / "a.lock"
    code = (
        "import sys, time; from pathlib import Path; from fallow.files import locked\n"
        "print('ready', flush=True)\n"
        "with locked(Path(sys.argv[1])):\n"
        "    print('mine', flush=True); time.sleep(60)"
    )
    with locked(path):
        waiting = process(code, path)
        with pytest.raises(subprocess.TimeoutExpired):
            waiting.wait(timeout=0.5)
    assert waiting.stdout is not None
    assert waiting.stdout.readline() == "mine\n"
    kill(waiting)
    with locked(path):
        pass


def test_who_does_not_want_to_wait_is_told(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    with (
        locked_or_refused(path, "It is taken."),
        pytest.raises(FallowError, match=r"^It is taken\.$"),
        locked_or_refused(path, "It is taken."),
    ):
        pass
    with locked_or_refused(path, "It is taken."):
        pass


def test_json_is_written_and_read(tmp_path: Path) -> None:
    value = {"a": [1, 2.5, None], "b": "ü"}
    write_json(tmp_path / "x.json", value)
    assert json.loads((tmp_path / "x.json").read_bytes()) == value


def test_a_line_that_was_cut_short_is_not_there_and_not_continued(tmp_path: Path) -> None:
    path = tmp_path / "results" / "lines.jsonl"
    assert whole_lines(path) == []
    append_json_line(path, {"first": 1})
    with path.open("ab") as file:
        file.write(b'{"second"')
    assert whole_lines(path) == [b'{"first": 1}']
    append_json_line(path, {"third": "ü"})
    assert [json.loads(line) for line in whole_lines(path)] == [{"first": 1}, {"third": "ü"}]
