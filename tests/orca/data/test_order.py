"""The keyed permutation: every row once, known at any place, and well shuffled."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest

from bigdl.errors import ConfigError, DataError
from bigdl.orca.data.order import MOST_ROWS, Order, Permutation, check_start


def test_every_row_once_for_every_small_size():
    for rows in range(1, 5001):
        order = Permutation(rows, 7, 3)[0:rows]
        assert (np.bincount(order, minlength=rows) == 1).all(), rows


def test_the_inverse_leads_back_for_every_small_size():
    for rows in range(1, 5001, 7):
        permutation = Permutation(rows, 11)
        np.testing.assert_array_equal(
            permutation.positions_of(permutation[0:rows]), np.arange(rows)
        )


@pytest.mark.parametrize(
    "rows", [2**31 - 1, 2**31, 2**31 + 1, 2**32 + 5, 10**11, 2**40, MOST_ROWS]
)
def test_large_sizes_without_a_table(rows):
    permutation = Permutation(rows, 1, 0)
    rng = np.random.default_rng(0)
    places = np.unique(np.concatenate([rng.integers(0, rows, 20_000), [0, rows - 1]]))
    found = permutation.rows_at(places)
    assert found.min() >= 0
    assert found.max() < rows
    assert len(np.unique(found)) == len(places)
    np.testing.assert_array_equal(permutation.positions_of(found), places)


@pytest.mark.parametrize("rows", [3, 1000, 70_000, 2**33])
def test_any_part_is_part_of_the_whole(rows):
    permutation = Permutation(rows, 5, 2)
    most = min(rows, 60_000)
    whole = permutation[0:most]
    for first, last in [(0, 1), (1, most), (most // 3, most // 2), (most - 1, most), (2, 2)]:
        np.testing.assert_array_equal(permutation[first:last], whole[first:last])


def test_known_orders():
    """A stored run must find its order again with any later version."""
    assert Permutation(10, 0, 0)[0:10].tolist() == KNOWN_10
    assert Permutation(10**6, 42, 1)[0:4].tolist() == KNOWN_MILLION
    assert Permutation(2**40, 42, 1)[0:2].tolist() == KNOWN_LARGE


KNOWN_10 = [1, 5, 4, 7, 8, 9, 2, 0, 3, 6]
KNOWN_MILLION = [717617, 773636, 664159, 628791]
KNOWN_LARGE = [124977030610, 359141104609]


def test_keys_give_orders_of_their_own():
    keys = [(0, 0), (0, 1), (1, 0), (-1, 0), (2**64, 0), (2**64 + 1, 0), (-(2**64), 0), (0,), ()]
    orders = {tuple(Permutation(1000, *key)[0:1000].tolist()) for key in keys}
    assert len(orders) == len(keys)
    assert (Permutation(1000, 3, 4)[0:1000] == Permutation(1000, 3, 4)[0:1000]).all()


@pytest.mark.parametrize("rows", [2, 3, 4, 5, 6])
def test_small_tables_meet_every_order_equally_often(rows):
    draws = 4_000
    seen = Counter(tuple(Permutation(rows, seed, 0)[0:rows].tolist()) for seed in range(draws))
    orders = math.factorial(rows)
    expected = draws / orders
    square = sum(
        (seen[order] - expected) ** 2 / expected for order in itertools.permutations(range(rows))
    )
    freedom = orders - 1
    assert square < freedom + 4 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("rows", [10, 37, 64])
def test_each_row_is_met_at_each_place_equally_often(rows):
    draws = 60 * rows
    counts = np.zeros((rows, rows))
    for seed in range(draws):
        counts[np.arange(rows), Permutation(rows, seed, 1)[0:rows]] += 1
    square = ((counts - draws / rows) ** 2 / (draws / rows)).sum()
    freedom = (rows - 1) ** 2
    assert abs(square - freedom) < 4 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("rows", [5_000, 65_536, 100_003, 1_000_000])
def test_places_say_nothing_about_rows(rows):
    order = Permutation(rows, 0, 0)[0:rows]
    limit = 4 / math.sqrt(rows)
    assert abs(np.corrcoef(np.arange(rows), order)[0, 1]) < limit
    for lag in (1, 2, 32, 1024):  # nor does one row say anything about a later one
        assert abs(np.corrcoef(order[:-lag], order[lag:])[0, 1]) < limit
    other = Permutation(rows, 0, 1)[0:rows]
    assert abs(np.corrcoef(order, other)[0, 1]) < limit
    assert abs(int((order == other).sum()) - 1) < 8  # as two independent orders agree
    low = order[: rows // 2] % 2  # halves hold odd and even rows alike
    assert abs(low.mean() - 0.5) < 4 / math.sqrt(rows)


def test_steps_between_neighbours_are_spread():
    rows = 1 << 16
    order = Permutation(rows, 9, 9)[0:rows]
    steps = np.bincount(((np.diff(order) % rows) * 64) // rows, minlength=64)
    expected = (rows - 1) / 64
    assert ((steps - expected) ** 2 / expected).sum() < 63 + 4 * math.sqrt(2 * 63)


def test_wrong_sizes_and_places():
    with pytest.raises(ConfigError, match=r"rows=-1 .* 2\*\*62"):
        Permutation(-1, 0)
    with pytest.raises(DataError, match="of 10, 3 to 10 asked"):
        Permutation(10, 0).rows_at([3, 10])
    with pytest.raises(DataError, match="row 11: an epoch of this data has 10 rows"):
        check_start(11, 10)
    assert Permutation(0, 0)[0:0].tolist() == []
    assert Permutation(1, 0)[0:1].tolist() == [0]


def test_without_a_seed_rows_are_as_they_are():
    assert Order(10, None, 4)[2:5] == slice(2, 5)
    assert Order(10, 3, 4)[2:5].tolist() == Permutation(10, 3, 4)[0:10][2:5].tolist()


def test_looking_ahead_changes_nothing():
    rows = 30_000
    whole = Permutation(rows, 1, 2)[0:rows]
    order = Order(rows, 1, 2)
    for start, stop in [
        (0, 7),
        (7, 9),
        (8190, 8200),
        (100, 20_000),
        (5, 6),
        (29_990, rows),
        (3, 3),
    ]:
        np.testing.assert_array_equal(order[start:stop], whole[start:stop])
