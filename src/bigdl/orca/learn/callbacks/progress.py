"""Lines about training where no terminal shows it live."""

from __future__ import annotations

from bigdl.orca.learn.callbacks.base import Callback

__all__ = ["Progress"]


class Progress(Callback):
    """A line on the caller's stderr for each epoch, also where stderr is no terminal.

    On a terminal there is one live line anyway; with this, a log file or a job's output has each
    epoch's record too.
    """
