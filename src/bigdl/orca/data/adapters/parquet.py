"""Parquet files on any fsspec path, read by row groups: never more than a window of them.

A block is a row group; ``windows.py`` says in which order they are met.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
from pyarrow.fs import FSSpecHandler, PyFileSystem

from bigdl._base.errors import DataError
from bigdl.orca.data.adapters.arrow_values import array_column, arrays_of, described
from bigdl.orca.data.columns import Columns, Nulls
from bigdl.orca.data.contract import DEFAULT_BATCH_SIZE, OutputSchema, Schema
from bigdl.orca.data.memory import Shaping, each_batch
from bigdl.orca.data.outputs import check_names, named_outputs
from bigdl.orca.data.packed import batch_of
from bigdl.orca.data.windows import WINDOW_BYTES, WindowReader, runs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from bigdl._base.trees import Tree
    from bigdl.orca.data.contract import Request, Run

__all__ = ["Files", "adapt_files"]


@dataclass(frozen=True, kw_only=True)
class Files:
    """A recipe that names files and their row groups.

    Args:
        url: Where the files are: protocol and options come from here.
        paths: Of the files, by name.
        blocks: Row groups in order: number of file, number in it, rows, bytes. Shape (n, 4).
        columns: Columns that are read.
        names: All columns.
        schema: What batches are; None if lists tell their lengths only by their values.
        shaping: What is done to each batch.
        window_bytes: Bytes of the blocks that are shuffled together.
    """

    url: str
    paths: tuple[str, ...]
    blocks: np.ndarray
    columns: Columns
    names: tuple[str, ...]
    schema: Schema | None
    shaping: Shaping
    window_bytes: int = WINDOW_BYTES

    @property
    def rows(self) -> int:
        return int(self.blocks[:, 2].sum())

    def open(self, rank: int, world: int) -> WindowReader:
        return WindowReader(
            rank,
            world,
            blocks=self.blocks,
            window_bytes=self.window_bytes,
            shaping=self.shaping,
            read=self._rows_of,
        )

    def _rows_of(self, blocks: np.ndarray) -> Iterator[Tree]:
        table = self.table(blocks, self.columns.names)
        nulls = Nulls(table.num_rows, _where(self))
        yield self.columns.nest(arrays_of(table, self.columns, nulls))

    def table(self, blocks: np.ndarray, columns: list[str] | None) -> pa.Table:
        """Blocks in the order given, as one table; None for all columns."""
        source = _dataset(self.url, list(self.paths))
        fragments = list(source.get_fragments())
        tables = []
        first = 0
        while first < len(blocks):  # neighbours of one file in one read
            last = first + 1
            while last < len(blocks) and blocks[last, 0] == blocks[first, 0]:
                last += 1
            some = fragments[int(blocks[first, 0])].subset(
                row_group_ids=[int(i) for i in blocks[first:last, 1]]
            )
            tables.append(some.to_table(schema=source.schema, columns=columns))
            first = last
        return pa.concat_tables(tables) if tables else source.schema.empty_table()

    def map_batches(
        self,
        fn: Callable[[Tree], Tree],
        schema: OutputSchema | None = None,
        *,
        size: int = DEFAULT_BATCH_SIZE,
        shares: int = 1,
        run: Run = map,
    ) -> pa.RecordBatchReader:
        """All columns of all rows, then the outputs, as a stream that is read block by block.

        With a lazy ``run`` as the built-in ``map`` only a few blocks are in memory.
        """
        schema = OutputSchema() if schema is None else schema
        check_names(schema, self.names)
        work = _BlockMapping(self, fn, schema, size)
        tables = iter(run(work, runs(self.blocks, self.window_bytes // 8)))
        first = next(tables)

        def batches() -> Iterator[pa.RecordBatch]:
            yield from first.to_batches()
            for table in tables:
                yield from table.cast(first.schema).to_batches()

        return pa.RecordBatchReader.from_batches(first.schema, batches())


@dataclass(frozen=True)
class _BlockMapping:
    """The rows of some blocks with their outputs."""

    source: Files
    fn: Callable[[Tree], Tree]
    schema: OutputSchema
    size: int

    def __call__(self, blocks: np.ndarray) -> pa.Table:
        source = self.source
        table = source.table(blocks, None)
        rows = table.num_rows
        data = source.columns.nest(arrays_of(table, source.columns, Nulls(rows, _where(source))))
        spans = [(i, min(i + self.size, rows)) for i in range(0, rows, self.size)]
        parts = ((source.shaping(batch_of(data, slice(i, j)), j - i), j - i) for i, j in spans)
        outputs = [
            named_outputs(out, self.schema, source.names) for out, _ in each_batch(self.fn, parts)
        ] or [named_outputs(None, self.schema, source.names)]
        for name in outputs[0]:
            values = np.concatenate([one[name] for one in outputs])
            table = table.append_column(name, array_column(values))
        return table


def adapt_files(data: Any, request: Request) -> Files:
    """A recipe of Parquet files: a path, a folder, a glob, or a list of those.

    Raises:
        ConfigError: feature_cols or label_cols are missing.
        DataError: No files, no such column, or no rows.
        FileNotFoundError: Nothing is there.
    """
    url, paths = _found(data)
    source = _dataset(url, paths)
    columns = Columns.asked(request, source.schema.names, "Parquet files")
    known: dict[str, Any] = {
        name: described(name, source.schema.field(name).type) for name in columns.names
    }
    blocks = [
        (number, group.id, group.num_rows, group.total_byte_size)
        for number, fragment in enumerate(source.get_fragments())
        for group in fragment.row_groups
    ]
    if request.has_labels and not sum(rows for _, _, rows, _ in blocks):
        raise DataError(f"{request.call}() got Parquet files of no rows: {data}.")
    return Files(
        url=url,
        paths=tuple(paths),
        blocks=np.array(blocks, dtype=np.int64).reshape(-1, 4),
        columns=columns,
        names=tuple(source.schema.names),
        schema=None if None in known.values() else columns.schema(known),
        shaping=Shaping(
            has_labels=request.has_labels,
            transform=request.transform,
            target_transform=request.target_transform,
        ),
    )


def _found(data: Any) -> tuple[str, list[str]]:
    """A URL that tells the file system, and the files' paths on it."""
    asked = [os.fspath(one) for one in (data if isinstance(data, list) else [data])]
    files: list[str] = []
    for one in asked:
        system, path = fsspec.core.url_to_fs(one)
        if any(sign in path for sign in "*?["):
            found = sorted(system.glob(path))
        elif system.isdir(path):
            found = sorted(name for name in system.find(path) if _is_data(name, path))
        else:
            found = [path] if system.exists(path) else []
        if not found:
            raise FileNotFoundError(f"No Parquet file at {one!r}.")
        files += found
    return asked[0], files


def _is_data(name: str, folder: str) -> bool:
    """Files and folders that begin with a dot or underscore are others' notes."""
    steps = os.path.relpath(name, folder).split("/")
    return not any(step.startswith((".", "_")) for step in steps)


def _dataset(url: str, paths: list[str]) -> pads.FileSystemDataset:
    system, _ = fsspec.core.url_to_fs(url)
    try:
        return pads.dataset(
            paths, format="parquet", partitioning="hive",
            filesystem=PyFileSystem(FSSpecHandler(system)),
        )  # fmt: skip
    except pa.ArrowInvalid as exc:
        raise DataError(f"Not a Parquet file at {url!r}: {exc}.") from exc


def _where(source: Files) -> str:
    return f" read together from {source.url}"
