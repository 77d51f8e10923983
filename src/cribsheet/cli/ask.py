"""`cribsheet ask` and `cribsheet chat`: questions to a sheet file."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cribsheet.cli.console import AsJson, Debug, Device, Revision, Verbose, misuse, note, quiet_libraries, say, say_json
from cribsheet.corpus.printable import in_line
from cribsheet.errors import RequestError

if TYPE_CHECKING:
    from cribsheet.asking.answer import Answer, Source
    from cribsheet.llm import CompressedKnowledgeLLM
    from cribsheet.retrieval.dense import DenseRetriever

SheetFile = Annotated[str, typer.Argument(metavar="FILE", help="A sheet: a file, a URL, or REGISTRY#NAME.")]
Model = Annotated[
    str | None, typer.Option(metavar="MODEL", help="The model, if it is no longer where the sheet was made.")
]
Dtype = Annotated[Literal["float32", "bfloat16", "float16"] | None, typer.Option(help="Type the model computes in.")]
MaxTokens = Annotated[int | None, typer.Option(metavar="N", help="Longest answer in tokens.  [default: 256]")]
Temperature = Annotated[
    float | None, typer.Option(metavar="X", help="0 takes the most probable token each time.  [default: 0]")
]
TopP = Annotated[
    float | None, typer.Option(metavar="X", help="Draw from the most probable tokens that sum up to this.")
]
TopK = Annotated[
    int | None,
    typer.Option(metavar="N", help="Draw from this many most probable tokens; with --retriever, passages at most."),
]
Seed = Annotated[int | None, typer.Option(metavar="N", help="Makes drawing repeatable.")]
Retriever = Annotated[
    Literal["bm25", "dense"] | None,
    typer.Option(help="Search the documents, by words or by an embedding model, and tell passages after the sheet."),
]
DenseModel = Annotated[
    str | None,
    typer.Option(metavar="MODEL", help="With --retriever dense, its model: a folder or id of sentence-transformers."),
]
Mode = Annotated[
    Literal["sheet", "retrieval", "hybrid", "auto"] | None,
    typer.Option(help="What answers; auto retrieves if passages may help.  [default: hybrid with --retriever]"),
]
PassageTokens = Annotated[int | None, typer.Option(metavar="N", help="Most tokens of passages.  [default: 512]")]
Stop = Annotated[list[str] | None, typer.Option(metavar="TEXT", help="End the answer before this text; repeatable.")]


def ask(
    file: SheetFile,
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="What to ask.")],
    model: Model = None,
    device: Device = None,
    dtype: Dtype = None,
    revision: Revision = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Seed = None,
    stop: Stop = None,
    retriever: Retriever = None,
    mode: Mode = None,
    passage_tokens: PassageTokens = None,
    dense_model: DenseModel = None,
    sources: Annotated[bool, typer.Option("--sources", help="Show where in the documents the answer looked.")] = False,
    stream: Annotated[bool, typer.Option("--stream", help="Show the answer while it is written.")] = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Ask one question."""
    if stream and as_json:
        misuse("--json prints one object at the end, so it cannot be combined with --stream")
    settings = _sampling(max_tokens, temperature, top_p, top_k, seed, stop)
    settings |= _passages(retriever, mode, passage_tokens, dense_model)
    kb = _load(file, model, device, dtype, revision)
    if dense_model is not None:
        settings["retriever"] = _dense(kb, dense_model)
    settings["evidence"] = sources
    answer = _streamed(kb, question, settings) if stream else kb.ask(question, **settings)
    looked_at = list(answer.sources)
    if as_json:
        say_json(_answer_data(question, answer) | ({"sources": [asdict(x) for x in looked_at]} if sources else {}))
        return
    if not stream:
        say(answer.text)
    if sources:
        say("\n" + "\n".join(source_lines(looked_at)))


def chat(
    file: SheetFile,
    model: Model = None,
    device: Device = None,
    dtype: Dtype = None,
    revision: Revision = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Seed = None,
    stop: Stop = None,
    retriever: Retriever = None,
    mode: Mode = None,
    passage_tokens: PassageTokens = None,
    dense_model: DenseModel = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Ask question after question, one a line.

    Later questions may refer to earlier ones. It ends with the input (Ctrl-D).
    """
    settings = _sampling(max_tokens, temperature, top_p, top_k, seed, stop)
    settings |= _passages(retriever, mode, passage_tokens, dense_model)
    kb = _load(file, model, device, dtype, revision)
    if dense_model is not None:
        settings["retriever"] = _dense(kb, dense_model)
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


def _load(
    file: str, model: str | None, device: str | None, dtype: str | None, revision: str | None
) -> CompressedKnowledgeLLM:
    quiet_libraries()
    from cribsheet.llm import CompressedKnowledgeLLM

    options = {"device": device, "dtype": dtype, "revision": revision}
    given = {name: value for name, value in options.items() if value is not None}
    return CompressedKnowledgeLLM.load(file, model=model, **given)


def _sampling(
    max_tokens: int | None,
    temperature: float | None,
    top_p: float | None,
    top_k: int | None,
    seed: int | None,
    stop: list[str] | None,
) -> dict[str, Any]:
    """The settings that were given."""
    settings = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed}
    return {name: value for name, value in (settings | {"stop": stop or None}).items() if value is not None}


def _passages(
    retriever: str | None, mode: str | None, passage_tokens: int | None, dense_model: str | None
) -> dict[str, Any]:
    """The settings of retrieval that were given."""
    if dense_model is not None and retriever != "dense":
        misuse("--dense-model is the model of --retriever dense; give both")
    given = {"retriever": retriever, "mode": mode, "passage_tokens": passage_tokens}
    return {name: value for name, value in given.items() if value is not None}


def _dense(kb: CompressedKnowledgeLLM, model: str) -> DenseRetriever:
    from cribsheet.retrieval.dense import DenseRetriever

    return DenseRetriever(kb.sheet.documents, model=model)


def _streamed(kb: CompressedKnowledgeLLM, question: Any, settings: dict[str, Any]) -> Answer:
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
