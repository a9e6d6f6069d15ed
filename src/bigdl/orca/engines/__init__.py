"""The table of engines: where work runs. Each is one file, imported when it is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bigdl._base.registry import Registry

if TYPE_CHECKING:
    from bigdl.orca.engines.base import Engine

__all__ = ["ENGINES"]

ENGINES: Registry[type[Engine]] = Registry(
    "engine",
    {
        "local": "bigdl.orca.engines.local:LocalEngine",
        "spark": "bigdl.orca.engines.spark:SparkEngine",
    },
    group="bigdl.engines",
)
