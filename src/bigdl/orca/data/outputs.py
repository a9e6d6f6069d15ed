"""Predictions as columns: their names, and names that are taken. NumPy only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from bigdl._base.errors import ConfigError, DataError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from bigdl._base.trees import Tree
    from bigdl.orca.data.contract import OutputSchema

__all__ = ["check_names", "named_outputs"]


def check_names(schema: OutputSchema, taken: Sequence[Any]) -> None:
    """Refuse names that the table has already, before any work.

    Raises:
        ConfigError: A name is taken by a column of the table, or given twice.
    """
    asked = [schema.names] if isinstance(schema.names, str) else list(schema.names)
    twice = sorted({name for name in asked if asked.count(name) > 1})
    if twice or not asked:
        raise ConfigError(f"output_cols={asked}: need one name for each output, none twice.")
    _refuse_taken(asked, taken)


def named_outputs(
    outputs: Tree, schema: OutputSchema, taken: Sequence[Any]
) -> dict[str, np.ndarray]:
    """Each output under the name of its column, in order.

    One output has the name itself; of several, each adds its number or key. Without rows there
    is nothing to see outputs by: each name gets an empty column of float32.

    Raises:
        ConfigError: A name is taken, or there are more or fewer names than outputs.
        DataError: An output is not an array.
    """
    names = schema.names
    outputs = schema.sample if outputs is None else outputs
    if outputs is None:
        each = [names] if isinstance(names, str) else names
        return {name: np.empty(0, np.float32) for name in each}
    if isinstance(names, str):
        found = dict(_flat(outputs, names))
    else:
        values = [value for _, value in _flat(outputs, "prediction")]
        if len(values) != len(names):
            raise ConfigError(
                f"output_cols has {len(names)} names, but the model has {len(values)} outputs."
            )
        found = dict(zip(names, values, strict=True))
    _refuse_taken(found, taken)
    return found


def _refuse_taken(names: Iterable[str], taken: Sequence[Any]) -> None:
    clash = [repr(name) for name in names if name in taken]
    if clash:
        raise ConfigError(
            f"The table has a column {', '.join(clash)} already. Choose another name for the "
            "prediction: output_cols=…."
        )


def _flat(outputs: Tree, name: str) -> Iterable[tuple[str, np.ndarray]]:
    if isinstance(outputs, Mapping):
        for key, value in outputs.items():
            yield from _flat(value, f"{name}_{key}")
    elif isinstance(outputs, (tuple, list)):
        for i, value in enumerate(outputs):
            yield from _flat(value, f"{name}_{i}")
    elif isinstance(outputs, np.ndarray):
        yield name, outputs
    else:
        raise DataError(f"The output {name!r} is a {type(outputs).__name__}; need an array.")
