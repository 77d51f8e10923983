"""Log lines as JSON: one for each request, without the text of questions, answers and error messages."""

from __future__ import annotations

import datetime
import logging
import sys
import traceback
from typing import Any

from cribsheet.corpus.printable import json_text
from cribsheet.server.telemetry.record import Record

logger = logging.getLogger("cribsheet.server")
_FIELDS = "fields"


class JsonLines(logging.Formatter):
    """A log record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        """The line; of exceptions only type and place, for their messages may quote what was asked."""
        at = datetime.datetime.fromtimestamp(record.created, datetime.UTC).isoformat(timespec="milliseconds")
        line: dict[str, Any] = {"time": at, "level": record.levelname.lower(), "logger": record.name}
        line["message"] = record.msg if record.exc_info else record.getMessage()
        line |= getattr(record, _FIELDS, {})
        if record.exc_info and record.exc_info[0] is not None:
            line["exception"] = record.exc_info[0].__name__
            line["traceback"] = [str(frame) for frame in traceback.format_tb(record.exc_info[2])]
        return json_text(line, default=str)


def log_to_stderr(level: int = logging.INFO) -> None:
    """Send the logs of this process to stderr as JSON lines."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logger.setLevel(level)


def log_request(record: Record) -> None:
    """One line for a request that is over; status 499 stands for a caller who left before the answer began."""
    fields: dict[str, Any] = {
        "id": record.id,
        "method": record.method,
        "path": record.path,
        "status": record.status,
        "ms": round(record.seconds * 1000, 1),
    }
    if record.first_seconds is not None:
        fields["first_ms"] = round(record.first_seconds * 1000, 1)
    for name in ("caller", "sheet", "error", "prompt_tokens", "cached_tokens", "completion_tokens"):
        if getattr(record, name):
            fields[name] = getattr(record, name)
    logger.info("request", extra={_FIELDS: fields | record.facts})


def log_failure(record: Record, error: BaseException) -> None:
    """What nobody foresaw: type and place, under the id that the caller was given."""
    logger.error("failure", exc_info=error, extra={_FIELDS: {"id": record.id, "path": record.path}})
