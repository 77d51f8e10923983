"""Sheets elsewhere: any fsspec URL, and registry folders that hold sheets by name and version.

A registry is a folder, on a disk or behind a URL, that any web server or bucket can hold:

    NAME/index.json        the versions, oldest first, each with file, sha256, bytes, and the sheet's own digest
    NAME/VERSION.sheet     never written twice, and beside it the sheet's archive, if it has one

What comes from a URL is downloaded once for each version of it, and compared with its digest whenever it is used. The
index is replaced last, so whoever reads sees the old registry or the new one.
"""

from __future__ import annotations

import contextlib
import email.utils
import hashlib
import logging
import os
import re
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cribsheet.errors import SheetError
from cribsheet.sheet import file
from cribsheet.sheet.archive.archive import Archive, archive_path
from cribsheet.sheet.archive.layout import SUFFIX
from cribsheet.sheet.atomic import replacing
from cribsheet.sheet.manifest import Manifest
from cribsheet.sheet.sheet import Sheet

logger = logging.getLogger(__name__)
CACHE = "CRIBSHEET_CACHE"  # names the folder for downloads
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}\Z")
_INDEX = "index.json"
_SURE = ("ETag", "Content-MD5", "Digest")  # what an HTTP server says of a version of a file, and of no other
_SETTLED_SECONDS = 60  # after which a date tells a version: it counts in seconds, and a file may change within one


class Version(BaseModel):
    """One version of a sheet in a registry; `digest` is its manifest's, `sha256` that of the file."""

    model_config = ConfigDict(extra="forbid")

    version: int = Field(ge=1)
    file: str
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    size: int = Field(ge=0)
    digest: str
    pushed: str


class Index(BaseModel):
    """All versions of a sheet, oldest first."""

    model_config = ConfigDict(extra="forbid")

    versions: list[Version] = []


def is_url(place: str | Path) -> bool:
    """Whether a place is a URL that fsspec opens: s3://, https://, memory://, file://, ..."""
    return isinstance(place, str) and bool(re.match(r"[A-Za-z][A-Za-z0-9+.-]+(::|://)", place))


def local(place: str | Path, *, sha256: str | None = None) -> Path:
    """The file of a sheet wherever it is; what is behind a URL is downloaded and verified.

    It is downloaded again when the file behind the URL has changed: where nothing tells (an HTTP server without ETag
    and date, or a date of this minute), each time. A download is compared with `sha256`, or else with the digest of
    the tensors that it was saved with, whenever it is used. Raises `SheetError` for what cannot be fetched, or is not
    what it should be.
    """
    if not is_url(place):
        path = Path(place)
        if sha256 is not None and path.is_file():
            _expect(path, sha256, str(place))
        return path
    url = str(place)
    with _told(f"The sheet {_shown(url)!r} cannot be fetched"):
        filesystem, inside = _filesystem(url)
        stamp = sha256 or _stamp(filesystem, inside)
    name = hashlib.sha256(f"{url} {stamp}".encode()).hexdigest()[:32]
    target = _cache() / f"{name}{file.SUFFIX}"
    if stamp is None or not _is_whole(target, sha256):
        with _told(f"The sheet {_shown(url)!r} cannot be fetched"):
            target.parent.mkdir(parents=True, exist_ok=True)
            with replacing(target) as unfinished:
                filesystem.get_file(inside, unfinished)
                if sha256 is not None:
                    _expect(Path(unfinished), sha256, _shown(url))
                file.verify(unfinished)
    _fetch_archive(filesystem, inside, target, _shown(url))
    return target


def _fetch_archive(filesystem: Any, inside: str, sheet: Path, url: str) -> None:
    """The archive of a sheet that was downloaded, beside it; without one the sheet is opened alone."""
    manifest, target = file.read_manifest(sheet), archive_path(sheet)
    if manifest.archive is None or _is_archive_of(manifest, target):
        return
    try:
        with _told(f"The archive of {url!r} cannot be fetched"), replacing(target) as unfinished:
            filesystem.get_file(_longer(inside, SUFFIX), unfinished)
            Archive(unfinished, manifest).verify()
    except SheetError as error:
        logger.warning("%s", error)


def _is_archive_of(manifest: Manifest, path: Path) -> bool:
    """Whether the archive that a manifest names lies at a path."""
    try:
        return Archive(path, manifest).layout.nbytes == path.stat().st_size
    except (SheetError, OSError):
        return False


class Registry:
    """Sheets by name and version in a folder: a path or a URL."""

    def __init__(self, place: str | Path) -> None:
        self.place = _longer(str(place), "")

    def names(self) -> list[str]:
        """The sheets that are there."""
        filesystem, root = _filesystem(self.place)
        with _told(f"The registry {_shown(self.place)!r} cannot be read"):
            if not filesystem.exists(root):
                return []
            listed = (_parted(entry["name"])[0] for entry in filesystem.ls(root, detail=True))
            found = [name for place in listed if _NAME.match(name := place.rstrip("/").rsplit("/", 1)[-1])]
            return sorted(name for name in found if filesystem.exists(_longer(root, f"/{name}/{_INDEX}")))

    def versions(self, name: str) -> list[Version]:
        """The versions of a sheet, oldest first; none if there is no such sheet."""
        filesystem, root = _filesystem(self.place)
        path = _longer(root, f"/{_checked(name)}/{_INDEX}")
        with _told(f"The registry {_shown(self.place)!r} cannot be read"):
            if not filesystem.exists(path):
                return []
            raw = filesystem.cat_file(path)
        try:
            return Index.model_validate_json(raw).versions
        except ValidationError as error:
            raise SheetError(f"The registry {_shown(self.place)!r} has a damaged index of {name!r}: {error}") from error

    def push(self, sheet: str | Path, name: str) -> Version:
        """Add a sheet file as the next version of `name`; the same file again is the version that it is already.

        Its archive goes with it, again if the registry has lost it. Raises `SheetError` if that is missing or damaged.
        """
        file.verify(sheet)
        archive = Archive.beside(sheet, file.read_manifest(sheet))
        if archive is not None:
            archive.verify()
        known = self.versions(name)
        data = Path(sheet).read_bytes()  # once, so that the digest is that of what is pushed
        sha256 = hashlib.sha256(data).hexdigest()
        filesystem, root = _filesystem(self.place)
        folder = _longer(root, f"/{name}")
        for version in known:
            if version.sha256 == sha256:
                if archive is not None:
                    self._put_again(filesystem, archive, _longer(folder, f"/{version.version}{file.SUFFIX}{SUFFIX}"))
                return version
        number = max((version.version for version in known), default=0) + 1
        with _told(f"The registry {_shown(self.place)!r} cannot be read"):
            while filesystem.exists(_longer(folder, f"/{number}{file.SUFFIX}")):  # left by a push that was interrupted
                number += 1
        made = Version(
            version=number,
            file=f"{number}{file.SUFFIX}",
            sha256=sha256,
            size=len(data),
            digest=file.read_manifest(sheet).digest,
            pushed=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        with _told(f"The registry {_shown(self.place)!r} cannot be written"):
            filesystem.makedirs(folder, exist_ok=True)
            if archive is not None:
                _put(filesystem, archive.path, _longer(folder, f"/{made.file}{SUFFIX}"))
            _put(filesystem, data, _longer(folder, f"/{made.file}"))
            index = Index(versions=[*known, made]).model_dump_json(indent=1).encode()
            _put(filesystem, index, _longer(folder, f"/{_INDEX}"))
        return made

    def _put_again(self, filesystem: Any, archive: Archive, path: str) -> None:
        """An archive of a version that is there, if the registry has lost it."""
        with _told(f"The registry {_shown(self.place)!r} cannot be written"):
            if not filesystem.exists(path):
                _put(filesystem, archive.path, path)

    def pull(self, name: str, version: int | None = None) -> Path:
        """The file of a version, the newest by default, on this machine and verified. Raises `SheetError` for none."""
        known = {each.version: each for each in self.versions(name)}
        wanted = known.get(version if version is not None else max(known, default=0))
        if wanted is None:
            have = ", ".join(map(str, known)) or "none"
            raise SheetError(f"{_shown(self.place)!r} has no version {version or ''} of {name!r}; it has {have}.")
        if "/" in wanted.file or "\\" in wanted.file or wanted.file.startswith("."):
            raise SheetError(f"The index of {name!r} names the file {wanted.file!r}, which is no name of a file in it.")
        return local(_longer(self.place, f"/{name}/{wanted.file}"), sha256=wanted.sha256)


def resolve(place: str | Path) -> Path:
    """The file of a sheet from a path, a URL, or `REGISTRY#NAME` and `REGISTRY#NAME@VERSION`."""
    registry, hash_, entry = str(place).rpartition("#")
    if not hash_ or (not is_url(place) and Path(place).exists()):
        return local(place)
    name, at, version = entry.partition("@")
    if at and not version.isdecimal():
        raise SheetError(f"The version in {_shown(str(place))!r} is {version!r}; give a number, as in staff@3.")
    return Registry(registry).pull(name, int(version) if at else None)


def load(place: str | Path) -> Sheet:
    """Open a sheet wherever it is: a path, a URL, or `REGISTRY#NAME@VERSION`; without copying it into memory.

    Raises `SheetError` for anything that cannot be fetched or is not a sound sheet.
    """
    return file.load(resolve(place))


def file_digest(path: str | Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _stamp(filesystem: Any, inside: str) -> str | None:
    """What tells this version of a file from all others, or nothing if that cannot be told."""
    if "http" not in (filesystem.protocol if isinstance(filesystem.protocol, tuple) else (filesystem.protocol,)):
        return str(filesystem.ukey(inside))
    told = {name.lower(): value for name, value in filesystem.info(inside).items()}  # its ukey is one of the URL only
    if any(name.lower() in told for name in _SURE) or _is_settled(told):
        return repr([told.get(name.lower()) for name in (*_SURE, "Last-Modified", "size")])
    return None


def _is_settled(told: Mapping[str, Any]) -> bool:
    """Whether a file was last changed so long ago that its date would be another if it had been changed again."""
    try:
        return email.utils.parsedate_to_datetime(told["last-modified"]).timestamp() < time.time() - _SETTLED_SECONDS
    except (KeyError, TypeError, ValueError):
        return False


def _is_whole(download: Path, sha256: str | None) -> bool:
    """Whether a download is there, and what it was when it came."""
    if not download.is_file():
        return False
    try:
        if sha256 is not None:
            _expect(download, sha256, str(download))
        else:
            file.verify(download)
    except SheetError as error:
        logger.warning("a download is fetched again: %s", error)
        return False
    return True


def _expect(path: Path, sha256: str, where: str) -> None:
    found = file_digest(path)
    if found != sha256:
        raise SheetError(
            f"{where!r} has the SHA-256 {found[:16]}..., but {sha256[:16]}... was expected: it was damaged or changed."
        )


def _checked(name: str) -> str:
    if not _NAME.match(name):
        raise SheetError(f"A sheet cannot be named {name!r}; use letters, digits, '.', '_' and '-'.")
    return name


def _filesystem(place: str) -> tuple[Any, str]:
    import fsspec

    with _told(f"{_shown(place)!r} cannot be opened"):
        filesystem, inside = fsspec.core.url_to_fs(place)
        filesystem.invalidate_cache()  # what a bucket held when it was last listed may be another thing by now
    return filesystem, _longer(str(inside), "")


def _put(filesystem: Any, data: bytes | Path, path: str) -> None:
    """Write bytes, or a file, under another name and move, so that no reader sees half of it."""
    unfinished = f"{path}.{os.getpid()}.part"
    try:
        if isinstance(data, Path):
            filesystem.put_file(str(data), unfinished)
        else:
            filesystem.pipe_file(unfinished, data)
        filesystem.mv(unfinished, path)
    except BaseException:
        with contextlib.suppress(Exception):
            filesystem.rm_file(unfinished)
        raise


def _cache() -> Path:
    """Where downloads are kept."""
    named = os.environ.get(CACHE)
    return Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cribsheet"


def _shown(words: str) -> str:
    """A URL, or words with some, without a password in it, nor what HTTP is asked with, such as a token."""
    return re.sub(r"""(https?://[^\s'"?]*\?)[^\s'"#)]+""", r"\1...", re.sub(r"://[^/@\s]*@", "://", words))


def _longer(place: str, more: str) -> str:
    """A place with more behind its path, that is before what HTTP is asked with."""
    path, mark, query = _parted(place)
    return f"{path.rstrip('/')}{more}{mark}{query}"


def _parted(place: str) -> tuple[str, str, str]:
    """A place, and of one behind HTTP what it is asked with, the question mark between them; elsewhere it is a name."""
    return place.partition("?") if re.match(r"(.*::)?https?://", place) else (place, "", "")


@contextlib.contextmanager
def _told(what: str) -> Iterator[None]:
    """Errors of whatever filesystem, as ours."""
    try:
        yield
    except SheetError:
        raise
    except Exception as error:  # each of fsspec's filesystems has its own
        raise SheetError(f"{what}: {type(error).__name__}: {_shown(str(error))}") from error
