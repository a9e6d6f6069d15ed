"""A worker's place among the workers of one run, and its line to their rendezvous.

Standard library only. ``rendezvous`` tells the whole story; here are the words that both sides
speak, and the worker's side.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import select
import struct
import threading
import time
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from bigdl._base import wire
from bigdl._base.errors import (
    ContextError,
    TimeLimitError,
    WorkerError,
    WorkerLostError,
)
from bigdl._base.wire import Frames, frame

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterable, Sequence

__all__ = ["Failure", "Gang", "Member", "Ticket", "pack_values"]

# Kinds of frames. From the rendezvous: a challenge, then what became of the answer.
CHALLENGE, REFUSED, WELCOME, MET, VALUES, LEFT, FAILED, CALLED, ABSENT = range(9)
# From a worker.
HELLO, PUT, GET, ABORT, BYE, CALL_ROLL, HERE = range(16, 23)

LANGUAGE = b"bigdl rendezvous 2"
STRANGER_LIMIT = 4096
MEMBER_LIMIT = 1 << 28
_WORDS_LIMIT = 16_000

#: In a roll call, workers have so long to say that they wait.
ROLL_CALL_S = 1.0


@dataclass(frozen=True, kw_only=True)
class Ticket:
    """All that a worker needs to join: give it only to the workers, and by a private way.

    Args:
        address: Where the rendezvous listens.
        port: Its port there.
        token: The run's secret.
        world: How many workers there will be.
        timeout_s: How long the first to come waits for the last.
        owner: Rank of the worker that holds the rendezvous; None if the caller holds it.
    """

    address: str
    port: int
    token: str = field(repr=False)
    world: int
    timeout_s: float
    owner: int | None = None

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Ticket:
        return cls(**json.loads(text))

    @property
    def key(self) -> bytes:
        return self.token.encode()

    @property
    def mark(self) -> str:
        """A word that is in the name of everything that this run makes; no secret."""
        return wire.proof(self.key, b"mark").hex()[:16]


@dataclass(frozen=True, kw_only=True)
class Member:
    """One worker, as all others know it.

    Args:
        rank: Its number, from 0.
        host: Equal for two workers that can share memory.
        address: Where other hosts reach it.
        pid: Its process on its host.
        node: Its host's name, for people.
    """

    rank: int
    host: str
    address: str
    pid: int
    node: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.node}"


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why a gang came to its end.

    Args:
        kind: "raised" (a worker gave up), "lost" (it is gone), "late" (it did not come in
            time), "stopped" (by the one who holds the rendezvous).
        rank: The worker it began with, if it was one.
        text: The whole story.
        host: Of that worker, by name.
    """

    kind: str
    rank: int | None
    text: str
    host: str | None = None

    def error(self) -> Exception:
        """A new exception that says it."""
        if self.kind == "late":
            return TimeLimitError(self.text)
        if self.kind == "lost":
            return WorkerLostError(self.text, rank=self.rank, host=self.host)
        return WorkerError(self.text, rank=self.rank, host=self.host)


class Gang:
    """A worker's place among the others, and its line to the rendezvous.

    Left by ``close``, or by the end of a ``with`` block; one that ends with an exception tells
    all other workers. Used by one thread at a time, but for ``abort``.
    """

    def __init__(self, ticket: Ticket, sock: socket.socket) -> None:
        self.ticket = ticket
        self.world = ticket.world
        self.rank = -1
        self.members: tuple[Member, ...] = ()
        #: Ranks that have left in good order.
        self.left: set[int] = set()
        self._sock = sock
        self._frames = Frames(STRANGER_LIMIT)
        self._failure: Failure | None = None
        self._answers: dict[int, bytes] = {}
        self._asked = 0
        self._absent: list[int] | None = None
        #: How often it has shared: the same number on all workers.
        self.shares = 0
        self._closed = False
        self._sending = threading.Lock()
        self._asking = threading.RLock()

    def __enter__(self) -> Gang:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, _: Any
    ) -> None:
        if exc is not None:
            self.abort(f"{type(exc).__name__}: {exc}")
        self.close()

    # --- who is who ---

    @property
    def hosts(self) -> tuple[tuple[int, ...], ...]:
        """Ranks by host: ascending on each, hosts in the order of their lowest rank."""
        groups: dict[str, list[int]] = {}
        for member in self.members:
            groups.setdefault(member.host, []).append(member.rank)
        return tuple(map(tuple, groups.values()))

    @property
    def me(self) -> Member:
        return self.members[self.rank]

    @property
    def key(self) -> bytes:
        """A secret of this gang alone, for lines straight from worker to worker."""
        return wire.proof(self.ticket.key, LANGUAGE, b"links")

    def name(self, rank: int) -> str:
        """A worker in words, for texts of errors."""
        return f"worker {rank} of {self.world} ({self.members[rank]})"

    # --- what all hear ---

    def abort(self, words: str) -> None:
        """End the work of all workers; each hears ``words``, this one's last."""
        self.report(Failure(kind="raised", rank=self.rank, text=words))

    def report(self, failure: Failure) -> None:
        """End the work of all workers for a reason that this one has found out."""
        if self._failure is None and not self._closed:
            text = failure.text
            if len(text) > _WORDS_LIMIT:
                text = text[:_WORDS_LIMIT] + " …"
            self._failure = replace(failure, text=text)
            self._send(ABORT, json.dumps(asdict(self._failure)).encode())

    def check(self) -> None:
        """Raise if the gang has come to its end; costs a few microseconds.

        Raises:
            WorkerLostError: A worker is gone, or the rendezvous is.
            WorkerError: A worker gave up; the text holds its own words.
        """
        self._hear(0)

    def fileno(self) -> int:
        """For waiting: readable when there is something that ``check`` should look at."""
        return self._sock.fileno()

    def wait_for(
        self, sock: socket.socket, events: int, deadline: float | None, what: str
    ) -> None:
        """Wait until ``sock`` is ready for ``events`` (as in ``select.poll``).

        Raises:
            TimeLimitError: ``deadline``, by ``time.monotonic``, has passed; ``what`` says what
                was waited for.
            WorkerError: As ``check``.
        """
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        poll.register(sock, events)
        while True:
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                raise TimeLimitError(f"Worker {self.rank} of {self.world} waited too long: {what}")
            ready = dict(poll.poll(None if left is None else left * 1000 + 1))
            if sock.fileno() in ready:
                return
            if ready:
                self.check()

    # --- small things for all ---

    def put(self, key: str, value: bytes, *, reads: int = 0) -> None:
        """Lay ``value`` down for all workers; it is dropped after ``reads`` reads (0 = never)."""
        name = key.encode()
        self._send(PUT, struct.pack("!II", reads, len(name)) + name + value)

    def get(self, keys: Sequence[str], *, timeout_s: float | None = None) -> list[bytes]:
        """The values that workers have laid down, waiting for those that are not there yet.

        Raises:
            TimeLimitError: ``timeout_s`` has passed.
            WorkerError: As ``check``.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        with self._asking:
            self._asked += 1
            asked = self._asked  # an answer to what nobody waits for any more is passed over
            self._send(GET, struct.pack("!I", asked) + json.dumps(list(keys)).encode())
            while asked not in self._answers:
                if deadline is not None and time.monotonic() >= deadline:
                    raise TimeLimitError(
                        f"Worker {self.rank} of {self.world} waited {timeout_s:g} s for "
                        f"{', '.join(keys)} of the others."
                    )
                self._hear(deadline)
            values = _values(self._answers[asked])
            self._answers.clear()
            return values

    def share(self, value: bytes, *, timeout_s: float | None = None) -> list[bytes]:
        """Every worker's ``value``, by rank. All workers have to call it, in the same order."""
        self.shares += 1
        stem = f"share/{self.shares}/"
        self.put(f"{stem}{self.rank}", value, reads=self.world)
        return self.get([f"{stem}{rank}" for rank in range(self.world)], timeout_s=timeout_s)

    def call_roll(self) -> list[int]:
        """The ranks that neither wait for anything nor have left, after about a second.

        For the story of a time limit: whoever waits in vain may itself be waited for, and what
        people want to know is where that begins.

        Raises:
            WorkerError: As ``check``.
        """
        deadline = time.monotonic() + 2 * ROLL_CALL_S
        self._absent = None
        self._send(CALL_ROLL)
        while self._absent is None and time.monotonic() < deadline:
            self._hear(deadline)
        return self._absent or []

    # --- its end ---

    def close(self) -> None:
        """Leave. Calling it twice is harmless."""
        if self._closed:
            return
        if self._failure is None:
            self._send(BYE)
        self._closed = True
        self._sock.close()

    # --- the line ---

    def _send(self, kind: int, payload: bytes = b"") -> None:
        # a broken line is no error here: what was said before it broke is still to be read
        with contextlib.suppress(OSError), self._sending:
            self._sock.sendall(frame(kind, payload))

    def _hear(self, deadline: float | None) -> None:
        """Read what has come, waiting for it until ``deadline`` (0 = not at all)."""
        if self._failure is None:
            if self._closed:
                raise ContextError("This worker has left its gang already.")
            left = None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000
            poll = select.poll()
            poll.register(self._sock, select.POLLIN)
            if poll.poll(left):
                self._read()
        if self._failure is not None:
            raise self._failure.error()

    def _read(self) -> None:
        try:
            received = self._sock.recv(1 << 20)
        except (ConnectionError, TimeoutError):
            received = b""
        if not received:
            self._failure = self._orphaned()
            return
        self._frames.feed(received)
        self._take()

    def _take(self) -> None:
        """Look at every message that has come whole."""
        for kind, payload in self._frames:
            if kind == VALUES:
                self._answers[struct.unpack_from("!I", payload)[0]] = payload[4:]
            elif kind == LEFT:
                self.left.add(int.from_bytes(payload, "big"))
            elif kind == FAILED and self._failure is None:
                self._failure = Failure(**json.loads(payload))
            elif kind == CALLED:
                self._send(HERE)
            elif kind == ABSENT:
                self._absent = json.loads(payload)
            elif kind == MET:
                self._meet(json.loads(payload))

    def _orphaned(self) -> Failure:
        owner = self.ticket.owner
        held = "the program that started this run" if owner is None else f"worker {owner}"
        if self.rank < 0:
            text = f"The rendezvous closed the line before all had come: {held} has gone."
        else:
            text = f"The line to the rendezvous broke: {held}, which held it, is gone."
        return Failure(kind="lost", rank=owner, text=text)

    # --- the way in ---

    def introduce(self, rank: int | None, host: str | None, address: str, deadline: float) -> None:
        mine = wire.nonce()
        theirs = self._expect(CHALLENGE, deadline)
        body = json.dumps(
            {
                "rank": rank,
                "host": host or wire.host_key(),
                "address": address,
                "pid": os.getpid(),
                "node": platform.node()[:200],
            }
        ).encode()
        key = self.ticket.key
        self._send(HELLO, mine + wire.proof(key, LANGUAGE, b"worker", theirs, mine, body) + body)
        answer = self._expect(WELCOME, deadline)
        if not wire.same(answer, wire.proof(key, LANGUAGE, b"rendezvous", mine, theirs)):
            raise self._strange("it does not know this run's token")
        self._frames.limit = MEMBER_LIMIT
        self._take()
        while not self.members:
            self._hear(deadline)
            if time.monotonic() >= deadline and not self.members:
                raise TimeLimitError(
                    f"The rendezvous at {self.ticket.address}:{self.ticket.port} did not say "
                    f"who has come within {self.ticket.timeout_s:g} s."
                )

    def _expect(self, wanted: int, deadline: float) -> bytes:
        """The next message, which has to be of one kind."""
        self._sock.settimeout(max(0.01, deadline - time.monotonic()))
        try:
            while True:
                for kind, payload in self._frames:
                    if kind == wanted:
                        return payload
                    if kind == FAILED:
                        raise Failure(**json.loads(payload)).error()
                    said = payload.decode(errors="replace")[:1000] if kind == REFUSED else "?"
                    raise self._strange(said)
                received = self._sock.recv(4096)
                if not received:
                    raise self._orphaned().error()
                self._frames.feed(received)
        except wire.FrameError as exc:
            raise self._strange(str(exc)) from exc
        except ConnectionError as exc:
            raise self._orphaned().error() from exc
        except TimeoutError as exc:
            if isinstance(exc, TimeLimitError):
                raise
            raise TimeLimitError(
                f"Nobody at {self.ticket.address}:{self.ticket.port} spoke within "
                f"{self.ticket.timeout_s:g} s."
            ) from exc
        finally:
            self._sock.settimeout(None)

    def _strange(self, why: str) -> ContextError:
        return ContextError(
            f"What listens at {self.ticket.address}:{self.ticket.port} is not this run's "
            f"rendezvous, or does not take this worker: {why}."
        )

    def _meet(self, content: dict[str, Any]) -> None:
        self.rank = content["rank"]
        self.members = tuple(Member(**member) for member in content["members"])


def _values(payload: bytes) -> list[bytes]:
    values, start = [], 0
    while start < len(payload):
        (length,) = struct.unpack_from("!I", payload, start)
        values.append(payload[start + 4 : start + 4 + length])
        start += 4 + length
    return values


def pack_values(values: Iterable[bytes]) -> bytes:
    """The payload of a ``VALUES`` message."""
    return b"".join(struct.pack("!I", len(value)) + value for value in values)
