"""The user's own step on the probe batches: what candidates are held against."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from bigdl.nano.pytorch.guard import Difference, compare, roughened
from bigdl.nano.pytorch.plan import streams
from bigdl.nano.pytorch.plan.rehearsal import Stage, dtypes

if TYPE_CHECKING:
    from bigdl.nano.pytorch.guard import Seen
    from bigdl.nano.pytorch.plan.rehearsal import Rehearsal

__all__ = ["Original"]


class Original:
    """The user's own step on the probe batches: what candidates are held against.

    Args:
        rehearsal: The step.
        is_long: Steps are too long to take more of them than must be: one batch is looked at.
    """

    def __init__(self, rehearsal: Rehearsal, *, is_long: bool) -> None:
        batch = rehearsal.batches[0]
        #: Where the random streams stand at the start of each look.
        self.start = streams.read()
        with Stage(rehearsal, []) as stage:
            self.seen: list[Seen] = [stage.look(batch, self.start)]
            self.types = dtypes(stage.cast.module)
            self.gradients = _by_optimizer(stage, self.seen[0])
        #: The step does not write into its batch, so that one copy serves many steps.
        self.is_pure = not is_long and _writes_not(rehearsal)
        self.noise = self._noise(rehearsal, batch, self.seen[0])
        for more in () if is_long else rehearsal.batches[1:2]:
            with Stage(rehearsal, []) as stage:
                self.seen.append(stage.look(more, self.start))
            noise = self._noise(rehearsal, more, self.seen[-1])
            if noise is not None and self.noise is not None:
                self.noise = self.noise.worse(noise)

    def _noise(self, rehearsal: Rehearsal, batch: Any, seen: Seen) -> Difference | None:
        """How far the step strays by itself when it is rounded as coarsely as in bf16."""
        noisy = rehearsal.noisy(batch)
        with Stage(rehearsal, []) as stage, roughened(stage.cast.module):
            difference = compare(seen, stage.look(batch if noisy is None else noisy, self.start))
        return None if noisy is None and difference.is_equal else difference


def _by_optimizer(stage: Stage, seen: Seen) -> list[Any] | None:
    """The gradients of one call of each optimizer, if each was called."""
    calls = dict(zip(seen.callers, seen.vectors, strict=True))
    places = range(len(stage.cast.optimizers))
    return [calls[place] for place in places] if calls.keys() == set(places) else None


def _writes_not(rehearsal: Rehearsal) -> bool:
    batch = copy.deepcopy(rehearsal.batches[0])
    with Stage(rehearsal, []) as stage:
        stage.seconds([batch])
    before, after = pytree.tree_leaves(rehearsal.batches[0]), pytree.tree_leaves(batch)
    if len(before) != len(after):
        return False
    return all(
        isinstance(a, torch.Tensor)
        and isinstance(b, torch.Tensor)
        and a.layout is torch.strided
        and torch.equal(a, b)
        if isinstance(a, torch.Tensor)
        else type(a) in (int, float, str, bool, type(None)) and a == b
        for a, b in zip(before, after, strict=True)
    )
