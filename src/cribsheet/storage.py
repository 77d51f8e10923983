"""Sheets on disk: one safetensors file, its manifest as JSON in the metadata, written whole or not at all.

The format is specified in `docs/reference/sheet-format.md`. Nothing in it is executable, and opening a file maps it
into memory: pages are read when they are first used.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from cribsheet.errors import SheetError
from cribsheet.selection import ABSENT
from cribsheet.sheet import FORMATS, Manifest, Sheet, format_of, mean_kept, segment_bounds
from cribsheet.stored import StoredLayer, parts_of
from cribsheet.task import Task

SUFFIX = ".sheet"
_MANIFEST = "cribsheet"
_DIGEST = "sha256"


def save(sheet: Sheet, path: str | Path, *, texts: bool = True) -> Path:
    """Write a sheet atomically; an interrupted write leaves the old file, or none.

    `texts=False` leaves the documents' texts out; their ids, sizes and character spans stay. Raises `SheetError` if
    the folder does not exist or cannot be written.
    """
    target = Path(path)
    if not target.parent.is_dir():
        raise SheetError(f"The folder {str(target.parent)!r} does not exist; create it first.")
    tensors: dict[str, Tensor] = {"indices": sheet.indices, "origins": sheet.origins}
    for number, layer in enumerate(sheet.layers):
        tensors |= {f"layers.{number}.{name}": tensor for name, tensor in layer.tensors().items()}
    if texts and sheet.texts:
        encoded = json.dumps(list(sheet.texts), ensure_ascii=False).encode()
        tensors["texts"] = torch.frombuffer(bytearray(encoded), dtype=torch.uint8)
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {"format": "pt", _MANIFEST: sheet.manifest.model_dump_json(), _DIGEST: _digest(contiguous)}
    try:
        with replacing(target) as unfinished:
            save_file(contiguous, unfinished, metadata=metadata)
    except (SafetensorError, OSError) as error:
        raise SheetError(f"The sheet cannot be written to {str(target)!r}: {error}.") from error
    return target


def load(path: str | Path) -> Sheet:
    """Open a sheet without copying it into memory. Raises `SheetError` for anything that is not a sound sheet."""
    manifest = read_manifest(path)
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from error
    indices, origins = _entry(tensors, "indices", path), _entry(tensors, "origins", path)
    windows, kept = manifest.fingerprint.windows, _kept(indices)
    layers = [
        StoredLayer(
            **{part: _entry(tensors, f"layers.{number}.{part}", path) for part in parts_of(manifest.dtype)},
            window=window,
            counts=counts,
        )
        for number, (window, counts) in enumerate(zip(windows, _counts(kept, windows), strict=True))
    ]
    _check_shapes(path, manifest, layers, indices, kept, origins)
    return Sheet(tuple(layers), indices, origins, manifest, _texts(tensors, manifest, path))


def verify(path: str | Path) -> None:
    """Read every byte of a sheet and compare with the digest that it was saved with; `load` alone checks no contents.

    Raises `SheetError` if anything differs, or if the file holds no digest.
    """
    load(path)
    with safe_open(Path(path), "pt") as opened:
        written = (opened.metadata() or {}).get(_DIGEST)
        found = _digest({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118
    if written is None:
        raise SheetError(f"{str(path)!r} holds no digest of its tensors; save it again to get one.")
    if written != found:
        raise SheetError(
            f"{str(path)!r} was changed after it was saved: its tensors have the digest {found[:16]}, but it was "
            f"saved with {written[:16]}; build the sheet again, or copy it again from where it came."
        )


def _digest(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and bytes, in the order of names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        if tensor.numel():
            digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_manifest(path: str | Path) -> Manifest:
    """The manifest alone; nothing else of the file is read."""
    file = Path(path)
    if not file.is_file():
        raise SheetError(f"There is no sheet {str(path)!r}; build one with `CompressedKnowledgeLLM.build` and save it.")
    try:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from error
    if _MANIFEST not in metadata:
        raise SheetError(f"{str(path)!r} is a safetensors file but not a sheet: it has no cribsheet manifest.")
    try:
        raw: dict[str, Any] = json.loads(metadata[_MANIFEST], object_pairs_hook=_unique)
        json.dumps(raw, ensure_ascii=False).encode()  # escapes may stand for what is no text
        if raw.get("format") not in FORMATS:
            raise SheetError(
                f"{str(path)!r} has sheet format {raw.get('format')!r}, but this version reads format "
                f"{' and '.join(map(str, FORMATS))}; build the sheet again or use the cribsheet version that made it "
                f"({raw.get('cribsheet', 'unknown')})."
            )
        manifest = Manifest.model_validate(raw)
        if manifest.format != format_of(manifest.dtype):
            raise ValueError(f"sheets in {manifest.dtype} have another format than {manifest.format}")
        Task.from_dict(manifest.task)
        if not all(document.id.strip() for document in manifest.documents):
            raise ValueError("a document has no id")
        return manifest
    except SheetError:
        raise
    except (ValueError, RecursionError, AttributeError) as error:  # ValidationError is a ValueError
        raise SheetError(f"{str(path)!r} has a damaged manifest: {error}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose names differ; of two with one name, readers may see one or the other."""
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("a name stands twice in one object")
    return made


def _entry(tensors: dict[str, Tensor], name: str, path: str | Path) -> Tensor:
    if name not in tensors:
        raise SheetError(f"{str(path)!r} lacks the tensor {name!r}; the file is damaged, build the sheet again.")
    return tensors[name]


def _texts(tensors: dict[str, Tensor], manifest: Manifest, path: str | Path) -> tuple[str, ...]:
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


def _check_shapes(
    path: str | Path, manifest: Manifest, layers: list[StoredLayer], indices: Tensor, kept: Tensor, origins: Tensor
) -> None:
    made = manifest.fingerprint
    full = (made.windows.count(None), made.kv_heads)
    sound = indices.dim() == 3 and indices.shape[:2] == full and indices.shape[2] > 0 and made.layers == len(layers)
    sound = sound and origins.dim() == 2 and origins.shape[1] == 4 and len(origins) > 0
    sound = sound and indices.dtype == origins.dtype == torch.int32
    sound = sound and _allocation_is_sound(manifest, indices, kept)
    sound = sound and (manifest.mode == "sequential" or _segments_are_sound(manifest, indices))
    longest = iter(kept.amax(-1).tolist() if sound else ())
    for layer in layers if sound else ():
        tokens = _held(manifest, layer, next(longest) if layer.window is None else indices.shape[-1])
        vectors = (sum(layer.counts),) if layer.counts else (made.kv_heads, tokens)
        sound = sound and layer.is_sound(vectors, made.head_size, manifest.dtype)
    sound = sound and bool((origins[:, 1] < len(manifest.documents)).all())
    if not sound:
        raise SheetError(f"{str(path)!r} has tensors that do not fit its manifest; build the sheet again.")


def _kept(indices: Tensor) -> Tensor:
    """(F, K) how many tokens each head keeps; one look at the indices where all keep as many."""
    if indices.dim() == 3 and indices.numel() and int(indices.amin()) > ABSENT:
        return torch.full(indices.shape[:2], indices.shape[2])
    return (indices != ABSENT).sum(-1)


def _counts(kept: Tensor, windows: Sequence[int | None]) -> Iterator[tuple[int, ...]]:
    """How many tokens (F, K) each head of each layer keeps; nothing for layers whose heads all keep as many."""
    rows = iter(kept.tolist() if kept.dim() == 2 else ())
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


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[str]:
    """A temporary path beside `target` that takes its place on success and vanishes on failure."""
    unfinished = target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
    try:
        handle = os.open(unfinished, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        usual = os.fstat(handle).st_mode  # what the user's umask allows; safetensors would leave the file private
        os.close(handle)
        yield str(unfinished)
        os.chmod(unfinished, usual & 0o777)
        os.replace(unfinished, target)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
