"""Registers our classes where LangChain keeps the classes that `langchain_core.load.load` may revive.

LangChain lists its partners' classes there itself; for a package outside of its repository this is the one way to be
revived by `load(..., allowed_objects="all", valid_namespaces=["langchain_cribsheet"])`. Without the namespace nothing
is revived, and what is revived holds paths and settings and opens nothing before it is asked.
"""

from __future__ import annotations

from importlib import import_module


def register(*path: str) -> None:
    """Let a class be revived by its path: modules, then the class."""
    loading = import_module("langchain_core.load.load")  # its package has a function of the same name
    loading.ALL_SERIALIZABLE_MAPPINGS.setdefault(path, path)
    getattr(loading, "_default_class_paths_cache", {}).pop("all", None)  # what was computed before we came
