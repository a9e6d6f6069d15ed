"""Control groups: the limits that Linux sets for this process, of version 1, 2 and both at once.

Standard library only; reads files and changes nothing. ``root`` is where the kernel's files are:
"/", or a copy of another machine's.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["cpu_quotas", "groups", "memory_limits", "read", "used_memory"]


def cpu_quotas(root: Path) -> Iterator[float]:
    """CPU quotas, in cores, of this process's control groups and all their parents."""
    for group in groups("cpu", root):
        quota, _, period = (read(group / "cpu.max") or "max").strip().partition(" ")  # v2
        if quota == "max":
            quota = (read(group / "cpu.cfs_quota_us") or "-1").strip()  # v1; -1 is no quota
            period = (read(group / "cpu.cfs_period_us") or "0").strip()
        if quota.isdigit() and period.isdigit() and int(period) > 0:
            yield int(quota) / int(period)


def memory_limits(root: Path) -> Iterator[tuple[Path, int]]:
    """Control groups of this process that limit memory, with the limit.

    Version 2 has two: "max", and "high", from which on the kernel slows a process down.
    """
    for group in groups("memory", root):
        for name in ("memory.max", "memory.high", "memory.limit_in_bytes"):
            text = (read(group / name) or "max").strip()
            # v1 says "no limit" by a number near 2**63
            if text.isdigit() and int(text) < 1 << 60:
                yield group, int(text)


def used_memory(group: Path) -> int:
    """What a control group holds, less the file cache that the kernel gives back first."""
    used = read(group / "memory.current") or read(group / "memory.usage_in_bytes") or "0"
    statistics = dict(
        line.split() for line in (read(group / "memory.stat") or "").splitlines() if " " in line
    )
    # v1's own line is of this group alone; its "total_" one has the children too, as v2's has
    cache = statistics.get("total_inactive_file", statistics.get("inactive_file", "0"))
    return max(0, int(used) - int(cache))


def groups(controller: str, root: Path) -> Iterator[Path]:
    """Folders of this process's control groups for ``controller``, each followed by its parents.

    Version 1, version 2 and both at once; a namespace or a bind mount may hide the upper part.
    """
    paths = {}  # kind of hierarchy -> this process's path in it
    for line in (read(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            paths["cgroup2"] = path
        elif controller in controllers.split(","):
            paths["cgroup"] = path
    for line in (read(root / "proc/self/mountinfo") or "").splitlines():
        before, _, after = line.partition(" - ")
        if not after:
            continue
        mounted, point = map(_unescape, before.split()[3:5])
        kind, *_, options = after.split()
        if kind not in paths or (kind == "cgroup" and controller not in options.split(",")):
            continue
        top = root / point.lstrip("/")
        yield from _upwards(_below(top, mounted, paths[kind]), top)


def _below(top: Path, mounted: str, path: str) -> Path:
    """The folder of group ``path`` in a hierarchy whose part ``mounted`` is seen at ``top``."""
    group = PurePosixPath(path)
    if ".." not in group.parts and group.is_relative_to(mounted):
        folder = top / group.relative_to(mounted)
        if folder.is_dir():
            return folder
    return top  # seen from another namespace: the mount is all there is to read


def _upwards(folder: Path, top: Path) -> Iterator[Path]:
    while True:
        yield folder
        if folder == top:
            return
        folder = folder.parent


def _unescape(text: str) -> str:
    """The kernel writes blanks in a mount's path as octal numbers."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def read(path: Path) -> str | None:
    """The text of one of the kernel's files, None where there is none to read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:  # not this system, not this kernel, or not for us to read
        return None
