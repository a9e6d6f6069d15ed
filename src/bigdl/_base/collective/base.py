"""The contract of everything that combines the numbers of several workers.

NumPy only. An implementation says how bytes move; what may be asked, the checks of what is
given, and what happens when it fails are here, once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from bigdl._base.collective.arithmetic import split
from bigdl._base.errors import (
    ArgumentError,
    BigDLError,
    ConfigError,
    ContextError,
    TimeLimitError,
    WorkerLostError,
)
from bigdl._base.gang import Failure

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from bigdl._base.gang import Gang

__all__ = ["Collective", "Compress"]

Compress = Literal["bf16"] | None

#: What can be added, by the letter of its dtype.
SUMMABLE = {np.dtype(kind).char for kind in ("f4", "f8", "i4", "i8")} | {"l", "q"}
_ITEM_LIMIT = 4096


class Collective(ABC):
    """A group of workers that combine arrays. Every worker makes the same calls in the same order.

    All calls block until this worker's part in them is done. Arrays are C-contiguous, of equal
    size and dtype on all workers, and changed in place. One thread at a time may use it.

    A worker that fails, dies, or takes longer than ``timeout_s`` ends it for all: they get the
    same error (or an error that quotes it), and every later call gets it too.
    """

    #: Its name in the table.
    kind: ClassVar[str]
    #: Whether sums have the very bits of adding one worker after the other, as ``order`` says.
    is_exact: ClassVar[bool] = True

    def __init__(
        self, gang: Gang | None, group: tuple[int, ...], *, timeout_s: float | None = 600.0
    ) -> None:
        self._gang = gang
        self._group = group
        self._timeout_s = timeout_s
        self.world = len(group)
        self.rank = group.index(gang.rank) if gang is not None else 0
        self._doing = ""
        self._ended = ""

    def __enter__(self) -> Collective:
        return self

    def __exit__(self, kind: object, exc: BaseException | None, trace: object) -> None:
        if exc is not None:
            self.abort(f"{type(exc).__name__}: {exc}")
        self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} rank {self.rank} of {self.world}>"

    @property
    def order(self) -> tuple[tuple[int, ...], ...]:
        """How sums are made: each group's ranks are added in order, then the groups in order."""
        return (tuple(range(self.world)),)

    def parts(self, n: int) -> list[slice]:
        """Which of ``n`` elements belong to which rank in ``reduce_scatter`` and ``all_gather``.

        Consecutive and of nearly equal size; together all ``n``. Some may be empty.
        """
        return split(n, self.world)

    def part(self, n: int) -> slice:
        """Which of ``n`` elements belong to this worker."""
        return self.parts(n)[self.rank]

    # --- what workers do together ---

    def all_reduce(self, array: NDArray[Any], *, compress: Compress = None) -> NDArray[Any]:
        """Give every worker the sum of all workers' ``array``, in place; the same bits to each.

        Args:
            array: float32, float64, int32 or int64; any shape.
            compress: "bf16" rounds float32 numbers to bf16 where they travel between hosts;
                they are added in float32. Between workers of one host nothing is rounded.

        Returns:
            ``array``.

        Raises:
            ConfigError: The array cannot be used, or other workers brought another one.
            WorkerError: Another worker failed (or ``WorkerLostError``: is gone).
            TimeLimitError: Another worker did not come in time.
        """
        flat = self._flat(array, summed=True)
        self._check_compress(flat, compress)
        self._together("all_reduce", self._all_reduce, flat, compress)
        return array

    def reduce_scatter(self, array: NDArray[Any], *, compress: Compress = None) -> NDArray[Any]:
        """Sum all workers' ``array``, each worker its own part; the rest of it is undefined then.

        Returns:
            The view of this worker's part, ``array.reshape(-1)[self.part(array.size)]``.

        Raises:
            ConfigError, WorkerError, TimeLimitError: As ``all_reduce``.
        """
        flat = self._flat(array, summed=True)
        self._check_compress(flat, compress)
        self._together("reduce_scatter", self._reduce_scatter, flat, compress)
        return flat[self.part(flat.size)]

    def all_gather(self, array: NDArray[Any]) -> NDArray[Any]:
        """Fill ``array``, of which each worker brings its own part, on every worker.

        Any dtype without Python objects. Raises as ``all_reduce``.
        """
        self._together("all_gather", self._all_gather, self._flat(array))
        return array

    def broadcast(self, array: NDArray[Any], root: int = 0) -> NDArray[Any]:
        """Give every worker what ``array`` holds on worker ``root``, in place.

        Any dtype without Python objects. Raises as ``all_reduce``.
        """
        if not 0 <= root < self.world:
            raise ConfigError(f"root={root} is none of the ranks 0 … {self.world - 1}.")
        self._together("broadcast", self._broadcast, self._flat(array), root)
        return array

    def barrier(self) -> None:
        """Return when all workers have come here. Raises as ``all_reduce``."""
        self._together("barrier", self._barrier)

    def buffer(self, nbytes: int) -> NDArray[np.uint8]:
        """Memory that this collective works on fastest, zero at first.

        All workers call it with the same size. Take views of it (``.view(np.float32)``) and
        give those, or parts of them, to the calls above: every worker the same part.
        It is usable, and holds memory, for as long as any array of it lives.

        Raises:
            ConfigError: There is too little memory.
        """
        if isinstance(nbytes, bool) or not isinstance(nbytes, int):
            raise ArgumentError(f"nbytes has to be an int, not {type(nbytes).__name__}.")
        if nbytes < 0:
            raise ConfigError(f"A buffer of {nbytes} bytes cannot be.")
        made: list[NDArray[np.uint8]] = []
        self._together("buffer", lambda: made.append(self._buffer(nbytes)))
        return made[0]

    def abort(self, words: str) -> None:
        """End it for all workers; the others' calls raise an error that holds ``words``."""
        self._ended = self._ended or words
        if self._gang is not None:
            self._gang.abort(words)

    def close(self) -> None:
        """Give everything back; the gang stays. Calling it twice is harmless."""
        self._ended = self._ended or "it is closed"

    # --- how ---

    @abstractmethod
    def _all_reduce(self, flat: NDArray[Any], compress: Compress) -> None: ...

    @abstractmethod
    def _reduce_scatter(self, flat: NDArray[Any], compress: Compress) -> None: ...

    @abstractmethod
    def _all_gather(self, flat: NDArray[Any]) -> None: ...

    @abstractmethod
    def _broadcast(self, flat: NDArray[Any], root: int) -> None: ...

    @abstractmethod
    def _barrier(self) -> None: ...

    def _buffer(self, nbytes: int) -> NDArray[np.uint8]:
        return np.zeros(nbytes, np.uint8)

    # --- checks, and the one fate ---

    def _flat(self, array: NDArray[Any], *, summed: bool = False) -> NDArray[Any]:
        if not isinstance(array, np.ndarray):
            raise ArgumentError(f"Need a NumPy array, not {type(array).__name__}.")
        dtype, flags = array.dtype, array.flags
        if summed and not (dtype.char in SUMMABLE and dtype.isnative):
            raise ConfigError(
                f"Cannot add arrays of {dtype}: need float32, float64, int32 or int64."
            )
        if dtype.hasobject:
            raise ConfigError(f"Cannot send arrays of {dtype}: Python objects have no bytes.")
        if not 0 < dtype.itemsize <= _ITEM_LIMIT:
            raise ConfigError(
                f"Cannot send arrays of {dtype}: elements of {dtype.itemsize} bytes, need 1 to "
                f"{_ITEM_LIMIT}."
            )
        if not (flags.c_contiguous and flags.writeable):
            fault = "not C-contiguous" if not flags.c_contiguous else "read-only"
            raise ConfigError(
                f"The array of shape {array.shape} is {fault}; it is changed in place, so give "
                "a contiguous one that may be written."
            )
        return array.reshape(-1)

    def _check_compress(self, flat: NDArray[Any], compress: Compress) -> None:
        if compress is None:
            return
        if compress != "bf16":
            raise ConfigError(f'compress={compress!r} is not known: need None or "bf16".')
        if flat.dtype != np.float32:
            raise ConfigError(f'compress="bf16" is for float32 arrays, not {flat.dtype}.')

    def _together(self, doing: str, work: Callable[..., None], *args: Any) -> None:
        """Do a piece of common work; if it fails here, it has failed for all."""
        if self._ended:
            if self._gang is not None:
                self._gang.check()  # the reason, if others have one
            raise ContextError(f"{doing} came too late: {self._ended}.")
        self._doing = doing
        try:
            work(*args)
        except BaseException as exc:
            self._fail(exc)
            raise

    def _fail(self, exc: BaseException) -> None:
        """Let all others know, in the kind of error that this worker has met."""
        if self._gang is not None and isinstance(exc, (WorkerLostError, TimeLimitError)):
            self._ended = str(exc)
            kind = "late" if isinstance(exc, TimeLimitError) else "lost"
            rank, host = getattr(exc, "rank", None), getattr(exc, "host", None)
            self._gang.report(Failure(kind=kind, rank=rank, text=str(exc), host=host))
        else:
            name = "" if isinstance(exc, BigDLError) else f"{type(exc).__name__}: "
            self.abort(f"{self._doing}: {name}{exc}")
