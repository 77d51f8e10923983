"""What the library says, in the words of the command line.

The library's messages name options as Python has them, `guide='dropped'`; whoever reads them here types
`--guide dropped`. What stands in quotes is somebody's own and stays, as do names of files.
"""

from __future__ import annotations

import re

# Options that the library's messages name, all of which some command has under the same name.
OPTIONS = (
    *("allocation", "budget", "check", "chunk_tokens", "correction", "device", "guide"),
    *("max_tokens", "mode", "passage_tokens", "rate", "retain", "retriever", "scorer", "seed", "system"),
    *("task", "temperature", "timeout", "top_k", "top_p"),
)
_CALLS = {  # what is done by a call in Python
    "`kb.sheet.documents` lists": "`cribsheet inspect` lists",
    "`CompressedKnowledgeLLM.build` and save it": "`cribsheet build`",
    "DenseRetriever(documents, model=...)": "--dense-model",
}
_NAMES = "|".join(OPTIONS)
_LONG = "|".join(name for name in OPTIONS if "_" in name)
_SAID = re.compile(
    rf"""(?<![\w'"/-])(?P<name>{_NAMES})=(?P<value>'[^']*'|"[^"]*"|-?\d+\.\d+|-?\w+)?"""  # guide='dropped', task=
    r"""(?![\w/]|\.\w)"""  # no name of a file
    rf"""|(?<![\w'"=/-])(?P<bare>{_LONG})(?![\w'"=/]|\.\w)"""  # chunk_tokens
    r"""|(?<!\w)'[^']*'(?!\w)|(?<!\w)"[^"]*"(?!\w)"""  # a quotation
)


def in_flags(message: str) -> str:
    """A message of the library with its options as flags."""
    for python, here in _CALLS.items():
        message = message.replace(python, here)
    return _SAID.sub(_flag, message)


def _flag(said: re.Match[str]) -> str:
    name, value = said["name"] or said["bare"], said["value"] or ""
    if name is None:
        return said[0]
    flag = f"--{name.replace('_', '-')}"
    return flag if value in ("", "True") else f"{flag} {value.strip(chr(39) + chr(34))}"
