"""A sheet of random keys and values, for timing."""

from __future__ import annotations

import torch

from cribsheet.build import build_sheet
from cribsheet.corpus.documents import Document
from cribsheet.corpus.task import Task
from cribsheet.sheet.layers import FloatLayer
from cribsheet.sheet.sheet import Sheet
from cribsheet_bench.speed.setting import Setting


def sheet_of(setting: Setting, tokens: int) -> Sheet:
    """A uniform bfloat16 sheet of so many tokens: a small real one, with larger tensors."""
    text = " ".join(f"House {n} is blue." for n in range(40))
    small = build_sheet(setting.backbone, [Document(text=text, id="a")], Task("Which?"), rate=1, scorer="task")
    shape = (setting.backbone.kv_heads, tokens, setting.backbone.head_size)
    keys = torch.randn(shape).to(torch.bfloat16)
    layers = [FloatLayer(keys.clone(), keys.clone()) for _ in small.layers]
    indices = torch.arange(tokens, dtype=torch.int32).expand(*small.indices.shape[:2], -1).contiguous()
    changed = {"dtype": "bfloat16", "guide": "dropped", "guide_tokens": 0, "corpus_tokens": tokens}
    made = small.manifest.model_copy(update=changed)
    return Sheet(layers, indices, small.origins, made, small.texts)
