"""``get_context``: how inference calls should run, for a block."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["InferenceContext"]


class InferenceContext:
    """No gradients and the models' threads, until the block ends; may be entered again.

    Args:
        models: The models that will be called.
    """

    def __init__(self, models: Iterable[Any]) -> None:
        self._threads = max(
            (getattr(model, "threads", 0) for model in models if _has_threads(model)), default=0
        )
        self._entered: list[tuple[torch.no_grad, int]] = []

    def __enter__(self) -> InferenceContext:
        grad = torch.no_grad()
        grad.__enter__()
        self._entered.append((grad, torch.get_num_threads()))
        if self._threads:
            torch.set_num_threads(self._threads)
        return self

    def __exit__(self, *exc: Any) -> None:
        grad, threads = self._entered.pop()
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        grad.__exit__(*exc)


def _has_threads(model: Any) -> bool:
    from bigdl.nano.pytorch.inference.accelerated import AcceleratedModule

    return isinstance(model, AcceleratedModule)
