"""`LlamaCpp`: a sheet and a GGUF of the model that made it, asked as `CompressedKnowledgeLLM` is.

The sheet is exported once, into a folder that goes when it is closed, and restored into each slot of the server.
Questions are put into tokens by the sheet's own template, so the model reads what it reads here.
Where an answer looked is not known: that takes our attention.
"""

from __future__ import annotations

import os
import queue
import shutil
import time
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, Unpack

from cribsheet.asking.answer import Answer, Usage
from cribsheet.asking.llama_cpp.server import LlamaServer, ServerOptions
from cribsheet.asking.outside.prompts import Prompts
from cribsheet.engine.sampling import SamplingParams
from cribsheet.engines.gguf import Gguf
from cribsheet.errors import EngineError, MismatchError, RequestError, WindowError
from cribsheet.prompt.turns import Question
from cribsheet.sheet.leftovers import hold, temporary_folder
from cribsheet.sheet.sheet import Sheet

if TYPE_CHECKING:
    from cribsheet.asking.options import LlamaCppSampling

_STATE, _FOLDER = "sheet.state", ".llama.cpp"
SAMPLED = ("max_tokens", "temperature", "top_p", "top_k", "seed", "stop", "frequency_penalty", "presence_penalty")
SETTINGS = (*SAMPLED, "json_schema", "timeout")
OPTIONS = ("slots", "room", "threads", "gpu_layers")
_REASONS: dict[str, Any] = {"limit": "length"}


class LlamaCpp:
    """A sheet that llama.cpp answers from. Thread-safe; so many questions at a time as it has slots.

    sheet
        a sheet, or its path; built with `for_engines=True`.
    gguf
        the file of the model that made it, of any quantisation.
    tokenizer
        that model's, or its folder or hub id; loaded from where the sheet says by default, without its weights.
    slots, room, threads, gpu_layers
        questions at a time, positions for each with its answer as far as the window has them, and what llama.cpp runs
        on.

    Attributes: `sheet`, `gguf`, `room`; `prefix`, the ids that stand for the sheet in a prompt; `server`, and the
    `folder` with the exported state.

    Raises `SheetError` for a sheet that llama.cpp cannot take, `MismatchError` for another model or tokenizer,
    `IntegrationError` without the extra `llama-cpp`, and `EngineError` for what llama.cpp cannot load.
    """

    def __init__(
        self,
        sheet: Sheet | str | Path,
        gguf: str | Path,
        *,
        tokenizer: Any = None,
        slots: int = 1,
        room: int = 2048,
        threads: int | None = None,
        gpu_layers: int = 0,
    ) -> None:
        for name, value in (("slots", slots), ("room", room)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise RequestError(f"{name} is {value!r}; use a whole number of at least 1.")
        self._prompts = Prompts(sheet, tokenizer)
        self.sheet, self.prefix, self.gguf = self._prompts.sheet, self._prompts.ids, Path(gguf)
        self.room = _room(self.sheet, Gguf.open(gguf), self._prompts.vocabulary, room)
        self.folder = temporary_folder(_FOLDER)
        self._emptying = weakref.finalize(self, _empty, self.folder, hold(self.folder), os.getpid())
        try:
            self.sheet.export(self.folder / _STATE, to="llama.cpp", gguf=gguf)
            positions = self.sheet.length + self.room
            how = ServerOptions(slots=slots, positions=positions, threads=threads, gpu_layers=gpu_layers)
            self.server = LlamaServer(Path(gguf), self.folder, how)
            self._filled = {slot for slot in range(slots) if self.server.restore(slot, _STATE)}
        except BaseException:
            if hasattr(self, "server"):
                self.server.close()
            self._emptying()
            raise

    def ask(self, question: Question, **settings: Unpack[LlamaCppSampling]) -> Answer:
        """Answer a question, or the last turn of a conversation.

        `settings` are those of `SamplingParams` that llama.cpp has, `json_schema` and `timeout`. Raises `RequestError`
        for others and for penalties, `WindowError` for a question that leaves no room, `EngineError` when time is up.
        """
        with self.stream(question, **settings) as stream:
            for _ in stream:
                pass
        return stream.answer

    def stream(self, question: Question, **settings: Unpack[LlamaCppSampling]) -> LlamaStream:
        """As `ask`, but the text as it is written: iterate for pieces, then read `.answer`."""
        wanted: dict[str, Any] = {name: value for name, value in settings.items() if value is not None}
        if unknown := sorted(set(wanted) - set(SETTINGS)):
            raise RequestError(
                f"llama.cpp answers without {', '.join(unknown)}; use {', '.join(SETTINGS)}, or ask the sheet here."
            )
        timeout, schema = wanted.pop("timeout", None), wanted.pop("json_schema", None)
        params = SamplingParams(**wanted)
        _check_penalties(params)
        ids = self._prompts.question(question)
        left = self.room - len(ids)
        if left < 1:
            raise WindowError(
                f"The question takes {len(ids)} tokens, and there is room={self.room} for question and answer behind "
                f"the sheet of {self.sheet.length}; ask a shorter question, or open it with more room."
            )
        told = _completion(params, min(params.max_tokens, left)) | ({"json_schema": schema} if schema else {})
        return LlamaStream(self._pieces(ids, told, timeout), len(self.prefix), len(ids), timeout)

    def _pieces(self, ids: list[int], told: Mapping[str, Any], timeout: float | None) -> Iterator[dict[str, Any]]:
        """What llama.cpp says of an answer, on a slot that is then free again."""
        server, prompt, ended = self.server, [*self.prefix, *ids], False
        try:
            slot = server.free.get(timeout=None if timeout is None else max(0.0, timeout))
        except queue.Empty:
            raise EngineError(
                f"No slot of llama.cpp became free within timeout={timeout} seconds; allow more, or open the sheet "
                "with more slots."
            ) from None
        try:
            if slot not in self._filled:
                server.restore(slot, _STATE)
                self._filled.add(slot)
            with server.complete(slot, prompt, told) as said:
                for piece in said:
                    if piece.get("timings", {}).get("cache_n", len(self.prefix)) < len(self.prefix):
                        self._filled.discard(slot)  # it would read placeholders as if they were text
                        raise EngineError("llama.cpp lost the sheet of this slot; ask again.")
                    ended = bool(piece.get("stop"))
                    yield piece
            if not ended:
                raise EngineError("llama.cpp was closed before the answer was complete; open the sheet in it again.")
        finally:
            server.free.put(slot)

    def count_tokens(self, question: Question) -> int:
        """Tokens that a question or conversation takes of `room`, the template's included."""
        return len(self._prompts.question(question))

    def close(self) -> None:
        """End llama.cpp and remove the exported state; safe to call twice."""
        self.server.close()
        self._emptying()

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close it."""
        self.close()

    def __repr__(self) -> str:
        """One line."""
        return f"<LlamaCpp over {self.sheet.summary}>"


class LlamaStream:
    """Pieces of an answer as llama.cpp writes them; `.answer` is complete afterwards. For one reader."""

    def __init__(self, said: Iterator[dict[str, Any]], cached: int, asked: int, timeout: float | None) -> None:
        self._said, self._cached, self._asked, self._timeout = said, cached, asked, timeout
        self._began, self._first = time.perf_counter(), 0.0
        self._text = ""
        self._answer: Answer | None = None

    @property
    def answer(self) -> Answer:
        """The answer. Raises `RequestError` before all of it was read."""
        if self._answer is None:
            raise RequestError("The answer is not complete; iterate over the stream first.")
        return self._answer

    def __iter__(self) -> Iterator[str]:
        """Pieces of text; never empty ones."""
        for piece in self._said:
            if self._timeout is not None and time.perf_counter() - self._began > self._timeout:
                raise EngineError(
                    f"The answer was not complete after timeout={self._timeout} seconds; allow more, or ask less."
                )
            text = piece.get("content", "") if self._text else piece.get("content", "").lstrip(" ")
            self._first = self._first or time.perf_counter() - self._began
            self._text += text
            if piece.get("stop"):
                self._answer = self._finish(piece)
            if text:
                yield text

    def _finish(self, last: Mapping[str, Any]) -> Answer:
        return Answer(
            text=self._text,
            finish_reason=_REASONS.get(last.get("stop_type", ""), "stop"),
            usage=Usage(self._cached + self._asked, self._cached, last.get("tokens_predicted", 0)),
            seconds=time.perf_counter() - self._began,
            first_token_seconds=self._first,
        )

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Stop what is still being written."""
        close = getattr(self._said, "close", None)
        if close is not None:
            close()


def in_engine(kb: Any, engine: str | None, gguf: str | Path | None, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a chat model over `kb` with the engine started, as `served`, in the place of what it was given."""
    if engine != "llama.cpp" or gguf is None:
        raise RequestError(f"engine is {engine!r} and gguf {gguf!r}; use engine='llama.cpp' and the path of a GGUF.")
    how = {name: value for name, value in settings.items() if name in OPTIONS}
    sampling = {name: value for name, value in settings.items() if name not in OPTIONS}
    return {"served": kb.in_llama_cpp(gguf, **how), **sampling}


def _room(sheet: Sheet, file: Gguf, vocabulary: int, room: int) -> int:
    """Positions behind a sheet, as many as are wanted and the model's window has.

    Raises `MismatchError` for a file that knows fewer tokens than the sheet's tokenizer, `WindowError` for a window
    that the sheet fills.
    """
    if file.vocabulary and file.vocabulary < vocabulary:
        raise MismatchError(
            f"{str(file.path)!r} knows {file.vocabulary} tokens and the sheet's tokenizer {vocabulary}; give the GGUF "
            "of the model that made the sheet."
        )
    window = file.count("context_length", sheet.length + room)
    if window <= sheet.length:
        raise WindowError(
            f"The sheet takes {sheet.length} positions, and the window of {str(file.path)!r} has {window}; build it at "
            "a higher rate."
        )
    return int(min(room, window - sheet.length))


def _empty(folder: Path, held: int | None, maker: int) -> None:
    if os.getpid() == maker:  # a forked child ends, or lets go of its copy, while the parent needs the folder
        shutil.rmtree(folder, ignore_errors=True)
    if held is not None:
        os.close(held)


def _check_penalties(params: SamplingParams) -> None:
    """Raise `RequestError` for penalties: llama.cpp counts for them what stands in the prompt, too."""
    for name in ("frequency_penalty", "presence_penalty"):
        if value := getattr(params, name):
            raise RequestError(
                f"{name} is {value}, and llama.cpp would count the ids that stand for the sheet as if they had been "
                "said; leave it out, or ask the sheet here."
            )


def _completion(params: SamplingParams, longest: int) -> dict[str, Any]:
    """Settings as llama.cpp's server names them; what it adds by default is turned off."""
    return {
        "n_predict": longest,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": params.top_k,
        "min_p": 0.0,
        "repeat_penalty": 1.0,
        "stop": list(params.stops),
        **({} if params.seed is None else {"seed": params.seed % (1 << 32)}),
    }
