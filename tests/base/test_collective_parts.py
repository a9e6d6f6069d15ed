"""What the collectives are made of, each by itself, and how they come together."""

from __future__ import annotations

import itertools
import os
import select
import socket
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigdl._base.collective import COLLECTIVES, connect
from bigdl._base.collective.alone import Alone
from bigdl._base.collective.arithmetic import add_in_order, from_bf16, split, to_bf16
from bigdl._base.collective.links import accept_all, mesh, reach
from bigdl._base.collective.room import Room
from bigdl._base.collective.segment import Segment
from bigdl._base.collective.shared import SharedMemory
from bigdl._base.rendezvous import Rendezvous, join
from bigdl.errors import (
    ConfigError,
    ContextError,
    TimeLimitError,
    WorkerError,
)
from bigdl.testing.collective import in_gang, numbers, total

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="worker processes, /proc")


@contextmanager
def gangs(world, *, hosts=None):
    """Gangs of threads, by rank."""
    with Rendezvous(world, timeout_s=20) as rendezvous, ThreadPoolExecutor(world) as pool:
        hosts = hosts or [None] * world
        coming = [
            pool.submit(join, rendezvous.ticket, rank, host=hosts[rank]) for rank in range(world)
        ]
        made = [one.result() for one in coming]
        yield made
        for gang in made:
            gang.close()


def each(fn, items):
    with ThreadPoolExecutor(len(items)) as pool:
        return list(pool.map(fn, items))


# --- arithmetic -------------------------------------------------------------------------------


@given(n=st.integers(0, 5000), among=st.integers(1, 70), start=st.integers(0, 9))
def test_split_covers_everything_once(n, among, start):
    parts = split(n, among, start=start)
    sizes = [part.stop - part.start for part in parts]
    assert len(parts) == among
    assert parts[0].start == start
    assert all(one.stop == next_.start for one, next_ in itertools.pairwise(parts))
    assert sum(sizes) == n
    assert max(sizes) - min(sizes) <= 1


def test_terms_are_added_one_after_the_other():
    terms = [np.array([value], np.float32) for value in (1e8, 1.0, -1e8, 1.0)]
    out = np.empty(1, np.float32)
    add_in_order(terms, out)
    assert out[0] == 1.0  # ((1e8 + 1) - 1e8) + 1, where 1e8 + 1 is 1e8
    for place in range(4):  # into any of the terms
        mine = [term.copy() for term in terms]
        add_in_order(mine, mine[place], np.empty(1, np.float32))
        assert mine[place][0] == 1.0
    add_in_order(terms[:1], out)
    assert out[0] == np.float32(1e8)


def _nearest_bf16(value):
    """The nearest number of 8 bits, ties to even, found by looking at both neighbours."""
    bits = np.array([value], np.float32).view(np.uint32)[0]
    low = np.array([bits & 0xFFFF0000], np.uint32)
    high = np.array([(int(bits) & 0xFFFF0000) + 0x10000], np.uint32)
    below, above = (float(one.view(np.float32)[0]) for one in (low, high))
    if np.isinf(above):  # one step further than the largest
        above = np.copysign(2.0**128, value)
    if abs(value - below) != abs(above - value):
        nearest = low if abs(value - below) < abs(above - value) else high
    else:
        nearest = low if not int(low[0]) & 0x10000 else high
    return nearest.view(np.float32)[0]


@settings(max_examples=500)
@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_bf16_is_the_nearest(value):
    coded = np.empty(1, np.uint16)
    to_bf16(np.array([value], np.float32), coded)
    back = np.empty(1, np.float32)
    from_bf16(coded, back)
    expected = _nearest_bf16(value)
    assert back[0] == expected
    assert np.signbit(back[0]) == np.signbit(value)


def test_bf16_of_what_is_no_number():
    patterns = np.array(
        [0x7F800000, 0xFF800000, 0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF, 0x7FC00000], np.uint32
    )
    values = np.resize(patterns.view(np.float32), 100_003)  # more than a block
    coded = np.empty(values.size, np.uint16)
    to_bf16(values, coded)
    back = np.empty(values.size, np.float32)
    from_bf16(coded, back)
    np.testing.assert_array_equal(np.isnan(back), np.isnan(values))
    np.testing.assert_array_equal(back[~np.isnan(back)], values[~np.isnan(values)])


# --- which collective it is -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hosts", "kind"),
    [
        (["a"], "alone"),
        (["a", "a"], "shared"),
        (["a", "b"], "tcp"),
        (["a", "b", "b"], "hierarchical"),
    ],
)
def test_the_best_way_is_taken(hosts, kind):
    with gangs(len(hosts), hosts=hosts) as made:

        def kind_of(gang):
            with connect(gang) as collective:
                return collective.kind

        assert set(each(kind_of, made)) == {kind}
    assert COLLECTIVES.get(kind).kind == kind


def test_alone_needs_no_gang():
    with Alone() as collective:
        array = np.arange(3.0)
        assert collective.all_reduce(array) is array
        assert collective.world == 1
        assert collective.rank == 0


@pytest.mark.parametrize("options", [{"kind": "shard"}, {"timeout_s": 0}, {"timeout_s": -1.0}])
def test_misuse_of_connect(options):
    with gangs(1) as made, pytest.raises(ConfigError):
        connect(made[0], **options)


def _odd_connect(gang):
    return connect(gang, kind="tcp" if gang.rank else "shard")


def test_a_worker_that_cannot_connect_ends_it_for_all():
    one, other = in_gang(2, _kind, connect=_odd_connect)
    assert isinstance(one, ConfigError)
    assert isinstance(other, WorkerError)
    assert "No collective 'shard'" in str(other)


def _without_shared_memory(gang):
    if gang.rank == 1:
        Room._open = lambda room: ("", None)  # as on a system that cannot
    return connect(gang, kind="auto")


def _insist_on_shared_memory(gang):
    Room._open = lambda room: ("", None)
    return connect(gang, kind="shared")


def _kind(collective):
    return collective.kind, collective.all_reduce(np.ones(3)).tolist()


def test_without_shared_memory_all_turn_to_tcp():
    hosts = ["a", "a", "b", "b"]  # only the first worker of the second host could say so
    results = in_gang(3, _kind, connect=_without_shared_memory, hosts=["a", "b", "b"])
    assert results == [("tcp", [3.0] * 3)] * 3
    results = in_gang(4, _kind, connect=_insist_on_shared_memory, hosts=hosts)
    assert any(isinstance(result, ConfigError) for result in results)
    assert all("without a name (that takes Linux)" in str(result) for result in results), results


# --- meetings ---------------------------------------------------------------------------------


def _by_message(gang):
    return SharedMemory(gang, by_message=True)


def _by_tcp(gang):
    return connect(gang, kind="tcp")


def _wait_for_late(collective):
    """Seconds waited, and of processor time, for one that comes 0.5 s late."""
    collective.barrier()
    if collective.rank == 1:
        time.sleep(0.5)
    used, started = time.process_time(), time.monotonic()
    collective.barrier()
    return time.monotonic() - started, time.process_time() - used


@pytest.mark.parametrize("way", [connect, _by_message, _by_tcp])
def test_to_wait_long_costs_nothing(way):
    waited, used = in_gang(2, _wait_for_late, connect=way)[0]
    assert waited > 0.4
    assert used < 0.1


def _wake(collective):
    """Median seconds from the coming of the last to the leaving of the first."""
    delays = []
    for _ in range(25):
        times = np.zeros(2)
        if collective.rank == 1:
            time.sleep(0.01)
            times[1] = time.monotonic()
        collective.barrier()
        if collective.rank == 0:
            times[0] = time.monotonic()
        collective.all_reduce(times)
        delays.append(times[0] - times[1])
    return statistics.median(delays)


@pytest.mark.parametrize("way", [connect, _by_message, _by_tcp])
def test_a_sleeper_is_woken_not_found(way):
    """Much sooner than it would have looked by itself."""
    assert in_gang(2, _wake, connect=way)[0] < 0.025


def _count_over_the_end(collective):
    meeting = collective._room._meeting
    collective.barrier()
    collective._gang.share(b"")  # all have left it
    meeting._words[meeting._mine] = meeting._turn = 0xFFFFFFFF - 50
    collective._gang.share(b"")  # all have jumped
    for turn in range(200):
        array = np.full(3, turn + collective.rank)
        collective.all_reduce(array)
        assert (array == 2 * turn + 1).all()
    return meeting._turn < 1000


def test_counting_goes_round():
    assert in_gang(2, _count_over_the_end) == [True, True]


def test_looking_stops_when_it_does_not_pay():
    def look(collective):
        meeting = collective._room._meeting
        if collective.rank == 1:
            for _ in range(10):
                time.sleep(0.01)
                collective.barrier()
            return 0
        for _ in range(10):
            collective.barrier()
        return meeting._looks

    assert in_gang(2, look)[0] < 10


def test_more_workers_than_cores_do_not_look():
    def looks(collective):
        return collective._room._meeting._most_looks

    usable = len(os.sched_getaffinity(0))
    assert in_gang(usable + 1, looks) == [0] * (usable + 1)


# --- memory -----------------------------------------------------------------------------------


def _maps():
    return Path("/proc/self/maps").read_text().count("memfd:bigdl")


def _drop_buffers(collective):
    before = _maps()
    kept = collective.buffer(1 << 20)
    for _ in range(20):
        collective.all_reduce(collective.buffer(1 << 20).view(np.float32))
    return before, _maps(), kept.sum()


def test_a_buffer_goes_with_its_last_array():
    for before, after, _ in in_gang(2, _drop_buffers):
        assert after == before + 1


def _too_much(collective):
    with pytest.raises((ConfigError, WorkerError)) as told:
        collective.buffer(1 << 48)
    return str(told.value)


def test_too_little_memory_is_said_to_all():
    for text in in_gang(2, _too_much):
        assert "cannot share 562,949,953,421,312 bytes" in text
        assert "memory" in text


def _limited(collective):
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with pytest.raises((ConfigError, WorkerError)) as told:
        collective.buffer(1 << 22)
    return str(told.value)


def test_memory_that_the_system_refuses_is_said_to_all():
    for text in in_gang(2, _limited):
        assert "workers on this host cannot share 8,388,608 bytes" in text


def test_nobody_can_cut_the_memory_off():
    one, other = socket.socketpair()
    with gangs(2) as made, one, other, ThreadPoolExecutor(1) as pool:
        given = pool.submit(Segment.between, made[0], {1: one}, True, 1 << 16, None, stride=1)
        received = Segment.between(made[1], {0: other}, False, 1 << 16, None, stride=1)
        given.result().map[5] = 7
        assert received.map[5] == 7
        for segment in (given.result(), received):
            with pytest.raises((OSError, ValueError)):
                segment.map.resize(1 << 12)
            segment.close()


def _names_in_shared_memory(collective):
    collective.all_reduce(collective.buffer(4096).view(np.float64))
    mark = collective._gang.ticket.mark
    sockets = [line for line in Path("/proc/net/unix").read_text().splitlines() if mark in line]
    return [name for name in os.listdir("/dev/shm") if "bigdl" in name], sockets


def test_nothing_has_a_name_while_it_is_used():
    for files, sockets in in_gang(2, _names_in_shared_memory):
        assert files == []
        # the accepted ends keep the name of the door, which itself is gone
        assert all(line.split()[3] == "00000000" for line in sockets)


# --- links ------------------------------------------------------------------------------------


def test_strangers_do_not_get_a_link():
    with gangs(2) as made, socket.create_server(("127.0.0.1", 0)) as door:
        address = door.getsockname()[:2]
        strangers = [socket.create_connection(address) for _ in range(3)]
        strangers[0].sendall(b"x" * 36)  # as long as a hello
        strangers[0].sendall(b"y" * 32)  # as long as a proof
        strangers[1].close()
        strangers[2].sendall(b"GET / HTTP/1.1\r\n\r\n" * 10)
        with ThreadPoolExecutor(2) as pool:
            deadline = time.monotonic() + 30
            inside = pool.submit(accept_all, made[0], door, {1}, deadline)
            link = pool.submit(reach, made[1], 0, socket.AF_INET, address, deadline).result()
            ((rank, accepted),) = inside.result().items()
        assert rank == 1
        link.send(b"hello")
        select.select([accepted], [], [], 5)
        assert accepted.recv(10) == b"hello"
        for one in (link, accepted, *strangers):
            one.close()


def test_a_link_to_something_else_is_refused():
    with gangs(2) as made, socket.create_server(("127.0.0.1", 0)) as door:

        def pretend():
            sock, _ = door.accept()
            with sock:
                sock.recv(100)
                sock.sendall(b"z" * 64)
                sock.recv(100)

        with ThreadPoolExecutor(1) as pool:
            pool.submit(pretend)
            with pytest.raises(ContextError, match="is not worker 0 of 2"):
                reach(made[1], 0, socket.AF_INET, door.getsockname()[:2], time.monotonic() + 10)


def test_a_link_that_nobody_opens_is_late():
    with gangs(2) as made, socket.create_server(("127.0.0.1", 0)) as door:
        with pytest.raises(TimeLimitError, match="for worker 1 of 2"):
            accept_all(made[0], door, {1}, time.monotonic() + 0.3)
        with pytest.raises(TimeLimitError, match="for worker 0 of 2"):
            reach(made[1], 0, socket.AF_INET, door.getsockname()[:2], time.monotonic() + 0.3)
    with gangs(2) as made, pytest.raises(ContextError, match="cannot reach worker 0 of 2"):
        reach(made[1], 0, socket.AF_INET, ("127.0.0.1", 1), time.monotonic() + 1)


def test_a_mesh_leaves_no_open_door():
    with gangs(3) as made:
        links = each(lambda gang: mesh(gang, (0, 1, 2), None), made)
        assert [sorted(one) for one in links] == [[1, 2], [0, 2], [0, 1]]
        for one in links:
            for link in one.values():
                assert link.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) == 0
                assert link.getpeername()[0] == "127.0.0.1"
                link.close()


# --- programs beside each other ---------------------------------------------------------------


def _many_sums(collective, seed):
    found = numbers(collective.rank, 30_011, "float64", seed)
    for _ in range(50):
        found = collective.all_reduce(numbers(collective.rank, 30_011, "float64", seed))
    np.testing.assert_array_equal(found, total(collective, 30_011, "float64", seed))
    return seed


def test_programs_at_once_do_not_meet():
    with ThreadPoolExecutor(3) as pool:
        runs = [pool.submit(in_gang, 2, _many_sums, seed) for seed in range(3)]
        assert [run.result() for run in runs] == [[seed] * 2 for seed in range(3)]


def _two_collectives(collective):
    """A second one, of another kind, over the same gang."""
    with connect(collective._gang, kind="tcp") as other:
        for turn in range(20):
            array = np.full(100_000, float(turn))
            (collective if turn % 2 else other).all_reduce(array)
            assert (array == 2 * turn).all()
    return collective.all_reduce(np.ones(1)).tolist()


def test_two_collectives_of_one_gang():
    assert in_gang(2, _two_collectives) == [[2.0], [2.0]]


def test_after_an_end_every_call_says_so():
    def go_on(collective):
        collective.barrier()
        if collective.rank == 1:
            collective.abort("enough")
        for _ in range(3):
            with pytest.raises((WorkerError, ContextError), match="enough"):
                collective.all_reduce(np.ones(3))

    assert in_gang(2, go_on) == [None, None]


def test_an_interrupt_ends_it_for_all():
    def interrupted(collective):
        collective.barrier()
        if collective.rank == 0:
            import _thread
            import threading

            threading.Timer(0.3, _thread.interrupt_main).start()
            with pytest.raises(KeyboardInterrupt):
                collective.barrier()
            return "stopped"
        time.sleep(1)
        collective.barrier()  # the other had come to this one before it was stopped
        collective.barrier()
        return "went on"

    stopped, other = in_gang(2, interrupted)
    assert stopped == "stopped"
    assert isinstance(other, WorkerError)
    assert "KeyboardInterrupt" in str(other)
