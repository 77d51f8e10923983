"""What `import cribsheet` offers, and how little it does."""

from __future__ import annotations

import subprocess
import sys

import pytest

import cribsheet


def in_a_fresh_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("name", cribsheet.__all__)
def test_every_public_name_exists_and_says_what_it_is(name):
    value = getattr(cribsheet, name)
    if name not in ("__version__", "SCORERS"):
        assert value.__doc__ and value.__module__.startswith("cribsheet.")
        assert value.__name__ in (name, name.removesuffix("_sheet"))


def test_the_public_names_are_few_and_in_order():
    constants = [name for name in cribsheet.__all__ if name.isupper()]
    classes = [name for name in cribsheet.__all__ if name[0].isupper() and not name.isupper()]
    rest = [name for name in cribsheet.__all__ if not name[0].isupper()]
    assert cribsheet.__all__ == [*sorted(constants), *sorted(classes), *sorted(rest)]
    assert len(set(cribsheet.__all__)) == len(cribsheet.__all__) <= 36
    assert dir(cribsheet) == sorted(cribsheet.__all__)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'cribsheet' has no attribute 'Sheets'"):
        cribsheet.Sheets  # noqa: B018


def test_importing_is_light_and_loads_neither_torch_nor_transformers():
    code = "import sys; before = set(sys.modules); import cribsheet; print(*sorted(set(sys.modules) - before))"
    modules = in_a_fresh_python(code).split()
    assert not {name.split(".")[0] for name in modules} & {
        "torch",
        "transformers",
        "numpy",
        "pydantic",
        "rich",
        "typer",
    }
    assert len(modules) < 60


def test_a_task_and_a_document_need_no_torch():
    code = "import sys; from cribsheet import Task, Document, CribsheetError; print('torch' in sys.modules)"
    assert in_a_fresh_python(code) == "False"


def test_every_error_is_a_cribsheet_error_and_bad_input_is_a_value_error():
    from cribsheet import errors

    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    assert len(kinds) > 8
    for kind in kinds:
        assert issubclass(kind, cribsheet.CribsheetError) and kind.__doc__
        assert f" {kind.__name__} " in errors.__doc__ or kind is cribsheet.CribsheetError
    others = [errors.CribsheetError, errors.EngineError, errors.IntegrationError]
    assert [kind for kind in kinds if not issubclass(kind, ValueError)] == others
