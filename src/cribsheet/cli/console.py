"""What all commands share: streams, the library's messages, errors and exit codes, signals, quiet libraries."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer

from cribsheet.compress.progress import Progress, shown
from cribsheet.corpus.printable import in_line, json_text, plain
from cribsheet.errors import CribsheetError, EngineError, SheetError

FAILURE, MISUSE, INTERRUPTED, TERMINATED = 1, 2, 130, 143

# Options that the library's messages name, all of which some command has under the same name.
OPTIONS = (
    *("allocation", "archive", "budget", "check", "chunk_tokens", "correction", "device", "for_engines", "gguf"),
    *(
        "guide",
        "learning_rate",
        "max_tokens",
        "minutes",
        "mode",
        "no_archive",
        "passage_tokens",
        "rate",
        "retain",
        "retriever",
        "scorer",
        "seed",
        "steps",
        "study",
        "study_steps",
        "system",
    ),
    *("task", "temperature", "timeout", "top_k", "top_p"),
)
_CALLS = {  # what is done by a call in Python
    "`kb.sheet.documents` lists": "`cribsheet inspect` lists",
    "`CompressedKnowledgeLLM.build` and save it": "`cribsheet build`",
    "DenseRetriever(documents, model=...)": "--dense-model",
    "build(..., archive=True)": "`cribsheet build --archive`",
    "archive='int4'": "--archive-dtype int4",
    "archive_folder=": "--output",  # beside which an archive is begun
    "; to pass text, wrap it in Document(text, id)": "; name files, folders or patterns, and write what comes by a "
    "pipe into a file first",
    ", or pass its text in Document(text, id)": "",
}
_NAMES = "|".join(OPTIONS)
_LONG = "|".join(name for name in OPTIONS if "_" in name)
_SAID = re.compile(
    rf"""(?<![\w'"/-])(?P<name>{_NAMES})=(?P<value>'[^']*'|"[^"]*"|-?\d+\.\d+|-?\w+)?"""  # guide='dropped', task=
    r"""(?![\w/]|\.\w)"""  # no name of a file
    rf"""|(?<![\w'"=/-])(?P<bare>{_LONG})(?![\w'"=/]|\.\w)"""  # chunk_tokens
    r"""|(?<![\w'"/-])dtype='(?P<stored>int[48])'(?![\w/]|\.\w)"""  # which no model computes in
    r"""|(?<!\w)'[^']*'(?!\w)|(?<!\w)"[^"]*"(?!\w)"""  # a quotation
)


class Terminated(BaseException):
    """SIGTERM arrived; a BaseException so that whatever is half done is cleaned up and nothing swallows it."""


class _State:
    verbose = False
    debug = False


def _set(name: str) -> Callable[[bool], None]:
    return lambda wanted: setattr(_State, name, True) if wanted else None


Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="Show what the libraries say.", callback=_set("verbose"), is_eager=True)
]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.", callback=_set("debug"), is_eager=True)]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Device = Annotated[str | None, typer.Option(metavar="NAME", help="cuda, mps or cpu; the best there is by default.")]
Revision = Annotated[str | None, typer.Option(metavar="NAME", help="Revision of the model, for an id.")]


def say(text: str = "", end: str = "\n") -> None:
    """Print to stdout: answers and results, `plain`."""
    sys.stdout.write(plain(text) + end)
    sys.stdout.flush()


def say_json(data: Any) -> None:
    """Print one JSON object to stdout."""
    say(json_text(data, indent=2))


def note(text: str) -> None:
    """Print to stderr, `plain`: everything that is not a result."""
    sys.stderr.write(plain(text) + "\n")
    sys.stderr.flush()


def in_flags(message: str) -> str:
    """A message of the library in the words of the command line: `guide='dropped'` as `--guide dropped`.

    What stands in quotes is somebody's own and stays, as do names of files.
    """
    for python, here in _CALLS.items():
        message = message.replace(python, here)
    return _SAID.sub(_flag, message)


def _flag(said: re.Match[str]) -> str:
    name, value = said["name"] or said["bare"], said["value"] or ""
    if name is None:
        return f"--storage-dtype {said['stored']}" if said["stored"] else said[0]
    flag = f"--{name.replace('_', '-')}"
    return flag if value in ("", "True") else f"{flag} {value.strip(chr(39) + chr(34))}"


class _PlainLines(logging.Formatter):
    """A record in a line, but for tracebacks, and `plain`: it may name files and documents."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return plain(text) if record.exc_info else in_line(text)


def misuse(message: str) -> NoReturn:
    """Refuse the arguments, before any work."""
    raise typer.BadParameter(message)


def guarded(command: Callable[[], object]) -> int:
    """Run a command and return its exit code; errors become one line on stderr, interruptions a code."""
    _State.verbose = _State.debug = False
    _never_fail_to_print()
    try:
        with _terminable():
            result = command()
        if result == INTERRUPTED:  # typer turns Ctrl-C into this
            raise KeyboardInterrupt
        return result if isinstance(result, int) else 0
    except BaseException as error:  # the last stop: whatever comes becomes an exit code
        return _reported(error)


def _reported(error: BaseException) -> int:
    if isinstance(error, BrokenPipeError):  # the reader of our output has left; nothing can be told there
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILURE
    if isinstance(error, KeyboardInterrupt | Terminated):
        note("cribsheet: interrupted")
        return TERMINATED if isinstance(error, Terminated) else INTERRUPTED
    if not isinstance(error, Exception):
        raise error
    if _State.debug:
        note(traceback.format_exc())
    message, code = _described(error)
    if message:
        note(f"cribsheet: error: {' '.join(message.split())}")
    return code


def _described(error: Exception) -> tuple[str, int]:
    """One line and the exit code for an error."""
    if isinstance(error, CribsheetError):
        return in_flags(str(error)), FAILURE if isinstance(error, SheetError | EngineError) else MISUSE
    if isinstance(error, typer.TyperException):  # wrong arguments, and `no_args_is_help`, which has shown the help
        shown: str = getattr(error, "format_message", lambda: str(error))()
        context = getattr(error, "ctx", None)
        if type(error).__name__ == "NoArgsIsHelpError":
            note(shown)
            return "", MISUSE
        hint = f" (see {context.command_path} --help)" if context is not None else ""
        return shown.rstrip() + hint, MISUSE
    if isinstance(error, OSError):
        return str(error), FAILURE
    return f"{type(error).__name__}: {error} (--debug shows where)", FAILURE


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Turn SIGTERM into `Terminated` while inside, so that unfinished files are removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        raise Terminated

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _never_fail_to_print() -> None:
    """Characters that the terminal's encoding lacks become question marks instead of a crash."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]


class _InFlags(_PlainLines):
    """Log lines of the library, in the words of the command line."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        return in_flags(super().format(record))


def quiet_libraries() -> None:
    """Silence what transformers and others say, unless --verbose; call before they are imported."""
    lines = logging.StreamHandler(sys.stderr)
    lines.setFormatter(_InFlags("cribsheet: %(message)s"))
    logging.basicConfig(handlers=[lines], level=logging.INFO if _State.verbose else logging.WARNING)
    if _State.verbose:
        return
    warnings.simplefilter("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from transformers.utils import logging as library

    library.disable_progress_bar()
    library.set_verbosity_error()
    for name in ("transformers", "huggingface_hub", "torch", "pypdf"):
        logging.getLogger(name).setLevel(logging.ERROR)


def calm_threads(environment: MutableMapping[str, str] = os.environ, groups: Path = Path("/sys/fs/cgroup")) -> None:
    """Let torch's threads sleep while they wait for each other, and be no more than there are processors to run them.

    By default they spin, and on a busy machine each small operation then waits for a whole turn of somebody else's.
    What the user has set stays. Call before torch is imported: it is read once, and holds for the process.
    """
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    allowed = _processors_of_group(groups)
    if allowed is not None and allowed < _processors():  # what a container may use, which torch does not ask
        environment.setdefault("OMP_NUM_THREADS", str(max(1, int(allowed))))


def _processors() -> int:
    """On how many this process may run, as torch counts them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processors_of_group(groups: Path) -> float | None:
    """How many processors the control group of this process may use; none if there is no bound."""
    try:
        if (both := groups / "cpu.max").is_file():
            quota, period = both.read_text().split()
        else:
            quota, period = ((groups / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        bound = float(quota) / float(period)
    except (OSError, ValueError):  # no control groups, or "max"
        return None
    return bound if bound > 0 else None


def build_progress(*, hidden: bool = False) -> AbstractContextManager[Progress | None]:
    """What `build_sheet(progress=)` takes: shows tokens read, tokens/s and time left until the block is left."""
    return shown(not hidden)
