"""Passes of new tokens are the model's own where nothing faster is known, and nobody in a hurry finds that out."""

from __future__ import annotations

import gc
import threading

import pytest
import torch

from cribsheet.attention import agreement, dispatch
from cribsheet.attention.agreement import answering, be_patient, in_a_hurry, is_in_a_hurry, relative_error
from cribsheet.attention.cache import prefix_cache
from cribsheet.attention.packed import check
from cribsheet.attention.prefix import LayerPrefix
from cribsheet.attention.slots import Rows, SlotLayer, step_cache
from cribsheet.kernels.ahead import Shape
from cribsheet.model import llama_step, passes
from cribsheet.model.backbone import Backbone
from cribsheet.model.passes import is_prepared, logits_after, prepare
from cribsheet.testing import tiny_backbone

TOKENS = 12


@pytest.fixture(scope="module")
def backbone():
    return tiny_backbone()


@pytest.fixture(scope="module")
def prefix(backbone):
    shape = backbone.kv_heads, TOKENS, backbone.head_size
    random = torch.Generator().manual_seed(0)
    return [LayerPrefix(*(torch.randn(shape, generator=random) for _ in "kv")) for _ in range(backbone.num_layers)]


@pytest.mark.parametrize("keep", [None, 2])
def test_a_pass_is_the_models_own(backbone, prefix, keep):
    ids, positions = torch.arange(20, 26).reshape(2, 3), torch.arange(TOKENS, TOKENS + 3).expand(2, -1)
    place = None if keep is None else torch.tensor([keep])
    got = logits_after(backbone, ids, positions, prefix_cache(prefix, TOKENS), place)
    wanted = backbone.step(ids, positions, prefix_cache(prefix, TOKENS), 3)[:, -1 if keep is None else keep]
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


def test_so_is_a_step(backbone, prefix):
    found = []
    for run in (logits_after, lambda *given: backbone.step(*given)[:, -1]):
        rows = Rows()
        rows.lengths = [0, 0]
        layers = [SlotLayer(layer, TOKENS, rows) for layer in prefix]
        rows.prepare(backbone.device)
        ids, positions = torch.tensor([[20], [21]]), torch.full((2, 1), TOKENS)
        found.append(run(backbone, ids, positions, step_cache(layers)) if run is logits_after
                     else run(ids, positions, step_cache(layers)))  # fmt: skip
    assert torch.equal(*found)


def test_on_a_cpu_nothing_is_prepared(backbone):
    assert prepare(backbone) is None and is_prepared(backbone) and llama_step.find(backbone) is None


def test_what_cannot_be_made_ready_keeps_nobody_from_finding_out_the_rest(monkeypatch, caplog):
    """The engine's thread never finds anything out itself."""
    monkeypatch.setattr(passes, "on_cuda", lambda like: True)
    backbone = tiny_backbone()
    passes.Preparation(backbone).wait()  # no device here has a capability
    assert "could not be made ready" in caplog.text
    assert "fast_read" in vars(backbone) and backbone in llama_step._steps


def test_processes_in_step_are_ready_at_once_and_make_no_pass_of_their_own(monkeypatch):
    """A pass beside those of others, or another way than theirs, would have all of them wait for each other."""
    monkeypatch.setattr(passes, "on_cuda", lambda like: True)
    monkeypatch.setattr(Backbone, "in_step", property(lambda backbone: True))
    backbone, made = tiny_backbone(), []
    monkeypatch.setattr(backbone, "step", lambda *given, **named: made.append(given))
    assert passes.Preparation(backbone).is_done and not made
    assert "fast_read" in vars(backbone)


def test_a_model_is_not_held_while_its_kernels_are_compiled(monkeypatch):
    monkeypatch.setattr(passes, "on_cuda", lambda like: True)
    monkeypatch.setattr(passes, "shape_of", lambda *given: None)
    compiling, gone = threading.Event(), []

    def compile_ahead(shape, closing):
        compiling.set()
        gone.append(closing.wait(60))

    monkeypatch.setattr(passes, "compile_ahead", compile_ahead)
    backbone = tiny_backbone()
    preparation = passes.Preparation(backbone)
    assert compiling.wait(60)
    del backbone
    gc.collect()
    preparation.wait()
    assert gone == [True]


def test_who_finds_out_gives_way_to_answers_until_they_are_over(monkeypatch):
    monkeypatch.setattr(passes, "on_cuda", lambda like: True)
    backbone = tiny_backbone()
    with answering():
        preparation = passes.Preparation(backbone)
        preparation.wait(0.5)
        assert not preparation.is_done and "fast_read" not in vars(backbone)
    preparation.wait()
    assert "fast_read" in vars(backbone)


def test_who_gives_way_is_stopped_at_once(monkeypatch):
    monkeypatch.setattr(passes, "on_cuda", lambda like: True)
    monkeypatch.setattr(agreement, "_PATIENCE", 600.0)
    backbone = tiny_backbone()
    with answering():
        preparation = passes.Preparation(backbone)
        preparation.close()
    assert preparation.is_done and "fast_read" not in vars(backbone)


def test_patience_ends_and_only_who_finds_out_in_the_background_has_any(monkeypatch):
    monkeypatch.setattr(agreement, "_PATIENCE", 0.1)
    ended = []

    def find_out():
        be_patient(threading.Event())
        for _ in range(3):
            relative_error(torch.ones(2), torch.ones(2))
        ended.append(True)

    with answering():
        thread = threading.Thread(target=find_out)
        thread.start()
        thread.join(60)
        monkeypatch.setattr(agreement, "_PATIENCE", 600.0)
        relative_error(torch.ones(2), torch.ones(2))  # in a thread that is not patient
    assert ended == [True]


def test_what_reads_codes_is_found_out_by_itself_and_the_rest_is_not_done_again(monkeypatch):
    monkeypatch.setattr(passes, "on_cuda", lambda like: True)
    monkeypatch.setattr(check, "on_cuda", lambda like: True)
    monkeypatch.setattr(dispatch, "_verdicts", {})
    monkeypatch.setattr(passes, "shape_of", lambda backbone, weights: Shape(90, "float16", 4, 2, 64))
    shapes, backbone = [], tiny_backbone()
    monkeypatch.setattr(passes, "compile_ahead", lambda shape, closing: shapes.append(shape))
    passes.Preparation(backbone, codes=True).wait()
    assert [shape.codes for shape in shapes] == [True]
    assert [verdict[0] for verdict in dispatch._verdicts] == [check.errors]  # no kernel runs here: it is ruled out
    like = torch.empty(1, backbone.num_heads, 1, backbone.head_size)
    assert check.is_ruled_out(like, backbone.kv_heads) and not check.usable(like, backbone.kv_heads)
    assert "fast_read" not in vars(backbone) and backbone not in llama_step._steps


def test_who_is_in_a_hurry_takes_the_plain_path_until_somebody_else_has_found_out(monkeypatch):
    monkeypatch.setattr(dispatch, "_verdicts", {})
    asked = []

    def check(*heads):
        asked.append(heads)
        return {"all": 0.0}

    heads = torch.device("cpu"), torch.float32, 64, 2
    with in_a_hurry():
        assert not dispatch.agree(check, *heads) and not asked
        thread = threading.Thread(target=dispatch.agree, args=(check, *heads))  # who has time
        thread.start()
        thread.join()
        assert dispatch.agree(check, *heads) and len(asked) == 1
    assert dispatch.agree(check, *heads) and len(asked) == 1 and not is_in_a_hurry()


def test_two_that_have_time_find_out_once(monkeypatch):
    monkeypatch.setattr(dispatch, "_verdicts", {})
    asked, begun = [], threading.Barrier(4)

    check = lambda *heads: asked.append(heads) or {}  # noqa: E731

    def find_out():
        begun.wait(30)
        dispatch.agree(check, torch.device("cpu"), torch.float32, 64, 2)

    threads = [threading.Thread(target=find_out) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(asked) == 1
