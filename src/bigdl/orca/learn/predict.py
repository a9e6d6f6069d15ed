"""The one path of prediction: batches are mapped, wherever there is a slot; no gang is needed.

Names no framework and no cluster. Each worker builds the model once a call and keeps it for the
pieces of work that follow.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from bigdl._base.collective.alone import Alone
from bigdl.orca.data.contract import OutputSchema
from bigdl.orca.learn.program import Options, ReplicaContext

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from bigdl._base.trees import Tree
    from bigdl.orca.data.contract import Sharded
    from bigdl.orca.engines.base import Engine
    from bigdl.orca.learn.program import Program, Replica, State

__all__ = ["predict"]

#: Pieces of work for each slot: a slow one does not keep the others waiting for long.
_SHARES_A_SLOT = 4


def predict(
    engine: Engine,
    program: Program,
    data: Sharded,
    *,
    size: int,
    names: str | Sequence[str] = "prediction",
    options: Options | None = None,
    state: State | None = None,
) -> Any:
    """The caller's kind of data with the model's outputs, rows aligned with the input.

    Args:
        engine: Where.
        program: Whose model; optimizer and loss are not looked at.
        data: What is predicted for.
        size: Most rows in a call of the model.
        names: Of the column, or columns, that tables get.
        options: Precision is looked at.
        state: Of the replicas; None = as the program has it.
    """
    model = _Model(program=program, state=state, options=options or Options())

    def run(fn: Callable[[Any], Any], shares: Iterable[Any]) -> Iterator[Any]:
        refs = engine.map(fn, engine.scatter(list(shares)))
        while refs:
            yield refs.pop(0).get()  # what has been read is let go

    return data.map_batches(
        model,
        OutputSchema(names=names),
        size=size,
        shares=_SHARES_A_SLOT * engine.slots(),
        run=run,
    )


@dataclass(frozen=True, kw_only=True)
class _Model:
    """From features to outputs, in any process."""

    program: Program
    state: State | None
    options: Options
    name: str = field(default_factory=lambda: secrets.token_hex(8))

    def __call__(self, features: Tree) -> Tree:
        replica = _built.get(self.name)
        if replica is None:
            _built.clear()  # one at a time: they may be large
            replica = self.program.build(ReplicaContext(collective=Alone(), options=self.options))
            if self.state is not None:
                replica.load(self.state)
            _built[self.name] = replica
        return replica.predict(features)


_built: dict[str, Replica] = {}
