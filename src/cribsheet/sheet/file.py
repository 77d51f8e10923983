"""Sheets on disk: one safetensors file, its manifest as JSON in the metadata, written whole or not at all.

The format is specified in `docs/reference/sheet-format.md`. Nothing in it is executable. Opening a large file reads its
manifest and what says where tokens came from; its keys and values are read, once, when they are first used.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from cribsheet.corpus.task import Task
from cribsheet.errors import SheetError
from cribsheet.sheet.archive.archive import Archive, archive_path, is_archive
from cribsheet.sheet.atomic import Seen, writing
from cribsheet.sheet.layers import LayersOfFile, StoredLayer, form_of
from cribsheet.sheet.manifest import FORMATS, Manifest
from cribsheet.sheet.sheet import Sheet, mean_kept, segment_bounds
from cribsheet.sheet.tensors import LARGEST, NoTensorFileError, TensorFile, digest_of, is_usable, unique
from cribsheet.vocabulary import ABSENT

logger = logging.getLogger(__name__)
SUFFIX = ".sheet"
_MANIFEST = "cribsheet"
_DIGEST = "sha256"
_TRIES = 9  # to open a sheet and its archive between two times that both are replaced
_AT_ONCE = 32 << 20  # bytes of a file whose keys and values are read, and looked at, when it is opened


def save(sheet: Sheet, path: str | Path, *, texts: bool = True, archive: bool = True, seen: Seen | None = None) -> Path:
    """Write a sheet atomically, and its archive beside it; an interrupted write leaves the old file, or none.

    `texts=False` leaves the documents' texts out; their ids, sizes and character spans stay. `archive=False` leaves the
    archive out; one that cannot be read is left out with a warning, and is still named. Raises `SheetError` if the
    folder does not exist or cannot be written, or if the path no longer leads to what was `seen` there.
    """
    target = Path(path)
    if sheet.archive is None or not archive:
        sheet = replace(sheet, manifest=sheet.manifest.model_copy(update={"archive": None}))
    if not target.parent.is_dir():
        raise SheetError(f"The folder {str(target.parent)!r} does not exist; create it first.")
    try:
        manifest = sheet.manifest.model_dump_json()
        Manifest.model_validate_json(manifest, strict=True).check()
    except ValueError as error:  # ValidationError is one
        raise SheetError(f"The sheet cannot be saved, as nobody could open it again: {error}.") from error
    tensors: dict[str, Tensor] = {"indices": sheet.indices, "origins": sheet.origins}
    for number, layer in enumerate(sheet.layers):
        tensors |= {f"layers.{number}.{name}": tensor for name, tensor in layer.tensors().items()}
    if texts and sheet.texts:
        encoded = json.dumps(list(sheet.texts), ensure_ascii=False).encode()
        tensors["texts"] = torch.frombuffer(bytearray(encoded), dtype=torch.uint8)
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    if wrong := next((name for name, tensor in contiguous.items() if not is_usable(tensor)), None):
        raise SheetError(
            f"The sheet has numbers in {wrong!r} that are not finite, or beyond {LARGEST:g}, as a model gives that "
            "overflows in float16; build it in bfloat16 or float32."
        )
    metadata = {"format": "pt", _MANIFEST: manifest, _DIGEST: digest_of(contiguous)}
    kept = _readable(sheet.archive, target) if archive else None
    with writing(target, "The sheet") as unfinished:
        save_file(contiguous, unfinished, metadata=metadata)
        if seen is not None:
            seen.check()  # before the archive, which may take the place of another's
        _put_archive(kept, archive_path(target))
    return target


def _readable(archive: Archive | None, target: Path) -> Archive | None:
    """An archive that is to be written beside a sheet, or lies there; none, with a warning, if it cannot be read."""
    if archive is None or archive.is_at(archive_path(target)):
        return archive
    try:
        archive.check()
        return archive
    except SheetError as error:
        there = archive.at(archive_path(target))  # what came back, since, is not to be taken away
        if _is_readable(there):
            return there
        logger.warning("the sheet is written without its archive: %s", error)
        return None


def _is_readable(archive: Archive) -> bool:
    try:
        archive.verify()
    except SheetError:
        return False
    return True


def copy(source: str | Path, target: Path) -> None:
    """Copy a sheet's file, and its archive if that can be read; each is written whole or not at all."""
    archive = _readable(Archive.beside(source, read_manifest(source)), target)
    with writing(target, "The sheet") as unfinished:
        shutil.copyfile(source, unfinished)
        _put_archive(archive, archive_path(target))


def _put_archive(archive: Archive | None, target: Path) -> None:
    """Write an archive, or take away the one of the sheet that is replaced: it may hold what that should not leave."""
    if archive is not None and not archive.is_at(target):
        with writing(target, "The archive") as unfinished:
            archive.copy_to(unfinished)
    elif archive is None and is_archive(target):
        Path(os.path.realpath(target)).unlink()  # what a link leads to, and the link
        target.unlink(missing_ok=True)


def load(path: str | Path) -> Sheet:
    """Open a sheet. Raises `SheetError` for anything that is not a sound sheet.

    Keys and values of a large one are read when they are first looked at, which raises `SheetError` if the file was
    written to in between; what was read stays as it is. A sheet whose archive cannot be read is opened alone, with a
    warning.
    """
    sheet = _loaded(path)
    if sheet.archive is not None and sheet.archive.trouble:
        logger.warning("the sheet is opened without its archive: %s", sheet.archive.trouble)
    return sheet


def _loaded(path: str | Path) -> Sheet:
    for _ in range(_TRIES):
        file = _opened(path)
        manifest = _manifest_of(file, path)
        archive = Archive.beside(path, manifest)
        if archive is None or _is_still(file, path):  # else both were replaced in between
            break
    try:
        return replace(_sheet_of(file, manifest, path), archive=archive)
    except SheetError:
        raise
    except (OSError, ValueError, RuntimeError, MemoryError) as error:  # torch has no memory in the form of RuntimeError
        raise _damaged(path, error) from error


def _is_still(file: TensorFile, path: str | Path) -> bool:
    """Whether a file that was opened is the one that lies at its path."""
    try:
        return file.is_same(Path(path))
    except OSError:  # it was taken away
        return True


def verify(path: str | Path) -> None:
    """Read every byte of a sheet and compare with the digest that it was saved with; `load` alone compares none.

    Its archive has digests of its own: `Archive.verify`.

    Raises `SheetError` if anything differs, or if the file holds no digest.
    """
    _loaded(path)
    file = _opened(path)
    written = file.metadata.get(_DIGEST)
    try:
        found = digest_of(file.read(file.entries))
    except (OSError, ValueError, RuntimeError, MemoryError) as error:
        raise _damaged(path, error) from error
    if written is None:
        raise SheetError(f"{str(path)!r} holds no digest of its tensors; save it again to get one.")
    if written != found:
        raise SheetError(
            f"{str(path)!r} was changed after it was saved: its tensors have the digest {found[:16]}, but it was "
            f"saved with {written[:16]}; build the sheet again, or copy it again from where it came."
        )


def read_manifest(path: str | Path) -> Manifest:
    """The manifest alone; nothing else of the file is read."""
    return _manifest_of(_opened(path), path)


def _opened(path: str | Path) -> TensorFile:
    if Path(path).is_dir():
        raise SheetError(
            f"{str(path)!r} is a folder, and a sheet is a file; name a file in it, or for a registry {path}#NAME."
        )
    if not Path(path).is_file():
        raise SheetError(f"There is no sheet {str(path)!r}; build one with `CompressedKnowledgeLLM.build` and save it.")
    try:
        return TensorFile(path)
    except NoTensorFileError as error:
        raise SheetError(f"{str(path)!r} is no sheet: {error}; name a file that a build wrote.") from error
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from error


def _manifest_of(file: TensorFile, path: str | Path) -> Manifest:
    if _MANIFEST not in file.metadata:
        raise SheetError(f"{str(path)!r} is a safetensors file but not a sheet: it has no cribsheet manifest.")
    try:
        raw = json.loads(
            file.metadata[_MANIFEST], object_pairs_hook=unique, parse_float=_finite, parse_constant=_finite
        )
        json.dumps(raw, ensure_ascii=False).encode()  # escapes may stand for what is no text
        if type(raw.get("format")) is not int or raw["format"] not in FORMATS:
            raise SheetError(
                f"{str(path)!r} has sheet format {raw.get('format')!r}, but this version reads format "
                f"{' and '.join(map(str, FORMATS))}; build the sheet again or use the cribsheet version that made it "
                f"({raw.get('cribsheet', 'unknown')})."
            )
        manifest = Manifest.model_validate(raw, strict=True)
        manifest.check()
        Task.from_dict(manifest.task)
        return manifest
    except SheetError:
        raise
    except (ValueError, RecursionError, AttributeError, TypeError) as error:  # ValidationError is a ValueError
        raise SheetError(f"{str(path)!r} has a damaged manifest: {error}") from error


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {text[:20]} is not finite")
    return number


def _sheet_of(file: TensorFile, manifest: Manifest, path: str | Path) -> Sheet:
    """The sheet of a file whose tensors are those that its manifest tells of."""
    windows, form = manifest.fingerprint.windows, form_of(manifest.dtype)
    parts = form.names
    names = [[f"layers.{number}.{part}" for part in parts] for number in range(len(windows))]
    like = file.like()
    small = ["indices", "origins", *(own[-1] for own in names if parts[-1] == "key_blocks")]
    small += ["texts"] if "texts" in like else []
    _check_names(like, {*small, *chain(*names)}, path)
    if not _are_announced(like, manifest):
        raise _unfitting(path)
    here = like | file.read(small)
    indices, origins = here["indices"], here["origins"]
    kept = _kept(indices)
    layers = [
        form(**{part: here[name] for part, name in zip(parts, own, strict=True)}, window=window, counts=counts)
        for own, window, counts in zip(names, windows, _counts(kept, windows), strict=True)
    ]
    if not _is_sound(manifest, layers, indices, kept, origins):
        raise _unfitting(path)
    texts = _texts(here, manifest, path)
    held = LayersOfFile(layers, partial(_layers_of, file, layers, names, path))
    if file.size <= _AT_ONCE:
        held.read()
    return Sheet(held, indices, origins, manifest, texts)


def _layers_of(
    file: TensorFile, like: Sequence[StoredLayer], names: Sequence[Sequence[str]], path: str | Path
) -> list[StoredLayer]:
    """The layers of a file by the names of their tensors, `like` those without contents."""
    try:
        held = file.read(chain(*names))
    except (OSError, ValueError, RuntimeError, MemoryError) as error:
        raise SheetError(f"The keys and values of {str(path)!r} cannot be read: {error}; open it again.") from error
    for name, tensor in held.items():
        if not is_usable(tensor):
            raise SheetError(
                f"{str(path)!r} has numbers in {name!r} that are not finite, or beyond {LARGEST:g}; build the sheet "
                "again."
            )
    file.close()  # not before: every look at unusable layers reads them again, and says the same
    return [
        layer.with_tensors({part: held[name] for part, name in zip(layer.names, own, strict=True)}, layer.counts)
        for layer, own in zip(like, names, strict=True)
    ]


def _check_names(found: Mapping[str, Tensor], wanted: set[str], path: str | Path) -> None:
    if lacking := sorted(wanted - found.keys()):
        raise SheetError(f"{str(path)!r} lacks the tensor {lacking[0]!r}; the file is damaged, build the sheet again.")
    if unknown := sorted(found.keys() - wanted):
        raise SheetError(f"{str(path)!r} has the tensor {unknown[0]!r}, which no such sheet has; build it again.")


def _are_announced(like: Mapping[str, Tensor], manifest: Manifest) -> bool:
    """Whether what is read of a sheet before its layers is of the types and shapes that it must be of."""
    made, indices, origins = manifest.fingerprint, like["indices"], like["origins"]
    return (
        indices.dim() == 3
        and indices.shape[:2] == (made.windows.count(None), made.kv_heads)
        and indices.shape[2] > manifest.guide_tokens
        and origins.dim() == 2
        and origins.shape[1] == 4
        and len(origins) > 0
        and indices.dtype == origins.dtype == torch.int32
        and ("texts" not in like or (like["texts"].dtype == torch.uint8 and like["texts"].dim() == 1))
    )


def _texts(tensors: Mapping[str, Tensor], manifest: Manifest, path: str | Path) -> tuple[str, ...]:
    if "texts" not in tensors:
        return ()
    try:
        texts = json.loads(bytes(tensors["texts"].numpy()))
        json.dumps(texts, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise SheetError(f"{str(path)!r} has damaged texts: {error}; build the sheet again.") from error
    sizes = [len(text) for text in texts if isinstance(text, str)] if isinstance(texts, list) else []
    if sizes != [document.characters for document in manifest.documents]:
        raise SheetError(f"{str(path)!r} has texts that are not those of its documents; build the sheet again.")
    return tuple(texts)


def _is_sound(
    manifest: Manifest, layers: Sequence[StoredLayer], indices: Tensor, kept: Tensor, origins: Tensor
) -> bool:
    """Whether tensors fit each other and the manifest; of layers, only types and shapes are looked at."""
    made = manifest.fingerprint
    of_guide = indices == -1
    size = manifest.guide_tokens * indices.shape[0] * indices.shape[1]
    low, high = (int(each) for each in indices.aminmax())
    sound = low >= ABSENT and high < manifest.corpus_tokens and int(of_guide.count_nonzero()) == size
    sound = sound and bool(of_guide[..., indices.shape[-1] - manifest.guide_tokens :].all())
    sound = sound and _allocation_is_sound(manifest, indices, kept)
    sound = sound and (manifest.mode == "sequential" or _segments_are_sound(manifest, indices))
    longest = iter(kept.amax(-1).tolist() if sound else ())
    for layer in layers if sound else ():
        tokens = _held(manifest, layer, next(longest) if layer.window is None else indices.shape[-1])
        vectors = (sum(layer.counts),) if layer.counts else (made.kv_heads, tokens)
        sound = sound and layer.is_sound(vectors, made.head_size, manifest.dtype)
    return sound and _origins_are_sound(manifest, origins)


def _origins_are_sound(manifest: Manifest, origins: Tensor) -> bool:
    """Whether origins (U, 4) ascend within the corpus, and are places in documents that are there, or nowhere."""
    index, number, start, stop = origins.long().unbind(1)
    sizes = torch.tensor([document.characters for document in manifest.documents] + [0])  # the last one is -1, nowhere
    inside = bool(((number >= -1) & (number < len(manifest.documents))).all())
    return (
        inside
        and bool((index.diff() > 0).all())
        and int(index[0]) >= 0
        and int(index[-1]) < manifest.corpus_tokens
        and bool(((start >= 0) & (start <= stop) & (stop <= sizes[number])).all())
    )


def _kept(indices: Tensor) -> Tensor:
    """(F, K) how many tokens each head keeps; one look at the indices where all keep as many."""
    if int(indices.amin()) > ABSENT:
        return torch.full(indices.shape[:2], indices.shape[2])
    return (indices != ABSENT).sum(-1)


def _counts(kept: Tensor, windows: Sequence[int | None]) -> Iterator[tuple[int, ...]]:
    """How many tokens (F, K) each head of each layer keeps; nothing for layers whose heads all keep as many."""
    rows = iter(kept.tolist())
    for window in windows:
        counts = () if window is not None else tuple(next(rows, ()))
        yield counts if len(set(counts)) > 1 else ()


def _allocation_is_sound(manifest: Manifest, indices: Tensor, kept: Tensor) -> bool:
    """Whether heads lack tokens (F, K, P) only where they may: in front, never all, and not in a uniform sheet."""
    if bool((kept == indices.shape[-1]).all()):
        return True
    absent = indices == ABSENT
    return manifest.allocation != "uniform" and not (
        (absent[..., 1:] & ~absent[..., :-1]).any() or absent[..., -1].any()
    )


def _held(manifest: Manifest, layer: StoredLayer, tokens: int) -> int:
    """How many tokens a layer must hold whose longest head keeps `tokens`; -1 if what it holds is wrong.

    For layers with a sliding window `tokens` is the length of the sheet.
    """
    if layer.window is None:
        return tokens
    if manifest.mode == "independent":
        kept = [manifest.head_tokens, *(segment.kept for segment in manifest.segments), manifest.guide_tokens]
        return sum(min(size, layer.window - 1) for size in kept)
    found = layer.keys.shape[1] if layer.keys.dim() == 3 else -1
    return found if found < layer.window else -1


def _segments_are_sound(manifest: Manifest, indices: Tensor) -> bool:
    """Whether the segments add up to the sheet, in order; every head keeps something of each unless heads differ."""
    segments, guide = manifest.segments, manifest.guide_tokens
    if not 0 <= guide < indices.shape[-1] or any(segment.read < 1 for segment in segments):
        return False
    corpus, end = indices.split([indices.shape[-1] - guide, guide], -1)
    least = 1 if manifest.allocation == "uniform" else 0
    counts = segment_bounds(indices, guide, [manifest.head_tokens, *(each.read for each in segments)]).diff()
    ordered = (corpus[..., 1:] > corpus[..., :-1]) | (corpus[..., :-1] == ABSENT)
    return (
        sum(segment.read for segment in segments) + manifest.head_tokens == manifest.corpus_tokens
        and sum(segment.documents for segment in segments) == len(manifest.documents)
        and bool(ordered.all() and (corpus != -1).all() and (corpus < manifest.corpus_tokens).all())
        and bool(
            (end == -1).all() and (counts[..., 0] == manifest.head_tokens).all() and (counts[..., 1:] >= least).all()
        )
        and [mean_kept(each) for each in counts[..., 1:].unbind(-1)] == [segment.kept for segment in segments]
    )


def _damaged(path: str | Path, error: Exception) -> SheetError:
    return SheetError(
        f"{str(path)!r} is not a readable sheet ({error}); it is truncated or something else, build it again."
    )


def _unfitting(path: str | Path) -> SheetError:
    return SheetError(f"{str(path)!r} has tensors that do not fit its manifest; build the sheet again.")
