"""The page for people, in a real headless Chromium: `make page`.

`CHROMIUM` names the browser if it has an unusual place; `CRIBSHEET_SCREENSHOTS=folder` keeps pictures.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from browser import Browser, find
from live import random_sheet, says, serving

pytestmark = [
    pytest.mark.reliability,
    pytest.mark.skipif(find() is None, reason="no Chromium here: install one (apt-get install chromium)"),
]
KEY = "a-long-random-text-for-a-key"


@pytest.fixture(scope="module")
def browser():
    made = Browser(find())
    yield made
    made.close()


@pytest.fixture(scope="module")
def shown():
    with serving({"oslo": says("Bob <b>lives</b> in Oslo."), "noise": random_sheet()}) as live:
        yield live


def text(browser, place):
    return browser.run(f"document.getElementById('{place}').innerText")


def focus(browser):
    return browser.run("document.activeElement.id")


def opened(browser, live):
    browser.requests.clear(), browser.complaints.clear()
    browser.open(f"{live.url}/")
    browser.wait("document.getElementById('text').innerText.length > 20")


def test_a_question_is_asked_and_answered_with_sources_and_numbers(browser, shown):
    opened(browser, shown)
    assert "for: Where do people live?" in text(browser, "about")
    browser.run("document.getElementById('question').focus()")
    browser.type("Where does Bob live?")
    browser.press("Enter", 13, "\r")
    browser.wait("document.getElementById('numbers').innerText")
    assert text(browser, "answer") == "Bob <b>lives</b> in Oslo."  # as text, whatever it holds
    assert "tokens from the sheet" in text(browser, "numbers") and "ms" in text(browser, "numbers")
    browser.wait("document.querySelectorAll('#sources button').length > 0")
    browser.wait("document.querySelectorAll('#text mark').length > 0")
    source = browser.run("document.querySelector('#sources small').innerText")
    marks = browser.run("[...document.querySelectorAll('#text mark')].map(m => m.textContent).join('')")
    assert source.split() == marks.split()
    assert text(browser, "error") == ""
    if os.environ.get("CRIBSHEET_SCREENSHOTS"):
        browser.screenshot(Path(os.environ["CRIBSHEET_SCREENSHOTS"]) / "page.png")


def test_the_heat_map_shows_what_is_kept_and_can_be_put_out(browser, shown):
    opened(browser, shown)
    kept = browser.run("document.querySelectorAll('#text .heat').length")
    assert kept > 0
    colour = "getComputedStyle(document.querySelector('#text .heat')).backgroundColor"
    lit = browser.run(colour)
    browser.run("document.getElementById('heat').click()")
    assert browser.run(colour) != lit
    whole = browser.run("fetch('v1/sheets/oslo/documents/0').then(r => r.json()).then(d => d.text)")
    assert browser.run("document.getElementById('text').textContent") == whole


def test_everything_is_reached_and_done_by_keyboard(browser, shown):
    opened(browser, shown)
    browser.run("document.activeElement.blur(), window.getSelection().removeAllRanges()")
    reached = []
    for _ in range(9):
        browser.press("Tab", 9)
        reached.append(focus(browser))
    wanted = ["sheet", "question", "ask", "document", "heat", "text"]
    assert [name for name in reached if name in wanted] == wanted
    browser.run("document.getElementById('sheet').value = 'noise'")
    browser.run("document.getElementById('sheet').dispatchEvent(new Event('change'))")
    browser.run("document.getElementById('question').focus()")
    browser.type("Where?")
    browser.press("Enter", 13, "\n", shift=True)
    assert text(browser, "answer") == ""
    browser.press("Enter", 13, "\r")
    browser.wait("document.getElementById('answer').innerText.length > 10")
    browser.press("Escape", 27)
    browser.wait("!document.getElementById('ask').disabled")
    unnamed = "[...document.querySelectorAll('select, input, textarea')].filter(e => !e.labels.length).length"
    assert browser.run(unnamed) == 0


def test_nothing_comes_from_elsewhere_and_nothing_complains(browser, shown):
    opened(browser, shown)
    assert len(browser.requests) >= 5 and all(url.startswith(shown.url) for url in browser.requests)
    serious = [each for each in browser.complaints if each.get("entry", {}).get("level") != "verbose"]
    assert [each for each in serious if "favicon" not in str(each)] == []


def test_a_key_is_asked_for_where_one_is_needed(browser):
    with serving({"oslo": says("Bob lives in Oslo.")}, keys={"me": {"key": KEY}}) as live:
        browser.open(f"{live.url}/")
        browser.wait("!document.getElementById('key-field').hidden")
        browser.wait("document.getElementById('error').innerText.includes('API keys')")
        browser.run("document.getElementById('key').focus()")
        browser.type(KEY)
        browser.press("Enter", 13, "\r")
        browser.wait("document.getElementById('text').innerText.length > 20")
