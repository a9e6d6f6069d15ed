"""Functions ``(config, batch_size)`` that make a loader or a dataset, called in the worker."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from bigdl._base.errors import DataError
from bigdl.orca.data.adapters import adapt, kind_of
from bigdl.orca.data.contract import DEFAULT_BATCH_SIZE, OutputSchema, Request, Run
from bigdl.orca.data.memory import mapped_by_rank

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from bigdl._base.trees import Tree
    from bigdl.orca.data.contract import Reader, Schema

__all__ = ["Created", "adapt_creator"]


@dataclass(frozen=True, kw_only=True)
class Created:
    """A recipe that calls the user's function.

    Args:
        creator: From ``(config, batch_size)`` to data of another kind, in each worker the same.
        request: What the call says about the data.
    """

    creator: Callable[[Mapping[str, Any], int], Any]
    request: Request

    @property
    def rows(self) -> int | None:
        return None

    @property
    def schema(self) -> Schema | None:
        return None

    def open(self, rank: int, world: int) -> Reader:
        """Call the creator and open what it made.

        Raises:
            ArgumentError: It made something that holds no data.
            DataError: It made another function.
        """
        request = self.request
        made = self.creator(dict(request.config or {}), request.batch_size or DEFAULT_BATCH_SIZE)
        kind = kind_of(made)
        if kind == "creator" or made is None:
            raise DataError(
                f"The data creator gave {made!r}; need a DataLoader, a Dataset or other data."
            )
        if kind == "dataloader":  # the creator has used the one and decides the other
            request = replace(request, batch_size=None, shuffle=None)
        return adapt(made, request).open(rank, world)

    def map_batches(
        self,
        fn: Callable[[Tree], Tree],
        schema: OutputSchema | None = None,
        *,
        size: int = DEFAULT_BATCH_SIZE,
        shares: int = 1,
        run: Run = map,
    ) -> Tree:
        """``fn``'s outputs for all batches in order, as NumPy arrays; None without rows."""
        return mapped_by_rank(self, fn, size=size, shares=shares, run=run)


def adapt_creator(creator: Callable[..., Any], request: Request) -> Created:
    """A recipe that calls ``creator(config, batch_size)`` in the worker."""
    return Created(creator=creator, request=request)
