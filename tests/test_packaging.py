"""What each distribution holds, and what is said where one of them is missing."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
import zlib
from pathlib import Path

import pytest
import typer

from cribsheet.cli import add_bench
from cribsheet.cli.console import MISUSE, guarded
from cribsheet.errors import ModelError
from cribsheet.model.backbone import Backbone

ROOT = Path(__file__).parents[1]
POCKET = ROOT / "src" / "cribsheet_pocket"
LISTING = """
import json, os, sys
from setuptools import Distribution
from setuptools.config.pyprojecttoml import apply_configuration
os.chdir(sys.argv[1])
distribution = apply_configuration(Distribution({"script_name": "setup.py"}), "pyproject.toml")
build = distribution.get_command_obj("build_py")
build.finalize_options()
files = [os.path.join(folder, name) for _, folder, _, names in build.data_files for name in names]
print(json.dumps(sorted(os.path.normpath(file) for file in [*files, *(file for *_, file in build.find_all_modules())])))
"""


def packed(folder: Path) -> list[Path]:
    """The files of the wheel that setuptools makes of a folder."""
    listing = [sys.executable, "-W", "ignore", "-c", LISTING, str(folder)]
    done = subprocess.run(listing, capture_output=True, text=True, check=True)
    return [folder / name for name in json.loads(done.stdout.splitlines()[-1])]


def test_the_librarys_wheel_is_the_library_and_nothing_beside_it() -> None:
    files = packed(ROOT)
    assert {file.relative_to(ROOT / "src").parts[0] for file in files} == {"cribsheet"}
    assert set((ROOT / "src" / "cribsheet").rglob("*.py")) <= set(files)
    data = {file.relative_to(ROOT / "src" / "cribsheet").as_posix() for file in files if file.suffix != ".py"}
    assert {"py.typed", "compress/rehearsal.toml", "server/page/page.html", "demo/demo.toml"} <= data
    assert not [name for name in data if name.endswith((".safetensors", ".bin", ".json"))]
    assert sum(len(zlib.compress(file.read_bytes())) for file in files) < 900_000  # a wheel of less than 1 MB


def test_the_pocket_models_wheel_is_the_weights_with_what_reads_them() -> None:
    names = {file.relative_to(POCKET).as_posix() for file in packed(POCKET)}
    assert {"__init__.py", "quantize.py", "card.md", "data/weights-int8.safetensors"} <= names
    assert {f"data/{file.name}" for file in (POCKET / "data").iterdir()} <= names
    assert {Path(name).suffix for name in names} == {".py", ".md", ".json", ".txt", ".safetensors"}


def test_the_library_asks_for_the_pocket_model_that_stands_in_the_clone() -> None:
    version = tomllib.loads((POCKET / "pyproject.toml").read_text())["project"]["version"]
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert f"cribsheet-pocket=={version}" in wanted


def test_without_the_pocket_model_its_name_tells_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cribsheet_pocket", None)
    with pytest.raises(ModelError, match=r"pip install cribsheet-pocket, or in a clone pip install \./src"):
        Backbone.load("pocket")


@pytest.mark.parametrize("words", [["bench"], ["bench", "speed", "--quick"], ["bench", "--help"]])
def test_where_the_benches_are_missing_their_command_says_where_they_are(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("cribsheet.cli.find_spec", lambda name: None)
    app = typer.Typer()
    app.callback()(lambda: None)
    add_bench(app)
    assert guarded(lambda: app(args=words, prog_name="cribsheet", standalone_mode=False)) == MISUSE
    (line,) = capsys.readouterr().err.splitlines()
    assert "clone cribsheet's repository and there run pip install -e ./src/cribsheet_pocket -e ." in line
