"""`cribsheet inspect`: what a sheet file holds, without loading a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cribsheet.cli.console import AsJson, quiet_libraries, say, say_json
from cribsheet.cli.options import SheetFile, flat
from cribsheet.corpus.printable import in_line

if TYPE_CHECKING:
    from cribsheet.sheet.manifest import Manifest
    from cribsheet.sheet.sheet import Sheet

_SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}  # bytes of a number in types that models compute in


@flat
def inspect(
    file: SheetFile,
    whole: Annotated[
        bool, typer.Option("--verify", help="Read all of it and compare with the digest it was saved with.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show what a sheet was made of.

    Corpus, task, sizes, kept tokens of each document, and fingerprints; no model is loaded.
    """
    quiet_libraries()
    from cribsheet.sheet.file import load, verify
    from cribsheet.sheet.registry import resolve

    found = resolve(file)
    if whole:
        verify(found)
    sheet = load(found)
    if whole and sheet.archive is not None:
        sheet.archive.verify()
    if as_json:
        say_json(sheet_data(sheet, found))
        return
    for line in sheet_lines(sheet, found):
        say(line)


def sheet_data(sheet: Sheet, file: Path) -> dict[str, Any]:
    """All there is to know, as plain data: the manifest, and what follows from the tensors."""
    return {
        "sheet": str(file),
        "tokens": sheet.tokens,
        "rate": round(sheet.rate, 3),
        "positions": sheet.length,
        "window": sheet.window,
        "bytes": sheet.nbytes,
        "file_bytes": file.stat().st_size,
        "archive_bytes": sheet.archive.bytes if sheet.archive else None,
        "has_texts": bool(sheet.texts),
        "study": sheet.manifest.build.get("study"),
        "kept_per_document": {id_: round(kept, 2) for id_, kept in sheet.kept_per_document().items()},
        "manifest": sheet.manifest.model_dump(),
    }


def sheet_lines(sheet: Sheet, file: Path) -> Iterator[str]:
    """The same for people: names and values in two columns, then a table of documents."""
    yield from columns(list(_facts(sheet, file).items()))
    yield ""
    kept = sheet.kept_per_document()
    rows = [("document", "tokens", "kept", "share")]
    for entry in sheet.manifest.documents:
        share = f"{kept[entry.id] / entry.tokens:.0%}" if entry.tokens else "-"
        rows.append((entry.id, f"{entry.tokens:,}", f"{kept[entry.id]:,.1f}", share))
    yield from columns(rows)


def positions(sheet: Sheet) -> str:
    """What the sheet takes of the model's window: the longest head counts, not the mean."""
    of_all = f" of {sheet.window:,}" if sheet.window else ""
    return f"{sheet.length:,}{of_all} positions"


def columns(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    """Rows as aligned text: the first column to the left, and the others too unless they are numbers.

    A cell stays in its line, whatever it holds.
    """
    rows = [tuple(map(in_line, row)) for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    right = [column > 0 and len(widths) > 2 for column in range(len(widths))]
    for row in rows:
        cells = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)]
        yield "  ".join(cells).rstrip()


def _facts(sheet: Sheet, file: Path) -> dict[str, str]:
    made, print_ = sheet.manifest, sheet.manifest.fingerprint
    facts = {
        "sheet": f"{file} (format {made.format}, {file.stat().st_size:,} bytes)",
        "made": f"{made.created} by cribsheet {made.cribsheet}{_took(made.build.get('seconds'))}",
        "task": sheet.task.description,
        "instruction": sheet.task.instruction,
    }
    for number, (question, answer) in enumerate(sheet.task.examples, 1):
        facts[f"example {number}"] = f"{question} => {answer}"
    if made.form:
        facts["form"] = f"{made.form} (in the place of the examples)"
    if made.system:
        facts["system"] = made.system
    if made.mode == "independent":
        rate = f", each document at rate {made.document_rate:g}" if made.document_rate else ""
        facts["mode"] = f"independent, {len(made.segments)} segments{rate}"
        facts["history"] = "; ".join(f"{x.operation} {x.documents} at {x.at}" for x in made.history)
    return facts | {
        "corpus": f"{len(made.documents)} documents, {made.corpus_tokens:,} tokens, digest {made.corpus_digest}",
        "texts": "in the sheet" if sheet.texts else "left out",
        "kept": f"{sheet.tokens:,} tokens per layer and head, of which {made.guide_tokens} are the {made.guide} guide",
        "rate": f"{sheet.rate:.2f}",
        "window": f"{positions(sheet)}, tokens of the head that keeps most",
        **_checked(made),
        **({"studied": told} if (told := studied(made)) else {}),
        "bytes": f"{sheet.nbytes:,} of keys and values in {made.dtype}",
        **_opened(sheet),
        **_archived(sheet),
        "scorer": f"{made.scorer}, {made.chunk_tokens:,} tokens at once, seed {made.seed}"
        + (f", corrected: {made.correction}" if made.correction != "none" else ""),
        "model": f"{print_.model}{f'@{print_.revision}' if print_.revision else ''}, {print_.family}, "
        f"{print_.layers} layers, {print_.kv_heads} key/value heads of {print_.head_size}",
        "weights": f"{print_.weights} in {print_.weights_dtype}",
        "tokenizer": print_.tokenizer,
        "template": print_.template,
        "rotary": print_.rotary,
    }


def _opened(sheet: Sheet) -> dict[str, str]:
    """What keys and values take in memory, where that is not what they take in the file."""
    from cribsheet.kernels.codes import PACKS_FROM

    made = sheet.manifest.dtype
    used = sheet.manifest.fingerprint.weights_dtype
    if made == used or used not in _SIZES:
        return {}
    told = f"{sheet.opened_bytes(_SIZES[used]):,} bytes in {used}"
    packed = made == "int4" and sheet.opened_bytes(2) >= PACKS_FROM
    return {"opened": f"{told}; on CUDA, where kernels read {made}, about what is stored" if packed else told}


def _archived(sheet: Sheet) -> dict[str, str]:
    """What lies beside the sheet; nothing if it was built without an archive."""
    archive = sheet.archive
    if archive is None:
        return {}
    each = archive.bytes / archive.tokens
    size = f"{archive.bytes:,} bytes of all tokens in {archive.dtype}, {each:,.0f} each, in {archive.path}"
    return {"archive": f"{size}; {archive.trouble}" if archive.trouble else size}


def _took(seconds: object) -> str:
    """How long a build took, if the sheet says so: what stands there is for people, and may be anything."""
    return f" in {seconds:.1f} s" if isinstance(seconds, float) else ""


def studied(made: Manifest) -> str:
    """What came of a study, if the sheet says so; nothing if there was none."""
    told = made.build.get("study")
    names = "questions", "tried", "before", "after", "steps", "best_step", "seconds"
    if not isinstance(told, dict) or not all(isinstance(told.get(name), int | float) for name in names):
        return ""
    return (
        f"{told['questions']:,} questions of {told['tried']:,} tried, {told['steps']:,} steps (best after "
        f"{told['best_step']:,}), {told['seconds']:,.0f} s; divergence on held-out questions {told['before']:.3f} -> "
        f"{told['after']:.3f}"
    )


def _checked(made: Manifest) -> dict[str, str]:
    """What a check of the sheet found; nothing if there was none."""
    found = made.retention
    if found is None:
        return {}
    facts = {"retention": str(found)}
    if found.why:
        return facts
    facts["probes"] = (
        f"{found.asked} asked, of which {found.known} are answered closed book; {found.reference} answers "
        f"{found.confirmed} as their stretches alone do; {found.held_back} of the task's examples were held back"
    )
    if found.rungs:
        rungs = [f"{rung.retained} of {rung.counted} at {rung.rate:g}" for rung in found.rungs]
        facts["rates asked"] = f"{', '.join(rungs)}; wanted {found.bound:.0%}"
    return facts
