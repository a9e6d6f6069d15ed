"""How slots are shared out to the workers of a gang."""

from __future__ import annotations

import pytest

from bigdl.errors import ConfigError
from bigdl.orca.engines.base import check_gang


@pytest.mark.parametrize(
    ("workers", "slots", "node", "grain", "each"),
    [
        (1, 8, None, 1, 8),  # one node: an equal part of it
        (3, 8, None, 1, 2),
        (8, 8, None, 1, 1),
        (4, 32, 8, 1, 8),  # four nodes of 8: a worker is on one of them
        (1, 32, 8, 1, 8),
        (2, 32, 8, 1, 8),
        (3, 32, 8, 1, 8),
        (6, 32, 8, 1, 4),
        (32, 32, 8, 1, 1),
        (2, 4, None, 2, 2),  # tasks of two cores
        (1, 6, 3, 2, 2),
    ],
)
def test_an_equal_part_of_a_node(workers, slots, node, grain, each):
    assert check_gang(workers, None, slots, node, grain) == each


@pytest.mark.parametrize(
    ("workers", "cores", "slots", "node", "grain", "words"),
    [
        (9, None, 8, None, 1, "offers 8 slots. Use at most 8 workers"),
        (3, 3, 8, None, 1, "offers 8 slots. Use at most 2 workers of 3 cores"),
        (1, 9, 32, 8, 1, "offers 32 slots, 8 a node. Use at most 8 cores each"),
        (5, 5, 32, 8, 1, "8 a node. Use at most 4 workers of 5 cores"),
        (3, None, 4, None, 2, "offers 4 slots, 2 a task. Use at most 2 workers"),
        (0, None, 4, None, 1, "whole number >= 1"),
    ],
)
def test_what_no_node_can_hold(workers, cores, slots, node, grain, words):
    with pytest.raises(ConfigError) as caught:
        check_gang(workers, cores, slots, node, grain)
    assert words in str(caught.value)
