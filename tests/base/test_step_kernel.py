"""The step kernel in real processes: sums, counts, flags, slices, clipping."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from bigdl._base.collective import connect
from bigdl._base.collective.alone import Alone
from bigdl._base.sync import Contribution, LoneKernel, StepKernel, gather_bytes
from bigdl.errors import ConfigError
from bigdl.testing.collective import in_gang

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="worker processes")

SIZES = (3, 70_001, 1, 0, 16)
DTYPES = ("float32", "float64", "float32", "float64", "float32")


def by_hierarchy(gang):
    return connect(gang, kind="hierarchical")


def gradient(rank, index):
    random = np.random.default_rng([rank, index])
    return random.standard_normal(SIZES[index]).astype(DTYPES[index])


def global_gradient(world, index, rows):
    """Mean over rows, in float64; the last parameter is nobody's."""
    total = sum(rows[r] * gradient(r, index).astype(float) for r in range(world) if rows[r])
    return total / sum(rows)


def bring(kernel, rows, rank, *, unit):
    """Write this rank's gradients; garbage where it uses nothing."""
    used = [rows > 0] * (len(SIZES) - 1) + [False]
    for index, view in enumerate(kernel.gradients):
        view[:] = np.nan
        if used[index]:
            view[:] = gradient(rank, index) * (rows / unit)
    return Contribution(
        used=used, rows=rows, weight=float(rows), loss=rows * (rank + 1.0), unit=unit
    )


def sums(collective, sync, compress, unit):
    """Results of three steps: (gradients or pieces, outcome) of the last."""
    rows = [0, 70_000, 3, 5][-collective.world :]
    kernel = StepKernel(collective, SIZES, DTYPES, sync=sync, compress=compress)
    for _ in range(3):
        mine = bring(kernel, rows[collective.rank], collective.rank, unit=unit or sum(rows))
        outcome = kernel.reduce(mine)
    if sync == "sharded":
        return kernel.assemble([view.copy() for view in kernel.piece_gradients]), outcome
    return [view.copy() for view in kernel.gradients], outcome


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("sync", ["allreduce", "sharded"])
def test_the_mean_over_all_rows(world, sync):
    rows = [0, 70_000, 3, 5][-world:]
    results = in_gang(world, sums, sync, None, None)
    for found, outcome in results:
        assert outcome.rows == outcome.weight == sum(rows)
        expected = sum(n * (rank + 1.0) for rank, n in enumerate(rows))
        assert outcome.loss == pytest.approx(expected, rel=1e-12)
        assert outcome.used == (True, True, True, True, False)
        assert not outcome.is_stopped
        for index, array in enumerate(found):
            wanted = 0 if index == 4 else global_gradient(world, index, rows)
            limit = 1e-6 if DTYPES[index] == "float32" else 1e-14
            np.testing.assert_allclose(array, np.broadcast_to(wanted, array.shape), limit, limit)
    for found, _ in results[1:]:  # the same bits on all workers
        for array, first in zip(found, results[0][0], strict=True):
            np.testing.assert_array_equal(array, first)


@pytest.mark.parametrize("sync", ["allreduce", "sharded"])
def test_any_common_unit_gives_the_same(sync):
    exact = in_gang(2, sums, sync, None, None)
    scaled = in_gang(2, sums, sync, None, 7.0)
    for (one, _), (other, _) in zip(exact, scaled, strict=True):
        for a, b in zip(one, other, strict=True):
            np.testing.assert_allclose(a, b, 1e-5)


@pytest.mark.parametrize("sync", ["allreduce", "sharded"])
def test_compressed_between_hosts(sync):
    """float32 gradients are rounded to bf16; counts and float64 never are."""
    hosts = ["one", "other"]
    results = in_gang(2, sums, sync, "bf16", None, connect=by_hierarchy, hosts=hosts)
    rows = [3, 5]
    for found, outcome in results:
        assert outcome.rows == 8
        assert outcome.loss == 3 + 10
        for index in range(3):
            wanted = global_gradient(2, index, rows)
            limit = 2**-7 if DTYPES[index] == "float32" else 1e-14
            np.testing.assert_allclose(found[index], wanted, limit, limit)
    rounded = results[0][0][0] - global_gradient(2, 0, rows)
    assert np.abs(rounded).max() > 1e-6  # it did travel as bf16


def float32_only(collective):
    """Row counts beyond what float32 holds, and what others use."""
    kernel = StepKernel(collective, [4, 4], ["float32"] * 2)
    rank = collective.rank
    kernel.gradients[rank][:] = 1.0
    used = [rank == 0, rank == 1]
    mine = Contribution(used=used, rows=(1 << 25) + 1, weight=1.0, unit=2.0, stop=rank == 1)
    outcome = kernel.reduce(mine)
    values = [view.tolist() for view in kernel.gradients]
    nobody = kernel.reduce(Contribution(used=[False, False]))
    return outcome, values, nobody


def test_counts_flags_and_branches():
    for outcome, values, nobody in in_gang(2, float32_only):
        assert outcome.rows == 2 * ((1 << 25) + 1)
        assert outcome.is_stopped
        assert outcome.used == (True, True)
        assert values == [[1.0] * 4, [1.0] * 4]  # (1 + 0) * unit / (1 + 1)
        assert nobody.rows == 0
        assert not nobody.is_stopped
        assert nobody.used == (False, False)


def sharded_steps(collective):
    """Plain gradient descent on pieces; the weights that all end with."""
    kernel = StepKernel(collective, SIZES, DTYPES, sync="sharded")
    for index, weights in enumerate(kernel.weights):
        weights[:] = index
    for _ in range(2):
        kernel.reduce(bring(kernel, 2, collective.rank, unit=2 * collective.world))
        for weight, grad in zip(kernel.piece_weights, kernel.piece_gradients, strict=True):
            weight -= grad
        kernel.gather_weights()
    elements = sum(piece.stop - piece.start for piece in kernel.pieces)
    return [weights.copy() for weights in kernel.weights], elements


def test_slices_are_updated_by_their_owners():
    results = in_gang(3, sharded_steps)
    assert sum(elements for _, elements in results) == sum(SIZES)
    for found, _ in results:
        for index, weights in enumerate(found):
            grad = 0 if index == 4 else global_gradient(3, index, [2, 2, 2])
            wanted = np.broadcast_to(index - 2.0 * grad, weights.shape)
            np.testing.assert_allclose(weights, wanted, 1e-5, 1e-5)


def clipped(collective, sync):
    options = {"sync": sync, "clip_norm": 2.0, "clip_value": 1.0}
    kernel = StepKernel(collective, [2, 1], ["float32", "float64"], **options)
    for view, values in zip(kernel.gradients, ([0.0, 6.0], [8.0]), strict=True):
        view[:] = np.array(values) / collective.world  # the sum: norm 10, then 1.2 and 1.6
    mine = Contribution(used=[True, True], rows=1, weight=1.0, unit=float(collective.world))
    outcome = kernel.reduce(mine)
    if sync == "sharded":
        return outcome.norm, [v.tolist() for v in kernel.assemble(kernel.piece_gradients)]
    return outcome.norm, [v.tolist() for v in kernel.gradients]


@pytest.mark.parametrize("sync", ["allreduce", "sharded"])
def test_clipping_is_of_the_global_gradient(sync):
    for norm, values in in_gang(2, clipped, sync):
        assert norm == pytest.approx(10.0, rel=1e-6)
        assert values == [[0.0, 1.0], [1.0]]  # both beyond clip_value after the norm's factor


def unequal(collective):
    kernel = StepKernel(collective, [4 + 100 * collective.rank], ["float32"])
    kernel.reduce(Contribution(used=[False]))


def test_workers_with_other_parameters_are_told():
    results = in_gang(2, unequal)
    assert any("do not do the same" in str(error) for error in results)


def gathered(collective):
    lengths = (0, 3, 5000)
    payload = bytes([collective.rank]) * lengths[collective.rank]
    return [(len(one), set(one)) for one in gather_bytes(collective, payload)]


def test_gather_bytes():
    for found in in_gang(3, gathered):
        assert found == [(0, set()), (3, {1}), (5000, {2})]


def test_one_worker_keeps_its_own_arrays():
    kernel = LoneKernel(clip_norm=1.0)
    array = np.array([6.0, 8.0])  # for weight 4 at unit 2: the mean is 3, 4, its norm 5
    mine = Contribution(used=[True], rows=2, weight=4.0, loss=8.0, unit=2.0)
    outcome = kernel.reduce(mine, lambda: [array])
    assert outcome.norm == pytest.approx(5.0)
    np.testing.assert_allclose(array, [0.6, 0.8], 1e-6)


def test_one_worker_touches_nothing_without_need():
    def fail():
        raise AssertionError("asked")

    outcome = LoneKernel().reduce(Contribution(used=[True], rows=2, weight=3.0, unit=3.0), fail)
    assert outcome.rows == 2


@pytest.mark.parametrize("bad", [np.inf, np.nan, 1e30])
def test_what_has_diverged_stays_so_without_a_warning(bad):
    kernel = StepKernel(Alone(), [2], ["float32"], clip_norm=1.0)
    kernel.gradients[0][:] = bad, 1.0
    outcome = kernel.reduce(Contribution(used=[True], rows=1, weight=3.0, loss=1e300))
    assert not np.isfinite(outcome.norm)
    assert outcome.loss == np.inf
    assert not np.isclose(kernel.gradients[0], [bad / 3, 1 / 3]).all()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"sync": "shard"}, "sync='shard'"),
        ({"compress": "fp8"}, "compress='fp8'"),
        ({"clip_norm": 0}, "clip_norm=0"),
        ({"clip_value": -1.0}, "clip_value=-1.0"),
        ({"dtypes": ["float16"]}, "float16"),
    ],
)
def test_misuse(options, text):
    with pytest.raises(ConfigError, match=text):
        StepKernel(Alone(), [1], **{"dtypes": ["float32"], **options})
