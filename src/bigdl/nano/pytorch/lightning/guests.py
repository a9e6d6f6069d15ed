"""Modules and callbacks of the other Lightning package, at home in this one for a call.

``lightning`` and ``pytorch_lightning`` hold the same code twice, as different classes; each
refuses the other's objects. Where both are installed, an object of the package that our Trainer
is not built on gets, while a call lasts, a class that is both: what its own classes define stays,
all else is the host's.
"""

from __future__ import annotations

import functools
import importlib
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from bigdl._base.errors import ArgumentError
from bigdl.nano.pytorch.lightning.host import pl

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

__all__ = ["at_home", "receiving"]

_OTHER = "lightning.pytorch" if pl.__name__ == "pytorch_lightning" else "pytorch_lightning"
#: What makes a class that class and is never taken from another.
_OWN = {"__dict__", "__weakref__", "__module__", "__qualname__", "__doc__", "__annotations__"}


@contextmanager
def at_home(objects: Iterable[Any]) -> Iterator[None]:
    """In the block, guests among ``objects`` (modules with their submodules) pass as ours."""
    changed = []
    if _OTHER in sys.modules:
        for one in objects:
            for part in one.modules() if isinstance(one, torch.nn.Module) else (one,):
                kind = type(part)
                both = _both(kind)  # type: ignore[arg-type]
                if both is not None:
                    part.__class__ = both
                    changed.append((part, kind))
    try:
        yield
    finally:
        for part, kind in reversed(changed):
            part.__class__ = kind


@functools.cache
def _both(kind: type) -> type | None:
    """A class that is ``kind`` and our package's counterpart of its base; None if no guest."""
    mro = kind.__mro__
    guest = next((one for one in mro if _is_of(one, _OTHER)), None)
    if guest is None or any(_is_of(one, pl.__name__) for one in mro):
        return None
    host = _counterpart(guest)
    if host is None:
        return None
    written = {name for one in mro[: mro.index(guest)] for name in vars(one)}
    ours: dict[str, Any] = {}
    for base in reversed(host.__mro__):
        if _is_of(base, pl.__name__) or _is_of(base, "lightning_fabric"):
            ours.update(vars(base))
    namespace = {k: v for k, v in ours.items() if k not in written and k not in _OWN}
    both = type(kind.__name__, (kind, host), namespace)
    both.__module__, both.__qualname__ = kind.__module__, kind.__qualname__
    return both


def _is_of(kind: type, package: str) -> bool:
    return f"{kind.__module__}.".startswith(f"{package}.")


def _counterpart(guest: type) -> type | None:
    """The class of the same name and place in our package."""
    module = pl.__name__ + guest.__module__.removeprefix(_OTHER)
    try:
        found = getattr(importlib.import_module(module), guest.__name__, None)
    except ModuleNotFoundError:
        return None
    return found if isinstance(found, type) else None


def _refuse_plain(model: Any, call: str) -> None:
    """A plain module has no steps, and there is a way to give it some.

    Raises:
        ArgumentError: ``model`` is one.
    """
    has_steps = any(hasattr(model, name) for name in ("training_step", "_orig_mod"))
    if isinstance(model, torch.nn.Module) and not has_steps:
        raise ArgumentError(
            f"Trainer.{call}(model) takes a LightningModule, not a plain {type(model).__name__}. "
            "Trainer.compile(model, loss=…, optimizer=…) makes one of it."
        )


def receiving(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of the trainer during which guests are at home."""

    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        _refuse_plain(args[0] if args else kwargs.get("model"), method.__name__)
        with at_home([*args, *kwargs.values(), *self.callbacks]):
            return method(self, *args, **kwargs)

    return call
