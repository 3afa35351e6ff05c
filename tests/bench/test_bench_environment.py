"""Environments of peers: made once, or a sentence about why not. Nothing here needs a network."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fallow.bench.environment import PeerError, Requirements, peer_python, peers_home, python_variable
from fallow.bench.peers import PEERS, peer_named
from fallow.bench.prepare import prepared, source_hash, worker_environment
from fallow.errors import FallowError

LAUNCH = Path(__file__).parents[2] / "src" / "fallow" / "bench" / "launch.py"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home of peers, and a pip that asks no index."""
    monkeypatch.setenv("FALLOW_PEERS_HOME", str(tmp_path / "peers"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    for name in PEERS:
        monkeypatch.delenv(python_variable(name), raising=False)
    return tmp_path / "peers"


def test_an_environment_is_made_once_and_can_install(home: Path, tmp_path: Path) -> None:
    project = tmp_path / "thing-1.0"
    project.mkdir()
    wheel = project / "thing-1.0-py3-none-any.whl"
    write_wheel(wheel, "thing", "1.0")
    requirements = Requirements((str(wheel),))
    said: list[str] = []
    python = peer_python("thing", requirements, lambda what, done, total: said.append(what))
    assert python.parent.parent.parent == home == peers_home()
    assert subprocess.run([python, "-c", "import thing"], check=False).returncode == 0
    made = python.stat().st_ctime_ns, (python.parent.parent / "complete.json").stat().st_mtime_ns
    assert peer_python("thing", requirements, lambda what, done, total: said.append(what)) == python
    assert made == (python.stat().st_ctime_ns, (python.parent.parent / "complete.json").stat().st_mtime_ns)
    assert len(said) == 1
    assert peer_python_folder("thing", Requirements((str(wheel), "other"))) != python.parent.parent


def peer_python_folder(name: str, requirements: Requirements) -> Path:
    return peers_home() / f"{name}-{requirements.digest}"


def write_wheel(path: Path, name: str, version: str) -> None:
    import zipfile

    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"{name}.py", "")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", f"{name}.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")


def test_what_pip_cannot_install_is_said_and_nothing_half_made_stays() -> None:
    requirements = Requirements(("a-package-that-is-nowhere==1",))
    with pytest.raises(PeerError, match=r"pip install failed \(ERROR: .*a-package-that-is-nowhere") as caught:
        peer_python("nowhere", requirements)
    assert not peer_python_folder("nowhere", requirements).exists()
    log = Path(str(caught.value).rpartition("see ")[2].rstrip("."))
    assert "a-package-that-is-nowhere" in log.read_text()


def test_a_home_that_cannot_be_written_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FALLOW_PEERS_HOME", str(tmp_path / "file" / "peers"))
    with pytest.raises(PeerError, match="FALLOW_PEERS_HOME"):
        peer_python("nowhere", Requirements(("x",)))


def test_a_python_of_the_users_own_is_taken_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FALLOW_PEER_PYTHON_LLAMA_CPP", sys.executable)
    assert peer_python("llama.cpp", PEERS["llama.cpp"].requirements) == Path(sys.executable)
    monkeypatch.setenv("FALLOW_PEER_PYTHON_LLAMA_CPP", "/nowhere/python")
    with pytest.raises(PeerError, match="FALLOW_PEER_PYTHON_LLAMA_CPP"):
        peer_python("llama.cpp", PEERS["llama.cpp"].requirements)


def test_every_peer_has_a_name_and_pinned_requirements() -> None:
    for name, peer in PEERS.items():
        assert peer_named(name) is peer
        assert any("==" in requirement for requirement in peer.requirements.install)
    with pytest.raises(FallowError, match=r"'gguf\.cpp'.*llama\.cpp"):
        peer_named("gguf.cpp")


def test_a_worker_sees_our_modules_and_none_of_our_libraries(tmp_path: Path) -> None:
    """In a bare Python the worker's side can be imported, though neither numpy nor an installed fallow is there."""
    command = [sys.executable, "-I", "-S", str(LAUNCH), "fallow.bench.worker"]
    environment = worker_environment(Path(sys.executable))
    assert "PYTHONPATH" not in environment
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_form_of_a_model_is_made_once_and_appears_only_when_it_is_complete(tmp_path: Path) -> None:
    model = tmp_path / "model.gguf"
    model.write_bytes(b"weights")
    calls: list[Path] = []

    def make(target: Path, log: Path) -> None:
        calls.append(target)
        target.mkdir()
        (target / "part").write_text("half")
        if len(calls) == 1:
            raise PeerError("broken")

    with pytest.raises(PeerError, match="broken"):
        prepared(model, "form", make, what="making it", progress=None)
    folder = peers_home() / "models" / source_hash(model)
    assert list(folder.glob("*form*")) == []
    made = prepared(model, "form", make, what="making it", progress=None)
    assert (made / "part").read_text() == "half"
    assert prepared(model, "form", make, what="making it", progress=None) == made
    assert len(calls) == 2
    model.write_bytes(b"other weights")
    assert prepared(model, "form", make, what="making it", progress=None) != made


def test_the_hash_of_a_folder_is_that_of_its_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({}))
    before = source_hash(tmp_path)
    assert source_hash(tmp_path) == before
    (tmp_path / "model.safetensors").write_bytes(b"1")
    assert source_hash(tmp_path) != before
