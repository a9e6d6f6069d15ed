"""Arguments are checked where they are written: what torchvision would only trip over later.

What torchvision refuses itself, it goes on refusing in its own words; what works there is never
refused here.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import numbers
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from torchvision.transforms.functional import InterpolationMode

from bigdl._base.errors import ArgumentError, ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "checked",
    "choice",
    "function",
    "interpolation",
    "path",
    "probability",
    "side",
    "size",
    "transforms",
    "values",
]

_Class = TypeVar("_Class", bound=type)


def checked(**checks: Callable[[str, Any], None]) -> Callable[[_Class], _Class]:
    """Let the decorated class check its arguments before it is built; the signature stays.

    Args:
        checks: For a parameter, the function that looks at what was given. It gets the words
            "Class(parameter=…)" and the value.
    """

    def decorate(cls: _Class) -> _Class:
        build: Callable[..., None] = cls.__init__  # type: ignore[misc]
        signature = inspect.signature(build)

        @functools.wraps(build)
        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
            given = bind(cls.__name__, signature, self, *args, **kwargs)
            for name, check in checks.items():
                if name in given:
                    check(f"{cls.__name__}({name}={given[name]!r})", given[name])
            build(self, *args, **kwargs)

        cls.__init__ = __init__  # type: ignore[misc]
        return cls

    return decorate


def bind(name: str, signature: inspect.Signature, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """The arguments of a call by name, or an error that names the nearest right one."""
    known = [parameter for parameter in signature.parameters if parameter != "self"]
    for word in kwargs:
        if word not in known:
            near = difflib.get_close_matches(word, known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ArgumentError(f"{name}() has no argument {word!r}; it has {known}.{hint}")
    try:
        return dict(signature.bind(*args, **kwargs).arguments)
    except TypeError as exc:
        raise ArgumentError(f"{name}(): {exc}. Its arguments are {known}.") from exc


def probability(call: str, value: Any) -> None:
    """A number from 0 to 1."""
    if not isinstance(value, numbers.Real) and not hasattr(value, "__float__"):
        raise ArgumentError(f"{call}: a probability is a number, not a {type(value).__name__}.")
    if not 0 <= float(value) <= 1:
        raise ConfigError(f"{call}: a probability lies between 0 and 1.")


def side(call: str, value: Any) -> None:
    """A length in pixels, or None."""
    if value is None:
        return
    if not isinstance(value, numbers.Number):
        raise ArgumentError(f"{call}: a length in pixels is an int, not {type(value).__name__}.")
    if not int(value) > 0:  # type: ignore[call-overload]
        raise ConfigError(f"{call}: a length in pixels is at least 1.")


def size(call: str, value: Any) -> None:
    """A length in pixels, or a sequence of one or two of them."""
    if isinstance(value, numbers.Number):
        side(call, value)
        return
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ArgumentError(
            f"{call}: a size is an int or a sequence of one or two ints, "
            f"not {type(value).__name__}."
        )
    if len(value) not in (1, 2):
        raise ConfigError(f"{call}: a size has one or two values, this one has {len(value)}.")
    for one in value:
        if one is None:
            raise ArgumentError(f"{call}: a length in pixels is an int, not NoneType.")
        side(call, one)


def interpolation(call: str, value: Any) -> None:
    """An ``InterpolationMode``, or Pillow's number for one."""
    if isinstance(value, InterpolationMode):
        return
    known = [f"InterpolationMode.{mode.name}" for mode in InterpolationMode]
    if not isinstance(value, int):
        wish = str(value).upper().replace("-", "_")
        near = difflib.get_close_matches(f"InterpolationMode.{wish}", known, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ArgumentError(
            f"{call}: an interpolation is one of {known}, not a {type(value).__name__}.{hint}"
        )
    if value not in range(6):
        raise ConfigError(f"{call}: Pillow's numbers for interpolations are 0 to 5.")


def values(call: str, value: Any) -> None:
    """A number, or a sequence of numbers."""
    for one in value if hasattr(value, "__iter__") and not isinstance(value, str) else [value]:
        if not isinstance(one, numbers.Real) and not hasattr(one, "__float__"):
            raise ArgumentError(f"{call}: needs numbers, one a channel, not {one!r}.")


def path(call: str, value: Any) -> None:
    """The path of a folder."""
    if not isinstance(value, (str, os.PathLike)):
        raise ArgumentError(f"{call}: a folder is a str or a Path, not {type(value).__name__}.")


def function(call: str, value: Any) -> None:
    """Something that can be called, or None."""
    if value is not None and not callable(value):
        raise ArgumentError(f"{call}: a {type(value).__name__} cannot be called.")


def choice(*allowed: str) -> Callable[[str, Any], None]:
    """One of some words."""

    def check(call: str, value: Any) -> None:
        if not isinstance(value, str):
            raise ArgumentError(f"{call}: must be one of {list(allowed)}.")
        if value in allowed:
            return
        near = difflib.get_close_matches(str(value), allowed, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"{call}: must be one of {list(allowed)}.{hint}")

    return check


def transforms(call: str, value: Any) -> None:
    """A sequence of callables."""
    if isinstance(value, str) or not hasattr(value, "__iter__"):
        raise ArgumentError(f"{call}: transforms are a list of callables.")
    if not hasattr(value, "__len__"):  # an iterator is left for torchvision to walk, once
        return
    for at, transform in enumerate(value):
        if not callable(transform):
            raise ArgumentError(
                f"{call}: entry {at} is a {type(transform).__name__}, which cannot be called."
            )
