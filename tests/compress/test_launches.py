"""What a chunk asks of a device besides being read: each call is a launch on a GPU, which waits for the processor."""

from __future__ import annotations

from collections import Counter

import pytest
from corpus import DOCUMENTS, FEW_SHOT
from torch.utils._python_dispatch import TorchDispatchMode

from cribsheet.compress.loop import compress
from cribsheet.plan.options import BuildOptions
from cribsheet.plan.plan import plan
from cribsheet.prompt.template import ChatLayout
from cribsheet.testing import tiny_backbone

LAYERS = 12
VIEWS = ("view", "expand", "slice", "select", "unsqueeze", "transpose", "permute", "split", "alias", "detach", "unbind",
         "t.", "squeeze", "unfold", "as_strided", "_unsafe_view")  # fmt: skip


class Calls(TorchDispatchMode):
    """Counts what is run, by whether the model reads or not; views run nothing."""

    def __init__(self):
        super().__init__()
        self.reading, self.counts, self.waits = False, Counter(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function).removeprefix("aten.")
        if not name.startswith(VIEWS):
            self.counts[self.reading] += 1
        self.waits += name.startswith(("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero"))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("options", "most"),
    [
        ({}, 90),
        ({"allocation": "adaptive"}, 92),
        ({"scorer": "task", "allocation": "uniform"}, 64),
    ],
    ids=["default", "adaptive", "task"],
)
def test_a_layer_of_a_chunk_takes_a_bounded_number_of_calls_and_no_wait(options, most, monkeypatch):
    backbone = tiny_backbone(num_hidden_layers=LAYERS)
    how = BuildOptions(**{"rate": 3, "guide": "dropped", "chunk_tokens": 60, **options})
    made = plan(backbone, ChatLayout(backbone.tokenizer), DOCUMENTS, FEW_SHOT, how)
    made.reading.weigh()  # which is measured once for each model
    calls, read = Calls(), backbone.read

    def counted(*given):
        calls.reading = True
        try:
            return read(*given)
        finally:
            calls.reading = False

    monkeypatch.setattr(backbone, "read", counted)
    with calls:
        chunks = sum(1 for _ in compress(backbone, made.corpus, made.reading))
    assert chunks > 3
    assert calls.counts[False] / chunks / LAYERS < most
    assert calls.waits == 0
