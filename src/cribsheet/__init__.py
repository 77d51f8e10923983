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
    "SCORERS": "compress.scoring",
    "Answer": "asking.answer",
    "AnswerStream": "asking.streams",
    "AsyncAnswerStream": "asking.streams",
    "BM25Retriever": "retrieval.retriever",
    "Backbone": "model.backbone",
    "BudgetError": "errors",
    "BuildOptions": "plan.options",
    "CompressedKnowledgeLLM": "llm",
    "CribsheetError": "errors",
    "DenseRetriever": "retrieval.dense",
    "Document": "corpus.documents",
    "DocumentError": "errors",
    "EngineError": "errors",
    "MismatchError": "errors",
    "ModelError": "errors",
    "Passage": "retrieval.retriever",
    "RequestError": "errors",
    "Retention": "sheet.manifest",
    "Retrieval": "asking.settings",
    "Router": "asking.router",
    "SamplingParams": "engine.sampling",
    "Sheet": "sheet.sheet",
    "SheetCache": "sheet.cache",
    "SheetError": "errors",
    "Source": "asking.answer",
    "Task": "corpus.task",
    "Tool": "structured.tools",
    "ToolCall": "structured.tools",
    "Usage": "asking.answer",
    "as_retriever": "retrieval.retriever",
    "build_sheet": "build",
    "load_sheet": "sheet.registry",
    "read_documents": "corpus.documents",
    "save_sheet": "sheet.file",
}
_NAMES = {"load_sheet": "load", "save_sheet": "save"}

__all__ = [
    "SCORERS",
    "Answer",
    "AnswerStream",
    "AsyncAnswerStream",
    "BM25Retriever",
    "Backbone",
    "BudgetError",
    "BuildOptions",
    "CompressedKnowledgeLLM",
    "CribsheetError",
    "DenseRetriever",
    "Document",
    "DocumentError",
    "EngineError",
    "MismatchError",
    "ModelError",
    "Passage",
    "RequestError",
    "Retention",
    "Retrieval",
    "Router",
    "SamplingParams",
    "Sheet",
    "SheetCache",
    "SheetError",
    "Source",
    "Task",
    "Tool",
    "ToolCall",
    "Usage",
    "__version__",
    "as_retriever",
    "build_sheet",
    "load_sheet",
    "read_documents",
    "save_sheet",
]

if TYPE_CHECKING:
    from cribsheet.asking.answer import Answer, Source, Usage
    from cribsheet.asking.router import Router
    from cribsheet.asking.settings import Retrieval
    from cribsheet.asking.streams import AnswerStream, AsyncAnswerStream
    from cribsheet.build import build_sheet
    from cribsheet.compress.scoring import SCORERS
    from cribsheet.corpus.documents import Document, read_documents
    from cribsheet.corpus.task import Task
    from cribsheet.engine.sampling import SamplingParams
    from cribsheet.errors import (
        BudgetError,
        CribsheetError,
        DocumentError,
        EngineError,
        MismatchError,
        ModelError,
        RequestError,
        SheetError,
    )
    from cribsheet.llm import CompressedKnowledgeLLM
    from cribsheet.model.backbone import Backbone
    from cribsheet.plan.options import BuildOptions
    from cribsheet.retrieval.dense import DenseRetriever
    from cribsheet.retrieval.retriever import BM25Retriever, Passage, as_retriever
    from cribsheet.sheet.cache import SheetCache
    from cribsheet.sheet.file import save as save_sheet
    from cribsheet.sheet.manifest import Retention
    from cribsheet.sheet.registry import load as load_sheet
    from cribsheet.sheet.sheet import Sheet
    from cribsheet.structured.tools import Tool, ToolCall


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'cribsheet' has no attribute {name!r}")
    value = getattr(import_module(f"cribsheet.{_HOMES[name]}"), _NAMES.get(name, name))
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
