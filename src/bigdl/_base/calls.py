"""Public calls that answer for every keyword: an unknown one gets the nearest right name, and
one of BigDL 2.x works or is answered with the new way. Standard library only.
"""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, cast

from bigdl._base.errors import ArgumentError
from bigdl._base.registry import nearest

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["Gone", "Renamed", "answers", "shown"]

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Renamed:
    """An old keyword that still works.

    Args:
        to: Its name now.
        values: Old values that have new names.
    """

    to: str
    values: Mapping[Any, Any] | None = None


@dataclass(frozen=True)
class Gone:
    """An old keyword that is answered.

    Args:
        instead: What to write now, as a sentence.
        harmless: Values that asked for nothing, and still may.
    """

    instead: str
    harmless: tuple[Any, ...] = (None,)


def shown(value: Any) -> str:
    """A value as an error text shows it: short plain ones as written, others by their type."""
    if value is None or isinstance(value, (str, int, float, bool)):
        text = repr(value)
        return text if len(text) <= 60 else f"{text[:57]}…"
    return f"a {type(value).__name__}"


def answers(old: Mapping[str, Renamed | Gone]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Make a function answer wrong calls, and those of BigDL 2.x by the table ``old``.

    ``inspect.signature`` goes on to show the function's own parameters.

    Raises:
        ArgumentError: From the decorated function, for a call that does not fit it.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)
        known = [name for name in signature.parameters if name != "self"]
        name = function.__qualname__

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if not kwargs.keys() <= signature.parameters.keys():
                kwargs = _translate(name, known, old, kwargs)
            try:
                signature.bind(*args, **kwargs)
            except TypeError as exc:
                raise ArgumentError(f"{name}() cannot be called so: {exc}.") from None
            return function(*args, **kwargs)

        return cast("Callable[P, R]", call)

    return decorate


def _translate(
    name: str,
    known: list[str],
    old: Mapping[str, Renamed | Gone],
    given: Mapping[str, Any],
) -> dict[str, Any]:
    """The keywords ``given``, in today's words."""
    kept: dict[str, Any] = {}
    for keyword, value in given.items():
        answer = old.get(keyword)
        if keyword in known:
            kept[keyword] = value
        elif answer is None:
            raise ArgumentError(
                f"{name}() has no argument {keyword!r}.{nearest(keyword, [*known, *old])}"
            )
        elif isinstance(answer, Gone):
            if not any(value is harmless or value == harmless for harmless in answer.harmless):
                raise ArgumentError(f"{name}({keyword}=…) is gone: {answer.instead}")
        elif answer.to in given:
            raise ArgumentError(
                f"{name}() got both {keyword!r} and {answer.to!r}, which is its name now."
            )
        else:
            kept[answer.to] = (answer.values or {}).get(value, value) if _is_key(value) else value
    return kept


def _is_key(value: Any) -> bool:
    return isinstance(value, (str, int, float, bool, type(None)))
