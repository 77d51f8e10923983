"""What a server may be told beside its sheets: limits, and what it shows."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """Limits of a server; each is refused by its own status code.

    max_tokens
        longest answer in tokens when a request names none.
    max_answers
        answers that are written or wait at once; beyond it 503.
    max_answers_per_caller
        the same for one key, or one address where there are no keys; beyond it 429.
    requests_per_minute
        questions of one caller, with as many at once after a pause; beyond it 429; `None` for any number.
    max_body_bytes
        size of a request; beyond it 413.
    answer_seconds, receive_seconds, send_seconds
        how long an answer may take (504), how long a request may take to arrive (408), and how long a reader may
        refuse to take what was written (the connection is closed).
    show_documents
        whether callers may read the documents' texts, as evidence and on the page.
    log_text
        whether questions and answers are logged.
    retriever
        what finds passages in the modes that retrieve, "bm25" or "dense".
    hosts
        names that requests may address the server by; empty for any.
    """

    max_tokens: int = 1024
    max_answers: int = 256
    max_answers_per_caller: int = 64
    requests_per_minute: int | None = None
    max_body_bytes: int = 2_000_000
    answer_seconds: float = 600.0
    receive_seconds: float = 30.0
    send_seconds: float = 60.0
    show_documents: bool = True
    log_text: bool = False
    retriever: str = "bm25"
    hosts: tuple[str, ...] = ()
