"""The cost model: arithmetic with answers that can be reckoned by hand."""

from __future__ import annotations

import pytest

from bigdl.orca.learn.costs import Compute, CostModel, Line, Memory, Network, break_even


def test_a_line_through_points_that_lie_on_one():
    line = Line.through([(64, 1.64), (128, 2.28), (256, 3.56)])
    assert (line.fixed, line.each) == pytest.approx((1.0, 0.01))
    assert line.at(100) == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("points", "fixed", "each"),
    [
        ([(8, 0.5)], 0.5, 0.0),  # one point: all of it is taken for fixed
        ([(8, 0.5), (8, 0.7)], 0.6, 0.0),
        ([(1, 3.0), (2, 2.0)], 2.5, 0.0),  # falling: more rows cost nothing
        ([(10, 1.0), (20, 4.0)], 0.0, (10 / 1 + 20 / 4) / (100 + 25)),  # would begin below 0
    ],
)
def test_neither_part_of_a_line_is_negative(points, fixed, each):
    line = Line.through(points)
    assert (line.fixed, line.each) == pytest.approx((fixed, each))


def test_threads_share_a_part_of_the_work():
    compute = Compute(
        cores=4,
        one_thread=Line(fixed=0.0, each=1.0),
        all_threads=Line(fixed=0.0, each=0.4),  # 0.2 on one thread, 0.8 shared by all
    )
    seconds = [compute.seconds(10, threads) for threads in (1, 2, 4, 8)]
    assert seconds == pytest.approx([10.0, 6.0, 4.0, 4.0])


def _model(rows: int, nbytes: int) -> CostModel:
    line = Line(fixed=0.001, each=0.0001)
    compute = Compute(cores=1, one_thread=line, all_threads=line)
    return CostModel(compute=compute, gradient_bytes=nbytes, batch_rows=rows)


def test_workers_of_a_machine_read_and_write_as_many_arrays():
    memory = Memory(cores=2, cost=Line(fixed=1e-5, each=1e-9))
    sums = [memory.sum_seconds(count, 1e6) for count in (1, 2, 4)]
    assert sums == pytest.approx([0.0, 1e-5 + 1e-3, 2e-5 + 2e-3])


def test_a_network_carries_each_number_twice():
    network = Network(bits_per_s=8e9, delay_s=1e-4, message_s=1e-5)
    assert network.sum_seconds(1, 1e6) == 0
    assert network.sum_seconds(4, 1e6) == pytest.approx(2 * (1e-4 + 3e-5) + 2 * 0.75 * 1e-3)


def test_a_step_is_as_long_as_that_of_the_worker_with_most_rows():
    network = Network(bits_per_s=8e9, delay_s=0.0, message_s=0.0)
    model = _model(10, 0)
    assert model.step_s(4, network) == pytest.approx(0.001 + 3 * 0.0001)


def test_break_even_is_the_fewest_that_are_faster_than_one():
    assert break_even([(1, 1.0), (2, 1.2), (4, 0.9), (8, 0.5)], 1.0) == 4
    assert break_even([(2, 1.0), (4, 1.1)], 1.0) is None
