"""Nobody but its owner uses what begins with an underscore."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import cribsheet

ROOT = Path(cribsheet.__file__).parents[2]
PACKAGES = ("src/cribsheet", "integrations/langchain/langchain_cribsheet", "integrations/llama-index/llama_index")
OURS = ("cribsheet", "langchain_cribsheet", "llama_index.llms.cribsheet")
FILES = {
    path.relative_to(ROOT).as_posix(): path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))
}
PUBLIC = {"_replace", "_asdict", "_fields", "_make", "_exit", "_repr_html_"}  # though they begin with an underscore
FOREIGN = {  # insides of other libraries for which there is no public way
    "attention/backends.py": {
        "_flash_attention_forward",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
    },
    "kernels/products.py": {"_linear_pointwise", "_reorder_linear_weight"},
    "model/llama_weights.py": {"_forward_hooks", "_forward_pre_hooks", "_parameters", "_version"},
    "model/registration.py": {"_modules"},
    "cribsheet/synthesizer.py": {"_get_messages", "_log_template_data", "_parse_output"},
}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in PUBLIC


def defined(tree: ast.Module) -> set[str]:
    """Names that a module gives: functions, classes, variables, fields, and attributes that it sets."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
    return names


def is_own(value: ast.expr) -> bool:
    """Whether an attribute is of `self`, `cls` or `super()`."""
    if isinstance(value, ast.Call):
        return getattr(value.func, "id", "") == "super"
    return isinstance(value, ast.Name) and value.id in ("self", "cls")


def others_privates(source: str) -> Iterator[str]:
    """Private attributes and functions of other modules that a module uses."""
    tree = ast.parse(source)
    own = defined(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr) and not is_own(node.value):
            if node.attr not in own:
                yield node.attr
        elif isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith(OURS)):
            yield from (alias.name for alias in node.names if is_private(alias.name))


@pytest.mark.parametrize("name", FILES)
def test_no_module_uses_what_is_private_to_another_one(name):
    allowed = next((names for file, names in FOREIGN.items() if name.endswith(file)), set())
    assert set(others_privates(FILES[name].read_text())) == allowed


@pytest.mark.parametrize(
    ("source", "used"),
    [
        ("kb._placed()", ["_placed"]),
        ("class A:\n def f(self, other): return self._a + super()._b + other._replace(c=1)", []),
        ("class A:\n def f(self, other):\n  self._a = 1\n  return other._a + other.b._c", ["_c"]),
        ("from cribsheet.llm import _SETTINGS, ask", ["_SETTINGS"]),
        ("from cribsheet import __version__\nfrom torch import _C", []),
    ],
)
def test_what_is_private_to_another_module_is_recognised(source, used):
    assert list(others_privates(source)) == used
