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
    from bigdl.orca.engines.base import Engine, Ref
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
    workers: int | None = None,
) -> Any:
    """The caller's kind of data with the model's outputs, rows aligned with the input.

    Args:
        engine: Where.
        program: Whose model; optimizer and loss are not looked at.
        data: What is predicted for.
        size: Most rows in a call of the model.
        names: Of the column, or columns, that tables get.
        options: Precision and accelerator are looked at.
        state: Of the replicas; None = as the program has it.
        workers: Pieces of work that run at the same time; None = as many as there are slots.
    """
    many = min(workers or engine.slots(), engine.slots())
    recipe = _Recipe(program=program, state=state, options=options or Options())
    # kept by the engine, so that weights travel once to a worker and not with each piece
    model = _Model(engine.scatter([recipe])[0])

    def run(fn: Callable[[Any], Any], shares: Iterable[Any]) -> Iterator[Any]:
        pieces = engine.scatter(list(shares))
        refs = engine.map(fn, pieces if workers is None else pieces[:many])
        pieces = pieces[len(refs) :]
        while refs:
            yield refs.pop(0).get()  # what has been read is let go
            if pieces:
                refs += engine.map(fn, [pieces.pop(0)])

    return data.map_batches(
        model, OutputSchema(names=names), size=size, shares=_SHARES_A_SLOT * many, run=run
    )


@dataclass(frozen=True, kw_only=True)
class _Recipe:
    program: Program
    state: State | None
    options: Options

    def build(self) -> Replica:
        place = ReplicaContext(collective=Alone(), options=self.options, trains=False)
        replica = self.program.build(place)
        if self.state is not None:
            replica.load(self.state)
        return replica


@dataclass(frozen=True)
class _Model:
    """From features to outputs, in any process."""

    recipe: Ref
    name: str = field(default_factory=lambda: secrets.token_hex(8))

    def __call__(self, features: Tree) -> Tree:
        replica = _built.get(self.name)
        if replica is None:
            _built.clear()  # one at a time: they may be large
            replica = _built[self.name] = self.recipe.get().build()
        return replica.predict(features)


_built: dict[str, Replica] = {}
