"""`cribsheet ask` and `cribsheet chat`: questions to a sheet file."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cribsheet.cli.console import AsJson, misuse, note, quiet_libraries, say, say_json
from cribsheet.cli.options import ModelOptions, PassageOptions, SamplingOptions, SheetFile, flat, given
from cribsheet.corpus.printable import in_line
from cribsheet.errors import RequestError

if TYPE_CHECKING:
    from cribsheet.asking.answer import Answer, Source
    from cribsheet.asking.llama_cpp.llm import LlamaCpp
    from cribsheet.llm import CompressedKnowledgeLLM


@flat
def ask(
    file: SheetFile,
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="What to ask.")],
    model: ModelOptions,
    sampling: SamplingOptions,
    passages: PassageOptions,
    sources: Annotated[bool, typer.Option("--sources", help="Show where in the documents the answer looked.")] = False,
    stream: Annotated[bool, typer.Option("--stream", help="Show the answer while it is written.")] = False,
    gguf: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Let llama.cpp answer, by this GGUF of the sheet's model."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Ask one question."""
    if stream and as_json:
        misuse("--json prints one object at the end, so it cannot be combined with --stream")
    kb: CompressedKnowledgeLLM | LlamaCpp
    if gguf is not None:
        kb, settings = _opened_in_llama_cpp(file, gguf, model, sampling, passages, sources=sources)
    else:
        kb, settings = _opened(file, model, sampling, passages)
        settings["evidence"] = sources
    with contextlib.closing(kb):
        answer = _streamed(kb, question, settings) if stream else kb.ask(question, **settings)
    looked_at = list(answer.sources)
    if as_json:
        say_json(_answer_data(question, answer) | ({"sources": [asdict(x) for x in looked_at]} if sources else {}))
        return
    if not stream:
        say(answer.text)
    if sources:
        say("\n" + "\n".join(source_lines(looked_at)))


@flat
def chat(
    file: SheetFile,
    model: ModelOptions,
    sampling: SamplingOptions,
    passages: PassageOptions,
    as_json: AsJson = False,
) -> None:
    """Ask question after question, one a line.

    Later questions may refer to earlier ones. It ends with the input (Ctrl-D).
    """
    kb, settings = _opened(file, model, sampling, passages)
    by_hand = sys.stdin.isatty() and not as_json
    messages: list[dict[str, str]] = []
    turns: list[dict[str, Any]] = []
    for question in _questions(by_hand):
        asked = [*messages, {"role": "user", "content": question}]
        try:
            answer = kb.ask(asked, **settings) if as_json else _streamed(kb, asked, settings)
        except RequestError as error:
            if not by_hand:
                raise
            note(f"cribsheet: {error}")
            continue
        messages = [*asked, {"role": "assistant", "content": answer.text}]
        turns.append(_answer_data(question, answer))
    if as_json:
        say_json({"turns": turns})


def source_lines(sources: list[Source]) -> list[str]:
    """One line for each source: its share of the attention, document, place, whether it was retrieved, and text."""
    return [
        f"{source.weight:4.0%}  {in_line(source.document_id)} [{source.start}:{source.stop}]"
        f"{'  retrieved' if source.retrieved else ''}  {' '.join(source.text.split())}"
        for source in sources
    ]


def _opened(
    file: str, model: ModelOptions, sampling: SamplingOptions, passages: PassageOptions
) -> tuple[CompressedKnowledgeLLM, dict[str, Any]]:
    """A sheet with its model, and what is to be asked with."""
    quiet_libraries()
    from cribsheet.llm import CompressedKnowledgeLLM

    kb = CompressedKnowledgeLLM.load(file, **given(model))
    settings = given(sampling) | given(passages)
    dense = settings.pop("dense_model", None)
    if dense is not None:
        from cribsheet.retrieval.dense import DenseRetriever

        settings["retriever"] = DenseRetriever(kb.sheet.documents, model=dense)
    return kb, settings


def _opened_in_llama_cpp(
    file: str,
    gguf: str,
    model: ModelOptions,
    sampling: SamplingOptions,
    passages: PassageOptions,
    *,
    sources: bool,
) -> tuple[LlamaCpp, dict[str, Any]]:
    """A sheet in llama.cpp, and what is to be asked with; refuses what only our own engine has."""
    ours = {"sources": True} if sources else {}
    if given(passages) or ours or model.device or model.dtype:
        named = [*given(passages), *ours, *(name for name in ("device", "dtype") if getattr(model, name))]
        misuse(f"--{named[0].replace('_', '-')} is of our own engine, and with --gguf llama.cpp answers; leave one out")
    quiet_libraries()
    from cribsheet.asking.llama_cpp.llm import LlamaCpp
    from cribsheet.model.backbone import load_tokenizer
    from cribsheet.sheet.registry import load

    sheet, tokenizer = load(file), None
    if model.model is not None or model.revision is not None:
        tokenizer = load_tokenizer(model.model or sheet.manifest.fingerprint.model, model.revision)
    return LlamaCpp(sheet, gguf, tokenizer=tokenizer), given(sampling)


def _streamed(kb: CompressedKnowledgeLLM | LlamaCpp, question: Any, settings: dict[str, Any]) -> Answer:
    """Ask, and print the text piece by piece."""
    with kb.stream(question, **settings) as stream:
        for piece in stream:
            say(piece, end="")
    say()
    return stream.answer


def _questions(by_hand: bool) -> Iterator[str]:
    """Lines of the input that are not blank; with a prompt when somebody types them."""
    if not by_hand:
        yield from (line.strip() for line in sys.stdin if line.strip())
        return
    while True:
        try:
            line = input("> ")
        except EOFError:
            note("")
            return
        if line.strip():
            yield line.strip()


def _answer_data(question: str, answer: Answer) -> dict[str, Any]:
    return {
        "question": question,
        "answer": answer.text,
        "finish_reason": answer.finish_reason,
        "usage": asdict(answer.usage),
        "seconds": round(answer.seconds, 4),
        "first_token_seconds": round(answer.first_token_seconds, 4),
        "mode": answer.mode,
        "passages": [asdict(passage) for passage in answer.passages],
        "certainty": answer.certainty,
    }
