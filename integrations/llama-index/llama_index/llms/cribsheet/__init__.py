"""LlamaIndex over a sheet: an LLM, a query engine and a retriever that answer from it.

from cribsheet import CompressedKnowledgeLLM

kb = CompressedKnowledgeLLM.load("staff.sheet")
query_engine = kb.as_query_engine()  # where `index.as_query_engine()` was
Settings.llm = kb.as_llama_index_llm()
"""

from llama_index.llms.cribsheet.base import CribsheetLLM
from llama_index.llms.cribsheet.llama_cpp import CribsheetLlamaCppLLM
from llama_index.llms.cribsheet.query_engine import CompressedKnowledgeQueryEngine
from llama_index.llms.cribsheet.retriever import CribsheetRetriever, SheetNode
from llama_index.llms.cribsheet.synthesizer import CribsheetSynthesizer

__all__ = [
    "CompressedKnowledgeQueryEngine",
    "CribsheetLLM",
    "CribsheetLlamaCppLLM",
    "CribsheetRetriever",
    "CribsheetSynthesizer",
    "SheetNode",
]
