"""cribsheet condenses a corpus into a sheet: a task-aware compressed KV cache that a local model answers from.

    from cribsheet import CompressedKnowledgeLLM

    kb = CompressedKnowledgeLLM.build("docs/", task="Answer questions about the staff.", rate=8)
    kb.ask("Where does Alice work?").text

Everything public is listed below and imported on first use, so that `import cribsheet` stays fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "Answer": "asking.answer",
    "Backbone": "model.backbone",
    "CompressedKnowledgeLLM": "llm",
    "CribsheetError": "errors",
    "Document": "corpus.documents",
    "SCORERS": "compress.scoring",
    "Sheet": "sheet.sheet",
    "SheetCache": "sheet.cache",
    "Task": "corpus.task",
    "build_sheet": "build",
    "load_sheet": "sheet.registry",
    "read_documents": "corpus.documents",
    "save_sheet": "sheet.file",
}
_NAMES = {"load_sheet": "load", "save_sheet": "save"}

__all__ = [
    "SCORERS",
    "Answer",
    "Backbone",
    "CompressedKnowledgeLLM",
    "CribsheetError",
    "Document",
    "Sheet",
    "SheetCache",
    "Task",
    "__version__",
    "build_sheet",
    "load_sheet",
    "read_documents",
    "save_sheet",
]

if TYPE_CHECKING:
    from cribsheet.asking.answer import Answer
    from cribsheet.build import build_sheet
    from cribsheet.compress.scoring import SCORERS
    from cribsheet.corpus.documents import Document, read_documents
    from cribsheet.corpus.task import Task
    from cribsheet.errors import CribsheetError
    from cribsheet.llm import CompressedKnowledgeLLM
    from cribsheet.model.backbone import Backbone
    from cribsheet.sheet.cache import SheetCache
    from cribsheet.sheet.file import save as save_sheet
    from cribsheet.sheet.registry import load as load_sheet
    from cribsheet.sheet.sheet import Sheet


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'cribsheet' has no attribute {name!r}")
    value = getattr(import_module(f"cribsheet.{_HOMES[name]}"), _NAMES.get(name, name))
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
