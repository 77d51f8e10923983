"""Two hundred callers at once, leaving and reading slowly: nothing leaks, nobody gets another's answer."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import random
import resource
import threading
import time
from pathlib import Path

import httpx
import pytest
from live import random_sheet, says, serving

pytestmark = pytest.mark.reliability
KEYS = {"a": "key-of-a-" + "a" * 20, "b": "key-of-b-" + "b" * 20}
CANARIES = {"a": "Canary Alpha sits in Oslo.", "b": "Canary Bravo flies over Rome."}
QUESTIONS = ["Where?", "Who lives in Oslo?", "What does Alice do, and where does she live?", "Bob " * 50]
NEVER_END = {"2": -100}


def memory():
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def fields(dice, sheet):
    """One request of many kinds; the same seed gives the same answer, whoever else asks."""
    asked = {
        "model": sheet,
        "messages": [{"role": "user", "content": dice.choice(QUESTIONS)}],
        "max_tokens": dice.choice([4, 12, 30]),
        "temperature": dice.choice([0.0, 1.0]),
        "seed": dice.randrange(3),
    }
    if sheet == "noise":
        asked["logit_bias"] = NEVER_END
    return asked


async def text_of(client, body, key, *, stream, dice, leave, slow):
    """The answer's text; nothing if the caller left before its end."""
    headers = {"Authorization": f"Bearer {KEYS[key]}"}
    if not stream:
        asking = asyncio.ensure_future(client.post("/v1/chat/completions", json=body, headers=headers))
        if leave:
            await asyncio.sleep(dice.uniform(0, 0.5))
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            return None
        reply = await asking
        assert reply.status_code == 200, reply.text
        return reply.json()["choices"][0]["message"]["content"]
    pieces = []
    async with client.stream("POST", "/v1/chat/completions", json={**body, "stream": True}, headers=headers) as reply:
        assert reply.status_code == 200
        async for line in reply.aiter_lines():
            if line == "data: [DONE]":
                return "".join(pieces)
            if line:
                pieces.append(json.loads(line[6:])["choices"][0]["delta"].get("content") or "")
            if leave and dice.random() < 0.2:
                return None
            if slow:
                await asyncio.sleep(dice.uniform(0, 0.3))
    raise AssertionError("the stream had no end")


async def visit(live, seconds, clients, seed, alone):
    """Callers who come and go for a while; returns how many answers were complete, and how many left."""
    until, whole, left = time.monotonic() + seconds, 0, 0
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients // 2)
    async with httpx.AsyncClient(base_url=live.url, timeout=120, limits=limits) as client:

        async def caller(number):
            nonlocal whole, left
            dice = random.Random(f"{seed} {number}")
            key = dice.choice(list(KEYS))
            while time.monotonic() < until:
                body = fields(dice, dice.choice([key, "noise"]))
                how = {"stream": dice.random() < 0.6, "leave": dice.random() < 0.3, "slow": dice.random() < 0.2}
                text = await text_of(client, body, key, dice=dice, **how)
                if text is None:
                    left += 1
                    continue
                whole += 1
                expected = CANARIES[key] if body["model"] == key else alone.setdefault(json.dumps(body), text)
                if body["model"] == key:  # max_tokens may cut it
                    assert expected.startswith(text) and text
                else:
                    assert text == expected
                assert not any(CANARIES[other].split()[1] in text for other in KEYS if other != key)

        await asyncio.gather(*(caller(number) for number in range(clients)))
    return whole, left


def test_a_crowd_leaves_nothing_behind_and_mixes_nothing_up(times):
    seed = os.environ.get("CRIBSHEET_SEED", "0")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    keys = {name: {"key": key, "sheets": [name, "noise"]} for name, key in KEYS.items()}
    sheets = {**{name: says(text) for name, text in CANARIES.items()}, "noise": random_sheet()}
    with serving(sheets, keys=keys, max_answers=1000, max_answers_per_caller=500) as live:
        service = live.app.state.service
        http = live.http(headers={"Authorization": f"Bearer {KEYS['a']}"})

        def at_rest():
            sessions = [served.kb.session for served in service.shelf.values()]
            engines = {id(session.loaded): session.loaded.engine for session in sessions}
            idle = all(not engine._started() and not engine._waiting for engine in engines.values())
            return idle and service.gate.in_flight == 0

        alone = {}
        asyncio.run(visit(live, 15, 20, f"{seed} warm", alone))
        asyncio.run(visit(live, 15, 200, f"{seed} warmer", alone))
        while not at_rest():
            time.sleep(0.1)
        time.sleep(2)
        memory_before, threads_before = memory(), threading.active_count()
        whole, left = asyncio.run(visit(live, times(180), 200, seed, alone))
        until = time.monotonic() + 60
        while not at_rest():
            assert time.monotonic() < until
            time.sleep(0.1)
        time.sleep(2)
        grown = memory() - memory_before
        logging.getLogger(__name__).warning(
            "%s", f"{whole} answers, {left} left; memory grew by {grown / 1e6:.1f} MB; {len(alone)} kinds of answers"
        )
        assert whole > 20 and left > 5
        assert threading.active_count() <= threads_before + 1, [each.name for each in threading.enumerate()]
        assert grown < 40e6
        for body, text in list(alone.items())[:: max(1, len(alone) // 40)]:  # and each is what it is alone
            reply = http.post("/v1/chat/completions", json=json.loads(body))
            assert reply.json()["choices"][0]["message"]["content"] == text
