"""Optional packages: imported when they are needed, or answered with the line to install."""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING

from bigdl._base.errors import MissingDependencyError

if TYPE_CHECKING:
    from types import ModuleType


def need(module: str, *, extra: str, purpose: str) -> ModuleType:
    """Import ``module`` now, or say how to install it.

    Args:
        module: Dotted name of the module.
        extra: The extra of this project that brings it.
        purpose: What needs it, as the subject of a sentence ("Saving a report").

    Raises:
        MissingDependencyError: ``module`` is not installed. A package that is installed
            but broken inside raises its own error.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as exc:
        if exc.name is None or not f"{module}.".startswith(f"{exc.name}."):
            raise  # installed but broken inside: show the real cause
        raise MissingDependencyError(
            f"{purpose} needs '{module}', which is not installed. "
            f"Install it with: pip install 'bigdl-next[{extra}]'"
        ) from exc


def is_installed(module: str) -> bool:
    """Whether ``module`` can be found, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False
