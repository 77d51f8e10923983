"""JSON schemas that strangers send: what they may ask of the compiler, which has no end of its own for some of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cribsheet.errors import RequestError
from cribsheet.structured.grammar import TOO_DEEP

MAX_PARTS = 2000  # mappings and lists of all schemas that one answer must fit
MAX_PATTERNS = 4  # that one text must match at once: the work doubles with each of them
_TEXTS = ("pattern", "format")
_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_HELD = ("allOf", "anyOf", "oneOf", "prefixItems", "items", "additionalProperties", "not", "if", "then", "else")


def check_schemas(schemas: Iterable[Mapping[str, Any]]) -> None:
    """Refuse schemas that are too much, with `RequestError`."""
    parts = 0
    for schema in schemas:
        waiting: list[Any] = [schema]
        while waiting:
            value = waiting.pop()
            inside = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else None
            if inside is None:
                continue
            parts += 1
            if parts > MAX_PARTS:
                raise RequestError(f"The JSON schema has more than {MAX_PARTS} parts; give a simpler one.")
            waiting.extend(inside)
        try:
            most = _Patterns(schema).most()
        except RecursionError:  # references to references
            raise RequestError(TOO_DEEP) from None
        if most > MAX_PATTERNS:
            raise RequestError(
                f"In the JSON schema one text must match {most} patterns at once, and at most {MAX_PATTERNS} may be; "
                "write them as one."
            )


class _Patterns:
    """How many patterns a text must match at once, anywhere in a schema; each of its parts is looked at once."""

    def __init__(self, schema: Mapping[str, Any]) -> None:
        self._schema = schema
        self._known: dict[int, int] = {}

    def most(self) -> int:
        """The largest number at any place."""
        most, waiting = 0, [self._schema]
        while waiting:
            schema = waiting.pop()
            most = max(most, self._of(schema))
            waiting += _inside(schema)
        return most

    def _of(self, schema: Any) -> int:
        """The number at one place; what refers to itself adds nothing."""
        if not isinstance(schema, Mapping):
            return 0
        if id(schema) in self._known:
            return self._known[id(schema)]
        self._known[id(schema)] = 0
        count = sum(name in schema for name in _TEXTS)
        count += sum(self._of(each) for each in _listed(schema.get("allOf")))
        for name in ("anyOf", "oneOf"):
            count += max((self._of(each) for each in _listed(schema.get(name))), default=0)
        count += self._of(self._target(schema.get("$ref")))
        self._known[id(schema)] = count
        return count

    def _target(self, place: Any) -> Any:
        """What a reference within the schema points to."""
        if not isinstance(place, str) or not place.startswith("#/"):
            return None
        found: Any = self._schema
        for step in place[2:].split("/"):
            found = found.get(step.replace("~1", "/").replace("~0", "~")) if isinstance(found, Mapping) else None
        return found


def _inside(schema: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The schemas that stand directly in one."""
    found: list[Any] = []
    for name, value in schema.items():
        if name in _NAMED and isinstance(value, Mapping):
            found += value.values()
        elif name in _HELD:
            found += value if isinstance(value, list) else [value]
    return [each for each in found if isinstance(each, Mapping)]


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list) else ()
