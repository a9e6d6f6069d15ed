"""A loader that gives one rank's parts of another loader's batches."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from bigdl.nano.pytorch.processes.loader_parts import Part, Parts
from bigdl.nano.pytorch.processes.shared_streams import SharedStreams

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bigdl._base.collective import Collective
    from bigdl.nano.pytorch.processes.streams import Streams

__all__ = ["PartLoader", "whole"]


class PartLoader:
    """Its items are ``Part``s, as many on every rank; all else is the given loader's.

    Args:
        loader: A DataLoader, or any iterable of batches.
        collective: The ranks; all of them iterate at the same time.
        own: What this rank's loader draws from when it draws no order; None is what there is.
    """

    def __init__(self, loader: Any, collective: Collective, own: Streams | None = None) -> None:
        vars(self).update(loader=loader, _collective=collective, _own=own)

    def __iter__(self) -> Iterator[Part]:
        return _Iteration(self.loader, self._collective, self._own)

    def __len__(self) -> int:
        return len(self.loader)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(vars(self)["loader"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.loader, name, value)


def whole(loader: Any) -> Any:
    """The loader that a ``PartLoader`` gives parts of; any other is given back."""
    return vars(loader)["loader"] if isinstance(loader, PartLoader) else loader


class _Iteration:
    """One pass; the loader's own processes are running when it has been made."""

    def __init__(self, loader: Any, collective: Collective, own: Streams | None) -> None:
        self._own = own
        parts = Parts(loader, collective.rank, collective.world)
        self._parts = parts
        self._met = parts.meet(SharedStreams(collective))

    def __iter__(self) -> _Iteration:
        return self

    def __next__(self) -> Part:
        with nullcontext() if self._own is None else self._own.drawn():
            return next(self._met)

    def __del__(self) -> None:
        self._parts.close()
