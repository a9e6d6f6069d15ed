"""Threads, cores and memory allocator of a process: computed as data, applied at its start.

Runtimes read these when they are loaded, so they are given to processes that we start. The one
place that touches this process's own variables is ``environment``, and it takes it back.
"""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bigdl._base.errors import ArgumentError, ConfigError
from bigdl._base.machine import core_ids

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = [
    "ProcessSettings",
    "allocator_in_use",
    "environment",
    "find_allocator",
    "stay_on",
    "thread_variables",
]

# Every name under which a library reads how many threads it may start.
THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "MKL_DOMAIN_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "GOTO_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "ACCELERATE_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "NUMEXPR_MAX_THREADS",
    "NUMBA_NUM_THREADS",
    "RAYON_NUM_THREADS",
    "TF_NUM_INTRAOP_THREADS",
)

# Best first. jemalloc keeps large blocks for the next step instead of giving them back.
_ALLOCATORS = ("libjemalloc.so*", "libtcmalloc_minimal.so*", "libtcmalloc.so*")
_ALLOCATOR_VARIABLES = {
    "jemalloc": {
        "MALLOC_CONF": "oversize_threshold:1,background_thread:true,metadata_thp:auto,"
        "dirty_decay_ms:10000,muzzy_decay_ms:10000"
    },
    # tensors are large: without this every allocation over 1 GiB is reported on stderr
    "tcmalloc": {"TCMALLOC_LARGE_ALLOC_REPORT_THRESHOLD": str(1 << 60)},
}
# TBB, which OpenVINO brings, loads a library so that it allocates by the C library and frees by
# whatever was preloaded: a crash at the first model that is compiled, unless it is told this.
TBB_BESIDE_ALLOCATOR = {"TBB_ENABLE_SANITIZERS": "1"}
_LIBRARY_FOLDERS = (
    "usr/lib/*-linux-*",
    "usr/lib64",
    "usr/local/lib",
    "usr/local/lib64",
    "usr/lib",
)


def thread_variables(n: int) -> dict[str, str]:
    """Variables that hold a new process, whatever it loads, to ``n`` threads a pool.

    Raises:
        ConfigError: ``n`` is less than 1.
    """
    if n < 1:
        raise ConfigError(f"A process cannot have {n} threads: need at least 1.")
    return {
        # MKL's own form: a list of domains
        name: f"MKL_DOMAIN_ALL={n}" if name == "MKL_DOMAIN_NUM_THREADS" else str(n)
        for name in THREAD_VARIABLES
    }


@dataclass(frozen=True, kw_only=True)
class ProcessSettings:
    """How a process that we start shall run; it changes nothing by itself.

    Args:
        threads: Threads for each pool; None leaves it to the process. With ``cores`` alone,
            as many as there are cores.
        cores: The cores it may run on; None leaves them all.
        allocator: A library to allocate memory with, as ``find_allocator`` gives it.
    """

    threads: int | None = None
    cores: tuple[int, ...] | None = None
    allocator: Path | None = None

    def __post_init__(self) -> None:
        wrong = []
        if self.threads is not None and self.threads < 1:
            wrong.append(f"threads={self.threads} (need >= 1)")
        if self.cores is not None:
            if not self.cores:
                wrong.append("cores=() (need at least one)")
            if len(set(self.cores)) < len(self.cores):
                wrong.append(f"cores={self.cores} (each once)")
            missing = sorted(set(self.cores) - set(core_ids()))
            if missing:
                wrong.append(f"cores {missing} (usable here: {list(core_ids())})")
        if self.allocator is not None and not Path(self.allocator).is_file():
            wrong.append(f"allocator={str(self.allocator)!r} (no such file)")
        if wrong:
            raise ConfigError("ProcessSettings cannot be used: " + ", ".join(wrong) + ".")

    def variables(self) -> dict[str, str]:
        """Environment variables to start the process with, on top of the present ones."""
        threads = self.threads or (len(self.cores) if self.cores else None)
        variables = thread_variables(threads) if threads else {}
        if self.allocator is not None:
            others = os.environ.get("LD_PRELOAD", "")
            variables["LD_PRELOAD"] = (
                f"{self.allocator}:{others}" if others else str(self.allocator)
            )
            variables |= TBB_BESIDE_ALLOCATOR
            for kind, settings in _ALLOCATOR_VARIABLES.items():
                if kind in Path(self.allocator).name:
                    # what the user has set for this allocator stays
                    variables |= {k: os.environ.get(k, v) for k, v in settings.items()}
        return variables


@contextmanager
def environment(**variables: str | None) -> Iterator[None]:
    """Set environment variables (None: unset) for the block, and put the old ones back.

    Variables belong to the whole process: other threads see them too.

    Raises:
        ArgumentError: A value is neither a string nor None.
    """
    for name, value in variables.items():
        if value is not None and not isinstance(value, str):
            raise ArgumentError(
                f"environment({name}=…) takes a string or None, not {type(value).__name__}."
            )
    before = {name: os.environ.get(name) for name in variables}
    try:
        _set(variables)
        yield
    finally:
        _set(before)


def _set(variables: dict[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


# --- allocator --------------------------------------------------------------------------------


def find_allocator(*, root: Path = Path("/")) -> Path | None:
    """A jemalloc or tcmalloc of this system that this Python can be started with, or None.

    Looks where the system's linker, conda and ``LD_LIBRARY_PATH`` keep libraries. Linux only.
    """
    if sys.platform != "linux":
        return None
    folders = [Path(part) for part in os.environ.get("LD_LIBRARY_PATH", "").split(":") if part]
    folders.append(Path(sys.prefix) / "lib")
    for pattern in _LIBRARY_FOLDERS:
        folders.extend(sorted(root.glob(pattern)))
    for pattern in _ALLOCATORS:
        for folder in folders:
            for library in sorted(folder.glob(pattern)):
                if _is_loadable(library):
                    return library.resolve()
    return None


def allocator_in_use(pid: int | None = None) -> str | None:
    """The allocator that a running process (None: this one) really has loaded.

    Returns:
        "jemalloc", "tcmalloc" or None: the C library's own, or not to be told.
    """
    try:
        maps = Path(f"/proc/{pid or 'self'}/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    names: Sequence[str] = [Path(line.split()[-1]).name for line in maps.splitlines()]
    for kind in _ALLOCATOR_VARIABLES:
        if any(name.startswith(f"lib{kind}") for name in names):
            return kind
    return None


def _is_loadable(library: Path) -> bool:
    """Whether ``library`` is of this Python's architecture (a preload of another is ignored)."""
    return _architecture(library) == _architecture(Path(sys.executable)) is not None


def _architecture(path: Path) -> bytes | None:
    """Word size, byte order and machine in an ELF file's head, None for other files."""
    try:
        with path.open("rb") as file:
            head = file.read(20)
    except OSError:
        return None
    return head[4:6] + head[18:20] if head.startswith(b"\x7fELF") else None


def stay_on(cores: Sequence[int] | None) -> None:
    """Keep all threads of this process, one of ours, on ``cores``; None leaves them."""
    if cores is not None and sys.platform == "linux":
        for thread in os.listdir("/proc/self/task"):  # libraries may have started some
            with suppress(ProcessLookupError):
                os.sched_setaffinity(int(thread), cores)
