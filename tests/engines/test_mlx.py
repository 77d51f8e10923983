"""MLX-LM answers from a sheet's prompt cache as we do; on its CPU backend too, so no Mac is needed."""

from __future__ import annotations

import json

import pytest
from corpus import DOCUMENTS, FEW_SHOT, QUESTION

from cribsheet import CompressedKnowledgeLLM, build_sheet

REASON = "mlx-lm is not installed: pip install 'mlx[cpu]' mlx-lm"
QUESTIONS = [QUESTION, "Where is Alice?", "Who speaks Greek?", "What is 40213?"]


def test_answers_are_those_of_our_own_engine(engine_family, tmp_path):
    core = pytest.importorskip("mlx.core", reason=REASON)
    loading, caching, writing = (
        pytest.importorskip(f"mlx_lm.{name}", reason=REASON) for name in ("utils", "models.cache", "generate")
    )
    sheet = build_sheet(engine_family, DOCUMENTS, FEW_SHOT, budget=96, for_engines=True)
    kb = CompressedKnowledgeLLM(engine_family, sheet)
    engine_family.model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"rope_theta": config["rope_parameters"]["rope_theta"]}  # where MLX-LM looks for it in Qwen2
    (tmp_path / "config.json").write_text(json.dumps(config))
    model, _ = loading.load_model(tmp_path)
    made = sheet.export(tmp_path / "sheet.safetensors", to="mlx")
    for question in QUESTIONS:
        cache = caching.load_prompt_cache(str(made))
        assert cache[0].offset == 96
        asked = core.array(kb.question_tokens(question).tolist())
        steps = writing.generate_step(asked, model, max_tokens=8, prompt_cache=cache)
        text = engine_family.tokenizer.decode([int(token) for token, _ in steps]).lstrip(" ")
        assert text == kb.ask(question, max_tokens=8, evidence=False).text
