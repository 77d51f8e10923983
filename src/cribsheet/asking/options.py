"""What calls take by name, so that editors complete and type checkers check them: nothing here is imported to run.

Each is what some function or class takes, and the tests compare them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypedDict

if TYPE_CHECKING:
    from pathlib import Path

    from cribsheet.asking.settings import Retrieval
    from cribsheet.compress.progress import Listener
    from cribsheet.compress.scoring import Scorer
    from cribsheet.structured.grammar import Grammar
    from cribsheet.vocabulary import Mode, NoArchive


class ReplaceOptions(TypedDict, total=False):
    """Those of `CompressedKnowledgeLLM.replace`."""

    scorer: str | Scorer | None
    progress: Listener


class ExtendOptions(ReplaceOptions, total=False):
    """Those of `CompressedKnowledgeLLM.extend`."""

    checkpoint: str | Path | None


class _AnyEngine(TypedDict, total=False):
    max_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    seed: int | None
    stop: str | Sequence[str] | None
    frequency_penalty: float | None
    presence_penalty: float | None
    timeout: float | None


class _Sampling(_AnyEngine, total=False):
    retriever: Any
    passage_tokens: int | None
    sure: float | None
    no_archive: NoArchive | None
    evidence: bool | None


class AskOptions(_Sampling, total=False):
    """Those of `CompressedKnowledgeLLM.ask`: of `SamplingParams`, forms, tools, and passages."""

    logprobs: int | None
    logit_bias: Mapping[int, float] | None
    grammar: Grammar | None
    json_schema: Mapping[str, Any] | str | None
    regex: str | None
    choices: Sequence[str] | None
    tools: Sequence[Any] | None
    tool_choice: Any
    mode: Mode | Retrieval | None


class _Fields(_Sampling, total=False):
    mode: Mode | None
    sheet: str | None
    model: str | None
    model_options: dict[str, Any]
    rate_limiter: Any


class ToolOptions(_Fields, total=False):
    """The fields of LangChain's chat model over a sheet, but for its name."""

    streaming: bool
    max_retries: int | None
    api_key: Any
    cache: Any
    verbose: bool
    callbacks: Any
    tags: list[str] | None
    metadata: dict[str, Any] | None
    custom_get_token_ids: Any
    disable_streaming: bool | Literal["tool_calling"]
    output_version: str | None
    profile: Any


class ChatModelOptions(ToolOptions, total=False):
    """The fields of LangChain's chat model over a sheet."""

    name: str | None


class LlamaCppSampling(_AnyEngine, total=False):
    """Those of `LlamaCpp.ask`."""

    json_schema: Mapping[str, Any] | None


class LlamaCppOptions(TypedDict, total=False):
    """Those of `LlamaCpp` beside the sheet, the GGUF and the tokenizer."""

    slots: int
    room: int
    threads: int | None
    gpu_layers: int


class RetrieverOptions(TypedDict, total=False):
    """The fields of LangChain's retriever over a sheet."""

    k: int
    characters: int
    content: Literal["text", "marker"]
    marker: str
    sheet: str | None
    model: str | None
    model_options: dict[str, Any]
    name: str | None
    tags: list[str] | None
    metadata: dict[str, Any] | None


class IndexLLMOptions(_Fields, total=False):
    """The fields of LlamaIndex's LLM over a sheet."""

    digest: str | None
    callback_manager: Any
    system_prompt: str | None
    completion_to_prompt: Any
    output_parser: Any
    pydantic_program_mode: Any
    query_wrapper_prompt: Any


class QueryEngineOptions(IndexLLMOptions, total=False):
    """Those of LlamaIndex's query engine over a sheet: its own, its synthesizer's and its LLM's."""

    llm: Any
    response_synthesizer: Any
    node_postprocessors: list[Any] | None
    similarity_top_k: int
    response_mode: Any
    output_cls: type[Any] | None
    streaming: bool
    text_qa_template: Any
    simple_template: Any
    context_tokens: int | None


class IndexRetrieverOptions(TypedDict, total=False):
    """Those of LlamaIndex's retriever over a sheet."""

    similarity_top_k: int
    passage_characters: int
    callback_manager: Any
