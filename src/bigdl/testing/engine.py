"""What every ``Engine`` has to do, as tests: subclass ``EngineContract`` to run them.

class TestMine(EngineContract):
    @classmethod
    def open_engine(cls):
        return MyEngine.open(EngineSettings(cores=4))
"""

from __future__ import annotations

import os
import queue
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from bigdl.errors import (
    ArgumentError,
    ConfigError,
    ContextError,
    DataError,
    TimeLimitError,
    WorkerError,
    WorkerLostError,
)
from bigdl.orca.engines.base import Engine, GangSetup, Ref, Task
from bigdl.orca.engines.worker import emit

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bigdl.orca.engines.worker import WorkerContext

__all__ = ["EngineContract"]


class TwoArguments(Exception):
    """Does not survive pickling: its constructor wants more than its args."""

    def __init__(self, first: object, second: object) -> None:
        super().__init__(f"{first} and {second}")
        self.second = second


def _wait_for_ever(_: WorkerContext) -> None:
    time.sleep(600)


def _late(seconds: float) -> str:
    time.sleep(seconds)
    return "late"


class EngineContract:
    """Every engine passes these. ``open_engine`` gives one with at least 4 slots."""

    @classmethod
    def open_engine(cls) -> Engine:
        """A new engine of at least 4 slots on one node; the tests close it."""
        raise NotImplementedError(f"{cls.__name__} has to define open_engine().")

    @pytest.fixture(scope="class")
    @classmethod
    def engine(cls) -> Iterator[Engine]:
        engine = cls.open_engine()
        yield engine
        engine.close()

    @pytest.fixture(autouse=True)
    def _usable_afterwards(self, request: pytest.FixtureRequest) -> Iterator[None]:
        """Whatever a test does, the engine works after it, with all its slots."""
        yield
        if "engine" in request.fixturenames:
            engine: Engine = request.getfixturevalue("engine")
            assert engine.gang(lambda ctx: ctx.rank, engine.slots()) == list(range(engine.slots()))

    # --- what it is ---

    def test_it_has_slots_and_facts(self, engine: Engine) -> None:
        assert isinstance(engine, Engine)
        assert engine.slots() >= engine.node_slots() >= 4
        found = engine.preflight()
        assert found.faults() == []
        assert found.nodes
        assert all(node.cores >= 1 for node in found.nodes)
        for word in ("python", "bigdl", "cores", "memory_limit", "shm_free", found.nodes[0].node):
            assert word in str(found)

    # --- submit ---

    def test_a_value_comes_back_from_another_process(self, engine: Engine) -> None:
        offset = 3
        task = engine.submit(lambda x: (x + offset, os.getpid()), 4)
        assert isinstance(task, Task)
        value, pid = task.result()
        assert value == 7
        assert pid != os.getpid()
        assert task.result() == (value, pid)  # asked again

    def test_results_belong_to_their_tasks(self, engine: Engine) -> None:
        tasks = [engine.submit(lambda i: i * i, i) for i in range(12)]
        assert [task.result() for task in reversed(tasks)] == [i * i for i in range(11, -1, -1)]

    def test_tasks_run_side_by_side(self, engine: Engine) -> None:
        engine.submit(int).result()
        started = time.monotonic()
        tasks = [engine.submit(time.sleep, 1.0) for _ in range(4)]
        for task in tasks:
            task.result()
        assert time.monotonic() - started < 3.5

    def test_large_values_travel_both_ways(self, engine: Engine) -> None:
        data = np.arange(3_000_000)
        assert np.array_equal(engine.submit(lambda x: x[::-1], data).result(), data[::-1])

    def test_an_exception_keeps_its_type_and_says_where(self, engine: Engine) -> None:
        def fail() -> None:
            raise KeyError("boom")

        task = engine.submit(fail)
        for _ in range(2):
            with pytest.raises(KeyError, match="boom") as caught:
                task.result()
            cause = caught.value.__cause__
            assert type(cause) is WorkerError
            assert "in fail" in cause.traceback
            assert "KeyError: 'boom'" in str(cause)

    def test_an_exception_that_cannot_travel_arrives_as_text(self, engine: Engine) -> None:
        def fail() -> None:
            raise TwoArguments("this", "that")

        with pytest.raises(WorkerError, match="TwoArguments: this and that"):
            engine.submit(fail).result()

    def test_a_value_that_cannot_travel_is_an_error(self, engine: Engine) -> None:
        with pytest.raises(TypeError, match="pickle"):
            engine.submit(threading.Lock).result()
        with pytest.raises(TypeError, match="pickle"):
            engine.submit(id, threading.Lock())

    def test_a_class_of_main(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        mine = type("Mine", (ValueError,), {"__module__": "__main__"})
        monkeypatch.setattr(sys.modules["__main__"], "Mine", mine, raising=False)

        def give(value: int) -> Any:
            if value < 0:
                raise mine("negative")
            return mine(value)

        assert type(engine.submit(give, 1).result()) is mine
        with pytest.raises(mine, match="negative"):
            engine.submit(give, -1).result()

    def test_events_of_a_task_come_in_order(self, engine: Engine) -> None:
        def work() -> str:
            for step in range(50):
                emit({"step": step})
            return "done"

        seen: list[Any] = []
        assert engine.submit(work, on_event=seen.append).result() == "done"
        assert seen == [{"step": step} for step in range(50)]

    def test_events_come_while_it_runs(self, engine: Engine) -> None:
        def work() -> None:
            emit("begun")
            time.sleep(600)

        seen: list[Any] = []
        task = engine.submit(work, on_event=seen.append)
        deadline = time.monotonic() + 60
        while not seen and time.monotonic() < deadline:
            assert not task.poll(0.1)
        task.cancel()
        assert seen == ["begun"]

    def test_emit_outside_a_worker_does_nothing(self) -> None:
        emit("nobody listens")

    def test_a_time_limit_leaves_the_task(self, engine: Engine) -> None:
        task = engine.submit(_late, 1.5)
        with pytest.raises(TimeLimitError, match=r"0\.2 s"):
            task.result(timeout_s=0.2)
        assert task.result(timeout_s=60) == "late"

    def test_a_cancelled_task_is_gone(self, engine: Engine) -> None:
        running = engine.submit(time.sleep, 600, cores=engine.slots())
        waiting = engine.submit(time.sleep, 600, cores=engine.slots())
        running.poll(0.5)
        started = time.monotonic()
        for task in (waiting, running):
            task.cancel()
            task.cancel()
            with pytest.raises(WorkerError, match="cancelled"):
                task.result()
        assert time.monotonic() - started < 10

    def test_a_cancelled_task_that_had_ended_stays(self, engine: Engine) -> None:
        task = engine.submit(int, "7")
        assert task.result() == 7
        task.cancel()
        assert task.result() == 7

    @pytest.mark.parametrize(
        ("end", "text"),
        [
            (lambda: os.kill(os.getpid(), signal.SIGKILL), "SIGKILL"),
            (lambda: os._exit(3), "exited with code 3"),
            (lambda: sys.exit(4), "exited with code 4"),
        ],
        ids=["killed", "exited", "sys.exit"],
    )
    def test_a_lost_worker_says_how(self, engine: Engine, end: Any, text: str) -> None:
        with pytest.raises(WorkerLostError, match=text):
            engine.submit(end).result(timeout_s=60)

    def test_more_cores_than_there_are(self, engine: Engine) -> None:
        for cores in (0, engine.slots() + 1):
            with pytest.raises(ConfigError, match=f"asked {cores} cores.*offers {engine.slots()}"):
                engine.submit(int, cores=cores)

    # --- gang ---

    @pytest.mark.parametrize("workers", [1, 2, 4])
    def test_members_know_who_they_are(self, engine: Engine, workers: int) -> None:
        def look(ctx: WorkerContext, letter: str, place: int) -> tuple[Any, ...]:
            ctx.barrier()
            pids = {member.pid for member in ctx.gang.members}
            return ctx.rank, ctx.world, letter, place, len(pids), os.getpid() in pids

        found = engine.gang(look, workers, args_of=lambda rank: ("abcd"[rank], rank * 10))
        expected = [(r, workers, "abcd"[r], r * 10, workers, True) for r in range(workers)]
        assert found == expected

    @pytest.mark.parametrize("workers", [1, 3])
    def test_members_add_arrays(self, engine: Engine, workers: int) -> None:
        def add(ctx: WorkerContext) -> list[float]:
            with ctx.connect() as collective:
                return list(collective.all_reduce(np.array([1.0, 10.0**ctx.rank])))

        total = float(sum(10**rank for rank in range(workers)))
        assert engine.gang(add, workers) == [[float(workers), total]] * workers

    def test_members_have_their_cores_and_variables(self, engine: Engine) -> None:
        def look(ctx: WorkerContext) -> tuple[Any, ...]:
            return ctx.cores, os.environ["OMP_NUM_THREADS"], os.environ.get("COLOUR")

        setup = GangSetup(cores=2, env={"COLOUR": "blue"})
        assert engine.gang(look, 2, setup=setup) == [(2, "2", "blue")] * 2
        each = engine.slots() // 3
        assert engine.gang(look, 3) == [(each, str(each), None)] * 3
        assert "COLOUR" not in os.environ

    def test_events_come_with_their_rank_in_order(self, engine: Engine) -> None:
        def work(ctx: WorkerContext) -> None:
            for step in range(30):
                ctx.emit(step)
                if step % 10 == 0:
                    ctx.barrier()

        seen: list[tuple[int, int]] = []
        threads: set[int] = set()

        def listen(rank: int, event: int) -> None:
            seen.append((rank, event))
            threads.add(threading.get_ident())

        engine.gang(work, 3, on_event=listen)
        for rank in range(3):
            assert [event for who, event in seen if who == rank] == list(range(30))
        assert threads == {threading.get_ident()}

    def test_events_come_while_members_run(self, engine: Engine, tmp_path: Any) -> None:
        mark = tmp_path / "seen"

        def work(ctx: WorkerContext) -> bool:
            ctx.emit("begun")
            deadline = time.monotonic() + 30
            while not mark.exists() and time.monotonic() < deadline:
                time.sleep(0.02)
            return bool(mark.exists())

        assert engine.gang(work, 2, on_event=lambda rank, _: mark.touch()) == [True, True]

    def test_a_listener_that_raises_ends_the_gang(self, engine: Engine) -> None:
        def work(ctx: WorkerContext) -> None:
            ctx.emit(1)
            time.sleep(600)

        def listen(rank: int, event: int) -> None:
            raise LookupError("enough")

        with pytest.raises(LookupError, match="enough"):
            engine.gang(work, 2, on_event=listen)

    @pytest.mark.parametrize("culprit", [0, 2])
    def test_the_first_failure_ends_the_gang(self, engine: Engine, culprit: int) -> None:
        def fail(ctx: WorkerContext) -> None:
            if ctx.rank == culprit:
                raise ZeroDivisionError("boom")
            ctx.barrier()  # waits for ever unless the gang is ended

        started = time.monotonic()
        with pytest.raises(ZeroDivisionError, match="boom") as caught:
            engine.gang(fail, 3)
        assert time.monotonic() - started < 15
        cause = caught.value.__cause__
        assert isinstance(cause, WorkerError)
        assert (cause.rank, cause.shard) == (culprit, None)
        assert cause.host
        assert f"worker {culprit} of 3" in str(cause)
        assert "in fail" in cause.traceback

    def test_a_failure_ends_members_that_do_not_listen(self, engine: Engine) -> None:
        def fail(ctx: WorkerContext) -> None:
            if ctx.rank == 1:
                raise ZeroDivisionError("boom")
            time.sleep(600)

        started = time.monotonic()
        with pytest.raises(ZeroDivisionError):
            engine.gang(fail, 3)
        assert time.monotonic() - started < 15

    def test_a_failure_while_arguments_arrive(self, engine: Engine) -> None:
        class Bad:
            def __reduce__(self) -> Any:
                return int, ("no number",)

        with pytest.raises(ValueError, match="invalid literal"):
            engine.gang(lambda ctx, _: ctx.barrier(), 2, args_of=lambda rank: (Bad(),))

    @pytest.mark.parametrize("where", ["in python", "in a sum"])
    def test_a_killed_member_ends_the_gang(self, engine: Engine, where: str) -> None:
        def work(ctx: WorkerContext) -> None:
            with ctx.connect() as collective:
                collective.barrier()
                if ctx.rank == 1:
                    os.kill(os.getpid(), signal.SIGKILL)
                if where == "in a sum":
                    collective.all_reduce(np.zeros(1000))
                time.sleep(600)

        started = time.monotonic()
        with pytest.raises(WorkerLostError, match=r"(?s)[Ww]orker 1 of 3.*SIGKILL") as caught:
            engine.gang(work, 3)
        assert time.monotonic() - started < 15
        assert caught.value.rank == 1

    def test_a_killed_member_whose_child_holds_its_lines(self, engine: Engine) -> None:
        def work(ctx: WorkerContext) -> None:
            if ctx.rank == 1:
                if os.fork() == 0:  # it has a copy of all its parent's sockets
                    os.setsid()
                    time.sleep(30)
                    os._exit(0)
                time.sleep(0.5)
                os.kill(os.getpid(), signal.SIGKILL)
            ctx.barrier()

        started = time.monotonic()
        with pytest.raises(WorkerLostError, match=r"(?s)[Ww]orker 1 of 2.*SIGKILL") as caught:
            engine.gang(work, 2)
        assert time.monotonic() - started < 15
        assert caught.value.rank == 1

    def test_a_member_that_leaves_with_a_code(self, engine: Engine) -> None:
        def work(ctx: WorkerContext) -> None:
            if ctx.rank == 0:
                sys.exit(5)
            ctx.barrier()

        with pytest.raises(WorkerLostError, match=r"(?s)[Ww]orker 0 of 2.*code 5") as caught:
            engine.gang(work, 2)
        assert caught.value.rank == 0

    def test_a_hung_member_is_taken_for_lost(self, engine: Engine) -> None:
        def work(ctx: WorkerContext) -> None:
            ctx.emit("begun")
            if ctx.rank == 1:
                time.sleep(600)

        asked = []

        def limit_s() -> float:
            asked.append(1)
            return 3.0

        started = time.monotonic()
        with pytest.raises(WorkerLostError, match=r"[Ww]orker 1 of 2.*hung.*3 s") as caught:
            engine.gang(work, 2, setup=GangSetup(silence_s=limit_s))
        assert 3 <= time.monotonic() - started < 20
        assert caught.value.rank == 1
        assert asked

    def test_events_are_a_sign_of_life(self, engine: Engine) -> None:
        def work(ctx: WorkerContext) -> int:
            for step in range(20):
                ctx.emit(step)
                time.sleep(0.2)
            return ctx.rank

        assert engine.gang(work, 2, setup=GangSetup(silence_s=3.5)) == [0, 1]

    def test_more_workers_than_slots(self, engine: Engine) -> None:
        slots = engine.slots()
        with pytest.raises(ConfigError, match=rf"asked {slots + 1} workers.*offers {slots}"):
            engine.gang(_wait_for_ever, slots + 1)
        with pytest.raises(
            ConfigError, match=rf"asked 2 workers of {slots} cores.*offers {slots}"
        ):
            engine.gang(_wait_for_ever, 2, setup=GangSetup(cores=slots))
        for wrong in (0, -1, 1.5, True, "2"):
            with pytest.raises(ConfigError, match="cannot be"):
                engine.gang(_wait_for_ever, wrong)  # type: ignore[arg-type]

    def test_all_start_in_time_or_none(self, engine: Engine, tmp_path: Any) -> None:
        busy = engine.submit(time.sleep, 600, cores=engine.slots() - 1)
        busy.poll(0.5)
        mark = tmp_path / "started"
        started = time.monotonic()
        with pytest.raises(TimeLimitError, match=r"asked 2 workers.*3 s"):
            engine.gang(lambda ctx: mark.touch(), 2, setup=GangSetup(cores=1, start_timeout_s=3.0))
        assert 2.5 < time.monotonic() - started < 15
        busy.cancel()
        assert not mark.exists()

    def test_a_gang_waits_for_slots(self, engine: Engine) -> None:
        busy = engine.submit(time.sleep, 1.5, cores=engine.slots())
        assert engine.gang(lambda ctx: ctx.rank, 2) == [0, 1]
        assert busy.poll(30)

    def test_two_gangs_at_once(self, engine: Engine) -> None:
        def add(ctx: WorkerContext, value: float) -> float:
            with ctx.connect() as collective:
                for _ in range(20):
                    total = collective.all_reduce(np.array([value]))[0]
                return float(total)

        results: queue.SimpleQueue[tuple[float, list[float]]] = queue.SimpleQueue()

        def run(value: float) -> None:
            setup = GangSetup(cores=1)
            results.put((value, engine.gang(add, 2, args_of=lambda _: (value,), setup=setup)))

        threads = [threading.Thread(target=run, args=(value,)) for value in (1.0, 10.0)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert {results.get()[0] for _ in threads} == {1.0, 10.0}

    def test_a_wrong_setup_names_each_fault(self) -> None:
        with pytest.raises(ConfigError, match=r"cores=0.*start_timeout_s=0.*silence_s=-1"):
            GangSetup(cores=0, start_timeout_s=0, silence_s=-1)

    # --- kept values ---

    def test_values_come_back_in_order(self, engine: Engine) -> None:
        values: list[dict[str, Any]] = [
            {"shard": i, "x": np.full(1000 * (i % 3), i)} for i in range(9)
        ]
        refs = engine.scatter(values)
        assert all(isinstance(ref, Ref) for ref in refs)
        for value, again in zip(values, engine.gather(refs), strict=True):
            assert again["shard"] == value["shard"]
            assert np.array_equal(again["x"], value["x"])
        assert engine.gather([]) == []
        assert engine.map(str, []) == []

    def test_a_chain_of_maps_keeps_order(self, engine: Engine) -> None:
        def slow_first(value: int) -> int:
            time.sleep(0.3 if value == 0 else 0)
            return value + 1

        refs = engine.map(str, engine.map(slow_first, engine.scatter(range(9))))
        assert engine.gather(refs) == [str(value + 1) for value in range(9)]
        assert engine.gather(refs[::-2]) == [str(value + 1) for value in range(8, -1, -2)]

    def test_changes_in_place_stay_in_the_worker(self, engine: Engine) -> None:
        def change(values: Any) -> float:
            values += 1
            return float(values.sum())

        array = np.zeros(3)
        refs = engine.scatter([array])
        assert engine.gather(engine.map(change, refs)) == [3.0]
        assert engine.gather(engine.map(change, refs)) == [3.0]
        assert engine.gather(refs)[0].tolist() == array.tolist() == [0.0] * 3
        engine.gather(refs)[0][:] = 5
        assert engine.gather(refs)[0].tolist() == [0.0] * 3

    def test_a_failed_shard_says_which(self, engine: Engine) -> None:
        refs = engine.map(lambda value: 12 // value, engine.scatter([1, 2, 0, 4]))
        again = engine.map(str, refs)
        for some in (refs, again):
            with pytest.raises(ZeroDivisionError) as caught:
                engine.gather(some)
            cause = caught.value.__cause__
            assert isinstance(cause, WorkerError)
            assert "shard 3 of 4" in str(cause)
            assert (cause.rank, cause.shard) == (None, 2)
            assert cause.host
        assert engine.gather([again[0], again[3]]) == ["12", "3"]

    def test_a_killed_shard_says_which(self, engine: Engine) -> None:
        def work(value: int) -> int:
            if value == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return value

        refs = engine.map(work, engine.scatter([0, 1]))
        with pytest.raises(WorkerLostError, match=r"(?s)[Ss]hard 2 of 2.*SIGKILL"):
            engine.gather(refs)
        assert engine.gather(refs[:1]) == [0]

    def test_refs_are_read_in_workers(self, engine: Engine) -> None:
        refs = engine.map(lambda value: value * 2, engine.scatter([1, 2, 3]))
        assert engine.submit(lambda many: [ref.get() for ref in many], refs).result() == [2, 4, 6]

        def read(ctx: WorkerContext, ref: Ref, many: list[Ref]) -> tuple[int, int]:
            return ref.get(), sum(one.get() for one in many)

        found = engine.gang(read, 3, args_of=lambda rank: (refs[rank], refs))
        assert found == [(2, 12), (4, 12), (6, 12)]

    def test_what_a_module_holds_is_found_again(self, engine: Engine) -> None:
        def count(_: int) -> int:
            import json

            json.touched = getattr(json, "touched", 0) + 1  # type: ignore[attr-defined]
            return int(json.touched)  # type: ignore[attr-defined]

        counts = [engine.gather(engine.map(count, engine.scatter([0])))[0] for _ in range(40)]
        assert max(counts) > 1

    def test_refs_within_values_are_read_in_workers(self, engine: Engine) -> None:
        inner = engine.map(lambda value: value * 2, engine.scatter([1, 2]))
        outer = engine.scatter([inner])
        del inner
        read = engine.map(lambda refs: [ref.get() for ref in refs], outer)
        assert engine.gather(read) == [[2, 4]]

    def test_parts_are_kept_one_by_one(self, engine: Engine) -> None:
        shards = engine.split(lambda n: [n, [n] * n, {"n": n}], engine.scatter([1, 2]), 3)
        assert all(isinstance(ref, Ref) for refs in shards for ref in refs)
        exchanged = engine.scatter(list(zip(*shards, strict=True)))
        del shards
        read = engine.map(lambda refs: [ref.get() for ref in refs], exchanged)
        assert engine.gather(read) == [[1, 2], [[1], [2, 2]], [{"n": 1}, {"n": 2}]]
        assert engine.split(list, [], 2) == []
        assert engine.split(list, engine.scatter(["", ""]), 0) == [[], []]

    def test_parts_that_fail_say_so(self, engine: Engine) -> None:
        def halves(value: int) -> list[int]:
            return [12 // value] * 2

        good, bad = engine.split(halves, engine.scatter([3, 0]), 2)
        assert engine.gather(good) == [4, 4]
        with pytest.raises(ZeroDivisionError) as caught:
            engine.gather(bad[1:])
        assert "shard 2 of 2" in str(caught.value.__cause__)
        [few] = engine.split(halves, engine.scatter([3]), 3)
        with pytest.raises(DataError, match="2 values came where 3"):
            engine.gather(few[:1])

    def test_refs_of_others_are_refused(self, engine: Engine) -> None:
        with pytest.raises(ArgumentError, match=r"refs\[1\] is a int"):
            engine.map(str, [*engine.scatter([1]), 2])  # type: ignore[list-item]

    # --- its end ---

    def test_a_closed_engine_says_so(self) -> None:
        engine = self.open_engine()
        refs = engine.scatter([1])
        running = engine.submit(time.sleep, 600)
        running.poll(0.5)
        engine.close()
        engine.close()
        calls: list[Any] = [
            engine.slots,
            engine.preflight,
            lambda: engine.submit(int),
            lambda: engine.gang(_wait_for_ever, 1),
            lambda: engine.scatter([1]),
            lambda: engine.map(str, refs),
            lambda: engine.split(list, refs, 1),
            lambda: engine.gather(refs),
            running.result,
        ]
        for call in calls:
            with pytest.raises(ContextError, match="init_orca_context"):
                call()

    def test_one_that_did_nothing_closes(self) -> None:
        self.open_engine().close()
