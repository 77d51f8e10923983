"""Who imports whom, and what importing leaves untouched."""

from __future__ import annotations

import ast
import sys
import threading
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import CodeType, FrameType

import pytest
from corpus import DOCUMENTS, FEW_SHOT, QUESTION
from test_public_api import in_a_fresh_python

import cribsheet
from cribsheet import CompressedKnowledgeLLM
from cribsheet.engine.engine import Engine
from cribsheet.testing import tiny_backbone

ROOT = Path(cribsheet.__file__).parent
FILES = {path.relative_to(ROOT).as_posix(): path for path in sorted(ROOT.rglob("*.py"))}
BENCH = {
    path.relative_to(ROOT.parent).as_posix(): path for path in sorted((ROOT.parent / "cribsheet_bench").rglob("*.py"))
}
UPPER = ("cli/", "compare/", "demo/", "server/", "ray/")
LINE = """errors vocabulary kernels | corpus attention | structured | prompt | model | sheet engine engines
    | compress retrieval | plan recall | living | asking | retention | study | build forecast | llm
    | compare demo server | ray | cli | testing"""
FLOOR = {room: number for number, floor in enumerate(LINE.split("|")) for room in floor.split()}
CORE = sorted(
    "cribsheet." + name.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
    for name in FILES
    if name != "__init__.py"
    and "__main__" not in name
    and not name.startswith(UPPER)
    and name != "engines/vllm/connector.py"  # which vLLM imports
    and (
        not name.startswith("kernels/") or name in ("kernels/__init__.py", "kernels/products.py") or find_spec("triton")
    )  # torch brings Triton along for CUDA, and only `dispatch` and `llama_step` ask for it
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


@pytest.mark.parametrize("name", FILES | BENCH)
def test_no_file_of_the_package_names_a_framework(name):
    path = (FILES | BENCH)[name]
    roots = {module.split(".")[0] for module in imports(path, to_check_types=name != "llm.py")}  # `as_*` give
    foreign = {"langchain", "langchain_core", "llama_index", "kvpress"}
    if name == "cribsheet_bench/quality/peers_runner.py":  # which runs in the peer's own environment, with nothing ours
        assert not roots & {"cribsheet", "cribsheet_bench"}
        foreign.remove("kvpress")
    assert not roots & foreign


def test_only_one_file_reaches_into_the_insides_of_transformers():
    inside = {
        name
        for name, path in FILES.items()
        for module in imports(path)
        if not name.startswith(UPPER) and module.startswith("transformers.") and module != "transformers.cache_utils"
    }
    assert inside == {"model/registration.py", "model/divided.py"}  # the second hands over a plan, by a public name
    whole = {name for name, path in FILES.items() if any(m.split(".")[0] == "transformers" for m in imports(path))}
    about = {
        "plan/describe.py",
        "testing.py",
        "cli/console.py",
        "compare/versions.py",
    }  # its version, its logs, a tiny model
    assert {name for name in whole - about if name.split("/")[0] not in ("model", "attention")} == set()


def rooms(path: Path) -> set[str]:
    """Folders and files at the root that a file imports from, also in functions and for types."""
    taken = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "cribsheet":
            taken.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cribsheet."):
            taken.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            taken.update(alias.name.split(".")[1] for alias in node.names if alias.name.startswith("cribsheet."))
    return taken & set(FLOOR)


def test_a_lower_folder_imports_no_higher_one():
    inside = {name: path for name, path in FILES.items() if name not in ("__init__.py", "__main__.py")}
    assert {name.split("/")[0].removesuffix(".py") for name in inside} == set(FLOOR)
    upward = {
        (name, room)
        for name, path in inside.items()
        for room in rooms(path)
        if FLOOR[room] > FLOOR[name.split("/")[0].removesuffix(".py")]
    }
    assert upward == set()


def neighbours(name: str, path: Path) -> set[str]:
    """Files of the library that a file imports, also in functions and for types."""
    homes = {
        "cribsheet." + each.removesuffix(".py").replace("/", ".").removesuffix(".__init__"): each for each in FILES
    }
    taken = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            taken.update(homes.get(each) or homes.get(node.module, "") for each in names)
    return taken - {name, "", "__init__.py"}


def test_no_files_import_each_other_in_a_circle():
    left = {name: neighbours(name, path) for name, path in FILES.items()}
    while free := [name for name, taken in left.items() if not taken & set(left)]:
        for name in free:
            del left[name]
    assert sorted(left) == []


Way = tuple[tuple[str, str], ...]  # file and function of ours, from the outermost inwards


def ways_to(reached: Callable[[CodeType], bool], run: Callable[[], object]) -> set[Way]:
    """The ways by which functions of the library come, in any thread, to code that is `reached` and not left again."""
    ways = set()

    def note(frame: FrameType, event: str, argument: object) -> None:
        if event != "call" or not reached(frame.f_code):
            return
        outer, way = frame.f_back, []
        while outer is not None:
            if reached(outer.f_code):
                return
            if outer.f_code.co_filename.startswith(str(ROOT)):
                file = Path(outer.f_code.co_filename).relative_to(ROOT).as_posix()
                way.append((file, outer.f_code.co_qualname))
            outer = outer.f_back
        ways.add(tuple(reversed(way)))

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return ways


def is_of_transformers(code: CodeType) -> bool:
    return "transformers" in Path(code.co_filename).parts and "models" in Path(code.co_filename).parts


def test_a_document_comes_to_the_model_by_six_functions_in_four_files_and_a_question_by_eight_in_four():
    model = tiny_backbone()

    def build() -> CompressedKnowledgeLLM:
        return CompressedKnowledgeLLM.build(
            DOCUMENTS, FEW_SHOT, model=model, rate=2, chunk_tokens=40, guide="resident", dtype="int4"
        )

    build()  # measures the model's profile, which is done once for a model and reads no document
    ways = ways_to(is_of_transformers, build)
    assert len(ways) == 2, ways  # of the documents, and of the guide on top of them
    for way in ways:
        assert way[0] == ("llm.py", "CompressedKnowledgeLLM.build") and len(way) <= 6, way
        assert len({file for file, _ in way}) <= 4, way

    with build() as kb:
        submitted = ways_to(lambda code: code is Engine.submit.__code__, lambda: kb.ask(QUESTION, max_tokens=3))
        (asked,) = submitted
        assert asked[0] == ("llm.py", "CompressedKnowledgeLLM.ask"), asked
    with build() as kb:
        ways = ways_to(is_of_transformers, lambda: kb.ask(QUESTION, max_tokens=3))
    assert ways
    for way in ways:  # by which the question is read, and each token
        whole = (*asked, ("engine/engine.py", "Engine.submit"), *way)
        assert len(whole) <= 8 and len({file for file, _ in whole}) <= 4, whole


@pytest.mark.parametrize("room", ["ray", "server"])
def test_names_that_a_folder_gives_later_are_where_it_says(room):
    """Needs none of what they need themselves: a move must not lose them where an extra is not installed."""
    body = ast.parse(FILES[f"{room}/__init__.py"].read_text()).body
    (homes,) = (
        ast.literal_eval(node.value) for node in body if isinstance(node, ast.Assign) and node.targets[0].id == "_HOMES"
    )
    assert homes
    for name, home in homes.items():
        made = ast.parse(FILES[f"{room}/{home.replace('.', '/')}.py"].read_text()).body
        defined = {
            node.name for node in made if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        }
        assert name in defined, (room, home, name)


def test_folders_are_small_enough_to_be_read():
    counts: dict[str, int] = {}
    for name in FILES:
        folder = name.rpartition("/")[0]
        counts[folder] = counts.get(folder, 0) + 1
    assert counts[""] <= 8
    assert {folder: count for folder, count in counts.items() if count > 12} == {}


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
    for name, path in (FILES | BENCH).items():
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
