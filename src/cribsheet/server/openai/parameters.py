"""What a request asks, as questions and settings of the library."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cribsheet.asking.llama_cpp.served import ServedLlamaCpp
from cribsheet.asking.settings import Retrieval
from cribsheet.asking.sources import LIMIT
from cribsheet.prompt.turns import Question, as_turns
from cribsheet.server.errors import Refusal, naming
from cribsheet.server.openai.protocol import (
    AsJsonObject,
    AsJsonSchema,
    Asked,
    ChatRequest,
    CompletionRequest,
    Extension,
    Turn,
)
from cribsheet.server.openai.schemas import check_schemas
from cribsheet.server.settings import ServerSettings
from cribsheet.server.sheets import Kb
from cribsheet.structured.grammar import Grammar
from cribsheet.structured.tools import Toolbox, closed

_READ_AGAIN = (
    60  # sources of all answers to a request, where they are more than answers carry: each answer is read again
)
_MODES = {"sure": "auto", "retriever": "recall", "no_archive": "recall"}  # settings that mean nothing in others
_OF_OURS = {  # settings that llama.cpp has not: the field of each, and what it asks for
    "evidence": ("cribsheet.evidence", "evidence and sources"),
    "mode": ("cribsheet.mode", "modes with passages"),
    "tools": ("tools", "tools"),
    "grammar": ("response_format", "forms"),
    "logprobs": ("logprobs", "logprobs"),
    "frequency_penalty": ("frequency_penalty", "penalties"),
    "presence_penalty": ("presence_penalty", "penalties"),
}
_SAME = ("frequency_penalty", "presence_penalty", "temperature", "top_k", "top_p", "seed", "stop")


@dataclass(frozen=True, slots=True)
class Ask:
    """A question and how many answers to it are written, with what `CompressedKnowledgeLLM.ask` takes beside it.

    `field` is where the request has the question, and `form` what in it gives the answers a form, if anything does.
    """

    question: Question
    settings: Mapping[str, Any]
    field: str
    answers: int = 1
    form: str | None = None


def chat_ask(body: ChatRequest, kb: Kb, limits: ServerSettings) -> Ask:
    """What a conversation asks. Raises `Refusal` that names the field at fault."""
    settings = _settings(body, kb, limits, body.max_completion_tokens or body.max_tokens)
    tools = [_plain_tool(tool.function.model_dump()) for tool in body.tools or ()]
    choice = body.tool_choice if isinstance(body.tool_choice, str | None) else body.tool_choice.model_dump()
    with naming("tools" if tools and choice in (None, "auto", "none") else "tool_choice"):
        toolbox = Toolbox.of(tools, choice)
        forced = toolbox.forced if toolbox else ()
        check_schemas(tool.parameters for tool in forced)
        form = Grammar.json_schema(toolbox.schema) if toolbox and forced else None
    if body.response_format is not None and body.response_format.type != "text":
        if form is not None:
            raise Refusal(
                400,
                "An answer has one form; give response_format or a tool_choice that forces a call.",
                param="response_format",
            )
        with naming("response_format"):
            schema = _schema(body.response_format)
            check_schemas([schema])
            settings["grammar"] = Grammar.json_schema(schema if _is_loose(body.response_format) else closed(schema))
    turns = [_told(turn) for turn in body.messages]
    with naming("messages"):
        as_turns(turns, toolbox)
    if body.logprobs:
        settings["logprobs"] = body.top_logprobs or 0
    if tools:
        settings |= {"tools": tools, "tool_choice": choice}
    _check_engine(settings, kb)
    shaped = "tool_choice" if form is not None else "response_format" if "grammar" in settings else None
    return Ask(turns, settings, "messages", body.choices, shaped)


def completion_asks(body: CompletionRequest, kb: Kb, limits: ServerSettings) -> list[Ask]:
    """What each prompt asks. Raises `Refusal` that names the field at fault."""
    settings = _settings(body, kb, limits, body.max_tokens)
    if body.logprobs is not None:
        settings["logprobs"] = body.logprobs
    _check_engine(settings, kb)
    alone = isinstance(body.prompt, str)
    asks = []
    for number, prompt in enumerate(body.prompts):
        place = "prompt" if alone else f"prompt[{number}]"
        with naming(place):
            as_turns(prompt)
        asks.append(Ask(prompt, settings, place, body.choices))
    return asks


def log_facts(body: Asked) -> dict[str, Any]:
    """What the log says of a request beside counts."""
    facts: dict[str, Any] = {"stream": True} if body.stream else {}
    if body.user:
        facts["user"] = hashlib.sha256(body.user.encode()).hexdigest()[:16]
    if isinstance(body, ChatRequest) and body.metadata:
        facts["metadata"] = body.metadata
    return facts


def _settings(body: Asked, kb: Kb, limits: ServerSettings, max_tokens: int | None) -> dict[str, Any]:
    settings: dict[str, Any] = {name: value for name in _SAME if (value := getattr(body, name)) is not None}
    settings["max_tokens"] = max_tokens or limits.max_tokens
    settings["timeout"] = limits.answer_seconds
    _check_sources(body)
    settings |= _extended(body.extension, kb, limits.retriever)
    if body.logit_bias:
        with naming("logit_bias"):
            size = kb.backbone.config.vocab_size
        beyond = [token for token in body.logit_bias if int(token) >= size]
        if beyond:
            raise Refusal(400, f"logit_bias names token {beyond[0]}; use ids from 0 to {size - 1}.", param="logit_bias")
        settings["logit_bias"] = {int(token): bias for token, bias in body.logit_bias.items()}
    return settings


def _check_engine(settings: Mapping[str, Any], kb: Kb) -> None:
    """Refuse what llama.cpp does not do, where it answers."""
    for name, (field, asked) in _OF_OURS.items() if isinstance(kb, ServedLlamaCpp) else ():
        if settings.get(name) or (name == "logprobs" and name in settings):  # 0: those of the tokens themselves
            raise Refusal(400, f"llama.cpp answers here, without {asked}; leave out {field}.", param=field)


def _check_sources(body: Asked) -> None:
    """Refuse more sources for more answers than are read again in short, one after the other for all callers."""
    sources = body.extension.sources or 0
    answers = body.choices * (len(body.prompts) if isinstance(body, CompletionRequest) else 1)
    if sources > LIMIT and answers * sources > _READ_AGAIN:
        raise Refusal(
            400,
            f"{sources} sources of each of {answers} answers are {answers * sources}, but at most {_READ_AGAIN} in all "
            f"are found by reading again; ask for fewer answers, or for up to {LIMIT} sources, which any answer has.",
            param="cribsheet.sources",
        )


def _extended(extension: Extension, kb: Kb, retriever: str) -> dict[str, Any]:
    """Settings of evidence and retrieval. Raises `Refusal` for what means nothing in this mode or for this sheet."""
    if extension.evidence is False and extension.sources:
        raise Refusal(400, "sources without evidence cannot be; leave out one of them.", param="cribsheet.sources")
    of_passages: dict[str, Any] = {
        "top_k": extension.top_k,
        "passage_tokens": extension.passage_tokens,
        "sure": extension.sure,
        "retriever": extension.retriever,
        "no_archive": extension.no_archive,
    }
    given = {name: value for name, value in of_passages.items() if value is not None}
    if given and not extension.retrieves:
        name = next(iter(given))
        raise Refusal(400, f"{name} is about passages; give a mode that retrieves with it.", param=f"cribsheet.{name}")
    for name, mode in _MODES.items():
        if name in given and extension.mode != mode:
            raise Refusal(400, f"{name} is for the mode {mode!r} only.", param=f"cribsheet.{name}")
    if extension.mode == "recall" and kb.sheet.manifest.archive is None and extension.no_archive != "sheet":
        raise Refusal(
            400,
            "This sheet has no archive to recall from; use another mode, or no_archive 'sheet'.",
            param="cribsheet.mode",
        )
    settings: dict[str, Any] = {"evidence": bool(extension.evidence or extension.sources)}
    if not extension.retrieves:
        return settings
    if not any(kb.sheet.texts) and extension.retriever is None:
        raise Refusal(
            400,
            f"The mode {extension.mode!r} searches the sheet's documents, but it was saved without their texts; use "
            "'sheet'.",
            param="cribsheet.mode",
        )
    assert extension.mode is not None
    with naming("cribsheet.mode"):
        return {**settings, "mode": Retrieval(extension.mode, **{"retriever": retriever, **given})}


def _schema(form: AsJsonObject | AsJsonSchema | Any) -> dict[str, Any]:
    return form.json_schema.schema_ if isinstance(form, AsJsonSchema) else {"type": "object"}


def _is_loose(form: AsJsonObject | AsJsonSchema | Any) -> bool:
    """Whether objects may hold more than the schema names."""
    return not isinstance(form, AsJsonSchema) or form.json_schema.strict is False


def _plain_tool(function: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in function.items() if name != "strict" and value is not None}


def _told(turn: Turn) -> dict[str, Any]:
    """A turn as the library takes it; who speaks, where a name is given, stands in front of the text."""
    said = turn.model_dump(exclude_none=True)
    content = said.get("content")
    if turn.name and turn.role not in ("tool", "function") and content:
        parts = [content] if isinstance(content, str) else content
        content = [f"{turn.name}: ", *parts]
    return {**said, "content": content}
