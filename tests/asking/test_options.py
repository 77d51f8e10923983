"""What editors complete is what calls take: the typed options name all of them, and no other."""

from __future__ import annotations

import dataclasses
import inspect
from typing import get_overloads

import pytest

from cribsheet import BuildOptions, CompressedKnowledgeLLM, build_sheet
from cribsheet.asking import options
from cribsheet.asking.answer import Conversation
from cribsheet.asking.router import Router
from cribsheet.asking.settings import SETTINGS
from cribsheet.forecast import forecast
from cribsheet.living import edits
from cribsheet.model.backbone import Backbone
from cribsheet.plan.options import BuildKeywords

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
    fields = {field.name: field.type for field in dataclasses.fields(BuildOptions)}
    assert {name: kind.__forward_arg__ for name, kind in BuildKeywords.__annotations__.items()} == fields
    for door in (build_sheet, CompressedKnowledgeLLM.build, forecast):
        assert OF(door).parameters["options"].annotation == "Unpack[BuildKeywords]"
    beside = keyword_only(build_sheet)
    assert beside.pop("read")
    assert beside.items() <= keyword_only(CompressedKnowledgeLLM.build).items() and not beside.keys() & fields.keys()


def test_a_question_takes_every_setting_and_no_other():
    assert set(options.AskOptions.__annotations__) == SETTINGS
    for owner, name in [*((CompressedKnowledgeLLM, each) for each in ASKING), (Conversation, "ask"), (Router, "ask")]:
        assert OF(getattr(owner, name)).parameters["sampling"].annotation == "Unpack[AskOptions]", name


@pytest.mark.parametrize("name", HANDED_OVER)
def test_what_is_handed_over_has_a_type_and_named_settings(name):
    method = getattr(CompressedKnowledgeLLM, name)
    *_, ours = get_overloads(method) or [method]  # those for other engines come first
    found = OF(ours)
    taken, given = HANDED_OVER[name]
    assert (found.parameters["settings"].annotation, found.return_annotation) == (f"Unpack[{taken}]", given)
    assert hasattr(options, taken)


def test_loading_and_changing_name_what_they_take():
    assert set(keyword_only(Backbone.load)) < set(keyword_only(CompressedKnowledgeLLM.load))
    for name, typed in (("extend", options.ExtendOptions), ("replace", options.ReplaceOptions)):
        taken = {option: kind.__forward_arg__ for option, kind in typed.__annotations__.items()}
        assert {**taken, "check": "bool"} == keyword_only(getattr(edits, name))
        assert OF(getattr(CompressedKnowledgeLLM, name)).parameters["how"].annotation == f"Unpack[{typed.__name__}]"
