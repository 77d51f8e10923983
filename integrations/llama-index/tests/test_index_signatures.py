"""What editors complete of `kb.as_query_engine` and its like is what they take."""

from __future__ import annotations

import inspect

from llama_index.llms.cribsheet import (
    CompressedKnowledgeQueryEngine,
    CribsheetLLM,
    CribsheetRetriever,
    CribsheetSynthesizer,
)

from cribsheet.asking import options


def named(function):
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {name for name, each in inspect.signature(function).parameters.items() if each.kind in kinds}


def test_the_typed_settings_are_what_is_taken():
    llm = set(CribsheetLLM.model_fields) - {"messages_to_prompt"}
    assert set(options.IndexLLMOptions.__annotations__) == llm
    engine = (llm | named(CompressedKnowledgeQueryEngine.from_args) | named(CribsheetSynthesizer)) - {"knowledge"}
    assert set(options.QueryEngineOptions.__annotations__) == engine
    assert set(options.IndexRetrieverOptions.__annotations__) == named(CribsheetRetriever) - {"knowledge"}
