"""Runs transforms one after another; ours on ``Picture``s, everybody else's on what they expect.

The table below says how a transform of ours acts on a picture. It is looked up by exact type: a
subclass may have changed anything, so it is called like any other function, with a PIL image.
The random numbers are drawn by torchvision's own ``get_params`` or in its words, from the same
generators in the same order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import torch
from PIL import Image

from bigdl.nano.pytorch.vision.picture import Picture

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = ["on_own_tensor", "on_picture", "run", "run_to_end", "starts_fast"]

_Function = TypeVar("_Function", bound="Callable[..., Any]")

_ON_PICTURE: dict[type, Callable[[Any, Picture], Any]] = {}
_ON_OWN_TENSOR: dict[type, Callable[[Any, torch.Tensor], torch.Tensor]] = {}


def on_picture(kind: type) -> Callable[[_Function], _Function]:
    """Enter the decorated function into the table: how transforms of ``kind`` act on pictures."""

    def enter(function: _Function) -> _Function:
        _ON_PICTURE[kind] = function
        return function

    return enter


def on_own_tensor(kind: type) -> Callable[[_Function], _Function]:
    """Enter how transforms of ``kind`` act on a tensor that nobody else holds: in place."""

    def enter(function: _Function) -> _Function:
        _ON_OWN_TENSOR[kind] = function
        return function

    return enter


def run(transforms: Iterable[Any], value: Any) -> Any:
    """Apply ``transforms`` in order. The result may be a ``Picture``."""
    is_ours = False  # whether ``value`` was made here and nobody else has seen it
    for transform in transforms:
        changed = _is_changed(transform)
        act = None if changed else _ON_PICTURE.get(type(transform))
        if act is not None and (type(value) is Picture or _is_rgb_image(value)):
            value = act(transform, value if type(value) is Picture else Picture.of(value))
            is_ours = type(value) is torch.Tensor
            continue
        in_place = None if changed or not is_ours else _ON_OWN_TENSOR.get(type(transform))
        if in_place is not None:
            value = in_place(transform, value)
            continue
        value = transform(value.image() if type(value) is Picture else value)
        is_ours = False
    return value


def starts_fast(transform: Any) -> bool:
    """Whether ``transform``, alone, takes pictures."""
    return type(transform) in _ON_PICTURE and not _is_changed(transform)


def run_to_end(transforms: Iterable[Any], value: Any) -> Any:
    """Apply ``transforms`` in order, and give a PIL image where the result is a picture."""
    value = run(transforms, value)
    return value.image() if type(value) is Picture else value


def _is_rgb_image(value: Any) -> bool:
    return isinstance(value, Image.Image) and value.mode == "RGB"


def _is_changed(transform: Any) -> bool:
    """Whether somebody hooked into this very object, so that it has to be called as it is."""
    if not isinstance(transform, torch.nn.Module):
        return False
    own = transform.__dict__
    return bool(own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own)
