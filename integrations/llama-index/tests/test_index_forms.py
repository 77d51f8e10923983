"""An LLM is a description: it names its sheet, travels as that, and opens it when it is first needed."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
from index_corpus import ANSWER, QUESTION
from llama_index.core import Settings
from llama_index.llms.cribsheet import CribsheetLLM

from cribsheet.errors import MismatchError, SheetError


def test_a_path_is_opened_with_the_first_question(sheet_path):
    llm = CribsheetLLM(sheet_path, max_tokens=12)
    assert llm._opened is None and llm.to_payload() == {
        "class_name": "CribsheetLLM",
        "sheet": sheet_path,
        "digest": None,
        "model_name": None,
    }
    assert llm.complete(QUESTION).text == ANSWER
    assert llm._opened is not None and llm.to_payload()["context_window"] == llm.knowledge.room


async def test_opening_does_not_happen_on_the_event_loop(sheet_path):
    assert (await CribsheetLLM(sheet_path, max_tokens=12).acomplete(QUESTION)).text == ANSWER


def test_it_survives_a_dict_json_and_a_pickle(kb, sheet_path):
    llm = CribsheetLLM(sheet_path, max_tokens=12, temperature=0.0, stop=["!"], system_prompt="Be brief.")
    copies = [
        CribsheetLLM.from_dict(llm.to_dict()),
        CribsheetLLM.from_json(llm.to_json()),
        pickle.loads(pickle.dumps(llm)),
    ]
    assert [each.to_dict() for each in copies] == [llm.to_dict()] * 3
    assert copies[2].complete(QUESTION).text == ANSWER
    saved = kb.as_llama_index_llm(sheet=sheet_path)
    assert len(pickle.dumps(saved)) < 4096 and pickle.loads(pickle.dumps(saved)).sheet == sheet_path
    assert json.loads(saved.to_json())["digest"] == kb.sheet.manifest.digest


def test_a_sheet_in_memory_is_not_pickled_but_can_be_told_from_others(kb, llm):
    with pytest.raises(SheetError, match=r"save it, and pass its path: kb.as_llama_index_llm\(sheet=path\)"):
        pickle.dumps(llm)
    assert llm.to_dict()["digest"] == kb.sheet.manifest.digest


def test_another_sheet_than_the_one_that_was_meant_is_refused(sheet_path):
    llm = CribsheetLLM(sheet_path, digest="0" * 16)
    with pytest.raises(MismatchError, match=f"has the digest .* but {'0' * 16} is wanted"):
        llm.complete(QUESTION)


def test_copies_share_the_model(llm):
    for made in (copy.copy(llm), copy.deepcopy(llm), llm.model_copy(update={"max_tokens": 1})):
        assert made.knowledge is llm.knowledge


def test_it_is_the_global_llm(llm):
    Settings.llm = llm
    assert Settings.llm is llm
