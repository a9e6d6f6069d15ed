"""The error tree of the whole project. Imports nothing.

BigDLError
├── ArgumentError(TypeError)         unknown keyword, wrong type
├── ConfigError(ValueError)          wrong value, or values that contradict each other
├── DataError(ValueError)            the data cannot be used as asked
├── ImageError(OSError)              a picture cannot be read
├── MissingDependencyError(ImportError)
├── AccuracyError(ValueError)        an accuracy criterion cannot be kept
├── NotReadyError(RuntimeError)      called out of order
├── ContextError(RuntimeError)       no running context, or another one
├── StoredModelError(ValueError)     a saved model is damaged, changed or unknown
├── TimeLimitError(TimeoutError)
├── SearchError(RuntimeError)
└── WorkerError(RuntimeError)        what happened in a worker
    └── WorkerLostError              the worker itself is gone
"""

from __future__ import annotations

__all__ = [
    "AccuracyError",
    "ArgumentError",
    "BigDLError",
    "ConfigError",
    "ContextError",
    "DataError",
    "ImageError",
    "MissingDependencyError",
    "NotReadyError",
    "SearchError",
    "StoredModelError",
    "TimeLimitError",
    "WorkerError",
    "WorkerLostError",
]


class BigDLError(Exception):
    """Base of every error that this project raises on purpose."""


class ArgumentError(BigDLError, TypeError):
    """A call got an argument that it does not have, or one of the wrong type."""


class ConfigError(BigDLError, ValueError):
    """A value is not allowed, or two values contradict each other."""


class DataError(BigDLError, ValueError):
    """The data cannot be used as asked."""


class ImageError(BigDLError, OSError):
    """A picture cannot be read; the text names its path."""


class MissingDependencyError(BigDLError, ImportError):
    """An optional package is not installed; the text says which extra brings it."""


class AccuracyError(BigDLError, ValueError):
    """An accuracy criterion cannot be kept; the text holds metric, value and limit."""


class NotReadyError(BigDLError, RuntimeError):
    """A method was called out of order; the text says what to call first."""


class ContextError(BigDLError, RuntimeError):
    """There is no running context, or the running one is another."""


class StoredModelError(BigDLError, ValueError):
    """A stored model is damaged, was changed, or has a form that is not known."""


class TimeLimitError(BigDLError, TimeoutError):
    """Work was ended because it took longer than its limit."""


class SearchError(BigDLError, RuntimeError):
    """A search cannot give an answer."""


class WorkerError(BigDLError, RuntimeError):
    """Something failed in a worker process.

    Args:
        message: The whole text, naming the worker ("worker 1 of 4").
        rank: The worker's rank, or None where ranks have no meaning.
        host: Name of the host it was on, or None where it never came to run.
        shard: Number of the shard that it worked on, from 0, or None where there is none.
        traceback: The worker's own traceback as text, "" if there is none.
    """

    def __init__(
        self,
        message: str,
        *,
        rank: int | None = None,
        host: str | None = None,
        shard: int | None = None,
        traceback: str = "",
    ) -> None:
        super().__init__(message)
        self.rank = rank
        self.host = host
        self.shard = shard
        self.traceback = traceback

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild_worker_error, (type(self), self.args, self.__dict__.copy())


class WorkerLostError(WorkerError):
    """A worker ended without an answer; the text holds its signal or exit code."""


def _rebuild_worker_error(
    kind: type[WorkerError], args: tuple[str], state: dict[str, object]
) -> WorkerError:
    error = kind(*args)
    error.__dict__.update(state)
    return error
