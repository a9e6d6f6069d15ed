"""Arrow tables in memory: the columns asked for become arrays once, in the caller's process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from bigdl._base.errors import DataError
from bigdl.orca.data.adapters.arrow_values import array_column, arrays_of
from bigdl.orca.data.columns import Columns, Nulls
from bigdl.orca.data.contract import DEFAULT_BATCH_SIZE, Column, OutputSchema
from bigdl.orca.data.memory import InMemory, Shaping, mapped
from bigdl.orca.data.outputs import check_names, named_outputs

if TYPE_CHECKING:
    from collections.abc import Callable

    from bigdl._base.trees import Tree
    from bigdl.orca.data.contract import Request, Run

__all__ = ["ArrowTable", "adapt_table"]


@dataclass(frozen=True, kw_only=True)
class ArrowTable(InMemory):
    """Columns of a table as arrays; the table itself stays with the caller.

    Args:
        table: The caller's table; None in a recipe that has travelled.
    """

    table: pa.Table | None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "table": None}

    def map_batches(
        self,
        fn: Callable[[Tree], Tree],
        schema: OutputSchema | None = None,
        *,
        size: int = DEFAULT_BATCH_SIZE,
        shares: int = 1,
        run: Run = map,
    ) -> pa.Table:
        """The caller's rows and columns, then the outputs."""
        table = self.table
        if table is None:
            raise DataError("This table's recipe has travelled: map it where the table is.")
        schema = OutputSchema() if schema is None else schema
        check_names(schema, table.column_names)
        outputs = mapped(self.data, self.rows, self.shaping, fn, size=size, shares=shares, run=run)
        for name, values in named_outputs(outputs, schema, table.column_names).items():
            table = table.append_column(name, array_column(values))
        return table


def adapt_table(table: pa.Table | pa.RecordBatch, request: Request) -> ArrowTable:
    """A recipe of the columns asked for.

    Raises:
        ConfigError: feature_cols or label_cols are missing.
        DataError: No such column, no rows, nulls without ``fill``, values that aren't numbers.
    """
    if isinstance(table, pa.RecordBatch):
        table = pa.Table.from_batches([table])
    columns = Columns.asked(request, table.column_names, "a table")
    if table.num_rows == 0 and request.has_labels:
        raise DataError(f"{request.call}() got a table of no rows.")
    arrays = arrays_of(table, columns, Nulls(table.num_rows))
    described = {
        name: Column(name=name, dtype=str(array.dtype), shape=array.shape[1:])
        for name, array in arrays.items()
    }
    return ArrowTable(
        data=columns.nest(arrays),
        rows=table.num_rows,
        schema=columns.schema(described),
        shaping=Shaping(
            has_labels=request.has_labels,
            transform=request.transform,
            target_transform=request.target_transform,
        ),
        table=table,
    )
