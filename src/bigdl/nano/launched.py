"""What a launched process does before it becomes the user's script. Standard library only.

Run as a file: ``python launched.py PARENT CORES COMMAND…``, cores as ``0,1`` or ``-``.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def _become(parent: int, cores: str, command: list[str]) -> None:
    """Take the cores, die with the parent however it dies, and turn into the command."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
        if cores != "-":
            os.sched_setaffinity(0, [int(core) for core in cores.split(",")])
    if os.getppid() != parent:  # it died before we could ask for the signal
        sys.exit(1)
    os.execv(command[0], command)  # keeps the process: its signal, its cores


if __name__ == "__main__":
    _become(int(sys.argv[1]), sys.argv[2], sys.argv[3:])
