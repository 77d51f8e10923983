"""`cribsheet serve --ray` with two replicas: the same contract, and clients who recover. Run by `make ray`."""

from __future__ import annotations

import concurrent.futures
import re
import signal
import uuid

import httpx
import pytest
from live import STAFF, serving
from processes import kill, marked, started, wait_until

from cribsheet import CompressedKnowledgeLLM
from cribsheet.testing import save_tiny_model

pytest.importorskip("ray")
pytestmark = pytest.mark.reliability

KEY = "a-long-key-for-everything"
REPLICA = "ray::ServeReplica:cribsheet:replicas"
TURN = [{"role": "user", "content": "Where?"}]


@pytest.fixture(scope="module")
def sheets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sheets")
    model = save_tiny_model(folder / "model")
    for name, rate in (("one", 2), ("two", 4), ("three", 3)):
        kb = CompressedKnowledgeLLM.build(STAFF, "Where do people live?", model=model, rate=rate, scorer="recent")
        kb.save(folder / f"{name}.sheet")
        kb.close()
    (folder / "keys.toml").write_text(f'[all]\nkey = "{KEY}"\n')
    return folder


@pytest.fixture(scope="module")
def mark():
    return uuid.uuid4().hex


@pytest.fixture(scope="module")
def url(sheets, mark):
    command = ["one.sheet", "two.sheet", "three.sheet", "--port", "0", "--ray", "--replicas", "2"]
    with started([*command, "--open-sheets", "1", "--keys", "keys.toml", "--drain", "20"], sheets, mark) as each:
        server, address = each
        yield address
        server.send_signal(signal.SIGTERM)
        assert server.wait(90) == 0
    wait_until(lambda: not marked(mark))


@pytest.fixture
def http(url):
    with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {KEY}"}, timeout=120) as client:
        yield client


@pytest.fixture(scope="module")
def alone(sheets):
    """A single server over the same sheets."""
    keys = {"all": {"key": KEY}}
    opened = {name: CompressedKnowledgeLLM.load(sheets / f"{name}.sheet") for name in ("one", "two", "three")}
    with serving(opened, keys=keys) as live:
        yield live


def without_chance(reply):
    """Status, kind, and text without ids and times; numbers to three places, as processes add in other orders."""
    text = re.sub(r'"(id|created)":\s*("[^"]*"|\d+)', "", reply.text)
    text = re.sub(r"-?\d+\.\d{4,}", lambda found: f"{float(found[0]):.3f}", text)
    return reply.status_code, reply.headers["content-type"], text


def asked(**fields):
    return {"model": "one", "messages": TURN, "max_tokens": 6, **fields}


REQUESTS = [
    ("POST", "/v1/chat/completions", asked()),
    ("POST", "/v1/chat/completions", asked(model="two", n=2, seed=3, temperature=1.0, logprobs=True)),
    ("POST", "/v1/chat/completions", asked(model="three", stream=True, stream_options={"include_usage": True})),
    ("POST", "/v1/chat/completions", asked(cribsheet={"sources": 2})),
    ("POST", "/v1/chat/completions", asked(model="nowhere")),
    ("POST", "/v1/chat/completions", asked(nonsense=1)),
    ("POST", "/v1/chat/completions", {"model": ["one"]}),
    ("POST", "/v1/completions", {"model": "two", "prompt": ["a", "b"], "max_tokens": 4}),
    ("GET", "/v1/models", None),
    ("GET", "/v1/models/two", None),
    ("GET", "/v1/sheets/three", None),
    ("GET", "/v1/sheets/one/documents/1", None),
    ("GET", "/v1/sheets/none", None),
    ("GET", "/health", None),
    ("GET", "/openapi.json", None),
    ("GET", "/", None),
    ("GET", "/nowhere", None),
    ("PUT", "/v1/models", None),
]


@pytest.mark.parametrize("number", range(len(REQUESTS)))
def test_it_answers_as_a_single_server_does(number, http, alone):
    method, path, body = REQUESTS[number]
    reply = http.request(method, path, json=body)
    with alone.http(headers={"Authorization": f"Bearer {KEY}"}) as single:
        assert without_chance(reply) == without_chance(single.request(method, path, json=body))
    assert len(reply.headers.get_list("x-request-id")) == 1


def test_without_a_key_nothing_is_told(url):
    for key in ("", "wrong-" + "x" * 20):
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        for path in ("/v1/models", "/v1/sheets/one", "/metrics"):
            assert httpx.get(url + path, headers=headers).status_code == 401


def test_large_bodies_are_refused(http):
    assert http.post("/v1/chat/completions", content=b"x" * 2_100_000).status_code == 413


def test_limits_hold_for_all_replicas_together(http):
    """64 answers of one caller at once, whichever replica writes them; refused in the words of a single server."""
    many = asked(n=40, max_tokens=3000, logit_bias={"2": -100}, stream=True)
    with http.stream("POST", "/v1/chat/completions", json=many) as reply:
        lines = reply.iter_lines()  # httpx closes the connection with it
        next(lines)
        refused = [http.post("/v1/chat/completions", json=asked(n=25)) for _ in range(4)]
        prompts = http.post("/v1/completions", json={"model": "two", "prompt": ["a"] * 25, "max_tokens": 1})
        for each in (*refused, prompts):
            assert each.status_code == 429 and int(each.headers["retry-after"]) >= 1
            assert each.json()["error"]["code"] == "rate_limit_exceeded"
        assert http.post("/v1/chat/completions", json=asked(n=2)).status_code == 200
    wait_until(lambda: http.post("/v1/chat/completions", json=asked(n=25)).status_code == 200, 30)
    assert http.post("/v1/chat/completions", json=asked(n=65)).json()["error"]["param"] == "n"
    assert 'cribsheet_requests_total{route="front",sheet="",status="429"} 5' in http.get("/metrics").text


def test_metrics_are_those_of_all_replicas(http):
    def count():
        found = re.search(r'requests_total\{route="/health",sheet="",status="200"\} (\d+)', http.get("/metrics").text)
        return int(found[1]) if found else 0

    before = count()
    for _ in range(20):
        http.get("/health")
    assert count() == before + 20
    assert "cribsheet_sheet_tokens{" in http.get("/metrics").text


def test_a_caller_who_leaves_frees_the_engine(http):
    long = asked(max_tokens=3000, logit_bias={"2": -100}, stream=True)
    with http.stream("POST", "/v1/chat/completions", json=long) as reply:
        next(reply.iter_lines())
    wait_until(lambda: "cribsheet_answers_in_flight 0" in http.get("/metrics").text, 30)


def test_clients_recover_from_a_replica_that_is_killed(http, mark):
    """Whole answers come as if nothing had happened; streams are whole, or end with an error and may be asked again."""
    long = asked(max_tokens=300, logit_bias={"2": -100})
    whole = http.post("/v1/chat/completions", json=long).json()["choices"][0]["message"]["content"]

    def ask(number):
        if number % 2:
            return http.post("/v1/chat/completions", json=long).json()["choices"][0]["message"]["content"] == whole
        return http.post("/v1/chat/completions", json={**long, "stream": True}).text

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        running = [pool.submit(ask, number) for number in range(16)]
        victim = kill(mark, REPLICA)
        found = [each.result() for each in running]
    assert all(found[1::2])
    ends = [text.strip().splitlines()[-1] for text in found[::2]]
    assert all(end == "data: [DONE]" or "died" in end for end in ends), ends
    assert ask(1)
    wait_until(lambda: len(set(marked(mark, REPLICA)) - {victim}) == 2)  # another took its place
    assert all(ask(1) for _ in range(6))
