"""What may be asked, field by field; anything else is refused by name.

A field that is here has an effect, or allows only what holds anyway; `docs/reference/http-api.md` tells which.
Every list and mapping has a limit, and its first fault ends it, so that a bad request costs little.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator

from cribsheet.engine.sampling import MAX_STOPS, MAX_TOP_LOGPROBS
from cribsheet.prompt.turns import TEXTS, is_not_said, not_read
from cribsheet.vocabulary import Mode, NoArchive

_Name = Annotated[str, Field(min_length=1, max_length=128)]
_StopText = Annotated[str, Field(min_length=1, max_length=1024)]
_MAX_CHOICES = 128
_MAX_PASSAGES = 100
_MAX_TURNS = 2048
_MAX_PARTS = 1024
_MAX_CALLS = _MAX_TOOLS = 128
_MAX_BIASES = 1024
_MAX_METADATA = 16
_MAX_FIELDS = 64  # more than any object here has

_T = TypeVar("_T")
_Turns = Annotated[list[_T], Field(min_length=1, max_length=_MAX_TURNS, fail_fast=True)]
_Parts = Annotated[list[_T], Field(max_length=_MAX_PARTS, fail_fast=True)]
_Calls = Annotated[list[_T], Field(max_length=_MAX_CALLS, fail_fast=True)]


def _mapping(limit: int, fits: Callable[[str, Any], bool]) -> BeforeValidator:
    """Refuse a larger mapping before anything in it is looked at, and of one with faults leave the first alone."""

    def check(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        if len(value) > limit:
            raise ValueError(f"it has {len(value)} entries; give at most {limit}.")
        return next(({name: each} for name, each in value.items() if not fits(name, each)), value)

    return BeforeValidator(check)


def _is_bias(token: str, bias: Any) -> bool:
    return token.isascii() and token.isdigit() and len(token) <= 9 and type(bias) in (int, float) and abs(bias) <= 100


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _read(cls, data: Any) -> Any:
        """Refuse more fields than any object here has, and drop those that are null.

        A null asks for nothing, whatever its name: clients write out all that they know.
        """
        if not isinstance(data, dict):
            return data
        if len(data) > _MAX_FIELDS:
            raise ValueError(f"it has {len(data)} fields, most of which are not supported; leave those out.")
        return {name: value for name, value in data.items() if value is not None}


_NotRead = Annotated[Any, Field(default=None, exclude=True, description="What other servers tell beside; not read.")]


def _is_read(kind: Any) -> Any:
    if isinstance(kind, str) and kind not in TEXTS:
        raise ValueError(not_read(kind))
    return kind


class TextPart(_Strict):
    """A piece of a turn's text."""

    type: Annotated[Literal["text"], BeforeValidator(_is_read)]
    text: str
    cache_control: _NotRead


class RefusalPart(_Strict):
    """What the assistant said instead of an answer."""

    type: Literal["refusal"]
    refusal: str


class NotSaid(_Strict):
    """What else other providers' models leave in a turn: thoughts, and calls and results in their own forms."""

    model_config = ConfigDict(extra="allow")

    type: str


def _part_of(data: Any) -> str:
    kind = data.get("type") if isinstance(data, dict) else getattr(data, "type", None)
    return "a refusal" if kind == "refusal" else "not said" if is_not_said(kind) else "a text"


_Part = Annotated[
    Annotated[TextPart, Tag("a text")] | Annotated[RefusalPart, Tag("a refusal")] | Annotated[NotSaid, Tag("not said")],
    Discriminator(_part_of),
]


class FunctionCalled(_Strict):
    """Which function was called, with what; `arguments` is JSON in a text."""

    name: _Name
    arguments: str = ""
    parsed_arguments: _NotRead


class CustomCalled(_Strict):
    """Which tool was called, with a text that is no JSON."""

    name: _Name
    input: str = ""


class _Past(_Strict):
    id: str | None = None
    index: int | None = None
    extra_content: _NotRead
    provider_specific_fields: _NotRead


class PastCall(_Past):
    """A call that the assistant made in an earlier turn."""

    type: Literal["function"] = "function"
    function: FunctionCalled


class PastCustomCall(_Past):
    """A call of a tool that takes a text; such tools are told of here, but cannot be offered."""

    type: Literal["custom"] = "custom"
    custom: CustomCalled


def _call_of(data: Any) -> str:
    if not isinstance(data, dict):
        return "a custom call" if isinstance(data, PastCustomCall) else "a function's call"
    kind = data.get("type") or ("custom" if data.get("custom") else "function")
    return "a custom call" if kind == "custom" else "a function's call"


_AnyCall = Annotated[
    Annotated[PastCall, Tag("a function's call")] | Annotated[PastCustomCall, Tag("a custom call")],
    Discriminator(_call_of),
]


class Turn(_Strict):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | _Parts[_Part] | None = None
    name: _Name | None = None
    tool_calls: _Calls[_AnyCall] | None = None
    tool_call_id: str | None = None
    function_call: FunctionCalled | None = None
    refusal: str | None = None
    audio: None = None
    annotations: _NotRead
    parsed: _NotRead
    provider_specific_fields: _NotRead
    reasoning: _NotRead
    reasoning_content: _NotRead
    reasoning_details: _NotRead
    thinking: _NotRead
    thinking_blocks: _NotRead


class Function(_Strict):
    """A function that may be called; `parameters` is a JSON schema."""

    name: _Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolOffered(_Strict):
    """A tool that the model may call."""

    type: Literal["function"]
    function: Function


class FunctionNamed(_Strict):
    """The name of a function."""

    name: _Name


class ToolChosen(_Strict):
    """The one tool that must be called."""

    type: Literal["function"]
    function: FunctionNamed


class SchemaNamed(_Strict):
    """A JSON schema with the name that OpenAI's API asks for."""

    name: str
    schema_: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = None


class AsText(_Strict):
    """An answer of any form."""

    type: Literal["text"]


class AsJsonObject(_Strict):
    """An answer that is a JSON object."""

    type: Literal["json_object"]


class AsJsonSchema(_Strict):
    """An answer that fits a schema."""

    type: Literal["json_schema"]
    json_schema: SchemaNamed


class StreamOptions(_Strict):
    """What a stream tells beside the text."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class Extension(_Strict):
    """What sheets can do beyond OpenAI's API.

    `evidence` tells what an answer looked at, and `sources` does for so many documents. Other modes than "sheet" tell
    passages of the sheet's own documents after it, at most `top_k` in `passage_tokens`; `sure` is for "auto". For
    "recall", the `retriever` "sheet" lets the sheet itself point to them, and with the `no_archive` "sheet" it answers
    alone where nothing can be recalled.
    """

    evidence: bool | None = None
    sources: int | None = Field(default=None, ge=0, le=20)
    mode: Mode | None = None
    top_k: int | None = Field(default=None, ge=1, le=_MAX_PASSAGES)
    passage_tokens: int | None = Field(default=None, ge=1)
    sure: float | None = Field(default=None, ge=0, le=1)
    retriever: Literal["sheet"] | None = None
    no_archive: NoArchive | None = None

    @property
    def retrieves(self) -> bool:
        """Whether passages may be told."""
        return self.mode not in (None, "sheet")

    @property
    def replies(self) -> bool:
        """Whether the reply has an extension field too."""
        return bool(self.evidence or self.sources or self.mode)


class Asked(_Strict):
    """Fields that both kinds of completion have."""

    model: str = Field(description="The name of a sheet, as in /v1/models.")
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    logit_bias: (
        Annotated[
            dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]],
            Field(max_length=_MAX_BIASES),
            _mapping(_MAX_BIASES, _is_bias),
        ]
        | None
    ) = None
    max_tokens: int | None = Field(default=None, ge=1)
    n: int | None = Field(default=None, ge=1, le=_MAX_CHOICES)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    seed: int | None = None
    stop: _StopText | Annotated[list[_StopText], Field(max_length=MAX_STOPS, fail_fast=True)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_k: int | None = Field(default=None, ge=0, description="An extension: draw from that many tokens.")
    top_p: float | None = Field(default=None, ge=0, le=1)
    user: str | None = Field(default=None, description="Logged as a digest.")
    cribsheet: Extension | None = None

    @model_validator(mode="before")
    @classmethod
    def _is_text(cls, data: Any) -> Any:
        try:
            json.dumps(data, ensure_ascii=False, default=repr).encode()
        except UnicodeEncodeError:
            raise ValueError("it holds half a surrogate pair, which is no text; repair the encoding.") from None
        return data

    @property
    def has_form(self) -> bool:
        """Whether the answer may need a grammar, which takes long to make."""
        return False

    @property
    def choices(self) -> int:
        """How many answers are wanted."""
        return self.n or 1

    @property
    def extension(self) -> Extension:
        """The extension fields, given or not."""
        return self.cribsheet or Extension()

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with token counts."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only for stream=true; leave it out, or stream.")
        return self


class ChatRequest(Asked):
    """The body of /v1/chat/completions."""

    messages: _Turns[Turn]
    logprobs: bool | None = None
    max_completion_tokens: int | None = Field(default=None, ge=1)
    metadata: (
        Annotated[
            dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]],
            Field(max_length=_MAX_METADATA),
            _mapping(_MAX_METADATA, lambda _, value: isinstance(value, str)),
        ]
        | None
    ) = Field(default=None, description="Logged with the request.")
    modalities: Annotated[list[Literal["text"]], Field(max_length=8, fail_fast=True)] | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Literal["none"] | None = None
    response_format: AsText | AsJsonObject | AsJsonSchema | None = None
    service_tier: Literal["auto", "default"] | None = None
    store: Literal[False] | None = None
    tool_choice: Literal["none", "auto", "required", "any"] | ToolChosen | None = None
    tools: Annotated[list[ToolOffered], Field(max_length=_MAX_TOOLS, fail_fast=True)] | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)

    @property
    def has_form(self) -> bool:
        """Whether the answer may need a grammar, which takes long to make."""
        form, choice = self.response_format, self.tool_choice
        return (form is not None and form.type != "text") or choice not in (None, "none", "auto")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs is only for logprobs=true; leave it out, or ask for logprobs.")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens differ; give one of them.")
        return self


class CompletionRequest(Asked):
    """The body of /v1/completions; each prompt is a question of its own."""

    prompt: str | Annotated[list[str], Field(min_length=1, max_length=_MAX_CHOICES, fail_fast=True)]
    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None
    logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    suffix: None = None

    @property
    def prompts(self) -> list[str]:
        """The questions."""
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt
