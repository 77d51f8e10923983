"""Keys, limits, leaving callers, logs, metrics, and a server that ends."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
import schemathesis
from live import random_sheet, says, serving

from cribsheet.cli import run
from cribsheet.cli.serve import _bound, _way_out
from cribsheet.errors import RequestError, SheetError
from cribsheet.server import Shelf, create_app
from cribsheet.server.auth import Keyring
from cribsheet.server.errors import Refusal
from cribsheet.server.limits import Gate
from cribsheet.server.settings import ServerSettings
from cribsheet.server.sheets import named
from cribsheet.server.telemetry.logs import JsonLines
from cribsheet.testing import save_tiny_model

ASK = {"model": "oslo", "messages": [{"role": "user", "content": "Where?"}]}
LONG = {"model": "noise", "messages": ASK["messages"], "max_tokens": 3000, "logit_bias": {"2": -100}}
ALICE, BOB, ALL = "alice-" + "a" * 20, "bob-" + "b" * 20, "all-" + "c" * 20


@pytest.fixture(scope="module")
def sheets():
    made = {"oslo": says("Bob lives in Oslo."), "rome": says("Nobody lives in Rome."), "noise": random_sheet()}
    yield made
    for kb in made.values():
        kb.close()


@pytest.fixture
def keyed(sheets):
    keys = {
        "alice": {"key": ALICE, "sheets": ["oslo"]},
        "bob": {"sha256": hashlib.sha256(BOB.encode()).hexdigest(), "sheets": ["rome"]},
        "operator": {"key": ALL},
    }
    with serving(_shared(sheets), keys=keys) as live:
        yield live


def _shared(sheets):
    """The open sheets for one more server, which closes its own attachments only."""
    from cribsheet import CompressedKnowledgeLLM

    return {name: CompressedKnowledgeLLM(kb.backbone, kb.sheet) for name, kb in sheets.items()}


def as_holder(live, key):
    return live.http(headers={"Authorization": f"Bearer {key}"} if key else {})


def posted(body, length):
    """A request as bytes, whose body may be shorter than it says."""
    head = ["POST /v1/chat/completions HTTP/1.1", "Host: x", "Content-Type: application/json"]
    return "\r\n".join([*head, f"Content-Length: {length}", "", ""]).encode() + body


def wait_until(true, seconds=30):
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_without_a_key_nothing_is_told(keyed):
    for key in ("", "wrong-" + "x" * 20, ALICE + "x", ALICE[:-1]):
        http = as_holder(keyed, key)
        for path in ("/v1/models", "/v1/sheets/oslo", "/v1/sheets/oslo/documents/0", "/metrics"):
            reply = http.get(path)
            assert reply.status_code == 401 and reply.headers["www-authenticate"] == "Bearer"
        assert http.post("/v1/chat/completions", json=ASK).json()["error"]["code"] == "invalid_api_key"
        assert http.get("/health").status_code == 200


def test_of_two_keys_none_is_taken(keyed):
    for keys in ((ALICE, ALL), (ALL, ALICE), (ALICE, ALICE)):
        headers = [("Authorization", f"Bearer {key}") for key in keys]
        reply = keyed.http().get("/v1/models", headers=headers)
        assert reply.status_code == 401 and "one header" in reply.json()["error"]["message"]
    ring = Keyring.of({"alice": {"key": ALICE}})  # Ray's front asks with the headers of its own scope
    assert ring.holder([(b"Authorization", f"bearer {ALICE}".encode())]).name == "alice"
    assert ring.holder([(b"authorization", f"Bearer {ALICE}".encode()), (b"authorization", b"x")]) is None


def test_a_key_opens_its_sheets_and_no_others(keyed):
    http = as_holder(keyed, ALICE)
    assert [entry["id"] for entry in http.get("/v1/models").json()["data"]] == ["oslo"]
    assert http.post("/v1/chat/completions", json=ASK).status_code == 200
    hidden = http.post("/v1/chat/completions", json={**ASK, "model": "rome"})
    absent = http.post("/v1/chat/completions", json={**ASK, "model": "pisa"})
    assert hidden.status_code == absent.status_code == 404
    assert hidden.json()["error"]["message"].replace("rome", "pisa") == absent.json()["error"]["message"]
    assert http.get("/v1/sheets/rome/documents/0").status_code == 404
    assert http.get("/metrics").status_code == 403
    assert [entry["id"] for entry in as_holder(keyed, BOB).get("/v1/models").json()["data"]] == ["rome"]
    assert 'sheet="rome"' in as_holder(keyed, ALL).get("/metrics").text


def test_the_description_says_that_keys_are_needed(keyed, live):
    described = httpx.get(f"{keyed.url}/openapi.json").json()
    assert described["paths"]["/v1/models"]["get"]["security"] == [{"key": []}]
    assert "security" not in described["paths"]["/health"]["get"]
    assert "securitySchemes" not in httpx.get(f"{live.url}/openapi.json").json()["components"]


STREAMED = {
    "model": "noise",
    "cribsheet": {"evidence": True},
    "stream": True,
    "stream_options": {"include_usage": True},
    "max_tokens": 4,
}
STREAMS = {
    "/v1/chat/completions": {**ASK, **STREAMED, "logprobs": True, "top_logprobs": 2},
    "/v1/completions": {"prompt": "Where?", **STREAMED, "logprobs": 2},
}


@pytest.mark.parametrize("path", STREAMS)
def test_every_event_of_a_stream_is_as_described(live, path):
    operation = schemathesis.openapi.from_url(f"{live.url}/openapi.json")[path]["POST"]
    case = operation.Case(body=STREAMS[path], media_type="application/json")
    reply, damaged = case.call(), case.call()
    assert b'"usage":{' in reply.content and b'"sources":[' in reply.content and b"logprob" in reply.content
    assert operation.is_valid_response(reply)
    damaged.content = damaged.content.replace(b'"choices"', b'"chosen"')
    assert not operation.is_valid_response(damaged)


@pytest.mark.parametrize(
    "table",
    [
        {},
        {"a": {}},
        {"a": "long enough to be a key"},
        {"a": {"key": "short"}},
        {"a": {"key": ALICE, "sha256": "00" * 32}},
        {"a": {"sha256": "00"}},
        {"a": {"key": ALICE, "sheets": "oslo"}},
        {"a": {"key": ALICE}, "b": {"key": ALICE}},
        {"a": {"key": ALICE, "admin": True}},
    ],
)
def test_a_key_file_that_makes_no_sense_is_refused(table):
    with pytest.raises(RequestError):
        Keyring.of(table)


def test_a_key_to_a_sheet_that_is_not_served_is_refused(sheets, tmp_path):
    file = tmp_path / "keys.toml"
    file.write_text(f'[alice]\nkey = "{ALICE}"\nsheets = ["oslo", "pisa"]\n')
    with pytest.raises(RequestError, match="pisa"):
        create_app(Shelf({"oslo": sheets["oslo"]}), keys=Keyring.read(file))
    with pytest.raises(RequestError, match="cannot be read"):
        Keyring.read(tmp_path / "none.toml")


def test_names_come_from_files_or_are_given():
    assert named("a/b/staff.sheet") == ("staff", "a/b/staff.sheet")
    assert named("s3://bucket/x/staff.v2.sheet") == ("staff.v2", "s3://bucket/x/staff.v2.sheet")
    assert named("https://host/staff.sheet?token=x/y") == ("staff", "https://host/staff.sheet?token=x/y")
    assert named("people=a/b.sheet") == ("people", "a/b.sheet")
    for wrong in ("a b.sheet", "../.sheet", ".sheet", "https://host/sheets#staff", "https://host/sheets?token=x#staff"):
        with pytest.raises(SheetError):
            named(wrong)


def test_the_gate_refuses_what_is_too_much():
    clock = [0.0]
    limits = ServerSettings(max_answers=5, max_answers_per_caller=3, requests_per_minute=60)
    gate = Gate(limits, now=lambda: clock[0])
    leave = gate.enter("a", 3)
    for caller, answers, status in (("a", 1, 429), ("b", 3, 503), ("b", 4, 400)):
        with pytest.raises(Refusal) as caught:
            gate.enter(caller, answers)
        assert caught.value.status == status
    leave()
    assert gate.in_flight == 0
    for _ in range(59):
        gate.enter("a", 1)()
    with pytest.raises(Refusal, match="60 questions a minute"):
        gate.enter("a", 1)
    clock[0] = 1.0
    gate.enter("a", 1)()


def test_a_full_server_says_when_to_come_again(sheets):
    with serving(_shared(sheets), max_answers=2, max_answers_per_caller=2) as live, live.http() as http:
        with http.stream("POST", "/v1/chat/completions", json={**LONG, "n": 2, "stream": True}) as running:
            lines = running.iter_lines()  # httpx closes the connection with it
            next(lines)
            refused = live.post(**ASK)
            assert refused.status_code in (429, 503) and int(refused.headers["retry-after"]) >= 1
            assert live.http().get("/health").status_code == 200
        wait_until(lambda: live.app.state.service.gate.in_flight == 0)
        assert live.post(**ASK).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_caller_who_leaves_frees_the_engine(live, stream):
    service = live.app.state.service
    engine = service.shelf["noise"].kb.session.loaded.engine
    host, port = live.url.removeprefix("http://").split(":")
    body = json.dumps({**LONG, "stream": stream}).encode()
    with socket.create_connection((host, int(port))) as raw:
        raw.sendall(posted(body, len(body)))
        wait_until(lambda: engine._started())
    wait_until(lambda: not engine._started() and service.gate.in_flight == 0, seconds=10)


def test_a_reader_who_takes_nothing_is_let_go(sheets):
    with serving(_shared(sheets), send_seconds=0.5) as live:
        host, port = live.url.removeprefix("http://").split(":")
        body = json.dumps({**LONG, "stream": True, "n": 8, "logprobs": True, "top_logprobs": 20}).encode()
        with socket.socket() as raw:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            raw.connect((host, int(port)))
            raw.sendall(posted(body, len(body)))
            wait_until(lambda: live.app.state.service.gate.in_flight == 8)
            wait_until(lambda: live.app.state.service.gate.in_flight == 0, seconds=60)
        assert live.post(**ASK).status_code == 200


def test_limits_of_size_and_time_have_their_own_status(sheets):
    with serving(_shared(sheets), max_body_bytes=2000, receive_seconds=0.3, answer_seconds=0.2) as live:
        assert live.post(**{**ASK, "user": "x" * 3000}).json()["error"]["code"] == "request_too_large"
        late = live.post(**LONG)
        assert late.status_code == 504 and late.json()["error"]["code"] == "answer_timeout"
        lines = [line for line in live.post(**LONG, stream=True).text.splitlines() if line]
        assert "answer_timeout" in lines[-1]
        host, port = live.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as slow:
            slow.sendall(posted(b"{", 50))
            assert b"408" in slow.recv(4096)


def test_a_name_that_another_site_points_here_is_not_answered(sheets):
    with serving(_shared(sheets), hosts=("127.0.0.1", "[::1]")) as live:
        assert live.post(**ASK).status_code == 200
        reply = live.http(headers={"Host": "evil.example"}).post("/v1/chat/completions", json=ASK)
        assert reply.status_code == 421


def test_documents_can_be_hidden(sheets):
    with serving(_shared(sheets), show_documents=False) as live:
        assert live.http().get("/v1/sheets/oslo/documents/0").status_code == 403
        assert live.http().get("/v1/sheets/oslo").json()["texts"] is False
        sources = live.post(**{**LONG, "max_tokens": 3}, cribsheet={"sources": 2}).json()["choices"][0]["cribsheet"][
            "sources"
        ]
        assert sources and all(source["text"] == "" for source in sources)


def test_documents_show_what_is_kept(live):
    http = live.http()
    details = http.get("/v1/sheets/oslo").json()
    assert [document["id"] for document in details["documents"]] == ["alice", "bob"]
    document = http.get("/v1/sheets/oslo/documents/1").json()
    assert document["text"].startswith("Bob Smith lives in Oslo")
    assert document["kept"] and all(0 < token["kept"] <= 1 for token in document["kept"])
    assert sum(token["kept"] for token in document["kept"]) == pytest.approx(details["documents"][1]["kept"], rel=1e-4)


def test_log_lines_are_json_without_texts(live, caplog):
    with caplog.at_level(logging.INFO, "cribsheet.server"):
        live.post(**{**ASK, "user": "eve", "messages": [{"role": "user", "content": "my secret"}]})
        live.post(**{**ASK, "messages": [{"role": "owner of secret", "content": "my secret"}]})
        wait_until(lambda: len(caplog.records) == 2)
    lines = [json.loads(JsonLines().format(record)) for record in caplog.records]
    assert lines[0]["status"] == 200 and lines[0]["sheet"] == "oslo" and lines[0]["completion_tokens"] > 0
    assert lines[0]["user"] == hashlib.sha256(b"eve").hexdigest()[:16]
    assert lines[1]["status"] == 400 and lines[1]["error"] == "invalid_value"
    assert "secret" not in json.dumps(lines)


def test_texts_are_logged_on_request(sheets, caplog):
    with caplog.at_level(logging.INFO, "cribsheet.server"), serving(_shared(sheets), log_text=True) as live:
        live.post(**ASK)
        wait_until(lambda: caplog.records)
    assert json.loads(JsonLines().format(caplog.records[0]))["answers"] == ["Bob lives in Oslo."]


def test_a_failure_is_logged_without_its_message_and_told_without_details(live, caplog):
    quoted = " ".join(("my", "secret"))
    try:
        raise ValueError(quoted)
    except ValueError as error:
        record = logging.LogRecord("x", logging.ERROR, "x", 1, "failure", (), (ValueError, error, error.__traceback__))
    line = json.loads(JsonLines().format(record))
    assert line["exception"] == "ValueError" and line["traceback"] and quoted not in json.dumps(line)


def test_metrics_count_in_prometheus_form(live):
    before = live.http().get("/metrics").text
    live.post(**ASK)
    after = live.http().get("/metrics").text
    name = 'cribsheet_requests_total{route="/v1/chat/completions",sheet="oslo",status="200"}'

    def value(text):
        return next((float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(name)), 0.0)

    assert value(after) == value(before) + 1
    assert 'cribsheet_tokens_total{sheet="oslo",kind="cached"}' in after
    assert 'cribsheet_request_seconds_bucket{sheet="oslo",le="+Inf"}' in after


@pytest.fixture(scope="module")
def sheet_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    (folder / "a.txt").write_text("Alice lives in Lisbon. Bob lives in Oslo. " * 8)
    model = save_tiny_model(folder / "model")
    arguments = [
        "build",
        folder / "a.txt",
        "--task",
        "Who?",
        "--model",
        model,
        "-o",
        folder / "staff.sheet",
        "--rate",
        "2",
    ]
    assert run([*map(str, arguments), "--scorer", "recent"]) == 0
    return folder / "staff.sheet"


def test_the_command_serves_drains_on_sigterm_and_ends_well(sheet_file):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    command = [sys.executable, "-m", "cribsheet", "serve", str(sheet_file), f"people={sheet_file}", "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as server:
        try:
            lines = iter(server.stderr.readline, "")
            url = next(line for line in lines if "http://" in line).split(" at ")[1].split("/ ")[0]
            assert {each["id"] for each in httpx.get(f"{url}/v1/models").json()["data"]} == {"staff", "people"}
            body = {
                "model": "staff",
                "messages": ASK["messages"],
                "max_tokens": 400,
                "stream": True,
                "logit_bias": {"2": -100},
            }
            with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as reply:
                received = reply.iter_lines()
                next(received)
                server.send_signal(signal.SIGTERM)
                rest = [line for line in received if line]
            assert rest[-1] == "data: [DONE]"
            logged = [json.loads(line) for line in lines]
            assert server.wait(30) == 0
        finally:
            server.kill()
    asked = [line for line in logged if line.get("path") == "/v1/chat/completions"]
    assert asked[0]["status"] == 200 and asked[0]["completion_tokens"] == 400


def test_the_command_refuses_to_be_open_by_accident(sheet_file, capfd):
    assert run(["serve", str(sheet_file), "--host", "0.0.0.0"]) == 2
    assert "--keys" in capfd.readouterr().err
    assert run(["serve", str(sheet_file), str(sheet_file), "--port", "0"]) == 1
    assert "Two sheets have the name 'staff'" in capfd.readouterr().err
    assert run(["serve", str(sheet_file.with_name("none.sheet"))]) == 1


@pytest.mark.parametrize("engine", [[], ["--engine", "llama.cpp", "--gguf", "none.gguf"]])
def test_a_port_that_is_taken_is_told_before_anything_is_loaded(engine, capfd):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert run(["serve", "none.sheet", "--port", str(port), *engine]) == 1
    told = capfd.readouterr().err
    assert f"(127.0.0.1, port {port}); give another --port" in told and "none." not in told


def test_of_two_that_load_at_once_the_later_is_told_too():
    with _bound("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with _bound("127.0.0.1", port) as second:  # which Linux allows as long as neither listens
            first.listen()
            with pytest.raises(OSError, match=f"port {port}.; give another --port"), _way_out("127.0.0.1", port):
                second.listen()


def test_many_callers_at_once_each_get_their_own_answer(live):
    wrong: list[str] = []

    def ask(number):
        body = {**LONG, "max_tokens": 12, "temperature": 1.0, "seed": number}
        text = live.post(**body).json()["choices"][0]["message"]["content"]
        if text != alone[number]:
            wrong.append(text)

    alone = {}
    for number in range(4):
        body = {**LONG, "max_tokens": 12, "temperature": 1.0, "seed": number}
        alone[number] = live.post(**body).json()["choices"][0]["message"]["content"]
    threads = [threading.Thread(target=ask, args=(number % 4,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [] and len(set(alone.values())) == 4
