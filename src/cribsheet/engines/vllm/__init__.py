"""Sheets in vLLM: `CribsheetConnector`, which its servers load by name, and the file that it loads sheets from.

    vllm serve MODEL --kv-transfer-config '{"kv_connector": "CribsheetConnector", "kv_role": "kv_both",
        "kv_connector_module_path": "cribsheet.engines.vllm", "kv_connector_extra_config": {"sheets": {"staff": FILE}}}'

`file.py` is the file, `scheduling.py` what vLLM's scheduler is told of a request, `caches.py` how its workers' caches
are filled, `checks.py` what must be the same, and `connector.py` the class, the only one that imports vLLM.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cribsheet.errors import integration

if TYPE_CHECKING:
    from cribsheet.engines.vllm.connector import CribsheetConnector

__all__ = ["CribsheetConnector"]


def __getattr__(name: str) -> Any:
    if name != "CribsheetConnector":
        raise AttributeError(f"module 'cribsheet.engines.vllm' has no attribute {name!r}")
    integration("vllm", "vllm")
    return integration("cribsheet.engines.vllm.connector", "vllm").CribsheetConnector
