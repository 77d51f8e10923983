"""What editors complete is what calls take: the typed options name all of them, and no other."""

from __future__ import annotations

import inspect

import pytest

from cribsheet import CompressedKnowledgeLLM, build_sheet
from cribsheet.asking import options
from cribsheet.asking.router import Router
from cribsheet.asking.settings import SETTINGS
from cribsheet.living import edits as living
from cribsheet.llm import Conversation
from cribsheet.model.backbone import Backbone

OF = inspect.signature
ASKING = ("ask", "stream", "prepare", "ask_many", "aask", "aask_many", "astream", "astream_many")
HANDED_OVER = {
    "as_chat_model": ("ChatModelOptions", "ChatCribsheet"),
    "as_retriever": ("RetrieverOptions", "ChainRetriever"),
    "as_tool": ("ToolOptions", "BaseTool"),
    "as_llama_index_llm": ("IndexLLMOptions", "CribsheetLLM"),
    "as_query_engine": ("QueryEngineOptions", "CompressedKnowledgeQueryEngine"),
    "as_index_retriever": ("IndexRetrieverOptions", "IndexRetriever"),
}


def keyword_only(function):
    return {
        name: parameter.annotation
        for name, parameter in OF(function).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }


def test_a_build_takes_what_build_sheet_takes():
    taken = keyword_only(build_sheet)
    assert taken.pop("progress") == OF(CompressedKnowledgeLLM.build).parameters["progress"].annotation
    named = {name: kind.__forward_arg__ for name, kind in options.BuildOptions.__annotations__.items()}
    assert named == taken
    assert OF(CompressedKnowledgeLLM.build).parameters["options"].annotation == "Unpack[BuildOptions]"


def test_a_question_takes_every_setting_and_no_other():
    assert set(options.AskOptions.__annotations__) == SETTINGS
    for owner, name in [*((CompressedKnowledgeLLM, each) for each in ASKING), (Conversation, "ask"), (Router, "ask")]:
        assert OF(getattr(owner, name)).parameters["sampling"].annotation == "Unpack[AskOptions]", name


@pytest.mark.parametrize("name", HANDED_OVER)
def test_what_is_handed_over_has_a_type_and_named_settings(name):
    found = OF(getattr(CompressedKnowledgeLLM, name))
    taken, given = HANDED_OVER[name]
    assert (found.parameters["settings"].annotation, found.return_annotation) == (f"Unpack[{taken}]", given)
    assert hasattr(options, taken)


def test_loading_and_changing_name_what_they_take():
    assert set(keyword_only(Backbone.load)) < set(keyword_only(CompressedKnowledgeLLM.load))
    for name in ("extend", "replace"):
        assert set(keyword_only(getattr(CompressedKnowledgeLLM, name))) == set(keyword_only(getattr(living, name))) - {
            "check"
        }
