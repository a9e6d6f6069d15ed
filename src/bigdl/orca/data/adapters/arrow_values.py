"""Values of Arrow columns as NumPy arrays, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bigdl._base.errors import DataError
from bigdl.orca.data.columns import from_cells, narrowed
from bigdl.orca.data.contract import Column

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bigdl.orca.data.columns import Columns, Nulls

__all__ = ["array_column", "arrays_of", "described", "prepared"]

_TIMES = (pa.types.is_timestamp, pa.types.is_date)
_SPANS = (pa.types.is_duration, pa.types.is_time)
_LISTS = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
#: The parts of one of Spark ML's vectors; type 0 is sparse, 1 is dense.
_VECTOR = ("type", "size", "indices", "values")


def arrays_of(table: pa.Table, columns: Columns, nulls: Nulls) -> dict[str, np.ndarray]:
    """The columns asked for as arrays, by name.

    Raises:
        DataError: Nulls without ``fill``, or values that no model takes as they are.
    """
    return {
        name: _array(whole, name, is_free=name in columns.free)
        for name, whole in _without_nulls(table, columns, nulls)
    }


def prepared(
    table: pa.Table, columns: Columns, nulls: Nulls
) -> dict[str, tuple[pa.Array, Column]]:
    """The columns asked for as ``arrays_of`` gives them, in Arrow's form, each with what it is.

    What becomes Python objects (strings for a transform) stays as it is, without its nulls.

    Raises:
        DataError: As ``arrays_of``.
    """
    found = {}
    for name, whole in _without_nulls(table, columns, nulls):
        values = _array(whole, name, is_free=name in columns.free)
        column = Column(name=str(name), dtype=str(values.dtype), shape=values.shape[1:])
        found[name] = (whole if values.dtype.kind == "O" else _tensors(values)), column
    return found


def _without_nulls(
    table: pa.Table, columns: Columns, nulls: Nulls
) -> Iterator[tuple[str, pa.Array]]:
    """Each column, its nulls filled."""
    chosen = {name: table.column(name) for name in columns.names}
    for name, column in chosen.items():
        if column.null_count and name not in columns.fill:
            nulls.add(name, column.null_count)
    nulls.check()
    for name, column in chosen.items():
        if column.null_count:
            column = _filled(column, name, columns.fill[name])
        is_cut = isinstance(column, pa.ChunkedArray)
        if is_cut and column.num_chunks == 1:
            whole = column.chunk(0)  # combine_chunks() would copy it
        else:
            whole = column.combine_chunks() if is_cut else column
        if isinstance(whole, pa.ChunkedArray):  # older versions, and more than 2 GB of strings
            whole = pa.concat_arrays(whole.chunks) if whole.num_chunks else whole
        yield name, whole


def _filled(column: pa.ChunkedArray, name: str, value: Any) -> pa.ChunkedArray:
    kind = column.type
    if pa.types.is_dictionary(kind):
        column = column.cast(kind.value_type)
    elif pa.types.is_decimal(kind):
        column = column.cast(pa.float64())
    kind = column.type
    try:
        if any(is_list(kind) for is_list in _LISTS) and not isinstance(value, (list, tuple)):
            full = next((cell for cell in column if cell.is_valid), None)
            if isinstance(value, np.ndarray):
                value = value.tolist()
            elif full is not None:
                value = [value] * len(full.values)
        if str(kind) in ("string", "large_string") and not isinstance(value, str):
            raise TypeError(f"it holds {kind}")
        return _replaced(column, pa.scalar(value, type=kind))
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, TypeError) as exc:
        raise DataError(f"fill={value!r} does not fit column {name!r}: {exc}.") from exc


def _replaced(column: pa.ChunkedArray, value: pa.Scalar) -> pa.ChunkedArray:
    if not pa.types.is_nested(column.type):
        return pc.fill_null(column, value)
    cells = [value.as_py() if not cell.is_valid else cell.as_py() for cell in column]
    return pa.chunked_array([pa.array(cells, type=column.type)])


def _array(column: pa.Array, name: str, *, is_free: bool) -> np.ndarray:
    """A column without nulls as an array of the type that models get."""
    kind = column.type
    if isinstance(column, pa.ExtensionArray):
        if hasattr(column, "to_numpy_ndarray") and len(column):
            tensors: np.ndarray = column.to_numpy_ndarray()
            return tensors
        return _array(column.storage, name, is_free=is_free)
    if pa.types.is_dictionary(kind):
        return _array(column.dictionary_decode(), name, is_free=is_free)
    if pa.types.is_decimal(kind):
        return narrowed(pc.cast(column, pa.float64()).to_numpy(zero_copy_only=False), name)
    if any(is_time(kind) for is_time in _TIMES):
        return _whole(pc.cast(column, pa.timestamp("us", getattr(kind, "tz", None)), safe=False))
    if any(is_span(kind) for is_span in _SPANS):
        span = pa.time64("us") if pa.types.is_time(kind) else pa.duration("us")
        return _whole(pc.cast(column, span, safe=False))
    if any(is_list(kind) for is_list in _LISTS):
        return _lists(column, name)
    if pa.types.is_struct(kind) and tuple(field.name for field in kind) == _VECTOR:
        return _vectors(column, name)
    values = column.to_numpy(zero_copy_only=False)
    if pa.types.is_map(kind) and not is_free:
        raise DataError(
            f"Column {name!r} holds maps, which no model takes as they are. Give a transform."
        )
    if values.dtype.kind == "O":
        return from_cells(values, name, is_free=is_free)
    return narrowed(values, name)


def _whole(column: pa.Array) -> np.ndarray:
    """Microseconds as whole numbers."""
    values: np.ndarray = column.view(pa.int64()).to_numpy(zero_copy_only=False)
    return values


def _lists(column: pa.Array, name: str) -> np.ndarray:
    """Lists of one length as an array (rows, length, …), in the type that they hold."""
    if len(column) == 0:
        return np.empty((0, 0), dtype=np.float32)
    lengths = pc.list_value_length(column).to_numpy(zero_copy_only=False)
    different = np.flatnonzero(lengths != lengths[0])
    if len(different):
        row = int(different[0])
        raise DataError(
            f"Column {name!r} holds arrays of length {int(lengths[0])} (row 0) and of length "
            f"{int(lengths[row])} (row {row}); a model needs one fixed length."
        )
    flat = column.flatten()
    if flat.null_count:
        raise DataError(f"Column {name!r} holds arrays with {flat.null_count} nulls inside.")
    if any(is_list(flat.type) for is_list in _LISTS):
        values = _lists(flat, name)
    else:
        values = flat.to_numpy(zero_copy_only=False)
        if values.dtype.kind not in "biuf":
            raise DataError(f"Column {name!r} holds arrays of {flat.type}; need numbers.")
    return values.reshape(len(column), int(lengths[0]), *values.shape[1:])


def _vectors(column: pa.Array, name: str) -> np.ndarray:
    """Spark ML's vectors, dense and sparse, as an array (rows, length) of float64."""
    is_dense = column.field("type").to_numpy(zero_copy_only=False) == 1
    values, indices = column.field("values"), column.field("indices")
    stored = pc.fill_null(pc.list_value_length(values), 0).to_numpy(zero_copy_only=False)
    sizes = pc.fill_null(column.field("size"), 0).to_numpy(zero_copy_only=False)
    lengths = np.where(is_dense, stored, sizes)
    different = np.flatnonzero(lengths != lengths[0]) if len(lengths) else lengths
    if len(different):
        row = int(different[0])
        raise DataError(
            f"Column {name!r} holds vectors of length {int(lengths[0])} (row 0) and of length "
            f"{int(lengths[row])} (row {row}); a model needs one fixed length."
        )
    width = int(lengths[0]) if len(lengths) else 0
    found = np.zeros((len(column), width))
    if is_dense.any():
        dense = values.filter(pa.array(is_dense)).flatten().to_numpy(zero_copy_only=False)
        found[is_dense] = dense.reshape(-1, width)
    if not is_dense.all():
        sparse = pa.array(~is_dense)
        rows = np.repeat(np.flatnonzero(~is_dense), stored[~is_dense])
        places = indices.filter(sparse).flatten().to_numpy(zero_copy_only=False)
        found[rows, places] = values.filter(sparse).flatten().to_numpy(zero_copy_only=False)
    return found


def described(name: str, kind: pa.DataType) -> Column | None:
    """What ``arrays_of`` makes of a column; None if only its values tell."""
    shape: tuple[int, ...] = ()
    if isinstance(kind, pa.DictionaryType):
        kind = kind.value_type
    is_array = pa.types.is_fixed_size_list(kind)
    while pa.types.is_fixed_size_list(kind):
        shape += (kind.list_size,)
        kind = kind.value_type
    is_number = pa.types.is_integer(kind) or pa.types.is_floating(kind)
    if is_array and is_number:
        return Column(name=name, dtype=str(np.dtype(kind.to_pandas_dtype())), shape=shape)
    if is_array or pa.types.is_nested(kind) or isinstance(kind, pa.BaseExtensionType):
        return None
    if pa.types.is_boolean(kind):
        return Column(name=name, dtype="bool")
    if pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        return Column(name=name, dtype="float32")
    is_whole = pa.types.is_integer(kind) or any(is_time(kind) for is_time in (*_TIMES, *_SPANS))
    return Column(name=name, dtype="int64" if is_whole else "object")


def array_column(values: np.ndarray) -> pa.Array:
    """Outputs as a column: numbers, or fixed-size lists."""
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if values.ndim <= 1:
        return pa.array(values)
    column = pa.array(np.ascontiguousarray(values).reshape(-1))
    for length in reversed(values.shape[1:]):
        column = pa.FixedSizeListArray.from_arrays(column, length)
    return column


def _tensors(values: np.ndarray) -> pa.Array:
    """An array of numbers as a column of the same shape and type."""
    column = pa.array(np.ascontiguousarray(values).reshape(-1))
    for length in reversed(values.shape[1:]):
        column = pa.FixedSizeListArray.from_arrays(column, length)
    return column
