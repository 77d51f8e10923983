"""One model over two processes: the sheet and its answers are those of one process. Run by `make ray`."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from processes import environment

from cribsheet.testing import save_tiny_model

pytest.importorskip("accelerate")
pytestmark = pytest.mark.reliability

_SCRIPT = """
import json, sys
import torch
import torch.distributed as dist
torch.set_num_threads(1)
from cribsheet import CompressedKnowledgeLLM
from cribsheet.model.divided import divided
model, folder, mode, scorer = sys.argv[1:]
dist.init_process_group("gloo")
texts = [{"id": name, "text": f"{name} lives in {place}. " * 25} for name, place in (("Ann", "Oslo"), ("Bob", "Rome"))]
options = {"rate": 3, "mode": mode, "scorer": scorer}
here = CompressedKnowledgeLLM.build(texts, "Who lives where?", model=model, **options)
both = CompressedKnowledgeLLM.build(texts, "Who lives where?", model=divided(model), **options)
weight = both.backbone.model.base_model.layers[0].mlp.up_proj.weight
assert weight.to_local().shape[0] * 2 == weight.shape[0]
def said(kb):
    sampled = {"seed": 5, "temperature": 1.0}
    return [
        *(kb.ask(q, max_tokens=12).text for q in ("Who?", "Where does Ann live?")),
        kb.ask("Who?", max_tokens=12, **sampled).text,
        *(answer.text for answer in kb.ask_many("Who?", 3, max_tokens=12, **sampled)),
        [s.document_id for s in kb.ask("Who?", max_tokens=4).sources],
    ]
found = {"here": said(here), "both": said(both)}
path = f"{folder}/{dist.get_rank()}.sheet"
both.save(path)
found["loaded"] = said(CompressedKnowledgeLLM.load(path, model=here.backbone))
found["same places"] = bool(torch.equal(here.sheet.indices, both.sheet.indices))
pairs = list(zip(here.sheet.layers, both.sheet.layers))
found["apart"] = max(float((a.keys - b.keys).abs().max()) for a, b in pairs)
json.dump(found, open(f"{folder}/{dist.get_rank()}.json", "w"))
here.close(), both.close()
dist.destroy_process_group()
"""


# The second process holds weights only; `lost` loses it in the middle.
_LED = """
import json, os, signal, sys, threading, time
from datetime import timedelta
import torch
import torch.distributed as dist
torch.set_num_threads(1)
from cribsheet import CompressedKnowledgeLLM
from cribsheet.errors import EngineError, ModelError
from cribsheet.model.divided import Leader, follow
model, folder = sys.argv[1:]
dist.init_process_group("gloo", timeout=timedelta(seconds=15))
if dist.get_rank():
    open(f"{folder}/pid", "w").write(str(os.getpid()))
    follow()
    dist.destroy_process_group()
    sys.exit()
texts = [{"id": name, "text": f"{name} lives in {place}. " * 25} for name, place in (("Ann", "Oslo"), ("Bob", "Rome"))]
options = {"rate": 3, "scorer": "recall", "guide": "dropped"}
def said(kb):
    found = {}
    def ask(question, mode):
        found[f"{question} {mode}"] = kb.ask(question, max_tokens=8, mode=mode).text
    asking = [(f"Where does {name} live?" + " So?" * n, mode) for name in ("Ann", "Bob") for n in range(2)
              for mode in ("sheet", "hybrid", "auto")]
    threads = [threading.Thread(target=ask, args=each) for each in asking]
    [each.start() for each in threads], [each.join() for each in threads]
    assert len(found) == len(asking)
    found["form"] = kb.ask("Who?", json_schema={"type": "object", "properties": {"a": {"type": "integer"}}}).text
    found["sampled"] = [answer.text for answer in kb.ask_many("Who?", 3, max_tokens=8, seed=5, temperature=1.0)]
    found["sources"] = [source.document_id for source in kb.sources("Who?", "Ann", limit=5)]
    return found
lost = []
leader = Leader(lambda: lost.append(1))
try:
    leader.load("/nowhere")
except ModelError as error:
    refused = str(error)
divided = leader.load(model)
assert leader.load(model) is divided and not lost
weight = divided.model.base_model.layers[0].mlp.up_proj.weight
assert weight.to_local().shape[0] * 2 == weight.shape[0]
here = CompressedKnowledgeLLM.build(texts, "Who lives where?", model=model, **options)
both = CompressedKnowledgeLLM.build(texts, "Who lives where?", model=divided, **options)
found = {"refused": refused, "here": said(here), "both": said(both)}
here.save(f"{folder}/here.sheet")
time.sleep(20)  # longer than the group waits for anybody: followers wait for work as long as it takes
loaded = CompressedKnowledgeLLM.load(f"{folder}/here.sheet", model=divided)
found["loaded"] = said(loaded)
signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun ends all when one is gone
os.kill(int(open(f"{folder}/pid").read()), 9)
found["lost"] = []
for _ in range(2):
    try:
        loaded.ask("Who?", max_tokens=4)
    except EngineError as error:
        found["lost"].append(str(error))
assert lost == [1]
json.dump(found, open(f"{folder}/found.json", "w"))
os._exit(0)
"""


def test_one_process_leads_and_can_do_all_that_it_can_do_alone(tmp_path):
    """Many threads at once, every mode, forms, sampling, evidence; and it hears of it when another process is lost."""
    model = save_tiny_model(tmp_path / "model")
    script = tmp_path / "led.py"
    script.write_text(_LED)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", str(script)]
    done = subprocess.run([*command, str(model), str(tmp_path)], env=environment("tp"), capture_output=True, text=True)
    assert (tmp_path / "found.json").exists(), done.stderr[-9000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["here"] == found["both"] == found["loaded"] and found["here"]["sources"]
    assert "/nowhere" in found["refused"]
    assert "lost each other" in found["lost"][0] and "have parted" in found["lost"][1]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma"])
@pytest.mark.parametrize(("mode", "scorer"), [("sequential", "recall"), ("independent", "task")])
def test_two_processes_build_the_same_sheet_and_say_the_same(family, mode, scorer, tmp_path):
    model = save_tiny_model(tmp_path / "model", family)
    script = tmp_path / "both.py"
    script.write_text(_SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", str(script)]
    command += [str(model), str(tmp_path), mode, scorer]
    done = subprocess.run(command, env=environment("tp"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in (0, 1):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found["both"] == found["here"] == found["loaded"]
        assert found["same places"] and found["apart"] < 1e-3
