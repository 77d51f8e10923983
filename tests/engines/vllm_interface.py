"""vLLM's interface of connectors, as far as ours uses it: names and parameters as in its sources, and nothing behind.

`python tests/engines/vllm_interface.py FOLDER...` compares it with the sources in unpacked wheels of vLLM.
"""

from __future__ import annotations

import ast
import enum
import inspect
import sys
import types
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import pytest

VERSION = "0.33.0"
BASE = "vllm.distributed.kv_transfer.kv_connector.v1.base"
STATE = "vllm.distributed.parallel_state"


class KVConnectorRole(enum.Enum):
    SCHEDULER = 0
    WORKER = 1


class KVConnectorMetadata(ABC):  # noqa: B024
    pass


class SupportsHMA(ABC):
    @abstractmethod
    def request_finished_all_groups(self, request, block_ids):
        raise NotImplementedError


class KVConnectorBase_V1(ABC):
    def __init__(self, vllm_config, role, kv_cache_config):
        self._connector_metadata = None
        self._vllm_config = vllm_config
        self._kv_transfer_config = vllm_config.kv_transfer_config
        self._kv_cache_config = kv_cache_config
        self._role = role

    def bind_connector_metadata(self, connector_metadata):
        self._connector_metadata = connector_metadata

    def clear_connector_metadata(self):
        self._connector_metadata = None

    def _get_connector_metadata(self):
        assert self._connector_metadata is not None
        return self._connector_metadata

    def register_kv_caches(self, kv_caches):
        return

    @abstractmethod
    def start_load_kv(self, forward_context, **kwargs): ...

    @abstractmethod
    def wait_for_layer_load(self, layer_name): ...

    @abstractmethod
    def save_kv_layer(self, layer_name, kv_layer, attn_metadata, **kwargs): ...

    @abstractmethod
    def wait_for_save(self): ...

    def get_block_ids_with_load_errors(self):
        return set()

    @abstractmethod
    def get_num_new_matched_tokens(self, request, num_computed_tokens): ...

    @abstractmethod
    def update_state_after_alloc(self, request, blocks, num_external_tokens): ...

    @abstractmethod
    def build_connector_meta(self, scheduler_output): ...

    def on_new_request(self, request):
        return

    def request_finished(self, request, block_ids):
        return False, None

    def take_events(self):
        return ()


# What else of vLLM is read or set, by file and class: attributes, fields and methods.
USED = {
    "v1/request.py": {
        "Request": "request_id prompt_token_ids kv_transfer_params lora_request cache_salt block_hashes "
        "skip_reading_prefix_cache resumable num_tokens update_block_hashes append_output_token_ids"
    },
    "v1/core/kv_cache_manager.py": {"KVCacheBlocks": "get_block_ids"},
    "v1/kv_cache_interface.py": {
        "KVCacheConfig": "kv_cache_groups",
        "KVCacheGroupSpec": "kv_cache_spec",
        "AttentionSpec": "dtype kv_quant_mode",
        "KVCacheSpec": "block_size",
        "FullAttentionSpec": "sliding_window attention_chunk_size",
    },
    "config/kv_transfer.py": {"KVTransferConfig": "kv_connector_extra_config kv_load_failure_policy"},
    "config/vllm.py": {"VllmConfig": "model_config cache_config parallel_config kv_transfer_config"},
    "config/parallel.py": {
        "ParallelConfig": "tensor_parallel_size decode_context_parallel_size prefill_context_parallel_size"
    },
    "config/model.py": {"ModelConfig": "model revision max_model_len hf_text_config"},
    "config/cache.py": {"CacheConfig": "cache_dtype"},
    "platforms/interface.py": {"Platform": "is_cpu"},
    "forward_context.py": {"ForwardContext": "no_compile_layers"},
    "v1/attention/backends/cpu_attn.py": {"CPUAttentionBackendImpl": "do_kv_cache_update"},
}


def modules(rank):
    """The modules that are imported, with a version and a worker's number."""
    base = types.ModuleType(BASE)
    for thing in (KVConnectorRole, KVConnectorMetadata, SupportsHMA, KVConnectorBase_V1):
        setattr(base, thing.__name__, thing)
    state: Any = types.ModuleType(STATE)
    state.get_tensor_model_parallel_rank = rank
    made = {BASE: base, STATE: state}
    for name in list(made):
        while "." in name:
            name = name.rpartition(".")[0]
            made.setdefault(name, types.ModuleType(name))
    made["vllm"].__version__ = VERSION
    made["vllm.platforms"] = platforms = types.ModuleType("vllm.platforms")
    platforms.current_platform = types.SimpleNamespace(
        is_cpu=lambda: False
    )  # a GPU's caches, whose rows lie as they are
    return made


@pytest.fixture
def interface(monkeypatch):
    """vLLM, as it seems to our connector; `.rank` is the worker's that it is asked for next."""
    told = types.SimpleNamespace(rank=0)
    for name, module in modules(lambda: told.rank).items():
        monkeypatch.setitem(sys.modules, name, module)
    ours = "cribsheet.engines.vllm.connector"
    monkeypatch.delitem(sys.modules, ours, raising=False)
    import cribsheet.engines.vllm as package

    told.connector = package.CribsheetConnector
    told.vllm = sys.modules["vllm"]
    yield told
    sys.modules.pop(ours, None)
    vars(package).pop("connector", None)


def parameters(function):
    """Names of what a function takes, in a source."""
    given = function.args
    return [each.arg for each in (*given.posonlyargs, *given.args, *given.kwonlyargs)] + [
        each.arg for each in (given.vararg, given.kwarg) if each
    ]


def classes(path):
    """Classes of a source, by name."""
    return {node.name: node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ClassDef)}


def names_in(node):
    """Fields, methods and attributes of `self` of a class."""
    found = set()
    for each in ast.walk(node):
        if isinstance(each, ast.FunctionDef):
            found.add(each.name)
        elif isinstance(each, ast.Attribute) and getattr(each.value, "id", "") == "self":
            found.add(each.attr)
        elif isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name):
            found.add(each.target.id)
    return found


def differences(root):
    """What is otherwise in the sources of a vLLM."""
    real = classes(root.joinpath(*BASE.split(".")[1:]).with_suffix(".py"))
    found = [each for ours in (KVConnectorBase_V1, SupportsHMA) for each in unlike(ours, real[ours.__name__])]
    for file, used in USED.items():
        here = classes(root / file)
        for name, needed in used.items():
            missing = set(needed.split()) - names_in(here[name])
            if missing:
                found.append(f"{file}: {name} has no {sorted(missing)}")
    state = ast.parse((root / "distributed/parallel_state.py").read_text())
    if "get_tensor_model_parallel_rank" not in {each.name for each in state.body if isinstance(each, ast.FunctionDef)}:
        found.append("no get_tensor_model_parallel_rank")
    return found


def unlike(ours, theirs):
    """Methods of a class that take other things in its source, or are left to others there and not here."""
    methods = {each.name: each for each in theirs.body if isinstance(each, ast.FunctionDef)}
    for name, mine in vars(ours).items():
        if inspect.isfunction(mine):
            takes = parameters(methods[name]) if name in methods else None
            if takes != list(inspect.signature(mine).parameters):
                yield f"{ours.__name__}.{name}: {takes}"
    abstract = {
        name
        for name, each in methods.items()
        if any(getattr(mark, "id", "") == "abstractmethod" for mark in each.decorator_list)
    }
    if abstract != ours.__abstractmethods__:
        yield f"{ours.__name__} leaves to others {sorted(abstract)}"


if __name__ == "__main__":
    for folder in map(Path, sys.argv[1:]):
        print(folder, differences(folder) or "the same")  # noqa: T201
