"""`cribsheet push` and `pull`: sheets into and out of a registry folder; `export`: into files of other engines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from cribsheet.cli.build import check_output
from cribsheet.cli.console import AsJson, say, say_json
from cribsheet.cli.options import SheetFile, flat, whole
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


@flat
def export(
    file: SheetFile,
    to: Annotated[Literal["llama.cpp", "mlx", "vllm"], typer.Option("--to", help="The engine that will read it.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The file to write.")],
    gguf: Annotated[
        Path | None, typer.Option(metavar="FILE", help="For llama.cpp: must be the model that made the sheet.")
    ] = None,
    version: Annotated[
        int | None,
        typer.Option(metavar="N", parser=whole(), help="For llama.cpp: version of its format.  [default: the newest]"),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file if it exists.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a sheet as a file of another engine.

    It must have been built with --for-engines.
    """
    check_output(output, force=force)
    from cribsheet.sheet.registry import load

    sheet = load(file)
    sheet.export(output, to=to, version=version, gguf=gguf)
    size = output.stat().st_size
    if as_json:
        say_json({"file": str(output), "engine": to, "tokens": sheet.length, "bytes": size})
    else:
        say(f"{in_line(str(output))}: {sheet.length:,} tokens for {to}, {size / 1e6:,.1f} MB")
