"""`cribsheet serve --ray --replica-processes 2`: the processes that divide a model answer as one does.

Run by `make ray`.
"""

from __future__ import annotations

import concurrent.futures
import signal
import uuid

import httpx
import pytest
from live import STAFF
from processes import kill, marked, started, wait_until

from cribsheet import CompressedKnowledgeLLM
from cribsheet.testing import save_tiny_model

pytest.importorskip("ray")
pytestmark = pytest.mark.reliability

QUESTIONS = ["Where?", "Who lives in Oslo?", "What does Alice do, and where does she live?"]
FIELDS = [{}, {"n": 2, "temperature": 1.0, "seed": 3}, {"cribsheet": {"mode": "auto"}}]


def test_a_replica_of_two_processes_answers_as_one_does_and_is_replaced_when_one_is_killed(tmp_path):
    mark, model = uuid.uuid4().hex, save_tiny_model(tmp_path / "model")
    for name, rate in (("one", 2), ("two", 4)):
        with CompressedKnowledgeLLM.build(STAFF, "Where?", model=model, rate=rate, scorer="recent") as kb:
            kb.save(tmp_path / f"{name}.sheet")
    turns = [[{"role": "user", "content": question}] for question in QUESTIONS]
    bodies = [{"model": name, "messages": each, "max_tokens": 8, **fields}
              for name in ("one", "two") for each in turns for fields in FIELDS]  # fmt: skip

    def said(url, body):
        reply = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=120)
        assert reply.status_code == 200, reply.text
        return [choice["message"]["content"] for choice in reply.json()["choices"]]

    def all_said(url):
        with concurrent.futures.ThreadPoolExecutor(len(bodies)) as pool:
            return list(pool.map(lambda body: said(url, body), bodies))

    command = ["one.sheet", "two.sheet", "--port", "0"]
    with started(command, tmp_path, mark) as (_, url):
        alone = all_said(url)
    command += ["--ray", "--replicas", "1", "--replica-processes", "2", "--replica-cpus", "0.5", "--drain", "20"]
    with started(command, tmp_path, mark) as (server, url):
        assert len(marked(mark, "ray::_follow")) == 1
        assert all_said(url) == alone
        victim = kill(mark, "ray::_follow")
        assert said(url, bodies[0]) == alone[0]
        assert marked(mark, "ray::_follow") not in ([], [victim])  # another took its place
        server.send_signal(signal.SIGTERM)
        assert server.wait(90) == 0
    wait_until(lambda: not marked(mark))
