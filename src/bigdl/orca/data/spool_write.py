"""Tasks write rows to files: in blocks of even size, with a note on each file for the owner.

Knows pyarrow, and not who runs the tasks. Errors in the data are notes too: a task that raises
would be tried again, to the same end.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import subprocess
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import pyarrow as pa

from bigdl._base.errors import DataError
from bigdl.orca.data.columns import NullsFound
from bigdl.orca.data.spool import BLOCK_BYTES
from bigdl.orca.data.spool_site import FILE_BYTES, Site, new_name, reserve

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from bigdl.orca.data.contract import Column
    from bigdl.orca.data.spool_lease import Ticket

__all__ = ["Converted", "Converter", "Order", "differing", "written"]

_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True, kw_only=True)
class Converted:
    """Rows as they are to be written.

    Args:
        batch: The rows.
        described: What models get of each column.
    """

    batch: pa.RecordBatch
    described: list[Column]


class Converter(Protocol):
    """From rows as they come to rows as they are written; travels to the tasks."""

    def __call__(self, rows: pa.Table) -> Converted:
        """One block.

        Raises:
            NullsFound: Nulls, by column.
            DataError: Values that no model takes.
        """


@dataclass(frozen=True, kw_only=True)
class Order:
    """What a task is to do; it travels.

    Args:
        ticket: Of the spool.
        convert: What is done to the rows.
        roots: Where folders may be made; None = the application's local directories.
        in_memory: Whether /dev/shm may be used.
    """

    ticket: Ticket
    convert: Converter
    roots: tuple[str, ...] | None = None
    in_memory: bool = True


def written(order: Order, partition: int, batches: Iterable[pa.RecordBatch]) -> list[str]:
    """Write one partition; notes for the owner, as JSON: on files, on nulls, on an error."""
    rows = (batch for batch in batches if batch.num_rows)
    first = next(rows, None)
    if first is None:
        return []
    try:
        site = _site(order)
    except (DataError, subprocess.SubprocessError) as exc:
        return [json.dumps({"partition": partition, "error": str(exc), "is_cause": True})]
    if site.has_failed:
        return [json.dumps({"partition": partition, "error": "another partition failed"})]
    writer = _Writer(order, site, partition)
    try:
        writer.take([first])
        for batch in rows:
            writer.take([batch])
        return [json.dumps(note) for note in writer.end()]
    except DataError as exc:
        site.mark_failed()
        return [json.dumps({"partition": partition, "error": str(exc), "is_cause": True})]
    except OSError as exc:
        if exc.errno not in _FULL:
            raise
        where = os.path.dirname(writer.path)
        error = f"The disk is full: {where} has no room for spooled rows. {_ADVICE}"
        with contextlib.suppress(OSError):
            site.mark_failed()
        return [json.dumps({"partition": partition, "error": error, "is_cause": True})]
    finally:
        writer.discard()


_ADVICE = (
    "Free some, or have Spark use another: spark.local.dir, or the cluster's local directories."
)


def _site(order: Order) -> Site:
    shm = "/dev/shm" if order.in_memory else None
    return Site(order.ticket, order.roots, shm)


#: Blocks may be so many times larger than meant before the next file has smaller ones.
_COARSE = 4


@dataclass
class _Writer:
    """Cuts rows into blocks, blocks into files."""

    order: Order
    site: Site
    partition: int
    path: str = ""
    notes: list[dict[str, Any]] = field(default_factory=list)
    nulls: dict[Any, int] = field(default_factory=dict)
    total: int = 0
    described: list[Column] | None = None
    _block_rows: int = 0
    _held: list[pa.RecordBatch] = field(default_factory=list)
    _held_rows: int = 0
    _file: _File | None = None
    _schema: pa.Schema | None = None
    _unfinished: list[str] = field(default_factory=list)

    def take(self, batches: Sequence[pa.RecordBatch]) -> None:
        for batch in batches:
            fitting = max(1, BLOCK_BYTES // max(1, batch.nbytes // batch.num_rows))
            if self._block_rows > _COARSE * fitting:  # rows have become far larger
                self._finish()
                self._block_rows = 0
            self._block_rows = self._block_rows or fitting
            self._held.append(batch)
            self._held_rows += batch.num_rows
            while self._held_rows >= self._block_rows:
                self._block(self._block_rows)

    def _finish(self) -> None:
        """Write what is held, and end the file: only its last block may be short."""
        while self._held_rows:
            self._block(min(self._held_rows, self._block_rows))
        if self._file is not None:
            self._close()

    def end(self) -> list[dict[str, Any]]:
        """Write what is left; the notes."""
        self._finish()
        if self.nulls:
            pairs = list(self.nulls.items())
            return [{"partition": self.partition, "nulls": pairs, "rows": self.total}]
        self._unfinished.clear()
        return self.notes

    def discard(self) -> None:
        """Remove what was written in vain."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.file.close()
        for path in self._unfinished:
            with contextlib.suppress(OSError):
                os.unlink(path)

    def _block(self, rows: int) -> None:
        """Convert and write the first ``rows`` of those that are held."""
        table = pa.Table.from_batches(self._held)
        block, rest = table.slice(0, rows), table.slice(rows)
        self._held, self._held_rows = rest.to_batches(), rest.num_rows
        self.total += rows
        try:
            converted = self.order.convert(block)
        except NullsFound as exc:  # go on, to count them all; nothing more is written
            for name, count in exc.counts.items():
                self.nulls[name] = self.nulls.get(name, 0) + count
            return
        if not self.nulls:
            self._check(converted)
            self._write(converted.batch)

    def _check(self, converted: Converted) -> None:
        if self.described is None:
            self.described, self._schema = converted.described, converted.batch.schema
        elif self.described != converted.described:
            pairs = zip(self.described, converted.described, strict=True)
            raise DataError(next(differing(*pair) for pair in pairs if pair[0] != pair[1]))

    def _write(self, batch: pa.RecordBatch) -> None:
        size = batch.nbytes + _heads(batch.schema)
        if self._file is not None and not self._fits(self._file, size):
            self._close()
        if self._file is None:
            self._file = self._open(batch.schema, size)
        self._file.add(batch)

    def _fits(self, file: _File, size: int) -> bool:
        if file.size + size > FILE_BYTES:
            return False
        return not file.is_in_memory or (self.site.has_room(size) and file.reserve(size))

    def _open(self, schema: pa.Schema, size: int) -> _File:
        """The next file: in memory if there is room, else on a disk."""
        name = new_name(self.partition, len(self.notes))
        path = self.site.in_memory(name, size)
        if path is not None:
            self.path = path
            self._unfinished.append(path)
            file = _File(path, schema, is_in_memory=True)
            if file.reserve(size):
                return file
            file.file.close()
            os.unlink(path)
        self.path = self.site.on_disk(name)
        self._unfinished.append(self.path)
        return _File(self.path, schema, is_in_memory=False)

    def _close(self) -> None:
        assert self._file is not None
        rows, size = self._file.end()
        nulls, self._file = self._file.nulls, None
        self.notes.append(
            {
                "partition": self.partition,
                "number": len(self.notes),
                "path": self.path,
                "guard": list(self.site.guard),
                "rows": rows,
                "block_rows": self._block_rows,
                "bytes": size,
                "null_counts": nulls,
                "columns": [[one.name, one.dtype, one.shape] for one in self.described or ()],
            }
        )


class _File:
    """One Arrow file while it is written."""

    def __init__(self, path: str, schema: pa.Schema, *, is_in_memory: bool) -> None:
        flags = os.O_CREAT | os.O_EXCL | os.O_RDWR
        buffering = 0 if is_in_memory else 1 << 20
        self.file = os.fdopen(os.open(path, flags, 0o600), "wb", buffering=buffering)
        self.is_in_memory = is_in_memory
        self._schema = schema
        self._writer: pa.RecordBatchFileWriter | None = None
        self.size, self.rows = 2 * schema.serialize().size, 0  # at the begin and at the end
        self.nulls = [0] * len(schema)

    def reserve(self, size: int) -> bool:
        """Set so much aside in memory, and what ends the file; whether there is that much."""
        return reserve(self.file.fileno(), 0, self.size + size + _heads(self._schema))

    def add(self, batch: pa.RecordBatch) -> None:
        if self._writer is None:
            self._writer = pa.ipc.new_file(self.file, self._schema)
        self._writer.write_batch(batch)
        self.size += batch.nbytes + _heads(batch.schema)
        self.rows += batch.num_rows
        self.nulls = [
            count + column.null_count
            for count, column in zip(self.nulls, batch.columns, strict=True)
        ]

    def end(self) -> tuple[int, int]:
        """Rows and bytes."""
        assert self._writer is not None
        self._writer.close()
        self.file.flush()
        size = self.file.tell()
        self.file.truncate(size)  # gives back what was reserved in vain
        self.file.close()
        return self.rows, size


def _heads(schema: pa.Schema) -> int:
    """More than what a block has beside its values: a few buffers a column, and their places."""
    return 4096 + 1024 * len(schema)


def differing(one: Column, other: Column) -> str:
    """In words: rows of a column that do not go together."""
    if one.dtype == other.dtype:
        return (
            f"Column {one.name!r} holds rows of shape {one.shape} and of shape {other.shape}; a "
            "model needs one fixed length."
        )
    return f"Column {one.name!r} holds {one.dtype} in some rows and {other.dtype} in others."
