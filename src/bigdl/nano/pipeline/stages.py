"""Values through stages of worker processes: in order, with a bounded number under way.

Knows no framework. The caller's own thread hands values from stage to stage, as bytes that it
does not open. A value enters each stage in its turn, so that a stage of one worker may keep a
state. No more values are under way than twice the workers: a slow stage slows down the reading
of the inputs, and nothing piles up.
"""

from __future__ import annotations

import os
import selectors
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bigdl._base.errors import ArgumentError, ContextError, NotReadyError
from bigdl._base.workers import Workers, rebuilt
from bigdl.nano.pipeline.seat import Seat
from bigdl.nano.pipeline.wire import pack, unpack
from bigdl.nano.pipeline.worker import FAILED

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from bigdl._base.environment import ProcessSettings
    from bigdl.nano.pipeline.wire import Message, Parts
    from bigdl.nano.pipeline.worker import Facts

__all__ = ["Stage", "Stages"]

_LOOK_S = 0.5


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What a stage does, and with which processes.

    Args:
        name: What error texts call it: "stage 'resize'".
        open_for: From the ``Workers`` that will run it, the function that gives, in a worker,
            what turns a value into the next.
        settings: How each of its workers runs.
        fds: File descriptors that the opened function takes over.
    """

    name: str
    open_for: Callable[[Workers], Callable[[], Callable[[Any], Any]]]
    settings: tuple[ProcessSettings, ...]
    fds: tuple[int, ...] = ()

    def worker(self, rank: int) -> str:
        count = len(self.settings)
        return self.name if count == 1 else f"worker {rank} of {count} of {self.name}"


class Stages:
    """Stages with their worker processes, which run until ``close``.

    Args:
        stages: In the order that values pass them.
        whole: What error texts call all of it: "pipeline".
        advice: What can be done after a worker was lost, as a sentence.
        preload: Modules that are imported once for all workers.
        env: Variables that the workers start with.

    Raises:
        Exception: What a stage's function raised when it was opened, as its own type.
        WorkerLostError: A worker died.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        *,
        whole: str,
        advice: str,
        preload: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
    ) -> None:
        self._stages = tuple(stages)
        self._whole, self._advice = whole, advice
        self._preload, self._env = tuple(preload), dict(env or {})
        self._workers: Workers | None = None
        self._opened: list[Callable[[], Callable[[Any], Any]]] = []
        self._seats: list[list[Seat | None]] = [[None] * len(s.settings) for s in self._stages]
        self._selector = selectors.DefaultSelector()
        self._run = 0
        self._turn = threading.Lock()
        self._runner: int | None = None
        self._owner = os.getpid()
        self._is_closed = False
        try:
            self._fill()
        except BaseException:
            self.close()
            raise

    def facts(self) -> list[list[Facts]]:
        """What each stage's workers have found themselves to be."""
        return [
            [seat.facts for seat in seats if seat is not None and seat.facts is not None]
            for seats in self._seats
        ]

    def run(self, inputs: Iterable[Any]) -> list[Any]:
        """What the stages make of ``inputs``, in order.

        After an error this can be called again; of the values that were under way then, nothing
        is heard any more.

        Raises:
            Exception: What a stage's function, or ``inputs``, raised; of several the one of the
                first input.
            WorkerLostError: A worker died; its place is taken by a new one at the next call.
            NotReadyError: It is closed.
        """
        if self._runner == threading.get_ident():
            raise ContextError(f"This {self._whole} is running already: its inputs come from it.")
        try:
            with self._turn:
                self._check_open()
                self._runner = threading.get_ident()
                try:
                    return self._made_of(inputs)
                finally:
                    self._runner = None
        finally:
            if self._is_closed:
                self._end()

    def _made_of(self, inputs: Iterable[Any]) -> list[Any]:
        try:
            self._fill()
            self._run += 1
            return list(self._outputs(iter(inputs)))
        except Exception:
            raise
        except BaseException:  # Ctrl-C: who knows what was cut in two
            self._dismiss()
            raise

    def close(self) -> None:
        """End the workers; calling it twice is harmless.

        A call under way, in another thread or around this one, ends with a ``NotReadyError``.
        """
        if self._owner == os.getpid():  # a fork's copy is not ours to end
            self._is_closed = True
            self._end()

    def _check_open(self) -> None:
        if self._is_closed:
            raise NotReadyError(f"This {self._whole} was closed; make it again.")

    def _end(self) -> None:
        """Give everything back, unless a call is under way: it will do that then."""
        if self._turn.acquire(blocking=False):
            try:
                self._dismiss()
                if self._workers is not None:
                    self._workers.close()
                self._selector.close()
            finally:
                self._turn.release()

    # --- workers ---

    def _fill(self) -> None:
        """Have a living worker in each place."""
        for seats in self._seats:
            for rank, seat in enumerate(seats):
                if seat is not None and seat.is_lost():
                    seat.close()
                    seats[rank] = None
        if self._workers is None or not self._workers.is_alive:
            self._dismiss()
            if self._workers is not None:
                self._workers.close()
            self._workers = Workers(preload=self._preload, env=self._env)
            self._opened = [stage.open_for(self._workers) for stage in self._stages]
        while not self._is_full():
            self._start_missing(self._workers)
            for _ in self._answers(None, is_run=False):
                pass

    def _is_full(self) -> bool:
        return all(seat is not None and seat.facts for seats in self._seats for seat in seats)

    def _start_missing(self, workers: Workers) -> None:
        for stage, opened, seats in zip(self._stages, self._opened, self._seats, strict=True):
            for rank, settings in enumerate(stage.settings):
                if seats[rank] is None:
                    seats[rank] = Seat(
                        workers,
                        stage.worker(rank),
                        rank,
                        settings,
                        opened,
                        stage.fds,
                        self._selector,
                    )

    def _all(self) -> list[Seat]:
        return [seat for seats in self._seats for seat in seats if seat is not None]

    def _dismiss(self) -> None:
        for seats in self._seats:
            for rank, seat in enumerate(seats):
                if seat is not None:
                    seats[rank] = None
                    seat.close()

    def _answers(
        self, wait_s: float | None, *, is_run: bool = True
    ) -> Iterator[tuple[Seat, Message]]:
        """What workers have answered; waits for the first, ``wait_s`` or until there is one.

        Raises:
            WorkerLostError: A worker died; one that had been in service before matters only
                while values are under way.
        """
        self._check_open()
        ready = self._selector.select(_LOOK_S if wait_s is None else wait_s)
        lost = []
        for key, events in ready:
            seat: Seat = key.data
            if events & selectors.EVENT_WRITE:
                seat.push()
            if events & selectors.EVENT_READ:
                try:
                    while (message := seat.receive()) is not None:
                        yield seat, message
                except EOFError:
                    lost.append(seat)
        if not ready and wait_s is None:
            lost = [seat for seat in self._all() if seat.is_lost()]
        for seat in lost:
            self._lose(seat, is_news=is_run or seat.facts is None)

    def _lose(self, lost: Seat, *, is_news: bool) -> None:
        """Free the place of a worker that is gone; if that is news, raise what says why."""
        error = None
        try:
            if is_news:
                error = lost.ending(self._run, self._advice)
        finally:
            for seats in self._seats:
                if lost in seats:
                    seats[seats.index(lost)] = None
            lost.close()
        if error is not None:
            raise error

    # --- values ---

    def _outputs(self, inputs: Iterator[Any]) -> Iterator[Any]:
        flow = _Flow(self._seats, self._run, limit=2 * len(self._all()))
        place = {id(seat): stage for stage, seats in enumerate(self._seats) for seat in seats}
        while True:
            if flow.has_room:
                flow.take(inputs)
                flow.hand_out()
            has_work = flow.has_room or flow.is_done
            for seat, message in self._answers(0.0 if has_work else None):
                if message.run == self._run:
                    flow.arrived(place[id(seat)], message)
                    if message.kind == FAILED:
                        flow.failed(message, self._stages[place[id(seat)]].name, seat.rank)
                flow.hand_out()
            while flow.finished in flow.outputs:
                yield unpack(flow.outputs.pop(flow.finished))
                flow.finished += 1
            if flow.is_done:
                if flow.error is not None:
                    raise flow.error
                return


class _Flow:
    """One call's values, by the stage that they wait for."""

    def __init__(self, seats: Sequence[Sequence[Seat | None]], run: int, *, limit: int) -> None:
        self._seats, self._run, self._limit = seats, run, limit
        #: Of each stage: values that have come to it, by index, and whose turn is next.
        self._waiting: list[dict[int, Parts]] = [{} for _ in seats]
        self._turn = [0] * len(seats)
        self._taken = 0
        self._is_exhausted = False
        self._end: int | None = None  # the first input that failed
        self.outputs: dict[int, Parts] = {}
        self.finished = 0
        self.error: BaseException | None = None

    @property
    def has_room(self) -> bool:
        """Whether one more input would be sent at once: it is the caller's until then."""
        return (
            not self._is_exhausted
            and self._end is None
            and self._taken - self.finished < self._limit
            and self._free(0) is not None
        )

    @property
    def is_done(self) -> bool:
        if self._end is not None:
            return self.finished == self._end
        return self._is_exhausted and self.finished == self._taken

    def take(self, inputs: Iterator[Any]) -> None:
        """Read one input."""
        try:
            value = next(inputs)
        except StopIteration:
            self._is_exhausted = True
            return
        try:
            self._waiting[0][self._taken] = pack(value)
        except Exception as exc:
            raise ArgumentError(
                f"Input {self._taken}, a {type(value).__name__}, cannot be sent to a worker "
                f"process: {exc}"
            ) from exc
        self._taken += 1

    def hand_out(self) -> None:
        """Give workers what has come, each value in its turn."""
        for stage, waiting in enumerate(self._waiting):
            while self._turn[stage] in waiting:
                index = self._turn[stage]
                seat = self._free(stage)
                if seat is None:
                    break
                parts = waiting.pop(index)
                self._turn[stage] += 1
                if self._end is None or index < self._end:
                    seat.give(self._run, index, parts)

    def _free(self, stage: int) -> Seat | None:
        free = [seat for seat in self._seats[stage] if seat is not None and seat.has_room]
        return min(free, key=lambda seat: len(seat.busy), default=None)

    def arrived(self, stage: int, message: Message) -> None:
        """A value has left a stage."""
        if message.kind == FAILED:
            return
        if stage + 1 < len(self._seats):
            self._waiting[stage + 1][message.index] = message.parts
        else:
            self.outputs[message.index] = message.parts

    def failed(self, message: Message, name: str, rank: int) -> None:
        """A stage's function raised; only what comes before that input goes on."""
        if self._end is not None and message.index > self._end:
            return
        self._end = message.index
        where = f"{name}, for input {message.index}"
        self.error = rebuilt(unpack(message.parts), where, rank)
        for index in [index for index in self.outputs if index >= self._end]:
            del self.outputs[index]
