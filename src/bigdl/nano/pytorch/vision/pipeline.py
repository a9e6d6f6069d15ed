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

from bigdl.nano.pytorch.vision.picture import Floats, Picture

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = ["acts_on", "run", "run_to_end", "starts_fast"]

_Function = TypeVar("_Function", bound="Callable[..., Any]")

_ACTIONS: dict[tuple[type, type], Callable[[Any, Any], Any]] = {}


def acts_on(carrier: type, transform: type) -> Callable[[_Function], _Function]:
    """Enter the decorated function: what ``transform(…)`` makes of a ``carrier``."""

    def enter(function: _Function) -> _Function:
        _ACTIONS[carrier, transform] = function
        return function

    return enter


def run(transforms: Iterable[Any], value: Any) -> Any:
    """Apply ``transforms`` in order. The result may be a carrier: ``Picture`` or ``Floats``."""
    for transform in transforms:
        is_image = _is_rgb_image(value)
        act = _ACTIONS.get((Picture if is_image else type(value), type(transform)))
        if act is None or _is_changed(transform):
            value = transform(_settle(value))
        else:
            value = act(transform, Picture.of(value) if is_image else value)
    return value


def run_to_end(transforms: Iterable[Any], value: Any) -> Any:
    """Apply ``transforms`` in order, and give what torchvision's give: an image, a tensor, …"""
    return _settle(run(transforms, value))


def starts_fast(transform: Any) -> bool:
    """Whether ``transform`` is one of ours that takes pictures."""
    return (Picture, type(transform)) in _ACTIONS and not _is_changed(transform)


def _settle(value: Any) -> Any:
    if type(value) is Picture:
        return value.image()
    return value.tensor() if type(value) is Floats else value


def _is_rgb_image(value: Any) -> bool:
    return isinstance(value, Image.Image) and value.mode == "RGB"


def _is_changed(transform: Any) -> bool:
    """Whether somebody hooked into this very object, so that it has to be called as it is."""
    if not isinstance(transform, torch.nn.Module):
        return False
    own = transform.__dict__
    return bool(own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own)
