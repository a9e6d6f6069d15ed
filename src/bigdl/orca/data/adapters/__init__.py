"""The table of data adapters. Each is one file, imported when data of its kind comes.

What kind data is needs no import: of a library that was never loaded nobody holds an object.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

from bigdl._base.errors import ArgumentError
from bigdl._base.optional import need
from bigdl._base.registry import Registry
from bigdl.orca.data.contract import Request, Sharded

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["ADAPTERS", "adapt", "kind_of"]

ADAPTERS: Registry[Callable[[Any, Request], Sharded]] = Registry(
    "kind of data",
    {
        "arrays": "bigdl.orca.data.adapters.arrays:adapt_arrays",
        "pandas": "bigdl.orca.data.adapters.pandas:adapt_frame",
        "arrow": "bigdl.orca.data.adapters.arrow:adapt_table",
        "parquet": "bigdl.orca.data.adapters.parquet:adapt_files",
        "dataloader": "bigdl.orca.data.adapters.dataloader:adapt_loader",
        "dataset": "bigdl.orca.data.adapters.dataloader:adapt_dataset",
        "shards": "bigdl.orca.data.adapters.shards:adapt_shards",
        "creator": "bigdl.orca.data.adapters.creator:adapt_creator",
    },
)

# Kind -> (module, class) pairs whose instances it takes, asked in this order.
_CLASSES: dict[str, tuple[tuple[str, str], ...]] = {
    "dataloader": (("torch.utils.data", "DataLoader"),),
    "dataset": (("torch.utils.data", "Dataset"),),
    "pandas": (("pandas", "DataFrame"),),
    "arrow": (("pyarrow", "Table"), ("pyarrow", "RecordBatch")),
    "shards": (("bigdl.orca.data.xshards", "XShards"),),
    "arrays": (("numpy", "ndarray"), ("torch", "Tensor")),
}


def kind_of(data: object) -> str | None:
    """The row of the table that takes ``data``; None if none does."""
    for kind, classes in _CLASSES.items():
        if any(_is_a(data, module, name) for module, name in classes):
            return kind
    if isinstance(data, (str, os.PathLike)):
        return "parquet"
    if isinstance(data, list) and data and all(isinstance(i, (str, os.PathLike)) for i in data):
        return "parquet"
    if isinstance(data, (tuple, list, dict)) or data is None:
        return "arrays"
    return "creator" if callable(data) else None


def _is_a(data: object, module: str, name: str) -> bool:
    kind = getattr(sys.modules.get(module), name, None)
    return isinstance(kind, type) and isinstance(data, kind)


def adapt(data: Any, request: Request | None = None) -> Sharded:
    """The rows of ``data`` as workers read them.

    Args:
        data: Arrays or nests of them, a table, Parquet files, shards, a loader, a dataset, a
            function that makes one of the latter two, or what is a ``Sharded`` already.
        request: What the call says about the data; None for ``fit`` without any argument.

    Raises:
        ArgumentError: No adapter takes data of this kind.
        MissingDependencyError: Paths of Parquet files need pyarrow.
        ConfigError: An argument does not go with this kind of data.
        DataError: The data cannot be used as asked.
    """
    request = Request() if request is None else request
    if not isinstance(data, type) and isinstance(data, Sharded):
        return data
    kind = kind_of(data)
    if kind is None:
        raise ArgumentError(
            f"{request.call}() cannot read a {type(data).__name__}. Give arrays as (features, "
            "labels), a pandas DataFrame, a pyarrow Table, a path of Parquet files, XShards, a "
            "DataLoader, a Dataset, or a function (config, batch_size) that makes one of these "
            "two."
        )
    if kind == "parquet":
        need("pyarrow", extra="spark", purpose="Reading Parquet files")
    return ADAPTERS.get(kind)(data, request)
