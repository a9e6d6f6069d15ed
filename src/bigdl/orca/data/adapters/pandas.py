"""pandas frames: the columns asked for become arrays once, in the caller's process."""

from __future__ import annotations

import numbers
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from bigdl._base.errors import DataError
from bigdl.orca.data.columns import Columns, Nulls, fill_nulls, from_cells, narrowed
from bigdl.orca.data.contract import DEFAULT_BATCH_SIZE, Column, OutputSchema
from bigdl.orca.data.memory import InMemory, Shaping, mapped
from bigdl.orca.data.outputs import check_names, named_outputs

if TYPE_CHECKING:
    from collections.abc import Callable

    from bigdl._base.trees import Tree
    from bigdl.orca.data.contract import Request, Run

__all__ = ["Frame", "adapt_frame"]


@dataclass(frozen=True, kw_only=True)
class Frame(InMemory):
    """Columns of a frame as arrays; the frame itself stays with the caller.

    Args:
        frame: The caller's frame; None in a recipe that has travelled.
    """

    frame: pd.DataFrame | None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "frame": None}

    def map_batches(
        self,
        fn: Callable[[Tree], Tree],
        schema: OutputSchema | None = None,
        *,
        size: int = DEFAULT_BATCH_SIZE,
        shares: int = 1,
        run: Run = map,
    ) -> pd.DataFrame:
        """The caller's rows, index and columns, then the outputs. The caller's frame stays."""
        frame = self.frame
        if frame is None:
            raise DataError("This frame's recipe has travelled: map it where the frame is.")
        schema = OutputSchema() if schema is None else schema
        check_names(schema, list(frame.columns))
        outputs = mapped(self.data, self.rows, self.shaping, fn, size=size, shares=shares, run=run)
        added = named_outputs(outputs, schema, list(frame.columns))
        result = frame.copy(deep=False)
        for name, values in added.items():
            result[name] = _series(values, frame.index)
        return result


def adapt_frame(frame: pd.DataFrame, request: Request) -> Frame:
    """A recipe of the columns asked for.

    Raises:
        ConfigError: feature_cols or label_cols are missing.
        DataError: No such column, no rows, nulls without ``fill``, values that aren't numbers.
    """
    columns = Columns.asked(request, list(frame.columns), "a DataFrame")
    total = len(frame)
    if total == 0 and request.has_labels:
        raise DataError(f"{request.call}() got a DataFrame of no rows.")
    nulls = Nulls(total)
    arrays = {name: _array(frame[name], name, columns, nulls) for name in columns.names}
    nulls.check()
    described = {
        name: Column(name=str(name), dtype=str(array.dtype), shape=array.shape[1:])
        for name, array in arrays.items()
    }
    return Frame(
        data=columns.nest(arrays),
        rows=total,
        schema=columns.schema(described),
        shaping=Shaping(
            has_labels=request.has_labels,
            transform=request.transform,
            target_transform=request.target_transform,
        ),
        frame=frame,
    )


def _array(series: pd.Series, name: Any, columns: Columns, nulls: Nulls) -> np.ndarray:
    """One column as an array; its nulls are filled, or counted."""
    values, is_null = _values(series)
    if is_null is not None and is_null.any():
        if name not in columns.fill:
            nulls.add(name, int(is_null.sum()))
            return np.empty(0, dtype=np.float32)
        values = fill_nulls(values, is_null, name, columns.fill[name])
    if values.dtype.kind == "O":
        return from_cells(values, name, is_free=name in columns.free)
    return narrowed(values, name)


def _values(series: pd.Series) -> tuple[np.ndarray, np.ndarray | None]:
    """The column's values in NumPy, and where it has nulls (None: it can have none)."""
    if isinstance(series.dtype, pd.CategoricalDtype):
        if series.hasnans:
            return series.to_numpy(dtype=object), series.isna().to_numpy()
        series = series.astype(series.cat.categories.dtype)
    if isinstance(series.dtype, pd.SparseDtype):
        series = series.sparse.to_dense()
    dtype = series.dtype
    if isinstance(dtype, np.dtype) and dtype.kind in "biuf":
        return series.to_numpy(), None  # NaN is a number
    is_null = series.isna().to_numpy()
    if isinstance(dtype, pd.DatetimeTZDtype):
        return series.dt.tz_convert("UTC").dt.tz_localize(None).to_numpy(), is_null
    kind = getattr(dtype, "kind", "O")
    if isinstance(dtype, np.dtype):
        return series.to_numpy(), _without_nan(series.to_numpy(), is_null)
    if kind in "biuf":  # nullable and Arrow's: zero stands where a null is
        kept = series.to_numpy(dtype=dtype.numpy_dtype, na_value=np.zeros(1, dtype.numpy_dtype)[0])
        return kept, is_null
    if kind in "mM":
        return series.to_numpy(dtype=f"{kind}8[us]", na_value=np.datetime64("NaT")), is_null
    return series.to_numpy(dtype=object), is_null


def _without_nan(cells: np.ndarray, is_null: np.ndarray) -> np.ndarray:
    """The nulls of a column of objects: among numbers, NaN is a number."""
    if cells.dtype.kind != "O" or not is_null.any():
        return is_null
    if not all(isinstance(cell, numbers.Real) for cell in cells[~is_null]):
        return is_null
    is_nan = np.array([isinstance(cell, float) for cell in cells])
    others: np.ndarray = is_null & ~is_nan
    return others


def _series(values: np.ndarray, index: pd.Index) -> pd.Series:
    """Outputs as a column: numbers, or an array in each cell."""
    if values.ndim > 1 and values.shape[1:] != (1,):
        cells = np.empty(len(values), dtype=object)
        for row, value in enumerate(values):
            cells[row] = value
        return pd.Series(cells, index=index)
    return pd.Series(values.reshape(len(values)), index=index)
