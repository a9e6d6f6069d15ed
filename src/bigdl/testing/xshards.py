"""What ``XShards`` have to do on every engine, as tests: subclass ``XShardsContract`` to run them.

class TestMine(XShardsContract):
    @classmethod
    def open_context(cls):
        return init_orca_context(runtime="mine", cores=2)

Known answers are pandas' own, on the joined table.
"""

from __future__ import annotations

import gc
import os
import secrets
import signal
import threading
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from bigdl._base import trees
from bigdl.errors import DataError, WorkerError, WorkerLostError
from bigdl.orca.data import XShards, per_worker
from bigdl.orca.data.pandas import read_csv

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    import pandas as pd

    from bigdl.orca.context import OrcaContext

__all__ = ["XShardsContract"]


class Celsius:
    """Any picklable object."""

    def __init__(self, degrees: np.ndarray) -> None:
        self.degrees = degrees


class Mine(Exception):
    """A user's own exception."""


def _noting(folder: Path, fn: Callable[..., Any], shard: Any, *args: Any) -> Any:
    """``fn(shard)``, leaving a file for the call."""
    (folder / secrets.token_hex(8)).touch()
    return fn(shard, *args)


def _same(shard: Any) -> Any:
    return shard


def _joined(shards: XShards | Sequence[pd.DataFrame]) -> pd.DataFrame:
    import pandas as pd

    return pd.concat(shards.collect() if isinstance(shards, XShards) else list(shards))


def _sorted(table: pd.DataFrame) -> pd.DataFrame:
    """In an order of its own, where none is promised."""
    return table.sort_values(list(table.columns), kind="stable").reset_index(drop=True)


def _table(rows: int = 23, seed: int = 0) -> pd.DataFrame:
    """Columns of several types, with repeated keys and missing values."""
    import pandas as pd

    draw = np.random.default_rng(seed)
    return pd.DataFrame(
        {
            "key": draw.integers(0, 4, rows),
            "name": draw.choice(["ann", "bob", "cid"], rows),
            "value": np.where(draw.random(rows) < 0.2, np.nan, draw.normal(size=rows)),
            "count": pd.array(draw.integers(0, 9, rows), dtype="Int64"),
            "when": pd.Timestamp("2020-01-01") + pd.to_timedelta(draw.integers(0, 99, rows), "h"),
        }
    )


class XShardsContract:
    """Every engine passes these. ``open_context`` gives one with at least 2 slots."""

    @classmethod
    def open_context(cls) -> OrcaContext:
        """A new context; the tests stop it."""
        raise NotImplementedError(f"{cls.__name__} has to define open_context().")

    @pytest.fixture(scope="class")
    @classmethod
    def context(cls) -> Iterator[OrcaContext]:
        context = cls.open_context()
        yield context
        context.stop()

    @pytest.fixture(autouse=True)
    def _usable_afterwards(self, context: OrcaContext) -> Iterator[None]:
        """Whatever a test does, shards are made after it, by all workers."""
        yield
        assert XShards.partition(list(range(8)), 8).transform_shard(sum).collect() == list(
            range(8)
        )

    @pytest.fixture
    def frames(self, context: OrcaContext) -> tuple[pd.DataFrame, XShards]:
        """A table, and the same in four shards."""
        table = _table()
        return table, XShards.partition(table, 4)

    # --- to and from ---

    @pytest.mark.parametrize("shards", [1, 2, 3, 7])
    def test_rows_are_cut_into_nearly_equal_shards(self, shards: int) -> None:
        data = {"x": (np.arange(14).reshape(7, 2), [np.arange(7.0)]), "y": np.arange(7) * 3}
        found = XShards.partition(data, shards)
        assert found.num_partitions() == shards
        assert len(found) == 7
        parts = found.collect()
        sizes = [trees.rows(part, "a shard") for part in parts]
        assert (sum(sizes), max(sizes) - min(sizes) <= 1) == (7, True)
        for whole, leaf in zip(trees.leaves(data), trees.leaves(trees.concat(parts)), strict=True):
            np.testing.assert_array_equal(whole, leaf)
            assert whole.dtype == leaf.dtype
        assert list(parts[0]) == ["x", "y"]
        assert isinstance(parts[0]["x"], tuple)

    def test_as_many_shards_as_slots_or_rows(self, context: OrcaContext) -> None:
        assert XShards.partition(np.zeros(100)).num_partitions() == min(context.slots, 100)
        assert XShards.partition(np.zeros(1)).num_partitions() == 1
        with pytest.raises(DataError, match="8 shards of 7 rows"):
            XShards.partition(np.zeros(7), 8)

    def test_what_is_partitioned_is_copied(self) -> None:
        array = np.arange(6)
        shards = XShards.partition(array, 2)
        array[:] = -1
        shards.collect()[0][:] = -1
        assert np.concatenate(shards.collect()).tolist() == [0, 1, 2, 3, 4, 5]

    # --- shard by shard ---

    def test_functions_run_in_workers_on_their_own_copies(self, frames: Any) -> None:
        table, shards = frames

        def negative(frame: pd.DataFrame, column: str, by: float) -> pd.DataFrame:
            frame[column] = frame[column] * -by
            return frame

        twice = shards.transform_shard(negative, "value", 2.0)
        here = os.getpid()
        assert here not in twice.transform_shard(lambda _: os.getpid()).collect()
        np.testing.assert_array_equal(_joined(twice)["value"], table["value"] * -2)
        assert _joined(shards).equals(table)  # the parent never hears of it
        assert _joined(twice).equals(_joined(twice))  # nor does one run of another

    def test_siblings_do_not_see_each_others_changes(self) -> None:
        parent = XShards.partition(np.arange(4), 2).transform_shard(_same)

        def add(shard: np.ndarray, value: int) -> np.ndarray:
            shard += value
            return shard

        pairs = parent.transform_shard(add, 10).zip(parent.transform_shard(add, 100)).collect()
        assert [[part.tolist() for part in pair] for pair in pairs] == [
            [[10, 11], [100, 101]],
            [[12, 13], [102, 103]],
        ]

    def test_shards_are_any_picklable_object(self) -> None:
        warm = XShards.partition(np.arange(6.0), 3).transform_shard(Celsius)
        assert [type(one) for one in warm.collect()] == [Celsius] * 3
        sums = warm.transform_shard(lambda one: float(one.degrees.sum()))
        assert sums.collect() == [1.0, 5.0, 9.0]
        with pytest.raises(DataError, match="Celsius has no rows"):
            len(warm)

    def test_nothing_runs_before_it_is_asked_for(self, tmp_path: Path) -> None:
        shards = XShards.partition(np.arange(6), 3)
        lazy = shards.transform_shard(partial(_noting, tmp_path, _same)).repartition(2)
        planned = lazy.zip(lazy)["x"], lazy.num_partitions(), repr(lazy), bool(lazy)
        assert planned[1] == 2
        assert list(tmp_path.iterdir()) == []
        assert len(lazy) == 6
        assert len(list(tmp_path.iterdir())) == 3

    def test_what_a_plan_shares_is_made_once_a_run(self, tmp_path: Path) -> None:
        once = XShards.partition(np.arange(6), 3).transform_shard(
            partial(_noting, tmp_path, _same)
        )
        once.zip(once.transform_shard(np.negative)).collect()
        assert len(list(tmp_path.iterdir())) == 3

    def test_cached_shards_are_made_once(self, tmp_path: Path) -> None:
        made = XShards.partition(np.arange(6), 3).transform_shard(
            partial(_noting, tmp_path, _same)
        )
        assert made.cache() is made
        for _ in range(2):
            assert np.concatenate(made.collect()).tolist() == list(range(6))
            assert len(made.transform_shard(np.negative)) == 6
        assert len(list(tmp_path.iterdir())) == 3
        assert made.uncache() is made
        made.collect()
        assert len(list(tmp_path.iterdir())) == 6

    def test_a_failure_is_not_cached(self, tmp_path: Path) -> None:
        def once(shard: np.ndarray) -> np.ndarray:
            if shard[0] == 2 and not (tmp_path / "failed").exists():
                (tmp_path / "failed").touch()
                raise Mine("only once")
            return shard

        made = XShards.partition(np.arange(4), 2).transform_shard(once).cache()
        with pytest.raises(Mine):
            made.collect()
        assert np.concatenate(made.collect()).tolist() == [0, 1, 2, 3]

    def test_a_value_is_built_once_a_worker(self, tmp_path: Path) -> None:
        lock = per_worker(partial(_noting, tmp_path, lambda _: threading.Lock(), None))

        def look(shard: np.ndarray, lock: Any, more: int) -> tuple[int, int, int]:
            assert lock.acquire(timeout=10)
            lock.release()
            return os.getpid(), id(lock), more

        shards = XShards.partition(np.arange(8), 8).transform_shard(look, lock, 5)
        found = shards.collect() + shards.collect()
        assert {more for _, _, more in found} == {5}
        workers = {pid for pid, _, _ in found}
        assert len({(pid, known) for pid, known, _ in found}) == len(workers)
        assert len(list(tmp_path.iterdir())) == len(workers)

    # --- rows among shards ---

    @pytest.mark.parametrize("shards", [1, 2, 5, 9, 30])
    def test_repartition_keeps_rows_in_order(self, frames: Any, shards: int) -> None:
        table, four = frames
        uneven = four.transform_shard(lambda frame: frame[frame["key"] > 1])
        found = uneven.repartition(shards).collect()
        sizes = [len(frame) for frame in found]
        assert (len(sizes), max(sizes) - min(sizes) <= 1) == (shards, True)
        assert _joined(found).equals(table[table["key"] > 1])

    @pytest.mark.parametrize("cols", ["key", ["key", "name"], "value"])
    @pytest.mark.parametrize("shards", [None, 1, 3, 9])
    def test_equal_keys_come_together(self, frames: Any, cols: Any, shards: int | None) -> None:
        table, four = frames
        parts = four.partition_by(cols, shards).collect()
        assert len(parts) == (shards or 4)
        assert _joined(parts).sort_index().equals(table)
        names = [cols] if isinstance(cols, str) else cols
        places: dict[Any, set[int]] = {}
        for number, frame in enumerate(parts):
            assert frame.index.is_monotonic_increasing
            for key in frame[names].itertuples(index=False):
                places.setdefault(str(key), set()).add(number)
        assert Counter(map(len, places.values())) == {1: len(places)}

    def test_zip_and_split_are_inverse(self, frames: Any) -> None:
        table, shards = frames
        left, right = shards.zip(shards["key"].transform_shard(lambda key: key + 1)).split()
        assert _joined(left).equals(table)
        assert _joined(right).equals(table["key"] + 1)

    def test_zip_needs_equal_shards(self) -> None:
        one = XShards.partition(np.arange(6), 2)
        with pytest.raises(DataError, match="got 2 and 3"):
            one.zip(XShards.partition(np.arange(6), 3))
        with pytest.raises(DataError, match="got 3 and 2"):
            one.zip(one.transform_shard(lambda shard: shard[:2])).collect()
        with pytest.raises(DataError, match="one length"):
            one.transform_shard(lambda shard: tuple(range(shard[0] + 1))).split()

    def test_columns(self, frames: Any) -> None:
        table, shards = frames
        assert _joined(shards["name"]).equals(table["name"])
        assert _joined(shards[["when", "key"]]).equals(table[["when", "key"]])
        nest = XShards.partition({"x": np.arange(4), "y": np.arange(4) * 2}, 2)
        assert np.concatenate(nest["y"].collect()).tolist() == [0, 2, 4, 6]
        with pytest.raises(DataError, match=r"no column 'nam'|No column 'nam'.*'name'"):
            shards["nam"].collect()

    # --- as pandas does on the joined table ---

    def test_unique_and_describe(self, frames: Any) -> None:
        table, shards = frames
        for name in table:
            found = shards[name].unique()
            assert isinstance(found, np.ndarray)
            np.testing.assert_array_equal(found, np.asarray(table[name].unique()))
        assert shards.describe().equals(table.describe())
        assert shards["value"].describe().equals(table["value"].describe())

    @pytest.mark.parametrize("how", ["inner", "left", "right", "outer"])
    @pytest.mark.parametrize("on", [None, "key", ["key", "name"]])
    def test_merge(self, frames: Any, how: Any, on: Any) -> None:
        table, shards = frames
        other = _table(9, seed=1)[["key", "name"]].assign(
            extra=np.arange(9.0), key=lambda t: t.key + 1
        )
        found = _joined(shards.merge(XShards.partition(other, 3), how=how, on=on))
        wanted = table.merge(other, how=how, on=on)
        assert _sorted(found).equals(_sorted(wanted))
        assert found.dtypes.equals(wanted.dtypes)

    @pytest.mark.parametrize("by", ["key", ["key", "name"]])
    def test_group_by(self, frames: Any, by: Any) -> None:
        table, shards = frames
        found = _joined(shards.group_by(by, agg={"value": ["mean", "max"], "count": "sum"}))
        wanted = table.groupby(by).agg(
            value_mean=("value", "mean"), value_max=("value", "max"), count_sum=("count", "sum")
        )
        assert _sorted(found).equals(_sorted(wanted.reset_index()))

    @pytest.mark.parametrize(
        ("by", "ascending"), [("value", True), ("name", False), (["key", "when"], [False, True])]
    )
    def test_sort_values(self, frames: Any, by: Any, ascending: Any) -> None:
        table, shards = frames
        wanted = table.sort_values(by, ascending=ascending, kind="stable")
        found = shards.sort_values(by, ascending)
        assert found.num_partitions() == 4
        assert _joined(found).equals(wanted)

    def test_missing_values_and_samples(self, frames: Any) -> None:
        table, shards = frames
        assert _joined(shards.drop_missing_value()).equals(table.dropna())
        sample = shards.sample(0.4, random_state=7)
        assert _joined(sample).equals(table.sample(frac=0.4, random_state=7))
        undecided = shards.sample(0.4)
        assert _joined(undecided).equals(_joined(undecided))
        assert len(shards.sample(0.0)) == 0
        assert len(shards.sample(1)) == len(table)

    def test_types_of_shards_without_rows_do_not_count(self, frames: Any) -> None:
        table, shards = frames
        kept = shards.transform_shard(lambda frame: frame[frame["when"] > "2020-01-04"])
        wanted = table[table["when"] > "2020-01-04"]
        found = _joined(kept.sort_values("count").repartition(2))
        assert found.equals(wanted.sort_values("count", kind="stable"))
        assert found.dtypes.equals(table.dtypes)

    # --- stored ---

    def test_pickles_come_back(self, frames: Any, tmp_path: Path) -> None:
        table, shards = frames
        assert shards.save_pickle(tmp_path / "a") is shards
        back = XShards.load_pickle(tmp_path / "a", trusted=True)
        assert back.num_partitions() == 4
        assert _joined(back).equals(table)
        reverse = back.sort_values("when", ascending=False)
        with pytest.raises(FileExistsError, match="overwrite=True"):
            reverse.save_pickle(tmp_path / "a")
        reverse.save_pickle(tmp_path / "a", overwrite=True)  # reads what it replaces
        again = XShards.load_pickle(tmp_path / "a", trusted=True)
        assert _joined(again).equals(table.sort_values("when", ascending=False, kind="stable"))
        assert len(list((tmp_path / "a").iterdir())) == 5  # four shards, and their list

    def test_what_fails_leaves_no_pickles(self, tmp_path: Path) -> None:
        def fail(shard: np.ndarray) -> np.ndarray:
            if shard[0]:
                raise Mine("boom")
            return shard

        shards = XShards.partition(np.arange(4), 2)
        with pytest.raises(Mine):
            shards.transform_shard(fail).save_pickle(tmp_path / "new")
        assert list(tmp_path.iterdir()) == []
        shards.save_pickle(tmp_path / "old")
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(Mine):
            shards.transform_shard(fail).save_pickle(tmp_path / "old", overwrite=True)
        assert sorted(tmp_path.rglob("*")) == before
        assert len(XShards.load_pickle(tmp_path / "old", trusted=True)) == 4

    # --- files ---

    def test_files_are_shards_in_the_order_of_their_names(self, tmp_path: Path) -> None:
        table = _table().drop(columns="count")
        for number, rows in ((2, slice(11, 23)), (0, slice(0, 4)), (1, slice(4, 11))):
            table[rows].to_csv(tmp_path / f"part-{number}.csv", index=False)
        shards = read_csv(tmp_path, parse_dates=["when"], float_precision="round_trip")
        assert [len(frame) for frame in shards.collect()] == [4, 7, 12]
        assert _joined(shards).reset_index(drop=True).equals(table)

    # --- what goes wrong ---

    def test_an_exception_keeps_its_type_and_names_the_shard(self) -> None:
        def fail(shard: np.ndarray) -> np.ndarray:
            if shard[0] == 2:
                raise Mine("boom")
            return shard

        with pytest.raises(Mine, match="boom") as caught:
            XShards.partition(np.arange(4), 4).transform_shard(fail).collect()
        assert isinstance(caught.value.__cause__, WorkerError)
        assert "shard 3 of 4" in str(caught.value.__cause__)
        assert "in fail" in str(caught.value.__cause__)

    def test_a_killed_worker_is_an_error_and_the_context_goes_on(self) -> None:
        def die(shard: np.ndarray) -> np.ndarray:
            if shard[0] == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return shard

        shards = XShards.partition(np.arange(4), 4)
        with pytest.raises(WorkerLostError, match="SIGKILL"):
            shards.transform_shard(die).collect()
        assert np.concatenate(shards.collect()).tolist() == [0, 1, 2, 3]

    def test_a_worker_killed_once_is_no_matter_for_the_next_run(self, tmp_path: Path) -> None:
        def die_once(shard: np.ndarray) -> np.ndarray:
            if shard[0] == 2 and not (tmp_path / "died").exists():
                (tmp_path / "died").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return shard * 2

        made = XShards.partition(np.arange(4), 2).transform_shard(die_once).cache()
        try:
            made.collect()  # an engine may try again by itself
        except WorkerLostError:
            assert (tmp_path / "died").exists()
        assert np.concatenate(made.collect()).tolist() == [0, 2, 4, 6]
        del made
        gc.collect()
