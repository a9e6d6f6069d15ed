"""What every ``Sharded`` has to do, as tests: subclass ``ShardedContract`` to run them.

class TestMine(ShardedContract):
    def make(self, rows):
        return MySharded(...)  # row i can be told from its data

    def ids(self, data):
        return data[0].ravel().tolist()  # the i of each row in a batch's data
"""

from __future__ import annotations

import pickle
from collections import Counter
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pytest

from bigdl._base.trees import leaves
from bigdl.errors import DataError
from bigdl.orca.data.contract import Batch, Reader, Sharded, part

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["ShardedContract"]

_ROWS = 23
_SEED = 5


class ShardedContract:
    """Every kind of data passes these; a subclass supplies ``make`` and ``ids``."""

    #: The source can be put in another order. A loader has its own.
    shuffles: ClassVar[bool] = True
    #: Rows in a batch of a source that has batches of its own; None: they are asked for.
    own_batch: ClassVar[int | None] = None
    #: An epoch can be gone on with at any row, not only between batches.
    starts_anywhere: ClassVar[bool] = True
    #: Most bytes of a pickled recipe of 10,000 rows; None: it holds its rows.
    recipe_bytes: ClassVar[int | None] = None

    def make(self, rows: int) -> Sharded:
        """Data of ``rows`` rows for training, in which each row can be told by its number."""
        raise NotImplementedError("A subclass supplies the data.")

    def ids(self, data: Any) -> Sequence[int]:
        """The numbers of the rows in a batch's data, in order."""
        raise NotImplementedError("A subclass reads the numbers of rows.")

    # --- what the tests ask ------------------------------------------------------------------

    def parts(
        self, sharded: Sharded, world: int, size: int, **options: Any
    ) -> list[list[tuple[Batch, list[int]]]]:
        """What each rank gets: its batches, each with the numbers of its rows."""
        found = []
        for rank in range(world):
            reader = pickle.loads(pickle.dumps(sharded)).open(rank, world)
            try:
                batches = list(reader.batches(size, **options))
                found.append(
                    [(batch, self._ids_of(batch)) for batch in batches],
                )
            finally:
                reader.close()
        return found

    def _ids_of(self, batch: Batch) -> list[int]:
        if batch.rows == 0:
            assert batch.data is None
            return []
        return [int(i) for i in self.ids(batch.data)]

    def order(
        self, sharded: Sharded, size: int, world: int = 1, **options: Any
    ) -> list[list[int]]:
        """The global batches, put together from the parts of all ranks."""
        ranks = self.parts(sharded, world, size, **options)
        steps = {len(one) for one in ranks}
        assert len(steps) == 1, f"ranks disagree on the number of steps: {steps}"
        return [[i for _, ids in step for i in ids] for step in zip(*ranks, strict=True)]

    # --- rows --------------------------------------------------------------------------------

    def test_it_is_what_the_contract_says(self) -> None:
        sharded = self.make(_ROWS)
        assert isinstance(sharded, Sharded)
        reader = sharded.open(0, 1)
        assert isinstance(reader, Reader)
        reader.close()
        reader.close()  # does nothing
        if sharded.rows is not None:
            assert sharded.rows == _ROWS
        if sharded.schema is not None:
            assert sharded.schema.row_bytes > 0

    @pytest.mark.parametrize("world", [1, 2, 3, 4])
    @pytest.mark.parametrize("size", [1, 4, _ROWS, 100])
    @pytest.mark.parametrize("seed", [None, _SEED])
    def test_every_row_once(self, world: int, size: int, seed: int | None) -> None:
        sharded = self.make(_ROWS)
        ranks = self.parts(sharded, world, size, seed=seed)
        assert Counter(i for rank in ranks for _, ids in rank for i in ids) == Counter(
            range(_ROWS)
        )
        for rank in ranks:
            for batch, ids in rank:
                assert batch.rows == len(ids)
                assert batch.global_rows >= 1

    @pytest.mark.parametrize("size", [1, 4, 5, 100])
    @pytest.mark.parametrize("seed", [None, _SEED])
    def test_the_same_global_batches_for_any_number_of_ranks(
        self, size: int, seed: int | None
    ) -> None:
        sharded = self.make(_ROWS)
        alone = self.order(sharded, size, seed=seed, epoch=2)
        for world in (2, 3, 4):
            assert self.order(sharded, size, world, seed=seed, epoch=2) == alone

    @pytest.mark.parametrize("size", [1, 4, 100])
    def test_batches_are_as_large_as_asked_but_the_last(self, size: int) -> None:
        if self.own_batch is not None:
            size = self.own_batch
        lengths = [len(ids) for ids in self.order(self.make(_ROWS), size, seed=_SEED)]
        whole, rest = divmod(_ROWS, size)
        assert lengths == [size] * whole + [rest] * (rest > 0)

    @pytest.mark.parametrize("world", [2, 3, 4])
    def test_a_batch_is_cut_into_contiguous_parts_larger_ones_first(self, world: int) -> None:
        for step in zip(*self.parts(self.make(_ROWS), world, 5, seed=_SEED), strict=True):
            totals = {batch.global_rows for batch, _ in step}
            assert totals == {sum(batch.rows for batch, _ in step)}
            total = totals.pop()
            spans = [part(total, rank, world) for rank in range(world)]
            assert [batch.rows for batch, _ in step] == [last - first for first, last in spans]

    def test_ranks_without_rows_take_part(self) -> None:
        ranks = self.parts(self.make(2), 4, 100, seed=None)
        assert [len(rank) for rank in ranks] == [len(ranks[0])] * 4
        assert sum(batch.rows for rank in ranks for batch, _ in rank) == 2
        assert [batch.rows for batch, _ in ranks[3]] == [0] * len(ranks[3])

    # --- order -------------------------------------------------------------------------------

    def test_without_a_seed_the_order_of_the_source(self) -> None:
        if not self.shuffles:
            pytest.skip("the source has an order of its own")
        for epoch in (0, 1):
            found = self.order(self.make(_ROWS), 4, 2, seed=None, epoch=epoch)
            assert [i for ids in found for i in ids] == list(range(_ROWS))

    def test_shuffled_orders_differ_by_epoch_and_seed(self) -> None:
        if not self.shuffles:
            pytest.skip("the source has an order of its own")
        sharded = self.make(_ROWS)
        keys = [(_SEED, 0), (_SEED, 1), (_SEED + 1, 0)]
        orders = [str(self.order(sharded, 4, seed=seed, epoch=epoch)) for seed, epoch in keys]
        assert len(set(orders)) == len(keys)
        assert str(self.order(sharded, 4, seed=None)) not in orders

    def test_the_same_seed_gives_the_same_order(self) -> None:
        sharded = self.make(_ROWS)
        for epoch in (0, 3):
            first = self.order(sharded, 4, seed=_SEED, epoch=epoch)
            assert self.order(self.make(_ROWS), 4, seed=_SEED, epoch=epoch) == first

    def test_a_reader_gives_epochs_as_new_readers_do(self) -> None:
        """In order, twice, broken off, and after one that was left out."""
        sharded = self.make(_ROWS)
        new = {e: self.order(sharded, 4, seed=_SEED, epoch=e) for e in (0, 1, 2, 5)}
        reader = sharded.open(0, 1)
        try:
            for epoch in (0, 1, 1, 2, 0, 5):
                broken_off = reader.batches(4, seed=_SEED, epoch=epoch)
                assert self._ids_of(next(iter(broken_off))) == new[epoch][0]
                found = [self._ids_of(b) for b in reader.batches(4, seed=_SEED, epoch=epoch)]
                assert found == new[epoch]
        finally:
            reader.close()

    # --- going on ----------------------------------------------------------------------------

    @pytest.mark.parametrize("world", [1, 2, 3])
    @pytest.mark.parametrize("seed", [None, _SEED])
    def test_going_on_between_batches_gives_the_tail(self, world: int, seed: int | None) -> None:
        sharded = self.make(_ROWS)
        whole = self.order(sharded, 4, seed=seed, epoch=1)
        start = 0
        for step in range(len(whole) + 1):
            assert self.order(sharded, 4, world, seed=seed, epoch=1, start=start) == whole[step:]
            start += len(whole[step]) if step < len(whole) else 0

    def test_going_on_at_any_row_gives_the_tail(self) -> None:
        if not self.starts_anywhere:
            pytest.skip("the source can be gone on with between batches only")
        sharded = self.make(_ROWS)
        whole = [i for ids in self.order(sharded, 4, seed=_SEED, epoch=1) for i in ids]
        for start in range(_ROWS + 1):
            for size, world in ((4, 1), (3, 2)):
                tail = self.order(sharded, size, world, seed=_SEED, epoch=1, start=start)
                assert [i for ids in tail for i in ids] == whole[start:]

    def test_outside_the_epoch_nothing_can_be_gone_on_with(self) -> None:
        for start in (-1, _ROWS + 1):
            reader = self.make(_ROWS).open(0, 2)
            try:
                with pytest.raises(DataError, match=rf"row {start}\b"):
                    list(reader.batches(4, start=start))
            finally:
                reader.close()

    # --- recipes -----------------------------------------------------------------------------

    def test_a_recipe_travels(self) -> None:
        sharded = self.make(_ROWS)
        again = pickle.loads(pickle.dumps(sharded))
        assert again.rows == sharded.rows
        assert again.schema == sharded.schema
        assert self.order(again, 4, seed=_SEED) == self.order(sharded, 4, seed=_SEED)

    def test_a_recipe_is_small_if_it_can_be(self) -> None:
        if self.recipe_bytes is None:
            pytest.skip("the recipe holds its rows")
        assert len(pickle.dumps(self.make(10_000))) <= self.recipe_bytes

    def test_a_receiver_may_write_into_its_batch(self) -> None:
        sharded = self.make(_ROWS)
        before = self.order(sharded, 4, seed=None)
        reader = sharded.open(0, 1)
        try:
            for batch in reader.batches(4):
                for leaf in leaves(batch.data):
                    if isinstance(leaf, np.ndarray) and leaf.dtype.kind in "biuf":
                        leaf[...] = 0
        finally:
            reader.close()
        assert self.order(sharded, 4, seed=None) == before
