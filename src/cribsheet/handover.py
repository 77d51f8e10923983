"""Hand-over to the frameworks whose integrations are distributions of their own."""

from __future__ import annotations

import importlib
from types import ModuleType

from cribsheet.errors import IntegrationError


def integration(module: str, distribution: str) -> ModuleType:
    """The module of an integration. Raises `IntegrationError` with the command that installs it if it is missing."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not module.startswith(error.name):
            raise  # it is there, and something that it needs is not
        raise IntegrationError(f"This needs the distribution {distribution}: pip install {distribution}") from error
