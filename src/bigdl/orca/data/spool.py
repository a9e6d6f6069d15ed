"""Rows in Arrow files that tasks have written on their hosts: what there is, and how it is read.

Knows pyarrow, and not what wrote the files. A *shard* is one file of one task; its record batches
are the blocks that ``windows.py`` puts in order. Shards of this host are mapped; those of other
hosts come, block by block, from their guards.
"""

from __future__ import annotations

import contextlib
import io
import json
import mmap
import os
import shutil
import socket
import struct
import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from bigdl._base.errors import DataError
from bigdl.orca.data.adapters.arrow_values import arrays_of
from bigdl.orca.data.columns import Columns, Nulls
from bigdl.orca.data.contract import DEFAULT_BATCH_SIZE, OutputSchema, Schema
from bigdl.orca.data.spool_lease import call
from bigdl.orca.data.windows import WINDOW_BYTES, WindowReader

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from bigdl._base.trees import Tree
    from bigdl.orca.data.contract import Run
    from bigdl.orca.data.memory import Shaping
    from bigdl.orca.data.spool_lease import Lease

__all__ = ["BLOCK_BYTES", "Shard", "Shards", "SpooledRows", "held"]

#: Bytes of a block, about: what is read, and put in order, at once.
BLOCK_BYTES = 1 << 20

_LENGTH = struct.Struct("!q")


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One file.

    Args:
        partition: Which part of the rows it is of.
        path: Where it lies on its host.
        guard: Address and port of who serves it to other hosts.
        rows: Its rows.
        block_rows: Rows of each block but the last.
        bytes: Its length.
    """

    partition: int
    path: str
    guard: tuple[str, int]
    rows: int
    block_rows: int
    bytes: int

    @property
    def blocks(self) -> int:
        return -(-self.rows // self.block_rows)


@dataclass(frozen=True, kw_only=True)
class Shards:
    """All files of a spool, in the order of their rows.

    Args:
        shards: The files.
        token: What their guards ask for.
        lease: Holds them, in the process that owns them; None in a copy that has travelled.
    """

    shards: tuple[Shard, ...]
    token: str = field(repr=False)
    lease: Lease | None = field(default=None, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "lease": None}

    @property
    def rows(self) -> int:
        return sum(shard.rows for shard in self.shards)

    def blocks(self) -> np.ndarray:
        """Number of shard, number of the block in it, rows, bytes. Shape (n, 4)."""
        if not self.shards:
            return np.empty((0, 4), np.int64)
        each = [
            np.stack(
                [
                    np.full(shard.blocks, number),
                    np.arange(shard.blocks),
                    np.minimum(
                        shard.block_rows,
                        shard.rows - np.arange(shard.blocks) * shard.block_rows,
                    ),
                    np.zeros(shard.blocks, np.int64),
                ],
                axis=1,
            )
            for number, shard in enumerate(self.shards)
        ]
        found = np.concatenate(each).astype(np.int64)
        row_bytes = np.array([shard.bytes / max(1, shard.rows) for shard in self.shards])
        found[:, 3] = np.maximum(1, found[:, 2] * row_bytes[found[:, 0]])
        return found

    def read(self, blocks: np.ndarray) -> Iterator[pa.RecordBatch]:
        """Some blocks, in the order given; a mapped file lives as long as what came from it.

        Raises:
            DataError: A file is gone.
        """
        first = 0
        while first < len(blocks):  # neighbours of one file in one opening
            last = first + 1
            while last < len(blocks) and blocks[last, 0] == blocks[first, 0]:
                last += 1
            shard = self.shards[int(blocks[first, 0])]
            with self.opened(shard) as reader:
                for number in blocks[first:last, 1]:
                    yield reader.get_batch(int(number))
            first = last

    @contextlib.contextmanager
    def opened(self, shard: Shard) -> Iterator[pa.RecordBatchFileReader]:
        """Reads blocks of a shard, wherever it lies.

        Raises:
            DataError: It is gone.
        """
        try:
            mapped = _mapped(shard)
        except OSError:  # of another host, or not for us to open
            mapped = None
        if mapped is not None:
            yield pa.ipc.open_file(pa.BufferReader(mapped))
            return
        try:
            remote = _Remote(shard, self.token)
        except OSError as exc:
            raise DataError(
                f"Spooled rows are gone: {os.path.basename(shard.path)} is not on this host, and "
                f"its guard at {shard.guard[0]}:{shard.guard[1]} does not give it ({exc}). They "
                "live as long as the call, or the predictions, that they were spooled for."
            ) from exc
        with remote:
            yield pa.ipc.open_file(pa.PythonFile(remote, mode="r"))

    def close(self) -> None:
        """Remove the files, in the process that owns them."""
        if self.lease is not None:
            _remove(self.lease, self.folders)

    @property
    def folders(self) -> set[str]:
        """Where the files lie on their hosts."""
        return {os.path.dirname(shard.path) for shard in self.shards}


def held(shards: Shards) -> Shards:
    """The same; the files go with this object, at the latest with this process."""
    if shards.lease is not None:
        weakref.finalize(shards, _remove, shards.lease, shards.folders)
    return shards


def _remove(lease: Lease, folders: set[str]) -> None:
    lease.close()
    for folder in folders:  # on this host, should their guard have been killed
        if lease.ticket.name in os.path.basename(folder):
            shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True, kw_only=True)
class SpooledRows:
    """A recipe of rows whose columns are as models get them.

    Args:
        shards: Where they are. Their columns are called by their number.
        columns: Which columns make a batch.
        schema: What batches are.
        shaping: What is done to each batch.
        window_bytes: Bytes of the blocks that are in memory, and shuffled, together.
    """

    shards: Shards
    columns: Columns
    schema: Schema
    shaping: Shaping
    window_bytes: int = WINDOW_BYTES

    @property
    def rows(self) -> int:
        return self.shards.rows

    def open(self, rank: int, world: int) -> WindowReader:
        return WindowReader(
            rank,
            world,
            blocks=self.shards.blocks(),
            window_bytes=self.window_bytes,
            shaping=self.shaping,
            read=self._rows_of,
        )

    def _rows_of(self, blocks: np.ndarray) -> Iterator[Tree]:
        numbered = _numbered(self.columns)
        for batch in self.shards.read(blocks):
            table = pa.Table.from_batches([batch])
            table = table.rename_columns([str(i) for i in range(table.num_columns)])
            yield numbered.nest(arrays_of(table, numbered, Nulls(table.num_rows)))

    def let_go(self) -> None:
        """Remove what was spooled, in the process that owns it."""
        self.shards.close()

    def map_batches(
        self,
        fn: Callable[[Tree], Tree],
        schema: OutputSchema | None = None,
        *,
        size: int = DEFAULT_BATCH_SIZE,
        shares: int = 1,
        run: Run = map,
    ) -> Any:
        """Rows that were spooled with their columns as models get them are for training.

        Raises:
            DataError: Always.
        """
        raise DataError("These rows were spooled for training; give predict() the DataFrame.")


def _numbered(columns: Columns) -> Columns:
    """The same columns under the names that they have in files."""
    number = {name: str(i) for i, name in enumerate(columns.names)}
    return Columns(
        features=tuple(number[name] for name in columns.features),
        labels=tuple(number[name] for name in columns.labels),
        fill={},
        free=frozenset(number[name] for name in columns.free),
    )


def _mapped(shard: Shard) -> pa.Buffer:
    """The bytes of a file of this host.

    Raises:
        OSError: There is none, or it is another one.
    """
    with open(shard.path, "rb") as file:
        if os.fstat(file.fileno()).st_size != shard.bytes:
            raise FileNotFoundError(f"{shard.path} is another file")
        return pa.py_buffer(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))


class _Remote(io.RawIOBase):
    """A file of another host's, read from its guard piece by piece."""

    def __init__(self, shard: Shard, token: str) -> None:
        self._shard, self._at = shard, 0
        self._line = call(shard.guard, token)
        self._answers: Any = self._line.makefile("rb", buffering=1 << 16)
        try:
            self._ask(0, 0)
        except OSError:
            self.close()
            raise

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._shard.bytes}[whence]
        self._at = base + offset
        return self._at

    def size(self) -> int:
        return self._shard.bytes

    def readinto(self, into: Any) -> int:
        view = memoryview(into).cast("B")
        wanted = min(len(view), self._shard.bytes - self._at)
        if wanted <= 0:
            return 0
        self._ask(self._at, wanted)
        read = 0
        while read < wanted:
            count = self._answers.readinto(view[read:wanted])
            if not count:
                raise ConnectionError("the guard has gone")
            read += count
        self._at += wanted
        return wanted

    def _ask(self, start: int, count: int) -> None:
        name = os.path.basename(self._shard.path)
        self._line.sendall(json.dumps([name, start, count]).encode() + b"\n")
        answer = self._answers.read(_LENGTH.size)
        if len(answer) < _LENGTH.size:
            raise ConnectionError("the guard has gone")
        if _LENGTH.unpack(answer)[0] != self._shard.bytes:
            raise FileNotFoundError("it has no such file")

    def close(self) -> None:
        if not self.closed:
            with contextlib.suppress(OSError):
                self._answers.close()
                self._line.shutdown(socket.SHUT_RDWR)
            self._line.close()
        super().close()
