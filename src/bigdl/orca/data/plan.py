"""What shards are made of, as a plan that any engine can run. Nothing runs until it is asked for.

Names no engine and no kind of data. A plan is a graph: what two of its parts share is made once
a run, and steps on single shards that follow one another are one call of the engine. Data stay
with the engine; this process sees them only where ``values`` gives them.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from bigdl._base.errors import DataError
from bigdl.orca.data import rows, worker_values
from bigdl.orca.data.contract import part
from bigdl.orca.data.progress import ShardProgress

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from bigdl.orca.engines.base import Engine, Ref

__all__ = [
    "Even",
    "Given",
    "Kept",
    "Mapped",
    "Plan",
    "Run",
    "Whole",
    "Zipped",
    "evenly",
    "kept",
    "noted",
    "values",
]

#: From one shard to another.
Step: TypeAlias = "Callable[[Any], Any]"


class Plan:
    """How shards come about.

    Args:
        shards: How many there are; known without running anything.
        label: What is done, in a word or two.
        parents: What it is done to.
    """

    def __init__(self, shards: int, label: str, parents: Sequence[Plan] = ()) -> None:
        self.shards = shards
        self.label = label
        self.parents = tuple(parents)
        self.is_cached = False
        self._kept: list[Ref] | None = None
        self._is_sound = False  # all that is kept is known to be there
        self._making = threading.RLock()

    def make(self, run: Run) -> list[Ref]:
        """Begin the work; a ref for each shard. Called once a run."""
        raise NotImplementedError(f"{type(self).__name__} has to define make().")

    def cache(self) -> None:
        """Keep the shards once they are made."""
        self.is_cached = True

    def uncache(self) -> None:
        """Let them go."""
        with self._making:
            self.is_cached, self._is_sound, self._kept = False, False, None

    def failed(self) -> None:
        """A run failed: what it kept may be what failed, and is made anew next time."""
        if not self._is_sound:
            self._kept = None

    def succeeded(self) -> None:
        """A run has read all that came from here."""
        self._is_sound = self.is_kept

    @property
    def is_kept(self) -> bool:
        """Whether the shards are there already, or being made."""
        return self._kept is not None

    def around(self) -> list[Plan]:
        """This plan and all that it comes from, each once; what is kept hides its origin."""
        found: dict[int, Plan] = {}
        waiting: list[Plan] = [self]
        while waiting:
            plan = waiting.pop()
            if id(plan) not in found:
                found[id(plan)] = plan
                waiting += () if plan.is_kept else plan.parents
        return list(found.values())

    def describe(self) -> str:
        """Its steps, from the beginning: "partition → negative → merge(partition)"."""
        own = self.label + (", cached" if self.is_cached else "")
        if not self.parents:
            return own
        first, *others = self.parents
        beside = f"({', '.join(other.describe() for other in others)})" if others else ""
        return f"{first.describe()} → {self.label}{beside}{', cached' if self.is_cached else ''}"


class Run:
    """One run of a plan on an engine.

    Args:
        engine: Where.
        plan: What.
    """

    def __init__(self, engine: Engine, plan: Plan) -> None:
        self.engine = engine
        self._made: dict[int, list[Ref]] = {}
        self._uses: dict[int, int] = {}
        for one in plan.around():
            for parent in one.parents:
                self._uses[id(parent)] = self._uses.get(id(parent), 0) + 1

    def refs(self, plan: Plan) -> list[Ref]:
        """The shards of a part of the plan; made now, unless they are there."""
        if id(plan) not in self._made:
            with plan._making:
                refs = plan._kept
                if refs is None:
                    refs = plan.make(self)
                    plan._kept = refs if plan.is_cached else None
            self._made[id(plan)] = refs
        return list(self._made[id(plan)])

    def is_passing(self, plan: Plan) -> bool:
        """Whether nobody but one asks for the shards of ``plan``, which need not be kept."""
        return self._uses.get(id(plan), 0) == 1 and not plan.is_cached and not plan.is_kept

    def gather(self, step: Callable[[Any], Any], refs: Sequence[Ref]) -> list[Any]:
        """Small answers of all shards."""
        return self.engine.gather(self.engine.map(step, refs))


def values(
    engine: Engine, plan: Plan, step: Callable[[Any], Any] | None = None, label: str = ""
) -> list[Any]:
    """The shards of a plan, or ``step`` of each, here and in order.

    When it fails, or is interrupted, what still works for it is ended.
    """
    if step is not None:
        plan = Mapped(plan, step, label)
    with ShardProgress(plan.describe(), plan.shards) as progress:
        return _settled(engine, plan, progress)


def kept(engine: Engine, plan: Plan, label: str) -> Kept:
    """The plan, carried out: its shards are made, and stay with the engine."""
    return Kept(noted(engine, plan, _without_note)[0], label)


def noted(
    engine: Engine, plan: Plan, step: Callable[[Any], list[Any]]
) -> tuple[list[Ref], list[Any]]:
    """Values that are made and stay with the engine, and notes on them, which come here.

    Args:
        engine: Where.
        plan: Whose shards.
        step: From a shard to a value and a note.
    """
    done = _Noted(plan, step)
    with ShardProgress(plan.describe(), plan.shards) as progress:
        notes = _settled(engine, done, progress)
    return done.values, notes


def evenly(shard: Any, shards: int) -> list[Any]:
    """One shard cut into ``shards`` whose rows differ by one at most."""
    total = rows.count(shard)
    return [rows.cut(shard, *part(total, i, shards)) for i in range(shards)]


def _settled(engine: Engine, plan: Plan, progress: ShardProgress) -> list[Any]:
    """Read all shards of a plan, in order."""
    refs: list[Ref] = []
    found = []
    try:
        refs = Run(engine, plan).refs(plan)
        while refs:
            found += engine.gather(refs[:1])
            del refs[0]  # what has been read is let go
            progress.done()
    except BaseException as exc:
        for one in plan.around():
            one.failed()
        refs.clear()
        # frames below would hold refs, and so the work behind them, as long as the error lives
        exc.__traceback__ = None
        raise
    for one in plan.around():
        one.succeeded()
    return found


# --- the parts of a plan ------------------------------------------------------------------------


class Kept(Plan):
    """Shards that the engine has."""

    def __init__(self, refs: Sequence[Ref], label: str) -> None:
        super().__init__(len(refs), label)
        self._refs = list(refs)

    def make(self, run: Run) -> list[Ref]:
        return list(self._refs)


class Given(Plan):
    """Small values of this process, each to become a shard: where a file is, say."""

    def __init__(self, given: Sequence[Any], label: str) -> None:
        super().__init__(len(given), label)
        self._given = list(given)

    def make(self, run: Run) -> list[Ref]:
        return run.engine.scatter(self._given)


class Mapped(Plan):
    """A step on each shard by itself."""

    def __init__(self, parent: Plan, step: Step, label: str) -> None:
        super().__init__(parent.shards, label, [parent])
        self._step = step

    def make(self, run: Run) -> list[Ref]:
        steps = [self._step]
        base = self.parents[0]
        while isinstance(base, Mapped) and run.is_passing(base):
            steps.insert(0, base._step)
            base = base.parents[0]
        return run.engine.map(_Chain(tuple(steps), worker_values.gone()), run.refs(base))


class Zipped(Plan):
    """The shards of several plans side by side, as tuples."""

    def __init__(self, parents: Sequence[Plan]) -> None:
        super().__init__(parents[0].shards, "zip", parents)

    def make(self, run: Run) -> list[Ref]:
        together = zip(*(run.refs(parent) for parent in self.parents), strict=True)
        return run.engine.map(_side_by_side, run.engine.scatter(list(together)))


class Even(Plan):
    """The same rows in the same order, in shards whose rows differ by one at most."""

    def __init__(self, parent: Plan, shards: int) -> None:
        super().__init__(shards, f"repartition({shards})", [parent])

    def make(self, run: Run) -> list[Ref]:
        refs = run.refs(self.parents[0])
        counts = run.gather(rows.count, refs)
        pieces = [
            _pieces(refs, counts, *part(sum(counts), i, self.shards)) for i in range(self.shards)
        ]
        return run.engine.map(_assembled, run.engine.scatter(pieces))


class Whole(Plan):
    """What has to see all shards at once, put together in one worker.

    Args:
        parents: Whose shards.
        work: From the joined shards of each parent to as many shards as there will be.
        shards: How many.
        label: In a word.
    """

    def __init__(
        self, parents: Sequence[Plan], work: Callable[..., list[Any]], shards: int, label: str
    ) -> None:
        super().__init__(shards, label, parents)
        self._work = work

    def make(self, run: Run) -> list[Ref]:
        inputs = run.engine.scatter([[run.refs(parent) for parent in self.parents]])
        return run.engine.split(_Joining(self._work), inputs, self.shards)[0]


class _Noted(Plan):
    """Notes on values that stay with the engine."""

    def __init__(self, plan: Plan, step: Callable[[Any], list[Any]]) -> None:
        super().__init__(plan.shards, plan.label, [plan])
        self._step = step
        self.values: list[Ref] = []

    def make(self, run: Run) -> list[Ref]:
        pairs = run.engine.split(self._step, run.refs(self.parents[0]), 2)
        self.values = [value for value, _ in pairs]
        return [note for _, note in pairs]

    def failed(self) -> None:
        self.values.clear()


# --- in the workers -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Chain:
    """Steps on one shard, one after the other."""

    steps: tuple[Step, ...]
    gone: tuple[str, ...]

    def __call__(self, shard: Any) -> Any:
        worker_values.forget(self.gone)
        for step in self.steps:
            shard = step(shard)
        return shard


@dataclass(frozen=True)
class _Joining:
    work: Callable[..., list[Any]]

    def __call__(self, inputs: list[list[Ref]]) -> list[Any]:
        return self.work(*(rows.join([ref.get() for ref in refs]) for refs in inputs))


def _without_note(shard: Any) -> list[Any]:
    return [shard, None]


def _side_by_side(refs: Sequence[Ref]) -> tuple[Any, ...]:
    shards = tuple(ref.get() for ref in refs)
    found = [rows.count(shard) for shard in shards]
    if len(set(found)) > 1:
        raise DataError(
            f"zip() needs shards of as many rows each, and got {' and '.join(map(str, found))}. "
            "repartition() both first."
        )
    return shards


def _pieces(
    refs: Sequence[Ref], counts: Sequence[int], first: int, last: int
) -> list[tuple[Ref, int, int]]:
    """Which rows of which shards are the rows ``first`` up to ``last``; one piece at least."""
    found, before = [], 0
    for ref, rows_here in zip(refs, counts, strict=True):
        start, stop = max(first - before, 0), min(last - before, rows_here)
        if start < stop:
            found.append((ref, start, stop))
        before += rows_here
    return found or [(refs[0], 0, 0)]


def _assembled(pieces: Sequence[tuple[Ref, int, int]]) -> Any:
    return rows.join([rows.cut(ref.get(), start, stop) for ref, start, stop in pieces])
