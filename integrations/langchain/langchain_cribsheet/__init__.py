"""LangChain over a sheet: a chat model that answers from it, and a retriever of what it looks at.

from langchain_cribsheet import ChatCribsheet

llm = ChatCribsheet(sheet="staff.sheet")
llm.invoke("Where does Alice work?").content
"""

from langchain_cribsheet.chat_model import ChatCribsheet
from langchain_cribsheet.llama_cpp import ChatCribsheetLlamaCpp
from langchain_cribsheet.messages import source_documents
from langchain_cribsheet.retriever import CribsheetRetriever

__all__ = ["ChatCribsheet", "ChatCribsheetLlamaCpp", "CribsheetRetriever", "source_documents"]
