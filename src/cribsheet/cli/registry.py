"""`cribsheet push` and `cribsheet pull`: sheets into and out of a registry folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cribsheet.cli.build import check_output
from cribsheet.cli.console import AsJson, say, say_json
from cribsheet.cli.options import flat
from cribsheet.corpus.printable import in_line

RegistryPlace = Annotated[str, typer.Argument(metavar="REGISTRY", help="A folder or a URL that fsspec opens.")]


@flat
def push(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A sheet file.")],
    registry: RegistryPlace,
    name: Annotated[str | None, typer.Option(metavar="NAME", help="Its name there; the file's own by default.")] = None,
    as_json: AsJson = False,
) -> None:
    """Add a sheet, with its archive, to a registry as its next version.

    A registry is a folder that holds sheets by name and version, with their digests.
    """
    from cribsheet.sheet.registry import Registry

    name = name or file.name.removesuffix(".sheet")
    version = Registry(registry).push(file, name)
    if as_json:
        say_json({"name": name, **version.model_dump()})
    else:
        say(f"{name}@{version.version}  {version.size} bytes  sha256 {version.sha256}")


@flat
def pull(
    sheet: Annotated[str, typer.Argument(metavar="REGISTRY#NAME[@N]", help="The newest version, or the N-th.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The sheet file to write.")],
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file if it exists.")] = False,
) -> None:
    """Copy a sheet from a registry or a URL to a file, verified; its archive to a second one."""
    check_output(output, force=force)
    from cribsheet.sheet.file import copy, read_manifest
    from cribsheet.sheet.registry import resolve

    copy(resolve(sheet), output)
    archive = read_manifest(output).archive
    beside = f", and an archive of {archive.bytes}" if archive else ""
    say(f"{in_line(str(output))}  {output.stat().st_size} bytes{beside}")
