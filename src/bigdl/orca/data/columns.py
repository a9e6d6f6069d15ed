"""Columns of tables as arrays: which, of what type, and what stands for nulls. NumPy only.

Every kind of table asks here which columns are meant and hands its values over as NumPy
arrays; pandas and Arrow know the rest of their own types.
"""

from __future__ import annotations

import datetime
import decimal
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from bigdl._base.errors import ArgumentError, ConfigError, DataError
from bigdl._base.registry import nearest
from bigdl.orca.data.contract import Column, Schema

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable

    from bigdl._base.trees import Tree
    from bigdl.orca.data.contract import Request

__all__ = ["Columns", "Nulls", "NullsFound", "fill_nulls", "from_cells", "narrowed", "stacked"]

_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
_MICROSECOND = datetime.timedelta(microseconds=1)
# Kinds that may stand in one column: points in time, times of day, spans of time.
_TIMES = (datetime.date, np.datetime64), (datetime.time,), (datetime.timedelta, np.timedelta64)


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Which columns of a table make a batch, in order.

    Args:
        features: Names of the inputs.
        labels: Names of the labels; empty for predict.
        fill: In place of nulls, by column; a column that is missing here may hold none.
        free: Columns that a transform gets: they may hold strings and other objects.
    """

    features: tuple[Any, ...]
    labels: tuple[Any, ...]
    fill: Mapping[Any, Any]
    free: frozenset[Any]

    @classmethod
    def asked(cls, request: Request, available: Sequence[Hashable], kind: str) -> Columns:
        """What a call asks of a table that has the columns ``available``.

        Raises:
            ArgumentError: Column names are not a name or a sequence of names.
            ConfigError: feature_cols, or label_cols where they are needed, are missing or empty.
            DataError: The table has no such column, or has it twice.
        """
        features = _names(request, "feature_cols", available, kind)
        labels = _names(request, "label_cols", available, kind) if request.has_labels else ()
        both = list(dict.fromkeys([*features, *labels]))
        free = [*(features if request.transform is not None else ())]
        free += labels if request.target_transform is not None else ()
        return cls(
            features=features,
            labels=labels,
            fill=_fills(request, both, available, kind),
            free=frozenset(free),
        )

    @property
    def names(self) -> list[Any]:
        """Every column that is read, each once."""
        return list(dict.fromkeys([*self.features, *self.labels]))

    def nest(self, values: Mapping[Any, Any]) -> Tree:
        """A batch out of the values of its columns: one stands by itself, several are a tuple.

        Returns:
            ``(features, labels)``; features alone if there are no labels.
        """
        features = _one_or_tuple([values[name] for name in self.features])
        if not self.labels:
            return features
        return features, _one_or_tuple([values[name] for name in self.labels])

    def schema(self, values: Mapping[Any, Column]) -> Schema:
        """What batches are, out of what each column is."""
        nest = self.nest(values)
        features, labels = nest if self.labels else (nest, None)
        return Schema(features=features, labels=labels)


class NullsFound(DataError):
    """A table has nulls: how many in which columns.

    Attributes:
        counts: By column.
    """

    counts: dict[Any, int]


class Nulls:
    """Counts nulls of several columns, to report them together."""

    def __init__(self, rows: int, where: str = "") -> None:
        self._rows = rows
        self._where = where
        self._found: dict[Any, int] = {}

    def add(self, column: Any, count: int) -> None:
        if count:
            self._found[column] = count

    def check(self) -> None:
        """Raise if there were any.

        Raises:
            DataError: The text has each column with its count.
        """
        if self._found:
            counts = ", ".join(f"{name!r} has {count}" for name, count in self._found.items())
            found = NullsFound(
                f"Nulls in {self._rows} rows{self._where}: column {counts}. "
                "Say what stands for them, fill=value or fill={column: value}, or drop those rows."
            )
            found.counts = dict(self._found)
            raise found


def _names(
    request: Request, argument: str, available: Sequence[Hashable], kind: str
) -> tuple[Any, ...]:
    asked = getattr(request, argument)
    if asked is None:
        raise ConfigError(
            f"{request.call}() on {kind} needs {argument}=[…]; it has the columns "
            f"{_listed(available)}."
        )
    if isinstance(asked, str) or not isinstance(asked, Sequence):
        if asked in available:  # one column, said without a list
            asked = [asked]
        elif not isinstance(asked, str):
            raise ArgumentError(
                f"{argument} is a {type(asked).__name__}; need a list of column names."
            )
        else:
            asked = [asked]
    if not asked:
        raise ConfigError(f"{argument} is empty; name at least one of {_listed(available)}.")
    for name in asked:
        count = sum(1 for one in available if type(one) is type(name) and one == name)
        if count == 0:
            near = nearest(name, [str(one) for one in available])
            raise DataError(f"{argument}: no column {name!r}; have {_listed(available)}.{near}")
        if count > 1:
            raise DataError(f"{argument}: {count} columns are called {name!r}; rename them.")
    return tuple(asked)


def _fills(
    request: Request, used: list[Any], available: Sequence[Hashable], kind: str
) -> Mapping[Any, Any]:
    fill = request.fill
    if fill is None:
        return {}
    if not isinstance(fill, Mapping):
        return dict.fromkeys(used, fill)
    for name, value in fill.items():
        if name not in available:
            near = nearest(str(name), [str(one) for one in available])
            raise DataError(f"fill: no column {name!r} in {kind}.{near}")
        if name not in used:
            raise ConfigError(f"fill names column {name!r}, which is not read; drop it.")
        if value is None:
            raise ConfigError(f"fill for column {name!r} is None, which is a null itself.")
    return dict(fill)


def _listed(names: Iterable[Any]) -> str:
    shown = [repr(name) for name in names]
    return ", ".join(shown) if len(shown) <= 12 else f"{', '.join(shown[:12])}, … ({len(shown)})"


def _one_or_tuple(parts: list[Any]) -> Any:
    return parts[0] if len(parts) == 1 else tuple(parts)


# --- values -----------------------------------------------------------------------------------


def narrowed(values: np.ndarray, column: Any) -> np.ndarray:
    """A column of numbers in the type that models get: float32, int64, bool.

    Times become int64 microseconds since 1970 UTC, spans of time int64 microseconds.

    Raises:
        DataError: NumPy holds something else there, or a whole number beyond int64.
    """
    kind = values.dtype.kind
    if kind == "b":
        return values
    if kind == "f":
        return values.astype(np.float32, copy=False)
    if kind == "u" and values.dtype.itemsize == 8 and values.size:
        most = values.max()
        if most > np.iinfo(np.int64).max:
            raise DataError(f"Column {column!r} holds {most}, which is more than int64 can hold.")
    if kind in "iu":
        return values.astype(np.int64, copy=False)
    if kind in "mM":
        return values.astype(f"{kind}8[us]").astype(np.int64)
    raise DataError(
        f"Column {column!r} holds {values.dtype}, which is not a number a model can take. "
        "Give a transform that turns it into numbers."
    )


def fill_nulls(values: np.ndarray, is_null: np.ndarray, column: Any, value: Any) -> np.ndarray:
    """``values`` with ``value`` in each null's place.

    Raises:
        DataError: ``value`` is of another kind than the column.
    """
    filled = values.copy()
    try:
        if values.dtype.kind in "mM":
            value = np.asarray(_time(value), dtype=values.dtype)
        elif values.dtype.kind != "O":
            same = np.asarray(value).astype(values.dtype)
            if isinstance(value, (str, bytes)) or not np.array_equal(same, value, equal_nan=True):
                raise TypeError(f"{values.dtype} cannot hold it")
        else:
            value = _same_cells(values[~is_null], value, int(is_null.sum()))
        filled[is_null] = value
    except (TypeError, ValueError) as exc:
        raise DataError(f"fill={value!r} does not fit column {column!r}: {exc}.") from exc
    return filled


def _same_cells(others: np.ndarray, value: Any, count: int) -> np.ndarray:
    """``value`` for ``count`` cells; a number stands for an array of that number."""
    first = others[0] if len(others) else value
    if isinstance(first, (list, tuple, np.ndarray)) and isinstance(value, numbers.Number):
        value = np.full_like(np.asarray(first), value)
    if isinstance(first, (str, bytes)) != isinstance(value, (str, bytes)):
        raise TypeError(f"it holds {type(first).__name__}")
    cells = np.empty(count, dtype=object)
    for i in range(count):
        cells[i] = value
    return cells


def from_cells(cells: np.ndarray, column: Any, *, is_free: bool) -> np.ndarray:
    """A column of Python objects, none of them null, as an array.

    Decimals, numbers, times and dates become what their own column types would; equally long
    arrays and lists are stacked and keep their type.

    Raises:
        DataError: Strings or other objects without a transform; arrays of several lengths.
    """
    if len(cells) == 0:
        return cells
    kinds = {type(cell) for cell in cells}
    if all(issubclass(kind, (bool, np.bool_)) for kind in kinds):
        return cells.astype(bool)
    if all(issubclass(kind, (numbers.Integral, np.bool_)) for kind in kinds):
        return _whole(cells, column)
    if all(issubclass(kind, (numbers.Real, decimal.Decimal)) for kind in kinds):
        return cells.astype(np.float64).astype(np.float32)
    if any(all(issubclass(kind, times) for kind in kinds) for times in _TIMES):
        return np.array([_microseconds(cell) for cell in cells], dtype=np.int64)
    if all(issubclass(kind, (list, tuple, np.ndarray)) for kind in kinds):
        return stacked(cells, column)
    if is_free:
        return cells
    found = sorted(kind.__name__ for kind in kinds)
    wanted = "strings" if found == ["str"] else f"objects ({', '.join(found)})"
    raise DataError(
        f"Column {column!r} holds {wanted}, which no model takes as they are. Give transform= "
        "(for a label target_transform=) that turns them into numbers, batch by batch."
    )


def _whole(cells: np.ndarray, column: Any) -> np.ndarray:
    try:
        return cells.astype(np.int64)
    except OverflowError:
        raise DataError(
            f"Column {column!r} holds {max(cells, key=abs)}, which is more than int64 can hold."
        ) from None


def stacked(cells: np.ndarray, column: Any) -> np.ndarray:
    """Arrays, one a row, as one array (rows, …).

    Raises:
        DataError: Their shapes differ, or what they hold is not a number.
    """
    arrays = [np.asarray(cell) for cell in cells]
    for row, array in enumerate(arrays):
        if array.dtype.kind not in "biuf":
            raise DataError(
                f"Column {column!r} holds arrays of {array.dtype} (row {row}); need numbers."
            )
        if array.shape != arrays[0].shape:
            raise DataError(
                f"Column {column!r} holds arrays of shape {arrays[0].shape} (row 0) and of shape "
                f"{array.shape} (row {row}); a model needs one fixed length."
            )
    return np.stack(arrays)


def _time(value: Any) -> Any:
    """What NumPy takes for a time: it knows no time zones."""
    if isinstance(value, datetime.datetime) and value.tzinfo is not None:
        return value.astimezone(datetime.UTC).replace(tzinfo=None)
    return value


def _microseconds(cell: Any) -> int:
    if isinstance(cell, (np.datetime64, np.timedelta64)):
        return int(cell.astype(f"{cell.dtype.kind}8[us]").astype(np.int64))
    if isinstance(cell, datetime.time):
        cell = datetime.datetime.combine(_EPOCH, cell.replace(tzinfo=None))
    if isinstance(cell, datetime.timedelta):
        return cell // _MICROSECOND
    if not isinstance(cell, datetime.datetime):
        cell = datetime.datetime.combine(cell, datetime.time())
    if cell.tzinfo is None:
        cell = cell.replace(tzinfo=datetime.UTC)
    return (cell - _EPOCH) // _MICROSECOND
