"""Who imports whom, and what importing leaves untouched."""

from __future__ import annotations

import ast
from importlib.util import find_spec
from pathlib import Path

import pytest
from test_public_api import in_a_fresh_python

import cribsheet

ROOT = Path(cribsheet.__file__).parent
FILES = {path.relative_to(ROOT).as_posix(): path for path in sorted(ROOT.rglob("*.py"))}
UPPER = ("cli/", "bench/", "demo/", "server/", "ray/")
CORE = sorted(
    "cribsheet." + name.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
    for name in FILES
    if name != "__init__.py"
    and "__main__" not in name
    and not name.startswith(UPPER)
    and (
        name not in {"kernels.py", "step_kernels.py", "read_kernels.py", "step_attention.py"} or find_spec("triton")
    )  # torch brings Triton along for CUDA, and only `fused` and `lean` ask for it
)


def imports(path: Path, *, to_check_types: bool = True) -> set[str]:
    """Modules that a file names in imports, also where only a type checker looks."""
    found, tree = set(), ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING" and not to_check_types:
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module)
    return found


@pytest.mark.parametrize("name", FILES)
def test_no_file_of_the_package_names_a_framework(name):
    roots = {module.split(".")[0] for module in imports(FILES[name], to_check_types=name != "llm.py")}  # `as_*` give
    foreign = {"langchain", "langchain_core", "llama_index", "kvpress"}
    if name == "bench/peers_runner.py":  # which runs in the peer's own environment, and imports nothing of ours
        assert "cribsheet" not in roots
        foreign.remove("kvpress")
    assert not roots & foreign


def test_only_one_file_reaches_into_the_insides_of_transformers():
    inside = {
        name
        for name, path in FILES.items()
        for module in imports(path)
        if not name.startswith(UPPER) and module.startswith("transformers.") and module != "transformers.cache_utils"
    }
    assert inside == {"attached.py", "parallel.py"}  # the second hands over a plan, by a public name
    whole = {name for name, path in FILES.items() if any(m.split(".")[0] == "transformers" for m in imports(path))}
    assert {name for name in whole if "/" not in name} <= {
        "attached.py", "backbone.py", "batch.py", "build.py", "parallel.py", "prefix.py", "testing.py"
    }  # fmt: skip


def test_the_core_does_not_import_what_stands_on_it():
    upper = {
        "cribsheet.cli",
        "cribsheet_bench",
        "cribsheet.server",
        "cribsheet.demo",
        "cribsheet.testing",
        "cribsheet.ray",
    }
    for name, path in FILES.items():
        if not name.startswith((*UPPER, "__main__")):
            assert not {module for module in imports(path) if any(module.startswith(u) for u in upper)}, name


def test_nothing_is_pickled_or_evaluated():
    for name, path in FILES.items():
        assert not imports(path) & {"pickle", "marshal", "shelve", "dill"}, name
        calls = {node.func.id for node in ast.walk(ast.parse(path.read_text()))
                 if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}  # fmt: skip
        assert not calls & {"eval", "exec", "compile", "__import__"}, name
        assert "torch.load" not in path.read_text(), name


def test_the_core_prints_nothing():
    for name, path in FILES.items():
        if not name.startswith((*UPPER, "__main__")):
            calls = {node.func.id for node in ast.walk(ast.parse(path.read_text()))
                     if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}  # fmt: skip
            assert "print" not in calls, name


def test_importing_everything_needs_no_framework_and_leaves_transformers_and_torch_as_they_were():
    """Neither LangChain nor LlamaIndex, which stand on it."""
    code = f"""
import importlib, logging, signal, sys, warnings
warnings.simplefilter('ignore')
import torch, transformers
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, AutoTokenizer
from transformers.models.llama import modeling_llama
class Wall:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('langchain', 'langchain_core', 'llama_index', 'kvpress'):
            raise AssertionError(name)
sys.meta_path.insert(0, Wall())
def state():
    return (sorted(AttentionInterface().valid_keys()), sorted(AttentionMaskInterface().valid_keys()),
            id(modeling_llama.LlamaAttention.forward), id(modeling_llama.apply_rotary_pos_emb),
            id(torch.nn.functional.scaled_dot_product_attention), torch.get_num_threads(), torch.get_default_dtype(),
            torch.is_grad_enabled(), torch.initial_seed(), list(logging.getLogger().handlers),
            logging.getLogger().level, signal.getsignal(signal.SIGINT))
before = state()
for name in {CORE!r}:
    importlib.import_module(name)
assert state() == before
print(len({CORE!r}))
"""
    assert int(in_a_fresh_python(code)) > 25
