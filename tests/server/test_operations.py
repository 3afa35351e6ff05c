"""What an operator looks at: health, metrics, ids, logs, the OpenAPI page, keys, replicas."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from fallow.errors import FallowError
from fallow.server import ServerSettings, load_api_keys
from fallow.server.process import bind, url_of
from fallow.server.record import RequestRecord, log_line
from fallow.server.replica_metrics import merge
from fallow.server.replicas import split_cores

BODY = {"prompt": "hello", "max_tokens": 3, "ignore_eos": True}


def test_health(tiny: Any) -> None:
    answer = tiny.http.get("/health")
    assert answer.status_code == 200
    assert answer.json() == {"status": "ok", "model": "tiny", "running": 0, "waiting": 0}


def test_metrics_count_what_happened(tiny: Any) -> None:
    def values() -> dict[str, float]:
        lines = tiny.http.get("/metrics").text.splitlines()
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}

    before = values()
    assert tiny.http.post("/v1/completions", json=BODY | {"n": 2}).status_code == 200
    assert tiny.http.post("/v1/completions", json={"prompt": 5}).status_code == 400
    tiny.http.get("/v1/made/up/path")
    after = values()

    def grew(name: str) -> float:
        return after[name] - before.get(name, 0)

    assert grew('fallow_http_requests_total{route="/v1/completions",status="200"}') == 1
    assert grew('fallow_http_requests_total{route="/v1/completions",status="400"}') == 1
    assert grew('fallow_http_requests_total{route="other",status="404"}') == 1
    assert grew("fallow_generated_tokens_total") == 6
    assert grew("fallow_prompt_tokens_total") >= 5
    assert grew("fallow_time_to_first_token_seconds_count") == 1
    assert grew("fallow_time_per_output_token_seconds_count") == 1
    assert grew("fallow_cost_usd_total") > 0
    assert after["fallow_kv_pages_total"] > 0
    (joules,) = [name for name in after if name.startswith("fallow_energy_joules_total")]
    assert re.fullmatch(r'fallow_energy_joules_total\{source="\w+"\}', joules)
    assert after[joules] > before[joules]


def test_request_ids(tiny: Any) -> None:
    assert tiny.http.get("/v1/models", headers={"x-request-id": "abc-123"}).headers["x-request-id"] == "abc-123"
    for bad in ("x" * 200, "a b", 'a"b', ""):
        given = tiny.http.get("/v1/models", headers={"x-request-id": bad}).headers["x-request-id"]
        assert re.fullmatch(r"[0-9a-f]{32}", given)
    assert tiny.http.get("/nowhere").headers["x-request-id"]


def test_paths_and_methods_that_are_not_there(tiny: Any) -> None:
    for answer, status in (
        (tiny.http.get("/nowhere"), 404),
        (tiny.http.get("/v1/completions"), 405),
        (tiny.http.get("/v1/models/other/model"), 404),
    ):
        assert answer.status_code == status
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_openapi_describes_bodies_and_answers(tiny: Any) -> None:
    document = tiny.http.get("/openapi.json").json()
    schemas = document["components"]["schemas"]

    def references(node: Any) -> set[str]:
        if isinstance(node, dict):
            own = {node["$ref"]} if isinstance(node.get("$ref"), str) else set()
            return own.union(*(references(value) for value in node.values()))
        return set().union(*(references(value) for value in node)) if isinstance(node, list) else set()

    assert {reference.removeprefix("#/components/schemas/") for reference in references(document)} <= set(schemas)
    chat = document["paths"]["/v1/chat/completions"]["post"]
    assert chat["requestBody"]["content"]["application/json"]["schema"]["$ref"].endswith("/ChatCompletionRequest")
    assert "text/event-stream" in chat["responses"]["200"]["content"]
    fields = schemas["ChatCompletionRequest"]["properties"]
    assert {"messages", "tools", "response_format", "temperature", "top_k"} <= set(fields)
    assert schemas["ChatCompletionRequest"]["required"] == ["messages"]


def test_the_docs_page_needs_no_other_host(tiny: Any) -> None:
    page = tiny.http.get("/docs")
    assert page.headers["content-type"].startswith("text/html")
    assert "/v1/chat/completions" in page.text
    assert "ChatCompletionRequest" in page.text
    assert not re.findall(r"""(?:src|href)=["'](?:https?:)?//""", page.text)
    assert "<script" not in page.text


def test_a_log_line_is_one_json_object() -> None:
    out = io.StringIO()
    log_line(RequestRecord(id="x", method="GET").to_json(), stream=out)
    assert out.getvalue().count("\n") == 1
    assert json.loads(out.getvalue())["status"] == 500  # nothing was sent


def test_a_log_that_cannot_be_written_is_no_error() -> None:
    closed = io.StringIO()
    closed.close()
    log_line({"a": 1}, stream=closed)


def test_keys_come_from_options_environment_and_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\nfrom-file\n\nfrom-file-2\n")
    monkeypatch.setenv("FALLOW_API_KEY", "from-env, given")
    assert load_api_keys(["given"], file) == ("given", "from-env", "from-file", "from-file-2")
    monkeypatch.delenv("FALLOW_API_KEY")
    assert load_api_keys() == ()
    for content in (b"", b"# nothing\n", b"\xff\xfe", b"x" * (2 << 20)):
        file.write_bytes(content)
        with pytest.raises(FallowError):
            load_api_keys([], file)
    with pytest.raises(FallowError):
        load_api_keys([], tmp_path / "absent")


@pytest.mark.parametrize(
    "wrong",
    [
        {"port": 70000},
        {"max_body_bytes": 0},
        {"drain_timeout": -1},
        {"price_per_hour": float("nan")},
        {"api_keys": ("",)},
    ],
)
def test_settings_are_checked(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="(?i)" + next(iter(wrong)).split("_")[0]):
        ServerSettings(**wrong)


def test_a_port_that_is_taken_is_a_sentence() -> None:
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        with pytest.raises(FallowError, match="Cannot listen on 127"):
            bind("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(FallowError, match="Cannot listen on nowhere"):
        bind("nowhere.invalid", 0)


def test_cores_are_split() -> None:
    assert split_cores([0, 1, 2, 3, 4], 2) == [[0, 1], [2, 3, 4]]
    assert split_cores([3], 1) == [[3]]
    assert split_cores([0], 2) == [None, None]


def test_metrics_of_replicas_are_merged() -> None:
    text = '# HELP a_total A.\n# TYPE a_total counter\na_total{x="1 {"} 2.0\n# HELP b B.\n# TYPE b gauge\nb 3.0\n'
    assert merge({"0": text, "1": text}).decode().splitlines() == [
        "# HELP a_total A.",
        "# TYPE a_total counter",
        'a_total{replica="0",x="1 {"} 2.0',
        'a_total{replica="1",x="1 {"} 2.0',
        "# HELP b B.",
        "# TYPE b gauge",
        'b{replica="0"} 3.0',
        'b{replica="1"} 3.0',
    ]


REPLICAS = """
import sys
from fallow.plan import SparsityPlan
from fallow.server import ServerSettings, serve_replicas
settings = ServerSettings(port=int(sys.argv[2]), served_model_name="tiny")
options = {"model": sys.argv[1], "max_num_seqs": 4}
sys.exit(serve_replicas(options, settings, replicas=2, plan=SparsityPlan.dense()))
"""


def test_replicas_share_a_port_restart_and_drain(tiny_model: Path) -> None:
    with bind("127.0.0.1", 0) as free:
        url, port = url_of(free), free.getsockname()[1]
    parent = subprocess.Popen(
        [sys.executable, "-c", REPLICAS, str(tiny_model), str(port)], stderr=subprocess.PIPE, text=True
    )
    assert parent.stderr is not None
    log: list[dict[str, Any]] = []

    def until(event: str, count: int) -> None:
        assert parent.stderr is not None
        while sum(entry["event"] == event for entry in log) < count:
            line = parent.stderr.readline()
            assert line, "the parent ended"
            log.append(json.loads(line))

    try:
        until("ready", 2)
        for _ in range(8):  # a connection each: both replicas answer some
            assert httpx.post(url + "/v1/completions", json=BODY, timeout=30).status_code == 200
        samples = [line for line in httpx.get(url + "/metrics").text.splitlines() if not line.startswith("#")]
        assert all('{replica="0"' in line or '{replica="1"' in line for line in samples)
        answered = [float(line.rsplit(" ", 1)[1]) for line in samples if "requests_total{" in line and '"200"' in line]
        assert sum(answered) == 8
        children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
        assert len(children) == 2
        os.kill(int(children[0]), signal.SIGKILL)
        until("ready", 3)
        assert any(entry["event"] == "replica_ended" for entry in log)
        assert httpx.post(url + "/v1/completions", json=BODY, timeout=30).status_code == 200
        parent.send_signal(signal.SIGTERM)
        assert parent.wait(30) == 0
    finally:
        if parent.poll() is None:
            parent.terminate()
            parent.wait(30)
        parent.stderr.close()
    ends = time.monotonic() + 10
    while time.monotonic() < ends and any(Path(f"/proc/{child}").exists() for child in children):
        time.sleep(0.05)
    assert not any(Path(f"/proc/{child}").exists() for child in children)
