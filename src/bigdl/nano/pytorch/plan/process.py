"""Candidates that change the process around the step: allocator, threads, processes.

Knows torch; imports no Lightning.
"""

from __future__ import annotations

import ctypes
import platform
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bigdl._base import machine
from bigdl._base.environment import allocator_in_use
from bigdl._base.errors import ConfigError
from bigdl.nano.pytorch.plan.candidates import Applied, Candidate

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from bigdl.nano.pytorch.plan.candidates import Scene

__all__ = ["Allocator", "Processes", "Threads", "page_faults"]


# --- memory allocation ------------------------------------------------------------------------

# glibc's parameters of mallopt(3)
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -2, -3, -4
_NEVER = -1  # the C library takes it as its largest size
# In force: no block gets pages of its own, and freed pages are kept for the next step.
_KEEP_PAGES = {_MMAP_MAX: 0, _TRIM_THRESHOLD: _NEVER, _TOP_PAD: 64 << 20}
# Undone: the state that glibc's own rule reaches once a block of its largest size was freed.
# (Its start, a threshold that moves, cannot be had back once it was set.)
_AS_EVER = {
    _MMAP_MAX: 65536,
    _MMAP_THRESHOLD: 32 << 20,
    _TRIM_THRESHOLD: 64 << 20,
    _TOP_PAD: 128 << 10,
}


#: What a page from the system costs at most (4.2 µs were measured in a virtual machine).
_PAGE_S = 5e-6
#: Of a step's time: less is not worth a trial.
_LEAST_SHARE = 0.01


class Allocator(Candidate):
    """Memory of a step is kept for the next one instead of being given back to the system.

    A step frees its activations; glibc returns large ones to the kernel, which then has to
    clear the same pages again in the next step.
    """

    name = "allocator"
    changes_numbers = False
    is_process_wide = True
    hope = 1.1

    def refuse(self, scene: Scene) -> str | None:
        if scene.device.type != "cpu":
            return "the step's memory is not the processor's"
        if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
            return "this system's C library is not glibc"
        other = allocator_in_use()
        if other is not None:
            return f"the process runs on {other}, which keeps memory already"
        if scene.page_faults is not None and scene.step_s and not _has_huge_pages():
            share = scene.page_faults * _PAGE_S / scene.step_s
            if share < _LEAST_SHARE:
                return f"new pages take {share:.1%} of a step's time at most: too little to win"
        return None

    def apply(
        self,
        module: torch.nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        scene: Scene,
    ) -> Applied:
        return _Allocator()


def _has_huge_pages(root: Path = Path("/")) -> bool:
    """Whether a page may be one of megabytes, without having been asked for."""
    file = root / "sys/kernel/mm/transparent_hugepage/enabled"
    try:
        return "[always]" in file.read_text()
    except OSError:
        return False


def page_faults() -> int | None:
    """Pages that this process has got from the system so far; None where it cannot be told."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


class _Allocator(Applied):
    _in_force = 0  # blocks of this process in which pages are kept

    def __init__(self) -> None:
        _mallopt(_KEEP_PAGES)
        if not _keeps_pages():
            _mallopt(_AS_EVER)
            raise ConfigError("the C library took the settings without effect")
        self._is_on = True
        _Allocator._in_force += 1
        self.detail = "freed pages are kept"

    def undo(self) -> None:
        if not self._is_on:
            return
        self._is_on = False
        _Allocator._in_force -= 1
        if _Allocator._in_force == 0:
            _mallopt(_AS_EVER)
            _libc().malloc_trim(0)


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def _mallopt(settings: dict[int, int]) -> None:
    mallopt = _libc().mallopt
    for parameter, value in settings.items():
        mallopt(parameter, value)


def _keeps_pages() -> bool:
    """Whether a large block now comes from the heap, as seen in the process's map."""
    block = torch.empty(96 << 20, dtype=torch.uint8)  # above any threshold
    address = block.data_ptr()
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
            for line in maps:
                span, *_ = line.split(maxsplit=1)
                start, end = (int(part, 16) for part in span.split("-"))
                if start <= address < end:
                    return line.rstrip().endswith("[heap]")
    except OSError:
        return False
    return False


# --- threads ----------------------------------------------------------------------------------


class Threads(Candidate):
    """Another number of threads for the step, where small operations lose time in waiting.

    Args:
        count: The number; None is the first one worth a try.
    """

    name = "threads"
    hope = 1.2

    def __init__(self, count: int | None = None) -> None:
        self._count = count

    def pinned(self, options: Mapping[str, Any]) -> Candidate:
        count = options.get("threads")
        if count is not None and (isinstance(count, bool) or not isinstance(count, int)):
            raise ConfigError(f"threads={count!r} in a plan is not a whole number.")
        return Threads(count)

    def refuse(self, scene: Scene) -> str | None:
        if scene.device.type != "cpu":
            return "the step does not run on the processor"
        now = torch.get_num_threads()
        if self._count is None and self._best() == now:
            return f"{now} {'thread is' if now == 1 else 'threads are'} what is best known here"
        return None

    def _best(self) -> int:
        """One thread where cores are few or the user has many; never more than the cores."""
        now, physical = torch.get_num_threads(), machine.physical_cores()
        if now > physical:
            return physical
        return max(1, now // 2)

    def apply(
        self,
        module: torch.nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        scene: Scene,
    ) -> Applied:
        count = self._best() if self._count is None else self._count
        if not 1 <= count <= max(machine.cores(), torch.get_num_threads()):
            raise ConfigError(f"{count} threads on {machine.cores()} cores")
        return _Threads(count)


class _Threads(Applied):
    def __init__(self, count: int) -> None:
        self._count = count
        self.detail = f"{count} instead of {torch.get_num_threads()}"

    @property
    def options(self) -> dict[str, Any]:
        return {"threads": self._count}

    @contextmanager
    def whole(self) -> Iterator[None]:
        # around each step only: validation, loaders and callbacks keep the user's number
        before = torch.get_num_threads()
        torch.set_num_threads(self._count)
        try:
            yield
        finally:
            torch.set_num_threads(before)


# --- more than one process ---------------------------------------------------------------------


class Processes(Candidate):
    """Several processes that share each batch."""

    name = "processes"
    hope = 1.0

    def refuse(self, scene: Scene) -> str | None:
        return "not tried: a plan is made in one process; num_processes= trains in several"

    def apply(
        self,
        module: torch.nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        scene: Scene,
    ) -> Applied:
        raise ConfigError("a plan is for one process; give Trainer(num_processes=…) for several")
