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
from cribsheet.parallel import divided
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
