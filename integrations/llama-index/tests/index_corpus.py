"""The documents, questions and embedding of the conformance tests."""

from __future__ import annotations

import re
from zlib import crc32

from llama_index.core.embeddings import BaseEmbedding

from cribsheet import Task
from cribsheet.corpus.documents import Document

STAFF = [
    Document("Alice Moreno lives in Lisbon. She works for Nordwind Labs and plays the violin.", "alice", {"page": 1}),
    Document("Bob Smith lives in Oslo. He works for Harbor Foods and plays chess.", "bob", {"page": 2}),
    Document("Clara Berg lives in Cairo. She works for Nordwind Labs and keeps a parrot.", "clara", {"page": 3}),
    Document("Hugo Ali lives in Quito. He works for Silver Motors and speaks Greek.", "hugo", {"page": 4}),
    Document("Nina Sato lives in Kyoto. She works for Harbor Foods and grows roses.", "nina", {"page": 5}),
]
PEOPLE = Task("Where do people live?", examples=(("Where does Bob Smith live?", "Oslo"),))
QUESTION, ANSWER = "Where does Hugo Ali live?", "Quito"
NEWCOMER = "Karl Voss lives in Turin. He works for Harbor Foods and plays tennis."


class WordEmbedding(BaseEmbedding):
    """Texts that share words are near each other; nothing to download."""

    def _get_text_embedding(self, text: str) -> list[float]:
        vector = [0.0] * 256
        for word in re.findall(r"\w+", text.lower()):
            vector[crc32(word.encode()) % 256] += 1.0
        return vector

    def _get_query_embedding(self, query: str) -> list[float]:
        return self._get_text_embedding(query)

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return self._get_text_embedding(query)
