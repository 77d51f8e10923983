"""What there is to ask: `/v1/models` in OpenAI's shape, and `/v1/sheets` with what a sheet holds."""

from __future__ import annotations

from typing import Literal

from cribsheet.server.errors import Refusal
from cribsheet.server.openai.replies import Reply
from cribsheet.server.sheets import Served, created
from cribsheet.sheet.manifest import Manifest


class ModelEntry(Reply):
    """A sheet, as OpenAI lists models."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(Reply):
    """The sheets that the caller may ask."""

    object: Literal["list"]
    data: list[ModelEntry]


class DocumentSummary(Reply):
    """A document; `kept` is its tokens that the sheet keeps, averaged over layers and heads."""

    number: int
    id: str
    characters: int
    tokens: int
    kept: float


class SheetDetails(Reply):
    """A sheet and its documents."""

    id: str
    digest: str
    task: str
    model: str
    corpus_tokens: int
    tokens: int
    rate: float
    room: int
    texts: bool
    documents: list[DocumentSummary]


class KeptToken(Reply):
    """A token that the sheet keeps: its characters in the document, and the share of heads, 0 to 1, that keep it."""

    start: int
    stop: int
    kept: float


class DocumentDetails(Reply):
    """A document's text, and what of it is kept."""

    id: str
    text: str
    kept: list[KeptToken]


def entry(name: str, manifest: Manifest) -> ModelEntry:
    """A sheet in the list of models."""
    return ModelEntry(id=name, object="model", created=created(manifest), owned_by="cribsheet")


def details(served: Served, *, texts: bool) -> SheetDetails:
    """What a sheet holds; `texts` is whether this server shows them."""
    sheet = served.kb.sheet
    kept = sheet.kept_per_document()
    return SheetDetails(
        id=served.name,
        digest=served.digest,
        task=sheet.task.description,
        model=sheet.manifest.fingerprint.model.rstrip("/").rsplit("/", 1)[-1],  # not where it lies on this machine
        corpus_tokens=sheet.manifest.corpus_tokens,
        tokens=sheet.tokens,
        rate=sheet.rate,
        room=served.kb.room,
        texts=texts and bool(sheet.texts),
        documents=[
            DocumentSummary(
                number=number, id=each.id, characters=each.characters, tokens=each.tokens, kept=kept.get(each.id, 0.0)
            )
            for number, each in enumerate(sheet.manifest.documents)
        ],
    )


def document(served: Served, number: int) -> DocumentDetails:
    """A document of a sheet. Raises `Refusal` if there is none of that number, or no text."""
    sheet = served.kb.sheet
    if not sheet.texts:
        raise Refusal(404, f"The sheet {served.name!r} was saved without its texts.")
    if not 0 <= number < len(sheet.texts):
        raise Refusal(404, f"The sheet {served.name!r} has documents 0 to {len(sheet.texts) - 1}, but no {number}.")
    mine = sheet.origins[:, 1] == number
    rows = zip(sheet.origins[mine].tolist(), sheet.kept_share[mine].tolist(), strict=True)
    return DocumentDetails(
        id=sheet.manifest.documents[number].id,
        text=sheet.texts[number],
        kept=[KeptToken(start=start, stop=stop, kept=share) for (_, _, start, stop), share in rows],
    )
