"""Where a spool's files go on one host: which folders, how much of its memory, whose guard.

Standard library only; runs in the tasks that write. Files lie in the application's local
directories; in /dev/shm as long as those there take no more than half of the memory that was
free at the beginning.
"""

from __future__ import annotations

import errno
import hashlib
import importlib
import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from typing import TYPE_CHECKING, Any

from bigdl._base import machine
from bigdl._base.errors import DataError
from bigdl.orca.data.spool_guard import HOME_FILE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bigdl.orca.data.spool_lease import Ticket

__all__ = ["FILE_BYTES", "Site", "local_roots", "new_name", "reserve"]

#: A file is closed when it has so many bytes.
FILE_BYTES = 64 << 20
_SHM = "/dev/shm"
_PART_OF_FREE_MEMORY = 0.5
_PATIENCE_S = 30.0
#: Other tasks write too, so one looks again; a look costs as much as half a block.
_LOOK_EVERY_S = 0.2
_BOOT = "import sys; exec(compile(sys.stdin.buffer.read(), 'spool_guard', 'exec'))"


class Site:
    """The folders of one spool on this host, with their guard.

    Args:
        ticket: Of the spool.
        roots: Where folders may be made; None = the application's local directories.
        shm: A file system in memory; None = none is used.

    Raises:
        DataError: No folder can be made.
    """

    def __init__(
        self, ticket: Ticket, roots: Sequence[str] | None = None, shm: str | None = _SHM
    ) -> None:
        roots = list(roots) if roots is not None else local_roots()
        folders = [os.path.join(root, f"bigdl-spool-{ticket.name}") for root in roots]
        if shm is not None and os.path.isdir(shm):
            # executors of one host that have roots of their own still share this one
            own = f"{_short(folders[0])}-{ticket.name}"
            folders.append(os.path.join(shm, f"bigdl-spool-{own}"))
        said = self._guarded(ticket, folders)
        self.guard: tuple[str, int] = (said["address"][0], said["address"][1])
        self._in_memory = [one for one in said["folders"] if shm and one.startswith(f"{shm}/")]
        self._on_disk = [one for one in said["folders"] if one not in self._in_memory]
        self._looked, self._room = -_LOOK_EVERY_S, 0.0

    def in_memory(self, name: str, size: int) -> str | None:
        """Path of a new file that may grow by so many bytes; None if there is no room."""
        for folder in self._in_memory:
            if self.has_room(size):
                return os.path.join(folder, name)
        return None

    def on_disk(self, name: str) -> str:
        """Path of a new file, where most is free."""
        return os.path.join(max(self._on_disk, key=_free), name)

    def has_room(self, size: int) -> bool:
        """Whether files in memory, with ``size`` more, leave as much memory free as they take."""
        now = time.monotonic()
        if now - self._looked > _LOOK_EVERY_S:
            used = sum(
                entry.stat().st_blocks * 512
                for folder in self._in_memory
                for entry in os.scandir(folder)
            )
            free = machine.available_memory_bytes()
            self._looked, self._room = now, (free + used) * _PART_OF_FREE_MEMORY - used
        self._room -= size
        return self._room >= 0

    def mark_failed(self) -> None:
        """Tell the other tasks of this host that there is no use in going on."""
        with open(os.path.join(self._on_disk[0], "failed"), "w"):
            pass

    @property
    def has_failed(self) -> bool:
        return os.path.exists(os.path.join(self._on_disk[0], "failed"))

    def _guarded(self, ticket: Ticket, folders: list[str]) -> dict[str, Any]:
        """What the guard says of itself; it is begun if there is none."""
        home = os.path.join(folders[0], HOME_FILE)
        deadline = time.monotonic() + _PATIENCE_S
        is_begun = False
        while not os.path.exists(home):
            if not is_begun and not os.path.isdir(folders[0]):
                _begin_guard(ticket, folders)
                is_begun = True
            if time.monotonic() > deadline:
                raise DataError(
                    f"Nobody guards {folders[0]}, where rows were to be spooled: the folder "
                    f"cannot be made, or {ticket.address}:{ticket.port} cannot be reached from "
                    "this executor."
                )
            time.sleep(0.01)
        with open(home) as file:
            said: dict[str, Any] = json.load(file)
        return said


def local_roots() -> list[str]:
    """The application's local directories, which go with it, as a task of Spark's sees them."""
    named = os.environ.get("SPARK_LOCAL_DIRS") or os.environ.get("LOCAL_DIRS") or ""
    # Spark names the block managers' folders, which go with an executor: what is above them goes
    # with the application
    roots = [
        os.path.dirname(path) if os.path.basename(path).startswith("blockmgr-") else path
        for path in named.split(",")
        if path
    ]
    usable = [path for path in dict.fromkeys(roots) if os.access(path, os.W_OK | os.X_OK)]
    return usable or [tempfile.gettempdir()]


def _short(text: str) -> str:
    """A short name for a long one; the same in every process."""
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def new_name(partition: int, number: int) -> str:
    """Of a file: no attempt of a task meets another's."""
    return f"{partition}-{number}-{secrets.token_hex(4)}.arrow"


def _begin_guard(ticket: Ticket, folders: list[str]) -> None:
    module = importlib.import_module("bigdl.orca.data.spool_guard")
    assert module.__spec__ is not None
    source: str = module.__spec__.loader.get_source(module.__name__)  # type: ignore[union-attr]
    words = {
        "folders": folders,
        "owner": [ticket.address, ticket.port],
        "token": ticket.token,  # by its stdin: command lines and environments can be read
    }
    subprocess.run(
        [sys.executable, "-I", "-S", "-c", _BOOT],
        input=f"{source}\nmain({json.dumps(words)!r})\n".encode(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        timeout=_PATIENCE_S,
        check=False,
        start_new_session=True,
    )


def reserve(file: int, first: int, count: int) -> bool:
    """Set bytes of a file in memory aside, so that writing them cannot fail; whether there are."""
    try:
        os.posix_fallocate(file, first, count)
    except OSError as exc:
        if exc.errno in (errno.ENOSPC, errno.EDQUOT):
            return False
        raise
    return True


def _free(folder: str) -> int:
    try:
        return os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
    except OSError:
        return -1
