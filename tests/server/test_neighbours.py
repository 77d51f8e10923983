"""No caller stops the others: whatever is sent costs little, counted in work that is done, not in seconds."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace

import httpx
import pytest
import torch
from live import STAFF, random_sheet, says, serving
from torch.utils._python_dispatch import TorchDispatchMode

from cribsheet import CompressedKnowledgeLLM
from cribsheet.engine.sampling import Sampler, SamplingParams
from cribsheet.errors import RequestError
from cribsheet.prompt.turns import as_turns
from cribsheet.server import Shelf, create_app
from cribsheet.server.auth import Keyring
from cribsheet.server.connections import Connection
from cribsheet.server.errors import Refusal
from cribsheet.server.openai import catalogue
from cribsheet.server.openai.json_body import MAX_VALUES, strict_json
from cribsheet.server.telemetry.metrics import Gauge
from cribsheet.structured.grammar import Constraint, Grammar
from cribsheet.structured.grammar_tokens import GrammarTokens
from cribsheet.structured.tools import CallReader, Tool, Toolbox, closed
from cribsheet.testing import tiny_backbone

ASK = {"model": "oslo", "messages": [{"role": "user", "content": "Where?"}]}
CHAT, PROMPTS = "/v1/chat/completions", "/v1/completions"
MANY = 18_000  # within what a body may hold in all


class Work:
    """Calls that this thread makes; one that looks through a list counts as often as the list is long."""

    def __init__(self):
        self.done = 0

    def _note(self, frame, event, called):
        if event == "call":
            self.done += 1
        elif event == "c_call":
            owner = getattr(called, "__self__", None)
            looks = isinstance(owner, list) and called.__name__ in ("count", "index", "remove")
            self.done += len(owner) if looks else 1

    def __enter__(self):
        sys.setprofile(self._note)
        return self

    def __exit__(self, *error):
        sys.setprofile(None)


@pytest.fixture(scope="module")
def app():
    made = create_app(Shelf({"oslo": says("Bob lives in Oslo.")}))
    post(made, b"")  # the first request puts the app together
    yield made
    made.state.service.close()


def post(app, body, path=CHAT, headers=()):
    """Status, reply, the work in this thread and how often the body was read, by the app alone."""
    sent, reads = [], 0

    async def receive():
        nonlocal reads
        reads += 1
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"",
             "headers": [(b"host", b"x"), (b"content-type", b"application/json"), *headers], "http_version": "1.1",
             "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2), "scheme": "http", "root_path": ""}  # fmt: skip

    async def ask():
        with Work() as work:
            await app(scope, receive, send)
        return work.done

    done = asyncio.run(ask())
    text = b"".join(each.get("body", b"") for each in sent)
    return sent[0]["status"], json.loads(text)["error"], done, reads


def ones(name, path=CHAT, **fields):
    return path, {**ASK, **fields, name: [1] * MANY}


def in_turn(**fields):
    return CHAT, {**ASK, "messages": [{"role": "assistant", "content": "x", **fields}, *ASK["messages"]]}


def names(value=1):
    return {f"name{n}": value for n in range(MANY)}


SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}
FAULTY = {
    "messages": ones("messages"),
    "tools": ones("tools"),
    "stop": ones("stop"),
    "modalities": ones("modalities"),
    "prompt": (PROMPTS, {"model": "oslo", "prompt": [1] * MANY}),
    "content": in_turn(content=[1] * MANY),
    "tool calls": in_turn(tool_calls=[1] * MANY),
    "unknown fields": (CHAT, {**ASK, **names()}),
    "unknown fields of a turn": in_turn(**names()),
    "unknown fields of many turns": (CHAT, {**ASK, "messages": [{f"n{n}": 1 for n in range(60)}] * 290}),
    "unknown fields of a form": (CHAT, {**ASK, "response_format": {**SCHEMA, **names()}}),
    "unknown fields of the extension": (CHAT, {**ASK, "cribsheet": names()}),
    "logit_bias": (CHAT, {**ASK, "logit_bias": names()}),
    "fewer biases": (CHAT, {**ASK, "logit_bias": {f"name{n}": 1 for n in range(1000)}}),
    "metadata": (CHAT, {**ASK, "metadata": names()}),
    "tool_choice": (CHAT, {**ASK, "tool_choice": names()}),
    "tool_choice's function": (CHAT, {**ASK, "tool_choice": {"type": "function", "function": names()}}),
    "response_format": (CHAT, {**ASK, "response_format": names()}),
    "parts of many turns": (CHAT, {**ASK, "messages": [{"role": "user", "content": [1] * 1000}] * 17}),
    "calls of many turns": (CHAT, {**ASK, "messages": [{"role": "user", "tool_calls": [1] * 100}] * 170}),
}


@pytest.mark.parametrize("kind", FAULTY)
def test_the_first_fault_of_a_list_or_mapping_ends_it(app, kind):
    path, body = FAULTY[kind]
    status, error, work, _ = post(app, json.dumps(body).encode(), path)
    assert status == 400 and (error["param"] or "18002 fields" in error["message"]) and len(error["message"]) < 1100
    assert work < 6_000, work  # of 18,000 faults


@pytest.mark.parametrize(
    "body",
    [
        b'{"messages": [' + b"1, " * 600_000 + b"1]}",
        b'{"messages": [' + b"{}, " * 400_000 + b"1]}",
        b'{"messages": [' + b'"", ' * 400_000 + b"1]}",
        b"{" + b", ".join(b'"n%d": 1' % n for n in range(100_000)) + b"}",
        b'{"a": ' * 100_000 + b"1" + b"}" * 100_000,
        b"[" * 1_000_000,
        b"[" * 5000 + b"]" * 5000,
        b'{"model": "' + b'\\"' * 900_000,
        b'{"model": "' + b'\\"' * 900_000 + b"\\",
        '{"model": "a", "messages": []}'.encode("utf-16"),
    ],
)
def test_a_body_of_too_much_is_refused_before_anything_is_made_of_it(app, body):
    status, error, work, _ = post(app, body)
    assert status == 400 and error["message"]
    assert work < 30_000, work


def test_a_name_that_is_given_twice_is_found_in_one_pass():
    many = 5_000
    body = b"{" + b", ".join(b'"n%d": 1' % n for n in range(many)) + b', "n4999": 1}'
    with Work() as work, pytest.raises(Refusal) as refused:
        strict_json(body)
    assert refused.value.detail.param == "n4999"
    assert work.done < 3 * many, work.done  # 25 million when each name was counted among all


def test_what_an_honest_client_sends_fits():
    function = {
        "name": "f",
        "parameters": {"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(30)}},
    }
    turns = [{"role": "user", "content": [{"type": "text", "text": "a, [b], {c}, " * 500}]}] * 1500
    body = {**ASK, "messages": turns, "tools": [{"type": "function", "function": function}] * 60}
    assert strict_json(json.dumps(body).encode()) == body
    long = {**ASK, "messages": [{"role": "user", "content": '"\\\n,[{' * 200_000}]}
    assert strict_json(json.dumps(long).encode()) == long
    assert strict_json(b"[" + b"1," * (MAX_VALUES - 2) + b"1]")[0] == 1
    with pytest.raises(Refusal, match=str(MAX_VALUES)):
        strict_json(b"[" + b"1," * MAX_VALUES + b"1]")


def test_who_has_no_key_is_refused_before_the_body_is_read():
    keys = Keyring.of({"a": {"key": "k" * 20}})
    app = create_app(Shelf({"oslo": says("Bob lives in Oslo.")}), keys=keys)
    post(app, b"")
    body = b'{"messages": [' + b"1, " * 600_000 + b"1]}"
    for headers in ((), [(b"authorization", b"Bearer " + b"x" * 20)]):
        status, error, work, reads = post(app, body, headers=headers)
        assert (status, error["code"], reads) == (401, "invalid_api_key", 0) and work < 3_000
    assert post(app, body, headers=[(b"authorization", b"Bearer " + b"k" * 20)])[0] == 400
    app.state.service.close()


class Operations(TorchDispatchMode):
    """Counts operations on tensors."""

    def __init__(self):
        super().__init__()
        self.done = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.done += 1
        return function(*args, **(kwargs or {}))


def test_biases_are_one_operation_however_many_they_are():
    logits = torch.randn(9000)
    biases = {number: float(number % 7 - 3) for number in range(8192)}
    sampler = Sampler(SamplingParams(logit_bias=biases))
    with Operations() as operations, Work() as work:
        _, logprobs = sampler.pick(logits)
    assert operations.done < 20 and work.done < 1000, (operations.done, work.done)
    expected = logits.clone()
    for token, bias in biases.items():
        expected[token] += bias
    assert torch.equal(logprobs, expected.log_softmax(-1))


@pytest.mark.parametrize("token", [2**31, pytest.param(10**5000, id="long"), "9" * 30, "9" * 5000, -1, "x", "1.5"])
def test_a_bias_of_what_is_no_token_is_refused(token):
    with pytest.raises(RequestError, match="logit_bias names"):
        SamplingParams(logit_bias={token: 1.0})


@pytest.mark.parametrize(
    "settings", [{}, {"json_schema": {"type": "object", "properties": {"a": {"type": "integer"}}}}]
)
def test_many_answers_to_one_question_are_prepared_once(settings):
    kb = CompressedKnowledgeLLM.build(STAFF, "Where?", model=tiny_backbone(), rate=2, scorer="recent")
    question = [{"role": "user", "content": f"Who lives in number {n}?"} for n in range(20)]

    def work(n):
        with Work() as counted:
            kb.session.prepare(question, {"max_tokens": 20, **settings}, n)
        return counted.done

    work(1)
    assert work(64) < 6 * work(1)
    with kb:
        same = kb.ask_many("Where?", 3, max_tokens=20, temperature=1.0, seed=5, **settings)
        assert [str(each) for each in same] == [
            str(kb.ask("Where?", max_tokens=20, temperature=1.0, seed=5 + n, **settings)) for n in range(3)
        ]


def test_a_way_out_is_looked_for_within_a_bound():
    backbone = tiny_backbone()
    tokens = GrammarTokens.of(backbone.tokenizer, backbone.eos_ids, backbone.config.vocab_size)
    endless = Grammar.json_schema({"type": "array", "items": {"type": "integer"}, "minItems": 10**6})
    tried = 0

    def note(frame, event, called):
        nonlocal tried
        tried += event == "call" and frame.f_code.co_name == "_first"

    sys.setprofile(note)
    try:
        with pytest.raises(RequestError, match="max_tokens=3000"):
            Constraint(endless, tokens, 3000)
    finally:
        sys.setprofile(None)
    assert tried < 4_200, tried


PATTERNS = [{"type": "string", "pattern": f".*a.{{{n}}}b"} for n in range(1, 30)]
CHAINED = {f"d{n}": {"pattern": f".*a.{{{n}}}b", "$ref": f"#/$defs/d{n + 1}"} for n in range(1, 30)}


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ({"allOf": PATTERNS}, "29 patterns"),
        ({"type": "object", "properties": {"a": {"anyOf": [{"type": "null"}, {"allOf": PATTERNS}]}}}, "29 patterns"),
        ({"$defs": CHAINED, "type": "string", "$ref": "#/$defs/d1"}, "29 patterns"),
        ({"anyOf": [{"const": n} for n in range(3000)]}, "2000 parts"),
        ({"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(3000)}}, "2000 parts"),
    ],
)
def test_a_schema_whose_compilation_has_no_end_is_refused(live, schema, says):
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    error = live.post(**ASK, response_format=form).json()["error"]
    assert error["param"] == "response_format" and says in error["message"]
    tool = {
        "type": "function",
        "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": schema}}},
    }
    error = live.post(**ASK, tools=[tool], tool_choice="required").json()["error"]
    if "$defs" not in schema:  # whose references are to the whole schema
        assert error["param"] == "tool_choice" and says in error["message"]


def test_schemas_of_every_day_are_taken(live):
    person = {
        "type": "object",
        "properties": {f"p{n}": {"type": "string", "format": "date", "pattern": "^2"} for n in range(40)},
    }
    schema = {"$defs": {"p": person}, "type": "object", "properties": {"a": {"allOf": [{"$ref": "#/$defs/p"}]}}}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    listed = {
        "type": "json_schema",
        "json_schema": {"name": "x", "schema": {"enum": [f"value {n}" for n in range(2000)]}},
    }
    for each in (form, listed):
        assert json.loads(live.post(**ASK, response_format=each).json()["choices"][0]["message"]["content"]) is not None


async def test_a_plain_question_goes_past_forms_that_take_long(live):
    slow = {"type": "array", "items": {"type": "integer"}, "minItems": 10**6}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": slow}}
    ended = []
    async with httpx.AsyncClient(base_url=live.url, timeout=60) as client:

        async def ask(name, **fields):
            reply = await client.post(CHAT, json={**ASK, **fields})
            ended.append((name, reply.status_code))

        forms = [asyncio.create_task(ask("form", response_format=form, max_tokens=900)) for _ in range(6)]
        await asyncio.sleep(0.05)
        await ask("plain")
        await asyncio.gather(*forms)
    assert ("plain", 200) in ended[:3] and ended.count(("form", 400)) == 6


DEEP = "[" * 100_000


def call(arguments):
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": arguments}}],
    }


@pytest.mark.parametrize("arguments", [DEEP, '{"a": ' * 100_000, DEEP + "]" * 100_000, '{"a": ' + DEEP])
def test_brackets_without_end_in_a_call_are_the_callers_fault(live, arguments):
    reply = live.post(**{**ASK, "messages": [call(arguments), *ASK["messages"]]})
    error = reply.json()["error"]
    assert (reply.status_code, error["param"]) == (400, "messages") and len(error["message"]) < 300
    with pytest.raises(RequestError, match="nested too deeply"):
        as_turns([call(arguments), *ASK["messages"]])


def nested(levels):
    schema = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


@pytest.mark.parametrize("levels", [200, 5000])
def test_a_schema_that_is_nested_too_deeply_is_refused(levels):
    for make in (Grammar.json_schema, lambda schema: Grammar.json_schema(closed(schema))):
        with pytest.raises(RequestError):
            make(nested(levels))
    with pytest.raises(RequestError):
        Grammar.json_schema('{"a":' * levels)
    with pytest.raises(RequestError):
        str(Toolbox.of([Tool("f", parameters=nested(5000))]))


@pytest.mark.parametrize(
    "text", [DEEP, f"<tool_call>{DEEP}", f'<tool_call>{{"name": "f", "arguments": {DEEP}</tool_call>']
)
def test_brackets_without_end_in_an_answer_are_text(text):
    reader = CallReader(Toolbox.of([Tool("f")]))
    assert reader.push(text) + reader.finish() == text and reader.calls == ()


def test_blanks_in_an_answer_are_passed_once():
    reader = CallReader(Toolbox.of([Tool("f")]))
    text = "<tool_call>" + " " * 300_000 + "x"
    began = time.perf_counter()
    reader.push(text)
    reader.finish()
    assert time.perf_counter() - began < 5  # minutes when each blank began a new search


def test_a_number_beyond_all_floats_takes_the_metrics_from_nobody():
    gauge = Gauge(
        "length", "Lengths.", lambda: {(("sheet", "a"),): 10**400, (("sheet", "b"),): 7, (("sheet", "c"),): -(10**400)}
    )
    assert [*gauge.lines()] == ['length{sheet="a"} +Inf', 'length{sheet="b"} 7', 'length{sheet="c"} -Inf']
    sheets = {"oslo": says("Bob lives in Oslo."), "huge": random_sheet()}
    sheet = sheets["huge"].sheet
    manifest = sheet.manifest.model_copy(update={"budget": 10**400, "created": "0001-01-01T00:00:00"})
    huge = sheets["huge"]
    huge.session = huge.session.over(replace(sheet, manifest=manifest))
    with serving(sheets) as live:
        http = live.http()
        assert 'sheet="oslo"' in http.get("/metrics").text and "+Inf" in http.get("/metrics").text
        assert {each["id"] for each in http.get("/v1/models").json()["data"]} == {"oslo", "huge"}


def test_a_refusal_shows_only_so_much_of_what_was_sent(live):
    long = "x" * 500_000
    for fields in ({"model": long}, {long: 1}, {"logit_bias": {long: 1}}, {"messages": [call(long), *ASK["messages"]]}):
        reply = live.post(**{**ASK, **fields})
        assert reply.status_code in (400, 404) and len(reply.content) < 5000


GREEDY = """
import contextlib, importlib, pkgutil, sys
import torch, cribsheet
from cribsheet import Document
from cribsheet.retrieval.retriever import BM25Retriever
left = {"ray", "bench", "__main__", "langchain", "llama_index"}
for found in pkgutil.walk_packages(cribsheet.__path__, "cribsheet."):
    if not left & set(found.name.split(".")):
        with contextlib.suppress(ModuleNotFoundError):  # triton is not everywhere
            importlib.import_module(found.name)
assert BM25Retriever([Document("Bob lives in Oslo.", "bob")]).retrieve("Oslo?")[0].document_id == "bob"
assert not torch.cuda.is_initialized()
print(*sorted({"jax", "tensorflow", "cupy"} & set(sys.modules)))
"""


def test_nothing_that_is_imported_takes_a_gpu(tmp_path):
    """Libraries that take one stand in the way of every import; whoever imports them has them among its modules."""
    for name in ("jax", "tensorflow", "cupy"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("__version__ = '9.9'\n")
    (tmp_path / "jax" / "lax.py").write_text("def top_k(values, k):\n    return values[:k], range(k)\n")
    path = ":".join([str(tmp_path), *(each for each in sys.path if each)])
    done = subprocess.run(
        [sys.executable, "-c", GREEDY], env={"PYTHONPATH": path, "PATH": ""}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""


@pytest.fixture
def hurried(live, monkeypatch):
    monkeypatch.setattr(Connection, "header_seconds", 0.4)
    host, port = live.url.removeprefix("http://").split(":")
    return live, (host, int(port))


def is_closed(raw, seconds):
    raw.settimeout(seconds)
    try:
        while raw.recv(65536):
            pass
    except TimeoutError:
        return False
    except ConnectionError:
        pass
    return True


WHOLE = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
HALVES = {
    "nothing": [],
    "half a header": [b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nX-"],
    "half after an answer": [WHOLE, b"GET /hea"],
    "half behind a whole": [WHOLE + b"GET /hea"],
    "an unread body": [b"POST /nowhere HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n{"],
}


@pytest.mark.parametrize("kind", HALVES)
def test_half_a_header_is_not_waited_for(hurried, kind):
    _, address = hurried
    with contextlib.ExitStack() as opened:
        raws = []
        for _ in range(20):
            raws.append(opened.enter_context(socket.create_connection(address)))
            for piece in HALVES[kind]:
                raws[-1].sendall(piece)
                time.sleep(0.02)
        assert all(is_closed(raw, 3) for raw in raws)


@pytest.mark.parametrize("before", [b"", WHOLE])
def test_a_header_that_trickles_in_is_not_waited_for_either(hurried, before):
    _, address = hurried
    with socket.create_connection(address) as raw:
        raw.sendall(before + b"GET /health HTTP/1.1\r\n")
        with pytest.raises(OSError):
            for _ in range(40):
                raw.sendall(b"X: y\r\n")
                time.sleep(0.05)


def test_an_answer_may_take_longer_than_a_header(hurried):
    live, address = hurried
    http = live.http()
    asked = {"model": "noise", "messages": ASK["messages"], "max_tokens": 300, "stream": True}
    lines = []
    with http.stream("POST", CHAT, json=asked) as reply:
        for line in reply.iter_lines():
            lines.append(line)
            time.sleep(0.003)
    assert lines[-2] == "data: [DONE]"
    assert [http.get("/health").status_code for _ in range(5)] == [200] * 5
    with socket.create_connection(address) as raw:
        raw.sendall(WHOLE * 3)
        time.sleep(0.3)
        assert raw.recv(65536).count(b"HTTP/1.1 200") == 3


def in_chunks(address, body):
    """What comes back for a body of which each byte is a chunk."""
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    chunks = b"".join(b"1\r\n%c\r\n" % each for each in body) + b"0\r\n\r\n"
    reply = b""
    with socket.create_connection(address) as raw, contextlib.suppress(OSError):
        raw.sendall(head + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks)
        while piece := raw.recv(65536):
            reply += piece
    return reply


def test_a_body_in_very_many_chunks_is_refused(live):
    host, port = live.url.removeprefix("http://").split(":")
    body = json.dumps(ASK).encode()
    assert in_chunks((host, int(port)), body).startswith(b"HTTP/1.1 200")
    reply = in_chunks((host, int(port)), body + b" " * 12_000)
    assert not reply or b"10000 chunks" in reply  # which may be lost to whoever still sends
    assert live.http().get("/health").status_code == 200


@pytest.mark.parametrize("busy", ["long", "form"])
def test_a_plain_question_goes_past_what_is_long(busy):
    """One lane is held up, and questions of the other lanes are answered meanwhile."""
    free, asked = threading.Event(), []
    long = {**ASK, "messages": [{"role": "user", "content": "Where? " * 10_000}]}
    with serving({"oslo": says("Bob lives in Oslo.")}) as server, contextlib.ExitStack() as after:
        service = server.app.state.service
        after.callback(free.set)
        for lane, threads in service._threads.items():
            threads.submit(free.wait) if lane == busy else None
        asking = threading.Thread(target=lambda: asked.append(server.post(**long).status_code))
        asking.start()
        assert server.post(**ASK).status_code == 200
        if busy == "form":
            asking.join()
        assert asked == ([400] if busy == "form" else [])  # too long for the window, once it is read
        free.set()
        asking.join()
    assert asked == [400]


def test_what_a_sheet_holds_is_not_written_in_the_event_loop(monkeypatch):
    places = []
    for name in ("details", "document"):
        made = getattr(catalogue, name)

        def noted(*args, _made=made, **options):
            places.append(threading.current_thread())
            return _made(*args, **options)

        monkeypatch.setattr(catalogue, name, noted)
    with serving({"oslo": says("Bob lives in Oslo.")}) as server, server.http() as http:
        for path in ("/v1/sheets/oslo", "/v1/sheets/oslo/documents/1", "/v1/sheets/oslo/documents/7"):
            assert http.get(path).status_code == (404 if path.endswith("7") else 200)
    assert len(places) == 3 and all(each.name.startswith("cribsheet-service-long") for each in places)


def test_references_to_references_are_refused_as_what_is_nested_too_deeply(live):
    chain = {f"d{n}": {"$ref": f"#/$defs/d{n + 1}"} for n in range(1900)}
    schema = {"$ref": "#/$defs/d0", "$defs": {**chain, "d1900": {"type": "string"}}}
    reply = live.post(**ASK, response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}})
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["param"] == "response_format" and "too deeply" in reply.json()["error"]["message"]
