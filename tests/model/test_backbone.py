"""The model underneath: what is accepted, what is refused by name, and that nothing is left behind."""

from __future__ import annotations

import contextlib
import json
import queue
import threading

import pytest
import torch
from reference import full_context_logits, stock_cache
from test_prefix import LEFT
from transformers import AttentionInterface

from cribsheet.attention.cache import prefix_cache
from cribsheet.attention.prefix import LayerPrefix
from cribsheet.compress.loop import nothing_read
from cribsheet.errors import ModelError
from cribsheet.model.backbone import Backbone
from cribsheet.model.divided import DividedBackbone, Leader, divided
from cribsheet.model.support import FAMILIES, ROPE_TYPES, check_supported
from cribsheet.testing import save_tiny_model, tiny_backbone, tiny_config, tiny_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module", params=["llama", "mistral", "qwen3", "phi3"])
def family(request):
    return tiny_backbone(request.param)


def nothing(backbone):
    return nothing_read(backbone)


def test_a_model_loads_from_a_folder_by_path_and_by_name(folder, tiny):
    for name in (folder, str(folder)):
        backbone = Backbone.load(name, device="cpu")
        assert backbone.name == str(folder)
        assert torch.equal(full_context_logits(backbone, LEFT), full_context_logits(tiny, LEFT))


@pytest.mark.parametrize(
    ("asked", "got"), [(None, torch.float32), ("bfloat16", torch.bfloat16), (torch.float16, torch.float16)]
)
def test_weights_are_float32_on_a_cpu_unless_another_dtype_is_asked(folder, asked, got):
    assert Backbone.load(folder, device="cpu", dtype=asked).dtype == got


@pytest.mark.parametrize("dtype", ["float31", "nn", "int"])
def test_an_unknown_dtype_is_refused(folder, dtype):
    with pytest.raises(ModelError, match=f"There is no dtype '{dtype}'; use float32, bfloat16 or float16"):
        Backbone.load(folder, dtype=dtype)


@pytest.mark.parametrize("name", ["a.gguf", "./models/A.GGUF"])
def test_a_gguf_is_no_model_of_ours(name):
    with pytest.raises(ModelError, match=r"is a GGUF, .* the transformers model that it was made of, and the GGUF as"):
        Backbone.load(name)


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/model", "~/no/such/model", "a/b/c"])
def test_a_folder_that_is_not_there_is_refused_before_any_hub_is_asked(name):
    with pytest.raises(ModelError, match="There is no model folder"):
        Backbone.load(name)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"holds no config\.json; give the folder of a transformers model"):
        Backbone.load(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"model_type": "no-such-family"}', "{}"])
def test_a_broken_or_foreign_config_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=str(tmp_path)):
        Backbone.load(tmp_path)


def test_a_model_without_its_weights_is_refused(folder, tmp_path):
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ModelError, match="cannot be loaded"):
        Backbone.load(tmp_path)


def test_other_families_are_refused_by_name_before_weights_are_read(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))
    with pytest.raises(ModelError, match="Models of type 'gpt2' are not supported; use one of llama, mistral"):
        Backbone.load(tmp_path)


@pytest.mark.parametrize("rope_type", ROPE_TYPES)
def test_rotary_settings_that_stand_still_are_accepted(rope_type):
    check_supported(_config(rope_type))


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_rotary_settings_that_change_with_length_are_refused(rope_type):
    with pytest.raises(ModelError, match=f"Rotary embeddings of type '{rope_type}' change with the length of the text"):
        check_supported(_config(rope_type))


def _config(rope_type):
    config = tiny_config("llama")
    config.rope_parameters = {"rope_type": rope_type, "rope_theta": 10000.0, "factor": 2.0}
    return config


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("mistral", {"sliding_window": 128}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 128, "layer_types": ["sliding_attention"] * 3}),
    ],
)
def test_a_model_that_sees_nothing_but_a_window_is_refused(family, settings):
    with pytest.raises(ModelError, match=f"In this {family} model every layer sees only the last 128 tokens"):
        check_supported(tiny_config(family, **settings))


def test_layers_of_unknown_kind_are_refused():
    with pytest.raises(ModelError, match="has layers of type linear_attention, which are not supported"):
        config = tiny_config("qwen3")
        config.layer_types = ["linear_attention", "full_attention", "full_attention"]
        check_supported(config)


def test_a_window_that_is_switched_off_is_accepted():
    check_supported(tiny_config("qwen2", use_sliding_window=False, sliding_window=128))


def test_a_slow_tokenizer_is_refused(tiny):
    class Slow:
        is_fast = False

    with pytest.raises(ModelError, match="The tokenizer Slow gives no character offsets"):
        Backbone(tiny.model, Slow())


def test_all_places_that_name_an_end_token_are_heard():
    backbone = tiny_backbone()
    backbone.model.generation_config.eos_token_id = [5, 6]
    assert backbone.eos_ids == {2, 5, 6}


def test_the_scale_is_that_of_the_model(family):
    assert family.scale == pytest.approx(16**-0.5)


def test_a_read_returns_the_rotated_keys_that_stock_transformers_caches(family):
    stock = stock_cache(family, LEFT)
    guide = torch.arange(300, 306)
    read = family.read(nothing(family), 0, LEFT, guide)
    for mine, theirs in zip(read, stock.layers, strict=True):
        torch.testing.assert_close(mine.chunk_keys, theirs.keys[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(mine.chunk_values, theirs.values[0], atol=1e-4, rtol=1e-4)
        assert mine.guide_queries.shape == (family.num_heads, 6, family.head_size)


def test_a_guide_s_log_sum_exps_cover_prefix_chunk_and_guide(tiny):
    """Weights made from them sum to one over everything that a row sees."""
    ids, guide = torch.arange(100, 130), torch.arange(300, 306)
    first = tiny.read(nothing(tiny), 0, ids, ids[:0])
    from cribsheet.attention.prefix import LayerPrefix

    prefix = [LayerPrefix(layer.chunk_keys, layer.chunk_values) for layer in first]
    for layer, before in zip(tiny.read(prefix, 30, ids + 50, guide), prefix, strict=True):
        keys = torch.cat([before.keys, layer.chunk_keys, layer.guide_keys], 1).repeat_interleave(2, 0)
        logits = layer.guide_queries @ keys.transpose(1, 2) * tiny.scale
        for row in range(6):
            weights = (logits[:, row, : 60 + row + 1] - layer.guide_lse[:, row, None]).exp()
            torch.testing.assert_close(weights.sum(-1), torch.ones(4), atol=1e-4, rtol=1e-4)


def test_the_stock_attention_is_back_after_use_however_deeply_nested(tiny):
    stock = tiny.config._attn_implementation
    with tiny.attached():
        with tiny.attached():
            assert tiny.config._attn_implementation == "cribsheet"
        assert tiny.config._attn_implementation == "cribsheet"
    assert tiny.config._attn_implementation == stock == "sdpa"
    with pytest.raises(KeyError), tiny.attached():
        raise KeyError
    assert tiny.config._attn_implementation == stock


@pytest.mark.parametrize("own", ["sdpa", "eager"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_stock_forward_gives_its_own_logits_also_while_attached(name, own):
    """In the thread that attached it and in others: with its own attention, mask and soft cap."""
    backbone = tiny_backbone(name)
    if own == "eager":
        backbone.model.set_attn_implementation("eager")
    before = full_context_logits(backbone, LEFT)
    during = []
    with backbone.attached():
        during.append(full_context_logits(backbone, LEFT))
        other = threading.Thread(target=lambda: during.append(full_context_logits(backbone, LEFT)))
        other.start()
        other.join()
    assert [torch.equal(each, before) for each in during] == [True, True]
    assert torch.equal(full_context_logits(backbone, LEFT), before)


@pytest.mark.parametrize("own", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3_text"])
def test_a_stock_forward_is_not_disturbed_by_attaching_in_its_middle(name, own):
    """Another thread attaches, or lets go, between the mask and the layers, and between two layers."""
    backbone = tiny_backbone(name)
    backbone.model.set_attn_implementation("eager" if name == "gemma2" else own)
    before = full_context_logits(backbone, LEFT)
    commands, done = queue.SimpleQueue(), queue.SimpleQueue()

    def elsewhere():
        while command := commands.get():
            command()
            done.put(True)

    def flip(*_):
        leave = backbone.config._attn_implementation == "cribsheet"
        commands.put(
            (lambda: backbone.attached().__exit__(None, None, None)) if leave else backbone.attached().__enter__
        )
        done.get()

    thread = threading.Thread(target=elsewhere)
    thread.start()
    hooks = [layer.register_forward_pre_hook(flip) for layer in backbone.model.base_model.layers]
    hooks += [backbone.model.base_model.rotary_emb.register_forward_pre_hook(flip)]
    try:
        assert torch.equal(full_context_logits(backbone, LEFT), before)
        assert torch.equal(full_context_logits(backbone, LEFT), before)  # begins as the last one ended, and so on
    finally:
        for hook in hooks:
            hook.remove()
        if backbone.config._attn_implementation == "cribsheet":
            flip()
        commands.put(None)
        thread.join()


def test_two_backbones_of_one_model_give_it_back_as_it_was(tiny):
    first, second = (Backbone(tiny.model, tiny.tokenizer) for _ in range(2))
    first.attached().__enter__()
    with second.attached():
        first.attached().__exit__(None, None, None)
        assert tiny.config._attn_implementation == "cribsheet"
    assert tiny.config._attn_implementation == "sdpa"


def test_the_stock_forward_keeps_its_padding_mask_while_attached(tiny):
    rows = torch.stack([LEFT, LEFT.clone()])
    mask = torch.ones_like(rows)
    mask[1, :7] = 0
    before = tiny.model(input_ids=rows, attention_mask=mask).logits
    with tiny.attached():
        during = tiny.model(input_ids=rows, attention_mask=mask).logits
    torch.testing.assert_close(during[:, 7:], before[:, 7:], atol=1e-5, rtol=1e-5)


def test_one_name_is_registered_and_it_replaces_none(tiny):
    assert "cribsheet" in AttentionInterface().valid_keys()
    assert tiny_tokenizer() is not tiny.tokenizer


def test_logits_are_returned_for_the_last_tokens_that_are_asked_for(tiny):
    from cribsheet.attention.cache import prefix_cache

    positions = torch.arange(len(LEFT))[None]
    three = tiny.step(LEFT[None], positions, prefix_cache(nothing(tiny), 0), keep=3)
    assert three.shape == (1, 3, 1000)
    one = tiny.step(LEFT[None], positions, prefix_cache(nothing(tiny), 0))
    torch.testing.assert_close(one[:, -1], three[:, -1])


def test_a_model_in_training_mode_is_evaluated_and_left_in_training_mode():
    backbone = tiny_backbone(attention_dropout=0.5)
    model = backbone.model.train()
    model.model.layers[1].eval()
    wrapped = Backbone(model, backbone.tokenizer)
    modes = [module.training for module in model.modules()]
    with wrapped.attached():
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == modes and model.training


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2", "smollm3", "mixtral"])
def test_a_model_without_sheet_goes_along_with_what_the_attention_of_another_gives(kind):
    """As the processes of a divided model do: from layer to layer both have the same queries."""
    leader, follower = (
        DividedBackbone(tiny.model, tiny.tokenizer) for tiny in (tiny_backbone(kind), tiny_backbone(kind))
    )
    told, given, asked = [], [], []

    def give(out, query):
        given.append((out, query))
        return out

    def take(out, query):
        assert out is None
        asked.append(query)
        return given[len(asked) - 1][0]

    def announce(*what):
        told.append(what)
        return contextlib.nullcontext()

    leader.announce, leader.attached().share, follower.attached().share = announce, give, take
    chunk, guide = torch.arange(10, 40), torch.arange(40, 45)
    nothing = nothing_read(leader)
    read = leader.read(nothing, 0, chunk, guide)
    layers = [LayerPrefix(each.chunk_keys, each.chunk_values) for each in read]
    leader.step(guide.unsqueeze(0), torch.arange(30, 35).unsqueeze(0), prefix_cache(layers, 30))
    assert [what[2] for what in told] == [None, 1]
    for what in told:
        follower.accompany(*what)
    assert len(asked) == len(given) == 2 * leader.num_layers
    for mine, (_, theirs) in zip(asked, given, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_nobody_leads_outside_of_a_group():
    for make in (Leader, lambda: divided("pocket")):
        with pytest.raises(ModelError, match="group"):
            make()


def test_weights_that_nobody_changes_are_sampled_once_and_again_afterwards():
    backbone = tiny_backbone()
    before = backbone.weight_samples()
    with backbone.unchanging(), backbone.unchanging():
        inside = backbone.weight_samples()
        assert backbone.weight_samples() is inside
    with torch.no_grad():
        backbone.model.lm_head.weight.add_(1.0)
    assert torch.equal(inside, before) and not torch.equal(backbone.weight_samples(), before)
    assert backbone.weight_samples() is not backbone.weight_samples()


def threads_reading(backbone, tokens):
    """How many threads make each layer's part of a read."""
    seen = []
    chunk = torch.arange(10, 10 + tokens)
    backbone.read(nothing(backbone), 0, chunk, chunk[:0], lambda: seen.append(torch.get_num_threads()))
    return seen


def test_one_thread_makes_a_short_read_of_a_small_model_and_all_a_long_one(two_threads):
    pocket = Backbone.load("pocket", device="cpu")
    assert threads_reading(pocket, 20) == [1] * pocket.num_layers
    assert threads_reading(pocket, 300) == [2] * pocket.num_layers
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2"])
def test_a_pass_leaves_the_caller_s_threads_as_they_were_also_if_it_fails(kind, two_threads):
    backbone = tiny_backbone(kind)
    seen = []
    backbone.model.register_forward_pre_hook(lambda *_: seen.append(torch.get_num_threads()))
    positions = torch.arange(len(LEFT))[None]
    cache = prefix_cache(nothing(backbone), 0)
    logits = backbone.step(LEFT[None], positions, cache)
    assert seen == [1] and torch.get_num_threads() == 2
    with pytest.raises(ZeroDivisionError):
        backbone.read(nothing(backbone), 0, LEFT, LEFT[:0], lambda: 1 / 0)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    assert torch.equal(logits, backbone.step(LEFT[None], positions, prefix_cache(nothing(backbone), 0)))
