"""What editors complete of `kb.as_chat_model` and `kb.as_retriever` are the fields of what they make."""

from __future__ import annotations

from langchain_cribsheet import ChatCribsheet, CribsheetRetriever

from cribsheet.asking import options


def test_the_typed_settings_are_the_fields():
    for kind, made in ((options.ChatModelOptions, ChatCribsheet), (options.RetrieverOptions, CribsheetRetriever)):
        assert set(kind.__annotations__) == set(made.model_fields) - {"knowledge"}
    assert set(options.ChatModelOptions.__annotations__) - set(options.ToolOptions.__annotations__) == {"name"}
