"""What data is to an estimator: rows that workers read in parts. Names no framework.

A ``Sharded`` is a recipe. It travels to the workers, each opens it with its rank, and all of
them meet the same global batches in the same order, cut into one part for each rank. The next
part starts at a global row, so that a run can go on there with another number of workers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, runtime_checkable

import numpy as np

from bigdl._base.errors import ConfigError, DataError
from bigdl._base.rows import part
from bigdl._base.trees import Tree, leaves, rows

if TYPE_CHECKING:
    import contextlib
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

__all__ = [
    "DEFAULT_BATCH_SIZE",
    "Batch",
    "Column",
    "OutputSchema",
    "Reader",
    "Request",
    "Schema",
    "Sharded",
    "checked_rows",
    "held_by",
    "part",
]

#: Rows in a global batch where the user names no number.
DEFAULT_BATCH_SIZE = 32

#: Calls a function for each share, in any place, and gives the results in the order of the
#: shares: the built-in ``map``, or that of an engine.
Run: TypeAlias = "Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]"


@dataclass(frozen=True)
class Batch:
    """One rank's part of a global batch.

    Args:
        data: ``(features, labels)``, or features alone where no labels were asked for; a
            loader's batch as it is. The receiver may write into it. None if ``rows`` is 0.
        rows: Rows of this part. A rank may have none, and still takes part in the step.
        global_rows: Rows of all ranks' parts together, at least 1.
    """

    data: Tree
    rows: int
    global_rows: int


class Column:
    """What one array of a batch holds. A leaf of nests, so not a dataclass; compares by value.

    Args:
        name: Name of the column or path in the nest.
        dtype: NumPy's name of the type, "object" for strings, otherwise the source's own name.
        shape: Of one row: () for a number.
    """

    __slots__ = ("dtype", "name", "shape")

    def __init__(self, *, name: str, dtype: str, shape: tuple[int, ...] = ()) -> None:
        self.name = name
        self.dtype = dtype
        self.shape = tuple(shape)

    def __repr__(self) -> str:
        return f"Column(name={self.name!r}, dtype={self.dtype!r}, shape={self.shape})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Column) and repr(self) == repr(other)

    def __hash__(self) -> int:
        return hash(repr(self))

    @property
    def row_bytes(self) -> int:
        """Bytes of one row; a pointer's size for objects."""
        try:
            size = np.dtype(self.dtype).itemsize
        except TypeError:
            size = 2  # the types that NumPy does not have are half floats of other kinds
        return size * math.prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class Schema:
    """What the rows are, before any transform.

    Args:
        features: Nest of ``Column`` as batches have it.
        labels: The same; None without labels.
    """

    features: Tree
    labels: Tree = None

    @property
    def row_bytes(self) -> int:
        """Bytes of one row in a batch."""
        return sum(column.row_bytes for column in leaves((self.features, self.labels)))


@dataclass(frozen=True, kw_only=True)
class OutputSchema:
    """How predictions are named and, where a kind of data must know before, what they are.

    Args:
        names: Name of the column, or first part of the names if there are several outputs; a
            sequence names the outputs one by one.
        sample: Outputs of a few rows; None where they are not known before the first batch.
    """

    names: str | Sequence[str] = "prediction"
    sample: Tree = None


@runtime_checkable
class Reader(Protocol):
    """Reads one rank's rows, in the worker that opened it."""

    def batches(
        self, size: int, *, epoch: int = 0, seed: int | None = None, start: int = 0
    ) -> Iterator[Batch]:
        """This rank's part of each global batch of an epoch, from a global row on.

        Every rank gets the same number of parts. Each row of the epoch is in exactly one of
        them. The global batches are the same for any number of ranks.

        Args:
            size: Rows of a global batch; the last one may have fewer. Sources that come in
                batches (a DataLoader) give their own, whatever the size.
            epoch: Shuffled orders differ by epoch. From 0.
            seed: Of the order; None keeps the order of the source.
            start: Rows of the epoch that all ranks together have had.

        Raises:
            DataError: The data cannot be read as asked, or ``start`` is not in the epoch.
        """

    def close(self) -> None:
        """Let go of files and processes. A second call does nothing."""


@runtime_checkable
class Sharded(Protocol):
    """Data as a picklable recipe that workers open.

    Attributes:
        rows: Number of rows; None if that is known only by reading.
        schema: What the rows are; None if that is known only by reading.
    """

    @property
    def rows(self) -> int | None: ...

    @property
    def schema(self) -> Schema | None: ...

    def open(self, rank: int, world: int) -> Reader:
        """The reader of one rank out of ``world``. Called in the worker."""

    def map_batches(
        self,
        fn: Callable[[Tree], Tree],
        schema: OutputSchema | None = None,
        *,
        size: int = DEFAULT_BATCH_SIZE,
        shares: int = 1,
        run: Run = map,
    ) -> Any:
        """The caller's kind of data with ``fn``'s outputs, rows aligned with the input.

        Args:
            fn: From the features of a batch to a nest of arrays with as many rows. Picklable
                if ``run`` works elsewhere.
            schema: Names and types of the outputs.
            size: Most rows that ``fn`` gets in one call; loaders keep their own batches.
            shares: Pieces of work to make, at most.
            run: Who does them.

        Raises:
            DataError: ``fn`` gave another number of rows than it got.
        """


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a call of an estimator says about its data.

    Args:
        call: The name of the call: fit and evaluate need labels, predict has none.
        feature_cols: Columns of a table, in the order of the model's inputs.
        label_cols: Columns of a table, in the order of the labels.
        fill: In place of nulls: a value for all columns, or a mapping from column to value.
        transform: From the features of one batch to those that the model gets.
        target_transform: The same for labels.
        batch_size: As the user wrote it; None if not at all.
        shuffle: As the user wrote it; None if not at all.
        config: First argument of creators.
    """

    call: Literal["fit", "evaluate", "predict"] = "fit"
    feature_cols: str | Sequence[Any] | None = None
    label_cols: str | Sequence[Any] | None = None
    fill: Any = None
    transform: Callable[[Tree], Tree] | None = None
    target_transform: Callable[[Tree], Tree] | None = None
    batch_size: int | None = None
    shuffle: bool | None = None
    config: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        wrong = []
        size = self.batch_size
        if size is not None and (
            isinstance(size, bool) or not isinstance(size, (int, np.integer)) or size < 1
        ):
            wrong.append(f"batch_size={size!r} (need a whole number >= 1)")
        for name in ("transform", "target_transform"):
            value = getattr(self, name)
            if value is not None and not callable(value):
                wrong.append(f"{name}={value!r} (need a function of one batch)")
        if self.call == "predict":
            for name in ("label_cols", "target_transform"):
                if getattr(self, name) is not None:
                    wrong.append(f"{name} (predict has no labels)")
        if wrong:
            raise ConfigError(f"{self.call}() cannot read its data so: {', '.join(wrong)}.")

    @property
    def has_labels(self) -> bool:
        """Whether batches are ``(features, labels)``."""
        return self.call != "predict"

    def refuse(self, kind: str, why: str, *names: str) -> None:
        """Raise for arguments that data of this kind does not take.

        Raises:
            ConfigError: One of ``names`` was given.
        """
        given = [name for name in names if getattr(self, name) is not None]
        if given:
            raise ConfigError(f"{self.call}() got {', '.join(given)} beside {kind}. {why}")


def held_by(stack: contextlib.ExitStack, source: Sharded) -> Sharded:
    """``source``, which lets go of what it keeps for a call at the end of that call.

    A recipe that keeps files for a call has a method ``let_go``.
    """
    let_go = getattr(source, "let_go", None)
    if let_go is not None:
        stack.callback(let_go)
    return source


def checked_rows(tree: Tree, expected: int, what: str) -> Tree:
    """``tree``, which must have ``expected`` rows.

    Raises:
        DataError: It has another number; both are in the text.
    """
    found = rows(tree, what)
    if found != expected:
        raise DataError(f"{what} has {found} rows, made from a batch of {expected} rows.")
    return tree
