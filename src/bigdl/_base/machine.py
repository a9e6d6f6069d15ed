"""What this machine offers this process: facts, read when asked for. Changes nothing.

Standard library only. Every function that reads files takes ``root``, so that the layouts of
other machines can be read from a copy.
"""

from __future__ import annotations

import ctypes
import math
import os
import platform
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bigdl._base import cgroups

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "Machine",
    "available_memory_bytes",
    "cache_dir",
    "core_ids",
    "cores",
    "describe",
    "isa",
    "memory_limit_bytes",
    "numa_nodes",
    "physical_cores",
]

_ROOT = Path("/")

# Our name of an instruction set, and the kernel's flags that must all be there.
_LINUX_ISA = {
    "sse4_2": ("sse4_2",),
    "avx2": ("avx2", "fma"),
    "avx512": ("avx512f", "avx512bw", "avx512dq", "avx512vl"),
    "avx512_vnni": ("avx512_vnni",),
    "avx_vnni": ("avx_vnni",),
    "avx512_bf16": ("avx512_bf16",),
    "amx_int8": ("amx_tile", "amx_int8"),
    "amx_bf16": ("amx_tile", "amx_bf16"),
    "neon": ("asimd",),
    "asimddp": ("asimddp",),
    "bf16": ("bf16",),
}
# The same in the words of macOS' sysctl; the keys stand under "hw.optional.".
_MACOS_ISA = {
    "sse4_2": ("sse4_2",),
    "avx2": ("avx2_0", "fma"),
    "avx512": ("avx512f", "avx512bw", "avx512dq", "avx512vl"),
    "avx512_vnni": ("avx512vnni",),
    "neon": ("neon",),
    "asimddp": ("arm.FEAT_DotProd",),
    "bf16": ("arm.FEAT_BF16",),
}


# --- cores ------------------------------------------------------------------------------------


def core_ids() -> tuple[int, ...]:
    """Numbers of the cores this process may run on, ascending (its affinity)."""
    if sys.platform == "linux":
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def cores(*, root: Path = _ROOT) -> int:
    """How many cores' worth of work this process can do at once, at least 1.

    The smaller of its affinity and the tightest CPU quota among its control groups and their
    parents. A broken quota counts up (1.5 is 2), as in other runtimes: a second thread that is
    held back at times still does more than none.
    """
    usable = len(core_ids())
    quota = min(cgroups.cpu_quotas(root), default=math.inf)
    return max(1, usable if quota == math.inf else min(usable, math.ceil(quota)))


def physical_cores(*, root: Path = _ROOT) -> int:
    """Like ``cores``, but two threads of one core (hyper-threading) count once."""
    siblings = set()
    for core in core_ids():
        topology = root / f"sys/devices/system/cpu/cpu{core}/topology"
        text = cgroups.read(topology / "thread_siblings_list")
        siblings.add(text.strip() if text else str(core))
    return max(1, min(len(siblings), cores(root=root)))


def numa_nodes(*, root: Path = _ROOT) -> tuple[tuple[int, ...], ...]:
    """The usable cores of each NUMA node that has any; one node where nothing is known."""
    usable = set(core_ids())
    nodes = []
    folder = root / "sys/devices/system/node"
    for node in sorted(folder.glob("node[0-9]*"), key=lambda path: int(path.name[4:])):
        ids = usable.intersection(_core_list(cgroups.read(node / "cpulist") or ""))
        if ids:
            nodes.append(tuple(sorted(ids)))
            usable -= ids
    if usable:  # cores that no node lists
        nodes.append(tuple(sorted(usable)))
    return tuple(nodes)


def _core_list(text: str) -> Iterator[int]:
    """The numbers in the kernel's list form, "0-3,8"."""
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if first.isdigit():
            yield from range(int(first), int(last or first) + 1)


# --- memory -----------------------------------------------------------------------------------


def memory_limit_bytes(*, root: Path = _ROOT) -> int:
    """Memory this process can use at most: the machine's, or a control group's limit.

    Returns:
        Bytes; 0 where it cannot be told.
    """
    limits = [limit for _, limit in cgroups.memory_limits(root)]
    total = _physical_memory(root)
    return min([total, *limits] if total else limits, default=0)


def available_memory_bytes(*, root: Path = _ROOT) -> int:
    """Memory this process can still take without swapping or reaching a limit.

    What a control group holds of files that were read once counts as available, as the
    kernel gives it back first.

    Returns:
        Bytes, never negative; 0 where it cannot be told.
    """
    free = _free_memory(root)
    rooms = [
        max(0, limit - cgroups.used_memory(group)) for group, limit in cgroups.memory_limits(root)
    ]
    return min([free, *rooms] if free else rooms, default=0)


def _physical_memory(root: Path) -> int:
    found = _meminfo("MemTotal", root)
    if found is not None:
        return found
    if sys.platform == "win32":
        return _windows_memory()[0]
    return _sysconf("SC_PHYS_PAGES")


def _free_memory(root: Path) -> int:
    found = _meminfo("MemAvailable", root)
    if found is not None:
        return found
    if sys.platform == "win32":
        return _windows_memory()[1]
    if sys.platform == "darwin":
        pages = re.findall(
            r"^Pages (?:free|inactive|speculative|purgeable):\s+(\d+)", _run("vm_stat"), re.M
        )
        return sum(map(int, pages)) * os.sysconf("SC_PAGE_SIZE")
    return _sysconf("SC_AVPHYS_PAGES")


def _meminfo(key: str, root: Path) -> int | None:
    match = re.search(rf"^{key}:\s+(\d+) kB", cgroups.read(root / "proc/meminfo") or "", re.M)
    return int(match[1]) * 1024 if match else None


def _sysconf(pages: str) -> int:
    """Bytes in so many pages, 0 where the system does not say."""
    try:
        return max(0, os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE"))
    except (ValueError, OSError, AttributeError):
        return 0


def _windows_memory() -> tuple[int, int]:
    """(physical, available) bytes."""

    class Status(ctypes.Structure):  # Windows' MEMORYSTATUSEX
        _fields_ = (
            ("length", ctypes.c_ulong),
            ("load", ctypes.c_ulong),
            *((name, ctypes.c_ulonglong) for name in ("total", "available", *"abcde")),
        )

    status = Status()
    status.length = ctypes.sizeof(Status)
    kernel = getattr(ctypes, "windll").kernel32  # noqa: B009  (exists on Windows only)
    if not kernel.GlobalMemoryStatusEx(ctypes.byref(status)):
        return 0, 0
    return status.total, status.available


# --- instruction sets -------------------------------------------------------------------------


def isa(*, root: Path = _ROOT) -> frozenset[str]:
    """Instruction sets that matter to us and that every core of this machine has.

    Returns:
        Names among ``sse4_2 avx2 avx512 avx512_vnni avx_vnni avx512_bf16 amx_int8 amx_bf16
        neon asimddp bf16``; empty where it cannot be told.
    """
    if sys.platform == "darwin" and root == _ROOT:
        return _macos_isa(_run("sysctl", "hw.optional"))
    return _linux_isa(cgroups.read(root / "proc/cpuinfo") or "")


def _linux_isa(cpuinfo: str) -> frozenset[str]:
    lines = re.findall(r"^(?:flags|Features)\s*:(.*)$", cpuinfo, re.M)
    cores_flags = [set(line.split()) for line in lines]
    if not cores_flags:
        return frozenset()
    flags = set.intersection(*cores_flags)  # cores may differ (big and little ones)
    if "neon" in flags:  # 32-bit ARM's word
        flags.add("asimd")
    return frozenset(name for name, needed in _LINUX_ISA.items() if flags.issuperset(needed))


def _macos_isa(sysctl: str) -> frozenset[str]:
    flags = set(re.findall(r"^hw\.optional\.(\S+): 1$", sysctl, re.M))
    if flags & {"arm64", "AdvSIMD", "arm.AdvSIMD"}:
        flags.add("neon")
    return frozenset(name for name, needed in _MACOS_ISA.items() if flags.issuperset(needed))


# --- places -----------------------------------------------------------------------------------


def cache_dir() -> Path:
    """Where we may keep files between runs. The folder is not made here."""
    named = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(named):  # the XDG standard: a relative path is to be ignored
        return Path(named) / "bigdl"
    try:
        return Path.home() / ".cache" / "bigdl"
    except RuntimeError:  # a user without a home, as in some containers
        user = os.getuid() if hasattr(os, "getuid") else "user"
        return Path(tempfile.gettempdir()) / f"bigdl-{user}"


# --- all together -----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What was found; ``str`` gives a table.

    Args:
        system: Operating system and architecture.
        processor: The maker's name of the processor, "" if unknown.
        cores: Cores' worth of work this process can do at once.
        core_ids: The cores it may run on.
        physical_cores: Those without second hardware threads.
        installed_cores: Cores that the whole machine has.
        numa_nodes: Usable cores, node by node.
        isa: Names of the instruction sets that matter to us.
        memory_limit_bytes: Memory that this process can use at most, 0 if unknown.
        available_memory_bytes: What is left of it, 0 if unknown.
    """

    system: str
    processor: str
    cores: int
    core_ids: tuple[int, ...]
    physical_cores: int
    installed_cores: int
    numa_nodes: tuple[tuple[int, ...], ...]
    isa: frozenset[str]
    memory_limit_bytes: int
    available_memory_bytes: int

    def rows(self) -> dict[str, str]:
        """The facts as words, by their heading."""
        return {
            "system": self.system,
            "processor": self.processor or "unknown",
            "usable cores": self._cores_in_words(),
            "NUMA nodes": str(len(self.numa_nodes)),
            "instruction sets": " ".join(sorted(self.isa)) or "unknown",
            "memory limit": _gib(self.memory_limit_bytes),
            "memory available": _gib(self.available_memory_bytes),
        }

    def __str__(self) -> str:
        rows = self.rows()
        width = max(map(len, rows))
        return "\n".join(f"{heading:<{width}}  {value}" for heading, value in rows.items())

    def _cores_in_words(self) -> str:
        text = str(self.cores)
        if self.installed_cores != self.cores:
            text += f" of {self.installed_cores}"
        if len(self.core_ids) < self.installed_cores:
            text += f"; affinity allows {len(self.core_ids)}"
        if self.cores < len(self.core_ids):
            text += f"; a CPU quota allows {self.cores}"
        if self.physical_cores < self.cores:
            text += f"; {self.physical_cores} physical"
        return text


def describe(*, root: Path = _ROOT) -> Machine:
    """All the facts of this module at once."""
    return Machine(
        system=f"{platform.system()} {platform.machine()}",
        processor=_processor(root),
        cores=cores(root=root),
        core_ids=core_ids(),
        physical_cores=physical_cores(root=root),
        installed_cores=os.cpu_count() or 1,
        numa_nodes=numa_nodes(root=root),
        isa=isa(root=root),
        memory_limit_bytes=memory_limit_bytes(root=root),
        available_memory_bytes=available_memory_bytes(root=root),
    )


def _processor(root: Path) -> str:
    match = re.search(r"^model name\s*:\s*(.+)$", cgroups.read(root / "proc/cpuinfo") or "", re.M)
    if match:
        return match[1].strip()
    if sys.platform == "darwin":
        return _run("sysctl", "-n", "machdep.cpu.brand_string").strip()
    return platform.processor()


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size else "unknown"


# --- asking the system ------------------------------------------------------------------------


def _run(*command: str) -> str:
    """What a system command prints, "" if it cannot."""
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=5,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout
