"""``XShards``: Python objects in shards, which stay with an engine and are worked on in parallel.

Loads no framework and no pandas. A call adds to the plan in ``plan.py``; an engine carries it out
when values are asked for.
"""

from __future__ import annotations

import importlib
import numbers
import secrets
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from bigdl._base.calls import Gone, Renamed, answers, shown
from bigdl._base.errors import ArgumentError, ConfigError, ContextError, DataError
from bigdl._base.optional import need
from bigdl._base.registry import nearest
from bigdl.orca.context import current_engine
from bigdl.orca.data import rows, steps, storing
from bigdl.orca.data.contract import part
from bigdl.orca.data.plan import Even, Kept, Mapped, Plan, Whole, Zipped, kept, values
from bigdl.orca.data.worker_values import PerWorker

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Mapping, Sequence
    from os import PathLike

    from bigdl.orca.engines.base import Engine

__all__ = ["XShards", "opened"]

_HOW = ("inner", "left", "right", "outer")


class XShards:
    """Data in shards: any picklable object each, in order, on the workers of an Orca context.

    Made by ``partition``, by the readers of ``bigdl.orca.data.pandas``, or by ``load_pickle``.
    Methods that return shards only plan; work runs at ``collect()``, ``len()``, ``save_pickle()``
    and what else returns values. Shards use the context that they were made in.

    Rows are those of a frame or an array; of a nest of arrays; else a list's items.
    """

    def __init__(self, engine: Engine, plan: Plan) -> None:
        self._engine = engine
        self._plan = plan

    # --- to and from this process ---

    @staticmethod
    @answers({})
    def partition(data: Any, num_shards: int | None = None) -> XShards:
        """Cut ``data`` into shards of the same kind, whose rows differ by one at most.

        Args:
            data: An array; a nest (tuple, list, dict) of arrays with equal first axes; a frame;
                or a list of any items. It is copied now.
            num_shards: How many; None = the context's slots, or the rows if they are fewer.

        Raises:
            DataError: It has no rows, or fewer than shards.
        """
        engine = current_engine()
        wanted = _number("partition", "num_shards", num_shards) if num_shards is not None else None
        try:
            total = rows.count(data)
        except DataError as exc:
            raise DataError(f"partition() cannot cut this data. {exc}") from exc
        if total == 0:
            raise DataError("partition() got no rows.")
        shards = min(engine.slots(), total) if wanted is None else wanted
        if shards > total:
            raise DataError(
                f"partition() cannot make {shards} shards of {total} rows. Use at most {total}."
            )
        pieces = [rows.cut(data, *part(total, i, shards)) for i in range(shards)]
        return XShards(engine, Kept(engine.scatter(pieces), "partition"))

    def collect(self) -> list[Any]:
        """The shards, here, in order; copies of this process' own."""
        return values(self._engine, self._plan)

    def __len__(self) -> int:
        """Rows of all shards together. This runs the plan."""
        return sum(values(self._engine, self._plan, rows.count, "len"))

    def num_partitions(self) -> int:
        """How many shards there are."""
        return self._plan.shards

    # --- shard by shard ---

    @answers({})
    def transform_shard(self, fn: Callable[..., Any], *args: Any) -> XShards:
        """Shards of ``fn(shard, *args)``.

        ``fn`` may change its shard in place: it is a copy of its own. It has to return the new
        one, any object that can be pickled.

        Args:
            fn: Called in a worker process, once for each shard.
            args: Handed on. What ``per_worker(factory)`` made is built once in each worker.
        """
        if not callable(fn):
            raise ArgumentError(f"transform_shard() needs a function, not {shown(fn)}.")
        name = getattr(fn, "__name__", None) or type(fn).__name__
        name = "function" if name == "<lambda>" else name
        return self._then(Mapped(self._plan, steps.Call(fn, args), name))

    def __getitem__(self, key: str | list[Hashable]) -> XShards:
        """One column, or value of a dict, by name; several columns as frames, by a list."""
        if isinstance(key, (int, slice)):
            raise ArgumentError(
                f"shards[{key!r}] is not how to take a shard: collect()[…] gives shards, "
                "split() the parts of tuples; shards[name] is a column, shards[[0]] one that a "
                "number names."
            )
        return self._then(Mapped(self._plan, steps.Pick(key), f"[{key!r}]"))

    def zip(self, other: XShards) -> XShards:
        """Shards of tuples (ours, theirs); both have as many shards, and rows in each.

        Raises:
            DataError: They have other numbers of shards; those of rows are seen when it runs.
        """
        other = self._beside("zip", other)
        if other.num_partitions() != self.num_partitions():
            raise DataError(
                f"zip() needs as many shards on both sides, and got {self.num_partitions()} and "
                f"{other.num_partitions()}. repartition() one of them."
            )
        return self._then(Zipped([self._plan, other._plan]))

    def split(self) -> list[XShards]:
        """The parts of shards that are tuples or lists of one length, each as shards.

        How many there are is in the data: this runs the plan, and the parts share the result.

        Raises:
            DataError: Shards that are no tuples or lists, or of differing lengths.
        """
        whole = kept(self._engine, self._plan, self._plan.describe())
        lengths = values(self._engine, whole, steps.length, "split")
        if len(set(lengths)) != 1:
            raise DataError(
                f"split() needs shards of one length, and got {sorted(set(lengths))} parts."
            )
        picks = (Mapped(whole, steps.Pick(i), f"part {i}") for i in range(lengths[0]))
        return [self._then(pick) for pick in picks]

    def drop_missing_value(self) -> XShards:
        """Frames without the rows in which a value is missing."""
        return self._then(Mapped(self._plan, steps.DropMissing(), "drop_missing_value"))

    # --- rows among shards ---

    def repartition(self, num_partitions: int) -> XShards:
        """The same rows in the same order in so many shards, whose rows differ by one at most."""
        wanted = _number("repartition", "num_partitions", num_partitions)
        return self._then(Even(self._plan, wanted))

    @answers({})
    def partition_by(
        self, cols: str | Sequence[Hashable], num_partitions: int | None = None
    ) -> XShards:
        """Frames in which rows with equal values in ``cols`` are in one shard, in order.

        Args:
            cols: A column or several. Missing values are equal to each other.
            num_partitions: Shards; None = as many as now. Some may have no rows.
        """
        names = _columns("partition_by", "cols", cols)
        shards = self.num_partitions()
        if num_partitions is not None:
            shards = _number("partition_by", "num_partitions", num_partitions)
        return self._whole("PartitionBy", shards, f"partition_by({_listed(names)})", columns=names)

    @answers({"col_names": Renamed("by")})
    def sort_values(
        self, by: str | Sequence[Hashable], ascending: bool | Sequence[bool] = True
    ) -> XShards:
        """Frames in order over all shards; rows that are equal in ``by`` stay as they were."""
        names = _columns("sort_values", "by", by)
        many = [ascending] if isinstance(ascending, bool) else ascending
        if not isinstance(many, (list, tuple)) or not all(isinstance(one, bool) for one in many):
            raise ArgumentError(
                f"ascending has to be True, False, or a list of them, not {shown(ascending)}."
            )
        if not isinstance(ascending, bool) and len(many) != len(names):
            raise ConfigError(f"ascending has {len(many)} values for {len(names)} columns.")
        order = ascending if isinstance(ascending, bool) else list(many)
        label = f"sort_values({_listed(names)})"
        return self._whole("SortValues", None, label, by=names, ascending=order)

    @answers({})
    def merge(
        self,
        right: XShards,
        how: Literal["inner", "left", "right", "outer"] = "inner",
        on: str | Sequence[Hashable] | None = None,
    ) -> XShards:
        """Frames joined as ``pandas.merge`` joins the whole tables; in no promised order.

        Args:
            right: Shards of frames, of the same context.
            how: "inner", "left", "right" or "outer".
            on: Columns that both have; None = all that both have.
        """
        right = self._beside("merge", right)
        if how not in _HOW:
            raise ConfigError(f"how={how!r} is not known; have {', '.join(_HOW)}.{_near(how)}")
        names = None if on is None else _columns("merge", "on", on)
        return self._whole("Merge", None, "merge", beside=[right._plan], how=how, on=names)

    @answers({"join": Gone("merge() the result with the shards.", harmless=(None, False))})
    def group_by(self, columns: str | Sequence[Hashable], agg: Mapping[Hashable, Any]) -> XShards:
        """Frames of groups: the columns of the groups, then ``c_mean`` for each aggregate.

        Args:
            columns: What makes a group; rows in which it is missing are in none.
            agg: From a column to names of pandas' aggregates, or functions: ``{"c": ["mean"]}``.
        """
        names = _columns("group_by", "columns", columns)
        if not hasattr(agg, "items") or not agg:
            raise ArgumentError(
                f'group_by() needs agg={{"column": ["mean", …]}}, not {shown(agg)}.'
            )
        several = {
            column: [one] if isinstance(one, str) or callable(one) else one
            for column, one in agg.items()
        }
        for column, found in several.items():
            if not isinstance(found, (list, tuple)) or not found:
                raise ArgumentError(
                    f"group_by() needs names of aggregates for {column!r}, not {shown(found)}."
                )
        label = f"group_by({_listed(names)})"
        return self._whole("GroupBy", None, label, columns=names, agg=several)

    @answers({"seed": Renamed("random_state")})
    def sample(self, frac: float, random_state: int | None = None) -> XShards:
        """A part of the rows of all shards, drawn without replacement, as pandas draws them.

        Args:
            frac: Which part, 0 to 1.
            random_state: A seed; None draws one now, so that each run gives the same rows.
        """
        if isinstance(frac, bool) or not isinstance(frac, numbers.Real):
            raise ArgumentError(f"frac has to be a number, not {shown(frac)}.")
        if not 0 <= frac <= 1:
            raise ConfigError(f"frac={frac} cannot be: need 0 to 1.")
        seed = secrets.randbits(32) if random_state is None else random_state
        if isinstance(seed, bool) or not isinstance(seed, numbers.Integral):
            raise ArgumentError(f"random_state has to be a whole number, not {shown(seed)}.")
        if not 0 <= seed < 1 << 32:
            raise ConfigError(f"random_state={seed} cannot be: need 0 to 2**32 - 1.")
        share = float(frac)
        return self._whole("Sample", None, f"sample({share:g})", frac=share, seed=int(seed))

    def unique(self) -> Any:
        """The values of the one column, each once in order of appearance, as a NumPy array."""
        return self._whole_value("unique")

    def describe(self) -> Any:
        """pandas' summary of the whole table."""
        return self._whole_value("describe")

    # --- kept and stored ---

    def cache(self) -> XShards:
        """Keep the shards with the engine once they are made; these same shards.

        They go with the last object that needs them, at ``uncache()``, or with the context.
        """
        self._plan.cache()
        return self

    def uncache(self) -> XShards:
        """Let go of what ``cache`` keeps; these same shards, made anew when they are needed."""
        self._plan.uncache()
        return self

    @answers({"batchSize": Gone("shards are written as they are.")})
    def save_pickle(self, path: str | PathLike[str], overwrite: bool = False) -> XShards:
        """Write each shard as a pickle to a folder on any fsspec path; these same shards.

        Args:
            path: The folder.
            overwrite: Replace what ``save_pickle`` has written there before. It stays whole if
                this fails.

        Raises:
            FileExistsError: Something is there.
        """
        storing.save(self._engine, self._plan, storing.target(path, overwrite))
        return self

    @staticmethod
    @answers({"minPartitions": Gone("load, then repartition(n).")})
    def load_pickle(path: str | PathLike[str], *, trusted: bool = False) -> XShards:
        """Shards that ``save_pickle`` has written; they are read when they are needed.

        Args:
            path: The folder.
            trusted: Pickles can run any code. Say True if you know who wrote these.

        Raises:
            ConfigError: ``trusted`` is not True.
            FileNotFoundError: Nothing is there.
            DataError: It was not written by ``save_pickle``, or not to the end.
        """
        return XShards(current_engine(), storing.stored(path, trusted))

    # --- other systems ---

    def to_spark_df(self) -> Any:
        """A DataFrame of the running Spark session with the rows of frames; this runs the plan.

        Rows are in order, without the frames' indexes; types, nulls and microseconds are kept.

        Raises:
            ContextError: There is no Spark session.
            DataError: Shards that are no frames, or do not fit each other.
        """
        need("pyspark", extra="spark", purpose="to_spark_df()")
        return _spark("shards").frame_of(self._engine, self._plan)

    @staticmethod
    def from_spark_df(df: Any) -> XShards:
        """Shards of pandas frames, one for each partition of a Spark DataFrame that has rows.

        The DataFrame is evaluated once, now; its rows lie in files until nothing is made of
        these shards any more.

        Raises:
            ArgumentError: It is no DataFrame of Spark's.
            ConfigError: It is a stream.
        """
        need("pyspark", extra="spark", purpose="from_spark_df()")
        return XShards(current_engine(), _spark("shards").plan_of(df))

    def to_rdd(self) -> Any:
        """A Spark RDD with an element, and a partition, for each shard; this runs the plan.

        Raises:
            ContextError: There is no Spark session, or it is one over Spark Connect.
            DataError: A shard has 2 GB or more as a pickle.
        """
        need("pyspark", extra="spark", purpose="to_rdd()")
        return _spark("rdd").rdd_of(self._engine, self._plan)

    @staticmethod
    def from_rdd(rdd: Any) -> XShards:
        """Shards of the elements of a Spark RDD, one each, in order.

        ``rdd.glom()`` makes one element, a list, of each partition of an RDD of rows. The RDD is
        evaluated once, now; its elements lie in files until nothing is made of these shards any
        more.

        Raises:
            ArgumentError: It is no RDD.
            DataError: It has no element, or so many that they must be rows.
        """
        need("pyspark", extra="spark", purpose="from_rdd()")
        return XShards(current_engine(), _spark("rdd").plan_of(rdd))

    def to_ray_dataset(self) -> NoReturn:
        """A Ray Dataset of the rows; needs a context on Ray."""
        raise _needs("to_ray_dataset", "Ray", self._engine)

    @staticmethod
    def from_ray_dataset(ds: Any) -> NoReturn:
        """Shards of the blocks of a Ray Dataset; needs a context on Ray."""
        raise _needs("from_ray_dataset", "Ray", current_engine())

    # --- as an object ---

    def __repr__(self) -> str:
        count = self.num_partitions()
        return f"<XShards of {count} shard{'s' * (count != 1)}: {self._plan.describe()}>"

    def __bool__(self) -> bool:
        return True  # asking for the length would run the plan

    def __iter__(self) -> NoReturn:
        raise ArgumentError("Shards are not here to go through: collect() brings them, as a list.")

    __contains__ = None

    def __reduce__(self) -> NoReturn:
        raise ArgumentError(
            "XShards do not travel: they belong to this process. zip() or merge() brings the data "
            "of others to a function; save_pickle() stores them."
        )

    # --- inside ---

    def _then(self, plan: Plan) -> XShards:
        return XShards(self._engine, plan)

    def _whole(
        self,
        name: str,
        shards: int | None,
        label: str,
        *,
        beside: Sequence[Plan] = (),
        **options: Any,
    ) -> XShards:
        """Shards of what pandas does with the whole table."""
        count = self.num_partitions() if shards is None else shards
        work = steps.WholeTable(name, {**options, "shards": count})
        return self._then(Whole([self._plan, *beside], work, count, label))

    def _whole_value(self, name: str) -> Any:
        work = steps.WholeTable(name, None)
        return values(self._engine, Whole([self._plan], work, 1, name))[0]

    def _beside(self, call: str, other: Any) -> XShards:
        if not isinstance(other, XShards):
            raise ArgumentError(f"{call}() needs other XShards, not {shown(other)}.")
        if other._engine is not self._engine:
            raise ContextError(f"{call}() needs shards of one Orca context; these are of two.")
        return other


def opened(shards: XShards) -> tuple[Engine, Plan]:
    """Where shards are, and how they come about; for what reads them elsewhere in this house."""
    return shards._engine, shards._plan


def _spark(of: str) -> Any:
    return importlib.import_module(f"bigdl.orca.data.adapters.spark_{of}")


def _number(call: str, name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise ArgumentError(f"{call}({name}=…) has to be a whole number, not {shown(value)}.")
    if value < 1:
        raise ConfigError(f"{call}({name}={value}) cannot be: need at least 1.")
    return int(value)


def _columns(call: str, name: str, value: Any) -> list[Hashable]:
    """Names of columns as a list."""
    if isinstance(value, str) or not isinstance(value, (list, tuple)):
        value = [value]
    if not value:
        raise ConfigError(f"{call}({name}=[]) names no column.")
    for one in value:
        if one is None or isinstance(one, (XShards, PerWorker)) or not _is_hashable(one):
            raise ArgumentError(f"{call}({name}=…) needs names of columns, not {shown(one)}.")
    return list(value)


def _is_hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


def _listed(names: Sequence[Hashable]) -> str:
    return ", ".join(map(str, names))


def _near(word: Any) -> str:
    return nearest(str(word), _HOW)


def _needs(call: str, what: str, engine: Engine) -> ContextError:
    return ContextError(
        f"{call}() needs an Orca context on {what}; this one is on {engine.name!r}. Stop it, then "
        f"init_orca_context(runtime={what.lower()!r})."
    )
