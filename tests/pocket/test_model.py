"""The shipped folder loads with transformers, renders the contract, and reads."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import cribsheet_pocket
from cribsheet_pocket import quantize
from cribsheet_pocket_training.worlds import make_world


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cribsheet_pocket.export(tmp_path_factory.mktemp("pocket") / "plain")


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def model(folder: Path) -> Iterator[Any]:
    from transformers import LlamaForCausalLM

    threads = torch.get_num_threads()
    yield LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    torch.set_num_threads(threads)


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import sys, cribsheet_pocket; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_template_renders_the_contract_word_for_word(tokenizer: Any) -> None:
    messages = [
        {"role": "system", "content": "Answer from the documents.\n\nA is B.\n\n"},
        {"role": "user", "content": "  Task: Look up.\n\nWhat is A? "},
        {"role": "assistant", "content": "B"},
        {"role": "user", "content": "And C?\n"},
    ]
    expected = (
        "<|bos|><|system|>Answer from the documents.\n\nA is B.\n\n<|end|>"
        "<|user|>  Task: Look up.\n\nWhat is A? <|end|><|assistant|>B<|end|><|user|>And C?\n<|end|>"
    )
    render = tokenizer.apply_chat_template
    assert render(messages, tokenize=False) == expected
    assert render(messages, tokenize=False, add_generation_prompt=True) == expected + "<|assistant|>"
    assert render(messages[1:2], tokenize=False) == "<|bos|><|user|>  Task: Look up.\n\nWhat is A? <|end|>"
    with pytest.raises(Exception, match="roles system, user and assistant, not tool"):
        render([{"role": "tool", "content": ""}], tokenize=False)


def test_the_rendered_prompt_has_one_beginning_and_the_models_end(tokenizer: Any, model: Any) -> None:
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.eos_token == "<|end|>" and model.config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_it_answers_held_out_questions_by_looking_them_up(model: Any, tokenizer: Any) -> None:
    right = asked = 0
    for seed in range(2):
        world = make_world(seed, 250, kind="person", style="prose")
        questions = [q for q in world.questions if q.kind in ("direct", "absent")][:6]
        for q in questions:
            content = f"{cribsheet_pocket.INSTRUCTION}\n\n{world.text}\n\n{q.text}"
            prompt = tokenizer.apply_chat_template(
                [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
            )
            ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16)
            right += tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True) == q.answer
            asked += 1
    assert asked == 12
    assert right / asked >= 0.9


def test_evaluation_reads_as_transformers_does(folder: Path, model: Any, tokenizer: Any) -> None:
    from cribsheet_pocket_training.evaluate import Reader

    world = make_world(11, 200, kind="company")
    questions = [q.text for q in world.questions[:4]]
    content = f"{cribsheet_pocket.INSTRUCTION}\n\n{world.text}\n\n"
    _, answers = Reader(folder).answers(world.text, questions)
    for question, answer in zip(questions, answers, strict=True):
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": content + question}], tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=60)
        assert tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True) == answer


def test_the_training_model_is_the_llama_that_transformers_loads(tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    from cribsheet_pocket_training import model as training

    reader = training.Reader(training.SHAPES["tiny"])
    training.save(reader, tmp_path, shard_bytes=200_000)
    llama = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    reader.load_state_dict(
        {k.removeprefix("model."): v for k, v in llama.state_dict().items() if k != "lm_head.weight"},
        strict=False,  # what training alone needs is not saved
    )
    ids = torch.randint(6, 8192, (2, 20))
    loss, _, _ = reader(ids, ids.roll(-1, 1), torch.float32)
    expected = torch.nn.functional.cross_entropy(
        llama(ids).logits.flatten(0, 1), ids.roll(-1, 1).flatten(), reduction="none"
    )
    torch.testing.assert_close(loss, expected)


def test_eight_bit_rows_keep_their_largest_number_and_half_a_step() -> None:
    weight = torch.randn(7, 33)
    rows, scale = quantize.pack_matrix(weight)
    back = quantize.unpack_matrix(rows, scale).float()
    assert rows.abs().amax(1).eq(127).all()
    assert ((back - weight).abs() <= 0.5 * scale[:, None] + weight.abs() / 256).all()


def test_the_digest_is_that_of_the_shipped_files() -> None:
    assert (quantize.DATA / quantize.DIGEST).read_text(encoding="utf-8").strip() == quantize.digest()
    assert sum(f.stat().st_size for f in quantize.DATA.iterdir()) < 40e6


def test_processes_that_unpack_at_once_get_one_whole_folder(tmp_path: Path) -> None:
    code = "import cribsheet_pocket; print(cribsheet_pocket.path())"
    environment = {**os.environ, "CRIBSHEET_CACHE": str(tmp_path / "cache")}
    running = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    found = {process.communicate()[0].strip() for process in running}
    assert [process.returncode for process in running] == [0, 0]
    assert len(found) == 1
    place = Path(found.pop())
    assert list(place.parent.iterdir()) == [place]  # nothing half-made is left
    assert (place / "model.safetensors").stat().st_size > 60_000_000


def test_a_folder_that_lost_a_file_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CRIBSHEET_CACHE", str(tmp_path))
    place = cribsheet_pocket.path()
    (place / "tokenizer.json").unlink()
    assert cribsheet_pocket.path() == place
    assert (place / "tokenizer.json").is_file()


def test_a_cache_that_cannot_be_written_is_refused_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CRIBSHEET_CACHE", str(tmp_path / "file"))
    with pytest.raises(OSError, match="set CRIBSHEET_CACHE to a folder that can be written"):
        cribsheet_pocket.path()


def test_export_refuses_a_folder_that_holds_something(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(FileExistsError, match="is not empty"):
        cribsheet_pocket.export(tmp_path)
