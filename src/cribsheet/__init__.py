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
    "Answer": "answer",
    "Backbone": "backbone",
    "CompressedKnowledgeLLM": "llm",
    "CribsheetError": "errors",
    "Document": "documents",
    "SCORERS": "scoring",
    "Sheet": "sheet",
    "SheetCache": "sheet_cache",
    "Task": "task",
    "build_sheet": "build",
    "load_sheet": "registry",
    "read_documents": "documents",
    "save_sheet": "storage",
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
    from cribsheet.answer import Answer
    from cribsheet.backbone import Backbone
    from cribsheet.build import build_sheet
    from cribsheet.documents import Document, read_documents
    from cribsheet.errors import CribsheetError
    from cribsheet.llm import CompressedKnowledgeLLM
    from cribsheet.registry import load as load_sheet
    from cribsheet.scoring import SCORERS
    from cribsheet.sheet import Sheet
    from cribsheet.sheet_cache import SheetCache
    from cribsheet.storage import save as save_sheet
    from cribsheet.task import Task


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'cribsheet' has no attribute {name!r}")
    value = getattr(import_module(f"cribsheet.{_HOMES[name]}"), _NAMES.get(name, name))
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
