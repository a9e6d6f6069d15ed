"""What every ``Collective`` has to do, as tests: subclass ``CollectiveContract`` to run them.

The checks run inside worker processes, all checks of one world in one gang, since starting
processes takes longer than the checks do; each is reported as a test of its own.
"""

from __future__ import annotations

import functools
import os
import signal
import threading
import time
import traceback
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pytest

from bigdl._base.collective import Collective, connect
from bigdl._base.rendezvous import Rendezvous, join
from bigdl._base.workers import Workers
from bigdl.errors import (
    ArgumentError,
    ConfigError,
    ContextError,
    TimeLimitError,
    WorkerError,
    WorkerLostError,
)
from bigdl.testing.processes import within

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from bigdl._base.rendezvous import Gang, Ticket

__all__ = ["CheckedContract", "CollectiveContract", "GangContract", "in_gang"]

SUMMED = ("float32", "float64", "int32", "int64")
MOVED = ("uint8", "float16", "float32", "int64", "complex128", "datetime64[s]", "V12")
SIZES = (0, 1, 2, 3, 5, 7, 64, 1000, 16_384, 70_001, 300_007, 1_000_003)


def in_gang(
    world: int,
    fn: Callable[..., Any],
    *args: Any,
    connect: Callable[[Gang], Collective] = connect,
    hosts: Sequence[str | None] | None = None,
    preload: Sequence[str] = ("numpy",),
    timeout_s: float = 120.0,
    meanwhile: Callable[[Rendezvous], None] | None = None,
) -> list[Any]:
    """Run ``fn(collective, *args)`` in a process for each rank; values or exceptions, by rank.

    Fails if any shared memory or socket of theirs is left.

    Args:
        world: How many processes.
        fn: What each does.
        args: Its further arguments.
        connect: Makes the collective from the gang.
        hosts: A host's name for each rank; None = this host.
        preload: Modules that the processes have loaded.
        timeout_s: A process that takes longer is killed.
        meanwhile: Called with the rendezvous in a thread of its own, once all have started.
    """
    results: list[Any] = [None] * world
    with (
        Rendezvous(world, timeout_s=60) as rendezvous,
        Workers(preload=(*preload, "bigdl.testing.collective")) as workers,
    ):
        started = [
            workers.start(
                _member, rendezvous.ticket, rank, hosts[rank] if hosts else None, connect, fn, args
            )
            for rank in range(world)
        ]
        beside = threading.Thread(target=meanwhile, args=(rendezvous,)) if meanwhile else None
        if beside is not None:
            beside.start()
        for rank, worker in enumerate(started):
            try:
                results[rank] = worker.result(timeout_s=timeout_s)
            except Exception as exc:  # noqa: BLE001  (it is what was asked for)
                results[rank] = exc
        if beside is not None:
            beside.join()
        mark = rendezvous.ticket.mark
    assert leftovers(mark) == []
    return results


def leftovers(mark: str) -> list[str]:
    """What is still there under the name of a run: shared memory, and sockets of the kernel."""
    found = [name for name in os.listdir("/dev/shm") if mark in name]
    with open("/proc/net/unix") as file:
        found += [line.split()[-1] for line in file if mark in line]
    return found


def _member(
    ticket: Ticket,
    rank: int,
    host: str | None,
    connect: Callable[[Gang], Collective],
    fn: Callable[..., Any],
    args: tuple[Any, ...],
) -> Any:
    with join(ticket, rank, host=host) as gang, connect(gang) as collective:
        return fn(collective, *args)


# --- known answers ----------------------------------------------------------------------------


def numbers(rank: int, n: int, dtype: str, seed: int = 0) -> NDArray[Any]:
    """What a rank brings: of many magnitudes, so that the order of adding shows in the bits."""
    # repeated, as drawing millions takes longer than adding them
    return np.resize(_drawn(rank, dtype, seed), n)


@functools.cache
def _drawn(rank: int, dtype: str, seed: int) -> NDArray[Any]:
    random = np.random.default_rng([seed, rank])
    n = 8191  # no divisor in common with the sizes of pieces and blocks
    if dtype.startswith("int"):
        return random.integers(-(2**30), 2**30, n).astype(dtype)
    return (random.standard_normal(n) * 10.0 ** random.integers(-4, 5, n)).astype(dtype)


def bits(rank: int, n: int, dtype: str) -> NDArray[Any]:
    """Elements of any kind, with any bits: they are moved, not understood."""
    size = np.dtype(dtype).itemsize
    return np.resize(_drawn(rank, "int64", 0).view(np.uint8), n * size).view(dtype)


def total(collective: Collective, n: int, dtype: str, seed: int = 0) -> NDArray[Any]:
    """The sum, added by NumPy in the order that the collective states."""
    groups = []
    for group in collective.order:
        part = numbers(group[0], n, dtype, seed)
        for rank in group[1:]:
            part = part + numbers(rank, n, dtype, seed)
        groups.append(part)
    whole = groups[0]
    for part in groups[1:]:
        whole = whole + part
    return whole


def same_sum(collective: Collective, found: NDArray[Any], expected: NDArray[Any]) -> None:
    """Bit for bit where the collective is exact, else nearly."""
    if collective.is_exact or found.dtype.kind == "i":
        np.testing.assert_array_equal(found, expected, strict=True)
    else:
        scale = float(np.abs(expected).max(initial=1.0))
        limit = 1e-5 if found.dtype == np.float32 else 1e-12
        np.testing.assert_allclose(found, expected, rtol=limit, atol=limit * scale)


def same_everywhere(collective: Collective, array: NDArray[Any]) -> None:
    """All workers hold the same bits."""
    mine = array.reshape(-1).view(np.uint8)
    first = mine.copy()
    collective.broadcast(first, 0)
    differ = np.array([np.count_nonzero(mine != first)], np.int64)
    assert collective.all_reduce(differ)[0] == 0, "workers hold different bits"


# --- checks, each run by every rank -----------------------------------------------------------


def check_all_reduce(collective: Collective) -> None:
    for dtype in SUMMED:
        for n in SIZES:
            array = numbers(collective.rank, n, dtype)
            assert collective.all_reduce(array) is array
            same_sum(collective, array, total(collective, n, dtype))
            same_everywhere(collective, array)


def check_shapes(collective: Collective) -> None:
    for shape in ((), (1,), (3, 5), (2, 0, 4), (7, 11, 13)):
        n = int(np.prod(shape))
        array = numbers(collective.rank, n, "float64").reshape(shape)
        collective.all_reduce(array)
        same_sum(collective, array, total(collective, n, "float64").reshape(shape))


def check_parts(collective: Collective) -> None:
    for n in SIZES:
        parts = collective.parts(n)
        assert len(parts) == collective.world
        assert collective.part(n) == parts[collective.rank]
        owned = np.concatenate([np.arange(n)[part] for part in parts])
        np.testing.assert_array_equal(np.sort(owned), np.arange(n))


def check_reduce_scatter(collective: Collective) -> None:
    for dtype in SUMMED:
        for n in SIZES:
            array = numbers(collective.rank, n, dtype)
            own = collective.reduce_scatter(array)
            part = collective.part(n)
            same_sum(collective, own, total(collective, n, dtype)[part])
            assert own.size == 0 or np.shares_memory(own, array)
            np.testing.assert_array_equal(array[part], own)


def check_all_gather(collective: Collective) -> None:
    for dtype in MOVED:
        for n in (0, 1, 2, 3, 5, 1000, 70_001, 300_007):
            whole = bits(0, n, dtype)
            array = np.zeros(n, dtype)
            part = collective.part(n)
            array[part] = whole[part]
            assert collective.all_gather(array) is array
            assert array.tobytes() == whole.tobytes()


def check_broadcast(collective: Collective) -> None:
    for root in range(collective.world):
        for dtype in MOVED:
            for n in (0, 1, 5, 1000, 70_001, 300_007):
                array = bits(collective.rank, n, dtype)
                assert collective.broadcast(array, root) is array
                assert array.tobytes() == bits(root, n, dtype).tobytes()


def check_barrier(collective: Collective) -> None:
    for late in range(collective.world):
        if collective.rank == late:
            time.sleep(0.05)
        came = time.monotonic()
        collective.barrier()
        left = time.monotonic()
        times = np.zeros((collective.world, 2))
        times[collective.rank] = came, left
        collective.all_reduce(times)
        assert times[:, 0].max() <= times[:, 1].min(), "one left before all had come"


def check_sharded_step(collective: Collective) -> None:
    """Sums by part, an update of the own part, and the parts to all: as an optimizer does."""
    n = 100_003
    weights = np.zeros(n)
    expected = np.zeros(n)
    for step in range(5):
        own = collective.reduce_scatter(numbers(collective.rank, n, "float64", step))
        part = collective.part(n)
        weights[part] -= 0.5 * own
        collective.all_gather(weights)
        expected -= 0.5 * total(collective, n, "float64", step)
    same_sum(collective, weights, expected)
    same_everywhere(collective, weights)


def check_buffers(collective: Collective) -> None:
    n = 90_001
    for dtype in ("float32", "float64"):
        size = np.dtype(dtype).itemsize
        buffer = collective.buffer(n * size + 64)
        assert buffer.dtype == np.uint8
        assert buffer.nbytes == n * size + 64
        assert not buffer.any()
        for start, stop in ((0, n), (1, n), (3, 4), (5, 5), (17, 40_000)):
            array = buffer[64:].view(dtype)[start:stop]
            array[:] = numbers(collective.rank, stop - start, dtype)
            collective.all_reduce(array)
            expected = total(collective, stop - start, dtype)
            same_sum(collective, array, expected)
            same_everywhere(collective, array)
            array[:] = numbers(collective.rank, stop - start, dtype)
            part = collective.part(stop - start)
            same_sum(collective, collective.reduce_scatter(array), expected[part])
            collective.all_gather(array)
            same_sum(collective, array, expected)
            for root in range(collective.world):
                array[:] = collective.rank
                collective.broadcast(array, root)
                np.testing.assert_array_equal(array, np.full(stop - start, root, dtype))


def check_a_buffer_beside_an_array(collective: Collective) -> None:
    """One brings an array of its own where the others bring parts of a buffer."""
    n = 60_000
    buffer = collective.buffer(4 * n).view(np.float32)
    for odd in range(collective.world):
        for size in (1000, n):
            array = np.empty(size, np.float32) if collective.rank == odd else buffer[:size]
            for call in (collective.all_reduce, collective.reduce_scatter):
                array[:] = numbers(collective.rank, size, "float32")
                call(array)
                part = collective.part(size)
                expected = total(collective, size, "float32")
                same_sum(collective, array[part], expected[part])
            collective.all_gather(array)
            same_sum(collective, array, expected)
            array[:] = collective.rank
            collective.broadcast(array, odd)
            assert (array == odd).all()


def check_many_buffers(collective: Collective) -> None:
    held = [collective.buffer(size) for size in (0, 1, 4096, 4097, 100_000)]
    for number, buffer in enumerate(held):
        buffer[:] = number + collective.rank * 10
        collective.broadcast(buffer, collective.world - 1)
    for number, buffer in enumerate(held):
        assert (buffer == number + (collective.world - 1) * 10).all()


def check_random_calls(collective: Collective) -> None:
    """Any calls in any order, while workers come early and late."""
    calls = np.random.default_rng(7)
    moods = np.random.default_rng(collective.rank)
    buffer = collective.buffer(8 * 50_000).view(np.float64)
    for turn in range(120):
        n = int(calls.choice([0, 1, 3, 100, 5000, 40_000]))
        call = int(calls.integers(5))
        lives_in_buffer = bool(calls.integers(2))
        if moods.random() < 0.1:
            time.sleep(moods.random() * 0.003)
        array = buffer[:n] if lives_in_buffer else np.empty(n)
        array[:] = numbers(collective.rank, n, "float64", turn)
        expected = total(collective, n, "float64", turn)
        if call == 0:
            collective.barrier()
        elif call == 1:
            collective.broadcast(array, turn % collective.world)
            np.testing.assert_array_equal(
                array, numbers(turn % collective.world, n, "float64", turn)
            )
        elif call == 2:
            collective.reduce_scatter(array)
            collective.all_gather(array)
            same_sum(collective, array, expected)
        else:
            collective.all_reduce(array)
            same_sum(collective, array, expected)


def check_many_small_sums(collective: Collective) -> None:
    mine = np.full(5, collective.rank + 1.0)
    expected = collective.world * (collective.world + 1) / 2
    for turn in range(1000):
        array = mine * turn
        collective.all_reduce(array)
        assert (array == expected * turn).all(), f"turn {turn}: {array}"


def check_the_same_bits_every_time(collective: Collective) -> None:
    n = 50_021
    first = collective.all_reduce(numbers(collective.rank, n, "float32"))
    for turn in range(10):
        time.sleep(0.002 * ((collective.rank + turn) % collective.world))
        again = collective.all_reduce(numbers(collective.rank, n, "float32"))
        np.testing.assert_array_equal(again.view(np.uint32), first.view(np.uint32))


def check_bf16(collective: Collective) -> None:
    for n in (0, 1, 5, 1000, 40_000, 300_007):
        array = numbers(collective.rank, n, "float32")
        expected = total(collective, n, "float32")
        sizes = sum(
            (np.abs(numbers(rank, n, "float32")) for rank in range(collective.world)),
            start=np.zeros(n, np.float32),
        )
        own = collective.reduce_scatter(array.copy(), compress="bf16")
        collective.all_reduce(array, compress="bf16")
        # each number is rounded once, and so is the sum, to 8 bits
        assert (np.abs(array - expected) <= 2.0**-7 * sizes).all()
        part = collective.part(n)
        assert (np.abs(own - expected[part]) <= 2.0**-7 * sizes[part]).all()
        same_everywhere(collective, array)
    exact = np.arange(-100, 100, dtype=np.float32)  # all of them, and their sums, fit 8 bits
    array = exact.copy() if collective.rank == 0 else np.zeros(200, np.float32)
    np.testing.assert_array_equal(collective.all_reduce(array, compress="bf16"), exact)


def check_numbers_that_are_none(collective: Collective) -> None:
    """Infinity and NaN come through, and overflow is silent, as it is in a training step."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for compress in (None, "bf16"):
            for n in (4, 50_000):
                array = np.ones(n, np.float32)
                if collective.rank == collective.world - 1:
                    array[:3] = np.nan, np.inf, -np.inf
                collective.all_reduce(array, compress=compress)
                assert np.isnan(array[0])
                assert array[1] == np.inf
                assert array[2] == -np.inf
                assert (array[3:] == collective.world).all()
        huge = np.full(1000, np.finfo(np.float32).max)
        collective.all_reduce(huge)
        assert (huge == (np.finfo(np.float32).max if collective.world == 1 else np.inf)).all()


def check_misuse(collective: Collective) -> None:
    """What cannot be used is refused before anything is sent, and harms nothing."""
    frozen = np.zeros(4)
    frozen.flags.writeable = False
    refused: list[tuple[type[Exception], Callable[[], Any]]] = [
        (ArgumentError, lambda: collective.all_reduce([1.0, 2.0])),  # type: ignore[arg-type]
        (ArgumentError, lambda: collective.broadcast(3)),  # type: ignore[arg-type]
        (ConfigError, lambda: collective.all_reduce(np.zeros(4, np.float16))),
        (ConfigError, lambda: collective.all_reduce(np.zeros(4, bool))),
        (ConfigError, lambda: collective.all_reduce(np.zeros(4, complex))),
        (ConfigError, lambda: collective.all_reduce(np.zeros(4, ">f4"))),
        (ConfigError, lambda: collective.all_gather(np.array([{}]))),
        (ConfigError, lambda: collective.broadcast(np.zeros(3, "V0"))),
        (ConfigError, lambda: collective.all_reduce(np.zeros((4, 4))[:, ::2])),
        (ConfigError, lambda: collective.all_reduce(np.zeros((4, 3)).T)),
        (ConfigError, lambda: collective.all_reduce(frozen)),
        (ConfigError, lambda: collective.broadcast(np.zeros(1), collective.world)),
        (ConfigError, lambda: collective.broadcast(np.zeros(1), -1)),
        (ConfigError, lambda: collective.all_reduce(np.zeros(1), compress="bf16")),
        (
            ConfigError,
            lambda: collective.all_reduce(np.zeros(1, np.float32), compress="fp8"),  # type: ignore[arg-type]
        ),
        (ConfigError, lambda: collective.buffer(-1)),
        (ArgumentError, lambda: collective.buffer(1.5)),  # type: ignore[arg-type]
        (ArgumentError, lambda: collective.buffer(True)),
    ]
    for kind, call in refused:
        with pytest.raises(kind):
            call()
    assert collective.all_reduce(np.ones(1))[0] == collective.world


def check_words(collective: Collective) -> None:
    assert f"rank {collective.rank} of {collective.world}" in repr(collective)
    assert isinstance(collective.kind, str)
    flat = sorted(rank for group in collective.order for rank in group)
    assert flat == list(range(collective.world))


CHECKS = {
    name.removeprefix("check_"): fn for name, fn in globals().items() if name[:6] == "check_"
}


def _all_checks(collective: Collective) -> dict[str, str]:
    """Every check's traceback, "" where it passed; one that breaks the gang ends the rest."""
    outcome = dict.fromkeys(CHECKS, "not run: an earlier check broke the gang")
    for name, check in CHECKS.items():
        try:
            check(collective)
            outcome[name] = ""
        except (Exception, pytest.fail.Exception):  # noqa: BLE001  (told by the test)
            outcome[name] = traceback.format_exc()
    return outcome


# --- ends -------------------------------------------------------------------------------------


def _work_until_it_ends(collective: Collective, n: int, what: str, begun: str = "") -> None:
    """Sums without end; ``what`` happens on the last rank, which makes the file ``begun``."""
    array = np.ones(n, np.float32)
    turn = 0
    while True:
        turn += 1
        array[:] = 1
        collective.all_reduce(array)
        if collective.rank == collective.world - 1 and turn == 20:
            if begun:
                Path(begun).touch()
            if what == "raise":
                raise ValueError("the loss is nan")
            if what == "leave":
                return
            if what == "exit":
                os._exit(7)


def _odd_one_out(collective: Collective, what: str) -> None:
    """Each rank makes the same call, but the last."""
    is_odd = collective.rank == collective.world - 1
    collective.barrier()
    if what == "size":
        collective.all_reduce(np.ones(5 if is_odd else 6))
    elif what == "large size":
        collective.all_reduce(np.ones(500_000 if is_odd else 400_000))
    elif what == "dtype":
        collective.all_reduce(np.ones(8, np.float32 if is_odd else np.int32))
    elif what == "call" and is_odd:
        collective.barrier()
    elif what == "call":
        collective.all_gather(np.ones(8))
    elif what == "root":
        collective.broadcast(np.ones(8), int(is_odd))
    elif what == "buffer":
        collective.buffer(100 if is_odd else 200)
    collective.barrier()  # by now at the latest everyone knows


def _close_and_go_on(collective: Collective) -> list[int]:
    """Open files before and after, and that a closed collective says so."""
    buffer = collective.buffer(1000)
    collective.barrier()
    collective.close()
    collective.close()
    with pytest.raises(ContextError, match="closed"):
        collective.barrier()
    buffer[:] = 3  # still ours
    assert (buffer == 3).all()
    del buffer
    return [len(os.listdir("/proc/self/fd"))]


def _count_files(ticket: Ticket, rank: int, host: str | None, connect: Any) -> tuple[int, int]:
    before = len(os.listdir("/proc/self/fd"))
    _member(ticket, rank, host, connect, _close_and_go_on, ())
    _drop_garbage()
    return before, len(os.listdir("/proc/self/fd"))


def _drop_garbage() -> None:
    import gc

    gc.collect()


class CollectiveContract:
    """What holds for every collective. A subclass says how to connect; the rest has defaults.

    ``connect`` runs in the worker processes, so it has to be a static method.
    """

    worlds: ClassVar[tuple[int, ...]] = (1, 2, 3, 4)
    preload: ClassVar[tuple[str, ...]] = ("numpy",)
    #: Results of the checks by world, once they have run.
    _outcomes: ClassVar[dict[int, list[Any]]]

    def __init_subclass__(cls) -> None:
        cls._outcomes = {}

    @staticmethod
    def connect(gang: Gang) -> Collective:
        """Make the collective that is tested."""
        raise NotImplementedError

    def hosts(self, world: int) -> list[str | None]:
        """Names of hosts, one for each rank."""
        return [None] * world

    def run(self, world: int, fn: Callable[..., Any], *args: Any, **options: Any) -> list[Any]:
        options = {
            "connect": type(self).connect,
            "hosts": self.hosts(world),
            "preload": self.preload,
            **options,
        }
        return in_gang(world, fn, *args, **options)

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "world" in metafunc.fixturenames:
            metafunc.parametrize("world", self.worlds)

    @pytest.mark.parametrize("check", CHECKS)
    def test_check(self, world: int, check: str) -> None:
        if world not in self._outcomes:
            self._outcomes[world] = self.run(world, _all_checks)
        for rank, outcome in enumerate(self._outcomes[world]):
            if isinstance(outcome, Exception):
                raise outcome
            assert not outcome[check], f"worker {rank} of {world}:\n{outcome[check]}"

    def test_nothing_is_left(self) -> None:
        world = self.worlds[-1]
        with (
            Rendezvous(world, timeout_s=60) as rendezvous,
            Workers(preload=(*self.preload, "bigdl.testing.collective")) as workers,
        ):
            started = [
                workers.start(_count_files, rendezvous.ticket, rank, host, type(self).connect)
                for rank, host in enumerate(self.hosts(world))
            ]
            for worker in started:
                before, after = worker.result(timeout_s=60)
                assert after <= before
            mark = rendezvous.ticket.mark
        assert leftovers(mark) == []


class GangContract(CollectiveContract):
    """What holds for collectives of several workers besides: one fate for all."""

    worlds: ClassVar[tuple[int, ...]] = (2, 3, 4)
    #: How many workers there are when one of them fails.
    failing_world: ClassVar[int] = 4
    #: Failures that are noticed take at most so long.
    noticed_s: ClassVar[float] = 10.0

    @staticmethod
    def connect_impatient(gang: Gang) -> Collective:
        """As ``connect``, with a time limit of 2 s."""
        raise NotImplementedError

    @pytest.mark.parametrize("n", [100, 3_000_000])
    def test_an_exception_reaches_all(self, n: int) -> None:
        world = self.failing_world
        started = time.monotonic()
        results = self.run(world, _work_until_it_ends, n, "raise")
        assert time.monotonic() - started < self.noticed_s + 10
        assert isinstance(results[-1], ValueError)
        for result in results[:-1]:
            assert type(result) is WorkerError, result
            assert result.rank == world - 1
            assert "the loss is nan" in str(result)

    @pytest.mark.parametrize("n", [100, 3_000_000])
    @pytest.mark.parametrize("what", ["leave", "exit"])
    def test_one_that_is_gone_is_missed(self, what: str, n: int) -> None:
        world = self.failing_world
        results = self.run(world, _work_until_it_ends, n, what)
        for result in results[:-1]:
            assert isinstance(result, WorkerLostError), result
            assert result.rank == world - 1
            assert f"orker {world - 1} of {world}" in str(result)

    @pytest.mark.parametrize("n", [100, 1_000_000])
    def test_one_that_is_killed_is_missed(self, n: int) -> None:
        """Also: killed at any moment, nothing of it is left."""
        self.kill_one(self.failing_world, n, 0.1)

    def kill_one(self, world: int, n: int, after_s: float) -> float:
        """Kill a worker so long after it began; how long the others took to notice."""
        killed: list[float] = []
        victim = world - 1

        def kill(rendezvous: Rendezvous) -> None:
            pid = rendezvous.members()[victim].pid
            time.sleep(after_s)
            killed.append(time.monotonic())
            os.kill(pid, signal.SIGKILL)

        results = self.run(world, _work_until_it_ends, n, "", meanwhile=kill)
        took = time.monotonic() - killed[0]
        assert took < self.noticed_s
        for result in results:
            assert isinstance(result, WorkerLostError), result
        for result in results[:-1]:
            assert result.rank == victim
            assert f"orker {victim} of {world}" in str(result)
        return took

    def test_one_that_stands_still_is_missed_in_time(self, tmp_path: Path) -> None:
        world = self.failing_world
        victim = world - 1
        begun = tmp_path / "begun"

        def stop(rendezvous: Rendezvous) -> None:
            pid = rendezvous.members()[victim].pid
            assert within(60, begun.exists)
            os.kill(pid, signal.SIGSTOP)
            time.sleep(6)  # the limit, and as long again for the roll call of a busy machine
            os.kill(pid, signal.SIGCONT)

        results = self.run(
            world,
            _work_until_it_ends,
            100,
            "",
            str(begun),
            connect=type(self).connect_impatient,
            meanwhile=stop,
        )
        late = [result for result in results[:-1] if isinstance(result, TimeLimitError)]
        assert late, results
        assert any(f"worker {victim} of {world}" in str(result) for result in late), late
        assert all(isinstance(result, (TimeLimitError, WorkerError)) for result in results)


class CheckedContract(GangContract):
    """What holds for collectives that know what the others are about to do."""

    @pytest.mark.parametrize("what", ["size", "large size", "dtype", "call", "root", "buffer"])
    def test_different_calls(self, what: str) -> None:
        world = self.failing_world
        results = self.run(world, _odd_one_out, what)
        assert all(isinstance(result, (ConfigError, WorkerError)) for result in results), results
        told = [str(result) for result in results if isinstance(result, ConfigError)]
        assert told
        assert any("do not do the same" in text for text in told)
