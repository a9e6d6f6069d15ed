"""Values that are built in the worker process that needs them, once, and stay there.

Standard library only.
"""

from __future__ import annotations

import secrets
import weakref
from collections import deque
from typing import TYPE_CHECKING, Any

from bigdl._base.calls import shown
from bigdl._base.errors import ArgumentError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = ["PerWorker", "forget", "gone", "per_worker"]

#: Here: names of values that nobody asks for any more; workers are told with the next work.
_gone: deque[str] = deque(maxlen=1000)
#: In a worker: what was built there, by name.
_built: dict[str, Any] = {}


class PerWorker:
    """Stands for a value in the arguments of ``transform_shard``; made by ``per_worker``."""

    def __init__(self, factory: Callable[[], Any]) -> None:
        self._factory = factory
        self._name = secrets.token_hex(8)
        weakref.finalize(self, _gone.append, self._name).atexit = False

    def __repr__(self) -> str:
        return f"per_worker({getattr(self._factory, '__qualname__', self._factory)!s})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _placed, (self._factory, self._name)

    def value(self) -> Any:
        """The value of this process; built if it is not there."""
        if self._name not in _built:
            _built[self._name] = self._factory()
        return _built[self._name]


def per_worker(factory: Callable[[], Any]) -> Any:
    """An argument for ``transform_shard`` that each worker process builds for itself, once.

    For what is slow to build or cannot be pickled: a loaded model, a parser, a camera. The
    function gets what ``factory()`` gave, the same object for every shard of that process; only
    the factory travels. Several calls that are given the same ``per_worker`` share the value.

    Args:
        factory: Called without arguments, in the worker.

    Raises:
        ArgumentError: It cannot be called.

    Example:
        >>> parser = per_worker(lambda: spacy.blank("en"))  # doctest: +SKIP
        >>> shards.transform_shard(lambda texts, nlp: [nlp(t) for t in texts], parser)
    """
    if not callable(factory):
        raise ArgumentError(
            f"per_worker() needs a function that builds the value, not {shown(factory)}: "
            "per_worker(lambda: …)."
        )
    return PerWorker(factory)


def gone() -> tuple[str, ...]:
    """Names of values that workers may let go."""
    return tuple(_gone)


def forget(names: Iterable[str]) -> None:
    """Let those values go, in a worker."""
    for name in names:
        _built.pop(name, None)


def _placed(factory: Callable[[], Any], name: str) -> PerWorker:
    """As it arrives in a worker: of the same name, owned by nobody there."""
    found = object.__new__(PerWorker)
    found._factory, found._name = factory, name
    return found
