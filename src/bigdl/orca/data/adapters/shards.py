"""Shards as data: ``{"x": …, "y": …}`` of arrays, or frames. They stay with their engine.

Each shard is read, in a worker, as the adapter of its kind reads a whole one; what differs
between shards is settled here, from notes that the workers send.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from bigdl._base import trees
from bigdl._base.errors import ConfigError, ContextError, DataError
from bigdl._base.trees import Tree, map_leaves, slice_rows
from bigdl.orca.context import current_engine
from bigdl.orca.data import rows
from bigdl.orca.data.adapters import adapt
from bigdl.orca.data.agreement import Note, agreed, cast
from bigdl.orca.data.columns import NullsFound
from bigdl.orca.data.contract import DEFAULT_BATCH_SIZE, OutputSchema, Schema, part
from bigdl.orca.data.memory import InMemory, Shaping, as_numpy
from bigdl.orca.data.outputs import named_outputs
from bigdl.orca.data.plan import Kept, Plan, noted
from bigdl.orca.data.windows import WINDOW_BYTES, WindowReader
from bigdl.orca.data.xshards import XShards, opened

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from bigdl.orca.data.contract import Request, Run
    from bigdl.orca.engines.base import Engine, Ref

__all__ = ["ShardRows", "ShardsToPredict", "adapt_shards"]

_X, _Y = "x", "y"


def adapt_shards(shards: XShards, request: Request) -> ShardRows | ShardsToPredict:
    """A recipe of shards, which are made now and stay with their engine.

    Raises:
        ContextError: They are of another context than the running one.
        ConfigError: Arguments that they do not take, or need.
        DataError: No rows, nulls without ``fill``, values that are not numbers, shards that do
            not fit each other.
    """
    engine, plan = opened(shards)
    if engine is not current_engine():
        raise ContextError(
            "These shards are of an Orca context that is not the running one. Make them again "
            "after init_orca_context()."
        )
    if not request.has_labels:
        return ShardsToPredict(engine=engine, plan=plan, request=request)
    refs, notes = noted(engine, plan, _Arrays(request))
    schema = agreed(notes, request)
    blocks = _blocks(engine, refs, notes, schema.row_bytes)
    return ShardRows(
        refs=tuple(ref for ref, _ in blocks),
        counts=tuple(count for _, count in blocks),
        schema=schema,
        shaping=Shaping(
            has_labels=True,
            transform=request.transform,
            target_transform=request.target_transform,
        ),
    )


@dataclass(frozen=True, kw_only=True)
class ShardRows:
    """A recipe that names arrays which an engine keeps.

    Args:
        refs: Of blocks, in order: each a nest of arrays.
        counts: Rows of each.
        schema: What batches are.
        shaping: What is done to each batch.
        window_bytes: Bytes of the blocks that are in memory, and shuffled, together.
    """

    refs: tuple[Ref, ...]
    counts: tuple[int, ...]
    schema: Schema
    shaping: Shaping
    window_bytes: int = WINDOW_BYTES

    @property
    def rows(self) -> int:
        return sum(self.counts)

    def open(self, rank: int, world: int) -> WindowReader:
        row_bytes = max(1, self.schema.row_bytes)
        blocks = [(i, 0, count, count * row_bytes) for i, count in enumerate(self.counts)]
        return WindowReader(
            rank,
            world,
            blocks=np.array(blocks, np.int64),
            window_bytes=self.window_bytes,
            shaping=self.shaping,
            read=self._rows_of,
        )

    def _rows_of(self, blocks: np.ndarray) -> Iterator[Tree]:
        wanted = self.schema.features, self.schema.labels
        for number in blocks[:, 0]:
            yield cast(self.refs[int(number)].get(), wanted)

    def map_batches(
        self,
        fn: Callable[[Tree], Tree],
        schema: OutputSchema | None = None,
        *,
        size: int = DEFAULT_BATCH_SIZE,
        shares: int = 1,
        run: Run = map,
    ) -> Any:
        """Shards with labels are for training.

        Raises:
            DataError: Always.
        """
        raise DataError("These shards were opened for training; open them for predict().")


@dataclass(frozen=True, kw_only=True)
class ShardsToPredict:
    """Shards that predictions are added to, where they lie.

    Args:
        engine: Whose they are.
        plan: How they come about.
        request: What the call says about them.
    """

    engine: Engine
    plan: Plan
    request: Request

    @property
    def rows(self) -> int | None:
        return None

    @property
    def schema(self) -> Schema | None:
        return None

    def open(self, rank: int, world: int) -> WindowReader:
        """Predictions need no ranks.

        Raises:
            DataError: Always.
        """
        raise DataError("These shards were opened for predict(); open them for training.")

    def map_batches(
        self,
        fn: Callable[[Tree], Tree],
        schema: OutputSchema | None = None,
        *,
        size: int = DEFAULT_BATCH_SIZE,
        shares: int = 1,
        run: Run = map,
    ) -> XShards:
        """The same shards with the outputs added. Their own engine does it, and it is done now.

        Raises:
            ConfigError: A name is taken, or there are more or fewer names than outputs.
            DataError: As for ``adapt_shards``.
        """
        engine, schema = self.engine, OutputSchema() if schema is None else schema
        refs, notes = noted(engine, self.plan, _Looking(self.request))
        features = agreed(notes, self.request).features
        step = _Predicting(self.request, fn, schema, size, features)
        made, samples = noted(engine, Kept(refs, "shards"), step)
        known = [sample for sample in samples if sample is not None]
        empty = [i for i, sample in enumerate(samples) if sample is None]
        if known and empty:  # those without rows look as the others do
            step = replace(step, schema=replace(schema, sample=known[0]))
            again, _ = noted(engine, Kept([refs[i] for i in empty], "shards"), step)
            for i, ref in zip(empty, again, strict=True):
                made[i] = ref
        return XShards(engine, Kept(made, "predict"))


# --- blocks, and what makes them in the workers --------------------------------------------------


def _blocks(
    engine: Engine, refs: Sequence[Ref], notes: Sequence[Note], row_bytes: int
) -> list[tuple[Ref, int]]:
    """Blocks with their rows: shards without rows are left out, very large ones are cut."""
    found: list[tuple[Ref, int]] = []
    for ref, note in zip(refs, notes, strict=True):
        parts = math.ceil(note.rows * row_bytes / WINDOW_BYTES)
        if parts > 1:
            parts = min(parts * 4, note.rows)
            [pieces] = engine.split(_Cut(parts), [ref], parts)
            spans = [part(note.rows, i, parts) for i in range(parts)]
            found += [
                (one, last - first) for one, (first, last) in zip(pieces, spans, strict=True)
            ]
        elif note.rows:
            found.append((ref, note.rows))
    return found


@dataclass(frozen=True)
class _Cut:
    parts: int

    def __call__(self, data: Tree) -> list[Tree]:
        total = rows.count(data)
        return [slice_rows(data, *part(total, i, self.parts)) for i in range(self.parts)]


@dataclass(frozen=True)
class _Arrays:
    """A shard's arrays, and a note."""

    request: Request

    def __call__(self, shard: Any) -> list[Any]:
        recipe, note = _read(shard, self.request)
        return [None if recipe is None else recipe.data, note]


@dataclass(frozen=True)
class _Looking:
    """The shard, and a note."""

    request: Request

    def __call__(self, shard: Any) -> list[Any]:
        return [shard, _read(shard, self.request)[1]]


@dataclass(frozen=True)
class _Predicting:
    """The shard with outputs, and outputs of no rows, to see what they are like."""

    request: Request
    fn: Callable[[Tree], Tree]
    schema: OutputSchema
    size: int
    features: Tree

    def __call__(self, shard: Any) -> list[Any]:
        seen: list[Tree] = []

        def watched(features: Tree) -> Tree:
            outputs = self.fn(features)
            if not seen:
                seen.append(map_leaves(lambda leaf: as_numpy(leaf)[:0].copy(), outputs))
            return outputs

        recipe, note = _read(shard, self.request)
        assert recipe is not None  # what has nulls was refused before
        if note.rows:
            recipe = replace(recipe, data=cast(recipe.data, self.features))
        outputs = recipe.map_batches(watched, self.schema, size=self.size)
        if isinstance(shard, dict):
            outputs = self._beside(shard, self.schema.sample if outputs is None else outputs)
        return [outputs, seen[0] if seen else None]

    def _beside(self, shard: dict[str, Any], outputs: Tree) -> dict[str, Any]:
        names = self.schema.names
        if isinstance(names, str) and outputs is not None:
            added = {names: outputs}
        else:
            added = dict(named_outputs(outputs, self.schema, ()))
        taken = [name for name in added if name in shard]
        if taken:
            raise ConfigError(
                f"The shards have {taken[0]!r} already. Choose another name for the prediction: "
                "output_cols=…."
            )
        return {**shard, **added}


def _read(shard: Any, request: Request) -> tuple[InMemory | None, Note]:
    """A shard as the adapter of its kind reads it; none if it has nulls."""
    kind, data, total = _parts_of(shard, request)
    if total == 0 and request.has_labels:
        return None, Note(kind, 0, None, {})
    try:
        recipe: Any = adapt(data, request)
    except NullsFound as exc:
        return None, Note(kind, total, None, exc.counts)
    return recipe, Note(kind, total, recipe.schema, {})


def _parts_of(shard: Any, request: Request) -> tuple[str, Any, int]:
    """Frames or arrays, what their adapter takes, and its rows."""
    if rows.is_pandas(shard) and shard.ndim == 2:
        return "frames", shard, len(shard)
    needed = [_X, _Y] if request.has_labels else [_X]
    if isinstance(shard, dict) and all(name in shard for name in needed):
        parts = {name: shard[name] for name in needed}
        data = tuple(parts.values()) if request.has_labels else shard[_X]
        return "dicts of arrays", data, trees.rows(parts, "shard")
    found = f"a {type(shard).__name__}"
    if isinstance(shard, dict):
        found += f" with {', '.join(map(repr, shard)) or 'nothing'}"
    wanted = '{"x": features, "y": labels}' if request.has_labels else '{"x": features}'
    raise DataError(
        f"{request.call}() needs shards that are frames or {wanted}, and got {found}. "
        "transform_shard(lambda shard: {…}) makes them."
    )
