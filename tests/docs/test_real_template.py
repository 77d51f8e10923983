"""The pages run with a model whose chat template is a real one: its preamble is as long as what some pages condense.

Only what is refused is looked at: the model here is small, random and answers noise. The pages run in one process of
their own, where "pocket" stands for that model.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from blocks import Session, run_page
from test_docs import ROOT, RUN
from transformers import AutoModelForCausalLM, AutoTokenizer

import cribsheet_pocket
from cribsheet.corpus.task import Task
from cribsheet.prompt.template import ChatLayout
from cribsheet.testing import tiny_config

TEMPLATE = ROOT / "tests" / "data" / "chat_templates" / "qwen2.5-instruct.jinja"
LEAST = 29  # tokens of the preamble with that model's own tokenizer; the pocket's needs a few more
PAGES = [page for page in RUN if page.parent.name == "how-to"]


def with_a_real_template(folder):
    """A model folder with the pocket model's tokenizer, and the real template."""
    tokenizer = AutoTokenizer.from_pretrained(cribsheet_pocket.path())
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = TEMPLATE.read_text(encoding="utf-8")
    layout = ChatLayout(tokenizer)
    assert len(layout.encoder.left(layout.preamble(Task.of(None).instruction))[0]) >= LEAST
    torch.manual_seed(0)  # noise, but the same every time
    config = tiny_config("llama", vocab_size=len(tokenizer), max_position_embeddings=16384)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def refused(tmp_path_factory):
    """What each page was refused."""
    model = with_a_real_template(tmp_path_factory.mktemp("real") / "model")
    places = {str(page): str(tmp_path_factory.mktemp("page")) for page in PAGES}
    given = json.dumps({"model": str(model), "places": places})
    done = subprocess.run([sys.executable, __file__], input=given, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("page", PAGES, ids=[page.stem for page in PAGES])
def test_nothing_on_a_page_is_refused_for_the_length_of_a_template(refused, page):
    assert refused[str(page)] == []


def run_one(page, place):
    """The steps of a page whose budget was refused, unless the page shows that."""
    steps = []
    try:
        for _, some in run_page(page.read_text(encoding="utf-8"), Session(place)):
            steps += some
    except AssertionError:  # of an example that judges what the model says
        assert steps
    return [
        (each.source, each.printed)
        for each in steps
        if "The budget" in each.printed and "The budget" not in each.wanted
    ]


if __name__ == "__main__":
    given = json.load(sys.stdin)
    cribsheet_pocket.path = lambda: Path(given["model"])
    asyncio.set_event_loop(asyncio.new_event_loop())
    found = {page: run_one(Path(page), Path(place)) for page, place in given["places"].items()}
    sys.stdout.write("\n" + json.dumps(found) + "\n")
