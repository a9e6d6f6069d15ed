"""Outputs of a frozen part, kept by the content of the rows that gave them. Knows torch.

A key is a hash of an input row's bytes, so a stored row is right for any pipeline: one without
random augmentation finds its rows again in every later epoch, however shuffled, and one with it
finds none, which is noticed and ends the cache.
"""

from __future__ import annotations

import hashlib
import importlib
import logging
import shutil
import tempfile
import threading
import weakref
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bigdl._base import machine
from bigdl._base.optional import is_installed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    Tensors = tuple[torch.Tensor, ...]
    Layout = tuple[tuple[torch.Size, torch.dtype], ...]

__all__ = ["FeatureCache", "find_hash"]

_log = logging.getLogger(__name__)

# A key (a bytes object) and its entry in the dict, beside the row itself.
_ENTRY_BYTES = 160
_BLOCK_BYTES = 4 << 20
# Of the rows that could have come back in an epoch so many must, or the cache ends.
_LEAST_HITS = 0.05
# The same where no epochs are told: rows without one hit, as a multiple of the rows kept.
_PATIENCE = 20


class FeatureCache:
    """Rows of outputs by the content of the rows of inputs.

    What is handed out is a new tensor each time, without a gradient. Rows are kept in memory
    up to a budget. Beyond it they go to a file without a name, which the system removes
    however the process ends; and only once hits have shown that rows do come back.

    Args:
        memory_bytes: Budget in memory; None is an eighth of what is available.
        spill_bytes: Budget in the file; None is an eighth of the free disk.
        directory: Where the file is made; None is our cache folder.
    """

    def __init__(
        self,
        *,
        memory_bytes: int | None = None,
        spill_bytes: int | None = None,
        directory: Path | None = None,
    ) -> None:
        if memory_bytes is None:
            memory_bytes = machine.available_memory_bytes() // 8
        self._budget = (memory_bytes, spill_bytes, directory)
        self._hash = find_hash()
        self._lock = threading.Lock()
        self._slots: dict[bytes, int] = {}
        self._store: _Store | None = None
        #: Rows found, and rows that had to be computed, so far.
        self.hits = self.misses = 0
        self._epoch_hits = self._epoch_rows = self._kept_before = 0
        #: True once the cache has ended; ``take`` then only computes.
        self.closed = False

    def __len__(self) -> int:
        return len(self._slots)

    def take(self, inputs: Tensors, compute: Callable[[Tensors], Tensors]) -> Tensors:
        """The outputs for ``inputs``; ``compute`` is called with the rows that are not here.

        Args:
            inputs: Tensors of one number of rows, on the CPU.
            compute: Gives outputs whose row i depends on row i of its inputs only.
        """
        if self.closed:
            return compute(inputs)
        with self._lock:
            return self._take(inputs, compute)

    def epoch_started(self) -> None:
        """Look back on the epoch that ends here, and end the cache if rows don't come back."""
        with self._lock:
            could = min(self._kept_before, self._epoch_rows)
            if could and self._epoch_hits < _LEAST_HITS * could:
                self._end(f"{self._epoch_hits} of {could} rows came back in an epoch")
            self._epoch_hits = self._epoch_rows = 0
            self._kept_before = len(self._slots)

    def close(self) -> None:
        """Free memory and file. Calling it twice is harmless."""
        with self._lock:
            self._free()

    # --- a batch ------------------------------------------------------------------------------

    def _take(self, inputs: Tensors, compute: Callable[[Tensors], Tensors]) -> Tensors:
        keys = _keys(inputs, self._hash)
        slots = [self._slots.get(key) for key in keys]
        new: dict[bytes, int] = {}  # a key's first row in this batch, if it is not kept
        for row, (key, slot) in enumerate(zip(keys, slots, strict=True)):
            if slot is None:
                new.setdefault(key, row)
        self._count(len(keys), len(keys) - slots.count(None))
        if len(new) == len(keys):
            outputs = compute(inputs)
            self._keep(new, outputs)
            return outputs
        computed: Tensors = ()
        if new:
            rows = torch.tensor(list(new.values()))
            computed = compute(tuple(tensor.index_select(0, rows) for tensor in inputs))
            if self._store is not None and self._store.layout != _layout(computed):
                return compute(inputs)  # the outputs' form depends on more than one row
        outputs = self._gather(keys, slots, new, computed)
        if new:
            self._keep(new, computed)
        return outputs

    def _gather(
        self,
        keys: Sequence[bytes],
        slots: Sequence[int | None],
        new: Iterable[bytes],
        computed: Tensors,
    ) -> Tensors:
        """New tensors of kept rows and, where none is kept, computed ones."""
        layout = _layout(computed) if computed else self._store.layout if self._store else ()
        outputs = tuple(torch.empty((len(keys), *shape), dtype=dtype) for shape, dtype in layout)
        views = [_as_bytes(tensor) for tensor in outputs]  # the same memory
        sources = [_as_bytes(tensor) for tensor in computed]
        place = {key: at for at, key in enumerate(new)}
        for row, (key, slot) in enumerate(zip(keys, slots, strict=True)):
            if slot is None:
                for view, source in zip(views, sources, strict=True):
                    view[row] = source[place[key]]
            elif self._store is not None:
                self._store.read(slot, [view[row] for view in views])
        return outputs

    def _keep(self, new: Iterable[bytes], outputs: Tensors) -> None:
        """Store the rows of ``outputs``, which are those of the keys ``new``, in order."""
        if self.closed:
            return
        if self._store is None:
            self._store = _Store(_layout(outputs), *self._budget)
        elif self._store.layout != _layout(outputs):
            return
        parts = [_as_bytes(tensor) for tensor in outputs]
        for row, key in enumerate(new):
            slot = self._store.write([part[row] for part in parts], may_spill=self.hits > 0)
            if slot is None:
                return
            self._slots[key] = slot

    # --- when it does not pay -----------------------------------------------------------------

    def _count(self, rows: int, hits: int) -> None:
        self.hits += hits
        self.misses += rows - hits
        self._epoch_hits += hits
        self._epoch_rows += rows
        if not self.hits and self.misses > _PATIENCE * max(len(self._slots), 1 << 16):
            self._end(f"none of {self.misses} rows came back")

    def _end(self, why: str) -> None:
        _log.info("The feature cache ends: %s, so the inputs are different each time.", why)
        self._free()

    def _free(self) -> None:
        self.closed = True
        self._slots.clear()
        if self._store is not None:
            self._store.close()
            self._store = None


class _Store:
    """Numbered rows of bytes: blocks of memory, then a file without a name."""

    def __init__(
        self, layout: Layout, memory_bytes: int, spill_bytes: int | None, directory: Path | None
    ) -> None:
        self.layout = layout
        self._sizes = [shape.numel() * dtype.itemsize for shape, dtype in layout]
        self._row_bytes = max(1, sum(self._sizes))
        self._block_rows = max(1, _BLOCK_BYTES // self._row_bytes)
        self._memory_rows = memory_bytes // (self._row_bytes + _ENTRY_BYTES)
        self._spill_bytes = spill_bytes
        self._directory = directory
        self._blocks: list[np.ndarray] = []
        self._file: Any = None
        self._rows = 0

    def write(self, parts: Sequence[np.ndarray], *, may_spill: bool) -> int | None:
        """Store one row; its number, or None if there is no room."""
        slot = self._rows
        if slot < self._memory_rows:
            block, row = divmod(slot, self._block_rows)
            if block == len(self._blocks):
                rows = min(self._block_rows, self._memory_rows - slot)
                self._blocks.append(np.empty((rows, self._row_bytes), np.uint8))
            np.concatenate(parts, out=self._blocks[block][row, : sum(self._sizes)])
        elif not may_spill or not self._spill(slot - self._memory_rows, parts):
            return None
        self._rows += 1
        return slot

    def read(self, slot: int, parts: Sequence[np.ndarray]) -> None:
        """Copy a stored row into ``parts``."""
        if slot < self._memory_rows:
            block, row = divmod(slot, self._block_rows)
            start = 0
            for part, size in zip(parts, self._sizes, strict=True):
                part[:] = self._blocks[block][row, start : start + size]
                start += size
            return
        self._file.seek((slot - self._memory_rows) * self._row_bytes)
        for part in parts:
            _read_fully(self._file, part.data)

    def close(self) -> None:
        self._blocks.clear()
        if self._file is not None:
            self._file.close()
            self._file = None

    def _spill(self, row: int, parts: Sequence[np.ndarray]) -> bool:
        """Write a row into the file; False if there is no room for it."""
        try:
            if self._file is None:
                self._open()
            if (row + 1) * self._row_bytes > (self._spill_bytes or 0):
                return False
            self._file.seek(row * self._row_bytes)
            data = b"".join(part.tobytes() for part in parts)
            return bool(self._file.write(data) == len(data))
        except OSError as exc:  # a full or read-only disk: what is kept stays
            _log.info("The feature cache grows no further: %s", exc)
            self._spill_bytes = 0
            return False

    def _open(self) -> None:
        folder = machine.cache_dir() if self._directory is None else self._directory
        folder.mkdir(parents=True, exist_ok=True)
        if self._spill_bytes is None:
            self._spill_bytes = shutil.disk_usage(folder).free // 8
        if self._spill_bytes < self._row_bytes:
            return
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
        weakref.finalize(self, self._file.close)


# --- tensors as bytes -------------------------------------------------------------------------


def find_hash() -> Callable[[Any], bytes]:
    """128 bits of a buffer's content: xxh3 where it is installed, else BLAKE2."""
    if is_installed("xxhash"):  # some 25 times faster
        found: Callable[[Any], bytes] = importlib.import_module("xxhash").xxh3_128_digest
        return found
    return lambda data: hashlib.blake2b(data, digest_size=16).digest()


def _keys(inputs: Tensors, digest: Callable[[Any], bytes]) -> list[bytes]:
    """A key for each row: what its bytes are in every input, and in which order they lie."""
    order = b""
    columns = []
    for tensor in inputs:
        # bytes as they lie where possible: reordering a batch of images costs more than hashing
        last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
        order += b"\1" if last else b"\0"
        rows = _as_bytes(tensor.permute(0, 2, 3, 1) if last else tensor)
        columns.append([digest(row) for row in rows])
    if len(columns) == 1:
        return [key + order for key in columns[0]]
    return [digest(b"".join(keys) + order) for keys in zip(*columns, strict=True)]


def _as_bytes(tensor: torch.Tensor) -> np.ndarray:
    """(rows, bytes) of ``tensor``: its own memory if that is contiguous."""
    tensor = tensor.detach().resolve_neg().contiguous()
    rows = len(tensor)
    if not tensor.numel():
        return np.empty((rows, 0), np.uint8)
    return tensor.reshape(rows, -1).view(torch.uint8).numpy()


def _layout(outputs: Tensors) -> Layout:
    return tuple((tensor.shape[1:], tensor.dtype) for tensor in outputs)


def _read_fully(file: Any, into: memoryview) -> None:
    while into.nbytes:
        got = file.readinto(into)
        if not got:
            raise OSError("The feature cache's file is shorter than what was written.")
        into = into[got:]
