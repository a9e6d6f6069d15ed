"""The serving side of a rendezvous: one thread, one loop, no lock held while it waits.

Standard library only. ``rendezvous`` tells the whole story and has everything that others use.
"""

from __future__ import annotations

import contextlib
import json
import logging
import selectors
import socket
import struct
import threading
import time
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from bigdl._base import wire
from bigdl._base.errors import ConfigError
from bigdl._base.gang import (
    ABORT,
    ABSENT,
    BYE,
    CALL_ROLL,
    CALLED,
    CHALLENGE,
    FAILED,
    GET,
    HELLO,
    HERE,
    LANGUAGE,
    LEFT,
    MEMBER_LIMIT,
    MET,
    PUT,
    REFUSED,
    ROLL_CALL_S,
    STRANGER_LIMIT,
    VALUES,
    WELCOME,
    Failure,
    Member,
    pack_values,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = ["Server"]

logger = logging.getLogger(__name__)

#: A stranger has so long to show that it knows the token.
_STRANGER_S = 10.0
_STRANGERS = 256  # more at once are not let in: somebody scans ports
#: When all is over, workers have so long to take the last message.
_FAREWELL_S = 2.0


class _Caller:
    """One connection: a stranger first, then a worker."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.frames = wire.Frames(STRANGER_LIMIT)
        self.challenge = wire.nonce()
        self.came = time.monotonic()
        self.out = bytearray()
        self.asked: int | None = None  # the rank it came with
        self.member: Member | None = None  # None while it is a stranger
        self.has_left = False
        self.is_refused = False  # to be closed when it has been told why

    @property
    def rank(self) -> int | None:
        return self.member.rank if self.member is not None else None


class _Request:
    """A worker that waits for values of the others."""

    def __init__(self, caller: _Caller, number: bytes, keys: list[str], missing: int) -> None:
        self.caller = caller
        self.number = number  # given back with the answer
        self.keys = keys
        self.missing = missing


class _RollCall:
    """Some workers ask who else waits; each is asked, and has a moment to answer."""

    def __init__(self) -> None:
        self.until = time.monotonic() + ROLL_CALL_S
        self.askers: list[_Caller] = []
        self.here: set[int | None] = set()


class Server:
    """Everything that happens at a rendezvous. ``run`` is its thread.

    Args:
        world: How many workers will come.
        address: Where to listen.
        key: The token.
        timeout_s: Until when, from now, all must have come.
    """

    def __init__(self, world: int, address: str, key: bytes, timeout_s: float) -> None:
        self._world = world
        self._key = key
        self._timeout_s = timeout_s
        self._deadline = time.monotonic() + timeout_s
        self._callers: dict[socket.socket, _Caller] = {}
        self._joined: list[_Caller] = []  # in the order in which they came
        self._values: dict[str, tuple[bytes, int]] = {}  # and how many reads are left
        self._wanted: dict[str, list[_Request]] = {}  # by key that has not come yet
        self._closing = False
        self._asked_abort: str | None = None
        self._roll: _RollCall | None = None
        self.failure: Failure | None = None
        self.members: tuple[Member, ...] = ()
        #: Set when all have come, or never will.
        self.settled = threading.Event()
        #: Set when all have left, or something has failed.
        self.over = threading.Event()
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        try:
            self._door = socket.create_server((address, 0), family=family, backlog=world + 16)
        except OSError as exc:
            raise ConfigError(
                f"Cannot listen at {address}: {exc}. Give one of this machine's own addresses."
            ) from exc
        self._door.setblocking(False)
        self.port: int = self._door.getsockname()[1]
        self._woken, self._wakes = socket.socketpair()
        self._wakes.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._door, selectors.EVENT_READ)
        self._selector.register(self._woken, selectors.EVENT_READ)

    # --- asked from other threads ---

    def ask_abort(self, words: str) -> None:
        self._asked_abort = words
        self._wake()

    def ask_close(self) -> None:
        self._closing = True
        self._wake()

    def _wake(self) -> None:
        with contextlib.suppress(OSError):  # full: it wakes anyway; closed: it has ended
            self._wakes.send(b"!")

    # --- the thread ---

    def run(self) -> None:
        try:
            while not self._closing:
                self._turn()
                self._look_at_clock()
            self._say_farewell()
        finally:
            if self.failure is None and not self.members:
                self.failure = Failure(
                    kind="stopped", rank=None, text="The rendezvous was closed before all came."
                )
            self.settled.set()
            self.over.set()
            for end in (*self._callers, self._door, self._woken, self._wakes):
                end.close()
            self._selector.close()

    def _turn(self, limit_s: float | None = None) -> None:
        """Wait for something to happen and do what it asks for."""
        for key, events in self._selector.select(self._patience() if limit_s is None else limit_s):
            if key.fileobj is self._door:
                self._let_in()
            elif key.fileobj is self._woken:
                self._woken.recv(4096)
                if self._asked_abort is not None:
                    words = f"The run was stopped: {self._asked_abort}"
                    self._fail(Failure(kind="stopped", rank=None, text=words))
            else:
                caller = self._callers.get(key.fileobj)  # type: ignore[call-overload]
                if caller is not None and events & selectors.EVENT_READ:
                    self._read(caller)
                if caller is not None and events & selectors.EVENT_WRITE:
                    self._flush(caller)

    def _patience(self) -> float | None:
        ends = [caller.came + _STRANGER_S for caller in self._strangers()]
        if not self.settled.is_set():
            ends.append(self._deadline)
        if self._roll is not None:
            ends.append(self._roll.until)
        return max(0.0, min(ends) - time.monotonic()) + 0.001 if ends else None

    def _strangers(self) -> list[_Caller]:
        return [caller for caller in self._callers.values() if caller.member is None]

    def _look_at_clock(self) -> None:
        now = time.monotonic()
        for caller in self._strangers():
            if now >= caller.came + _STRANGER_S:
                self._drop(caller)
        if not self.settled.is_set() and now >= self._deadline:
            self._fail(Failure(kind="late", rank=None, text=self._who_is_missing()))
        if self._roll is not None and now >= self._roll.until:
            self._end_roll_call(self._roll)

    def _who_is_missing(self) -> str:
        came = [caller.asked for caller in self._joined if caller.asked is not None]
        start = f"Not all {self._world} workers came to the rendezvous in {self._timeout_s:g} s: "
        if len(came) < len(self._joined):
            return start + f"{len(self._joined)} came. Did the others start?"
        missing = [rank for rank in range(self._world) if rank not in came]
        return start + (
            f"{_ranks(sorted(came))} came, {_ranks(missing)} did not. "
            "Did they start, and can they reach this address?"
        )

    def _say_farewell(self) -> None:
        here = [caller for caller in self._joined if not caller.has_left]
        if here and self.failure is None:
            words = "The run was stopped: its rendezvous was closed."
            self._fail(Failure(kind="stopped", rank=None, text=words))
        end = time.monotonic() + _FAREWELL_S
        while any(caller.out for caller in self._callers.values()) and time.monotonic() < end:
            self._turn(0.05)

    # --- connections ---

    def _let_in(self) -> None:
        try:
            sock, _ = self._door.accept()
        except OSError:  # it has gone again, or this process is out of file descriptors
            return
        if len(self._strangers()) >= _STRANGERS:
            sock.close()
            return
        sock.setblocking(False)
        wire.settle(sock)
        caller = self._callers[sock] = _Caller(sock)
        self._selector.register(sock, selectors.EVENT_READ)
        self._say(caller, CHALLENGE, caller.challenge)

    def _read(self, caller: _Caller) -> None:
        try:
            received = caller.sock.recv(1 << 20)
        except BlockingIOError:
            return
        except OSError:
            received = b""
        if not received:
            self._gone(caller)
            return
        caller.frames.feed(received)
        try:
            for kind, payload in caller.frames:
                if caller.is_refused or caller.sock not in self._callers:
                    return
                if caller.member is None:
                    self._greet(caller, kind, payload)
                else:
                    self._obey(caller, kind, payload)
        except (wire.FrameError, ValueError, KeyError, TypeError, struct.error) as exc:
            logger.debug("A caller did not make sense: %s", exc)
            self._gone(caller)

    def _say(self, caller: _Caller, kind: int, payload: bytes = b"") -> None:
        caller.out += wire.frame(kind, payload)
        self._flush(caller)

    def _flush(self, caller: _Caller) -> None:
        if caller.sock not in self._callers:
            return
        try:
            sent = caller.sock.send(caller.out) if caller.out else 0
        except BlockingIOError:
            sent = 0
        except OSError:
            caller.out.clear()
            return  # its end is read in a moment
        del caller.out[:sent]
        if caller.is_refused and not caller.out:
            self._drop(caller)
            return
        writes = selectors.EVENT_WRITE if caller.out else 0
        self._selector.modify(caller.sock, selectors.EVENT_READ | writes)

    def _drop(self, caller: _Caller) -> None:
        if self._callers.pop(caller.sock, None) is not None:
            self._selector.unregister(caller.sock)
            caller.sock.close()

    def _gone(self, caller: _Caller) -> None:
        """A connection has ended; of a worker that had not said good-bye it is a failure."""
        self._drop(caller)
        if caller.member is None or caller.has_left:
            return
        who = f"Worker {caller.asked}" if caller.asked is not None else "A worker"
        self._fail(
            Failure(
                kind="lost",
                rank=caller.asked,
                text=f"{who} of {self._world} ({caller.member}) is gone: its connection to the "
                "rendezvous broke off without a word.",
                host=caller.member.node,
            )
        )

    # --- strangers ---

    def _greet(self, caller: _Caller, kind: int, payload: bytes) -> None:
        """Let a stranger in who knows the token."""
        theirs = payload[: wire.NONCE_BYTES]
        body = payload[wire.NONCE_BYTES + wire.PROOF_BYTES :]
        shown = payload[wire.NONCE_BYTES : wire.NONCE_BYTES + wire.PROOF_BYTES]
        expected = wire.proof(self._key, LANGUAGE, b"worker", caller.challenge, theirs, body)
        if kind != HELLO or not wire.same(shown, expected):
            self._refuse(caller, "the worker's token is wrong")
            return
        content = json.loads(body)
        rank = content["rank"]
        twin = next((one for one in self._joined if rank is not None and one.asked == rank), None)
        if twin is not None:
            self._refuse(caller, f"rank {rank} is taken by {twin.member}")
        elif len(self._joined) == self._world:
            self._refuse(caller, f"all {self._world} workers are there")
        elif rank is not None and not 0 <= rank < self._world:
            self._refuse(caller, f"rank {rank} is none of 0 … {self._world - 1}")
        else:
            self._accept(caller, theirs, content)

    def _refuse(self, caller: _Caller, why: str) -> None:
        logger.debug("Refused a caller: %s", why)
        caller.is_refused = True
        self._say(caller, REFUSED, why.encode())

    def _accept(self, caller: _Caller, theirs: bytes, content: dict[str, Any]) -> None:
        rank = content.pop("rank")
        caller.asked = rank
        caller.member = Member(rank=-1 if rank is None else rank, **content)
        caller.frames.limit = MEMBER_LIMIT
        answer = wire.proof(self._key, LANGUAGE, b"rendezvous", theirs, caller.challenge)
        self._say(caller, WELCOME, answer)
        if self.failure is not None:
            self._say(caller, FAILED, json.dumps(asdict(self.failure)).encode())
            return
        self._joined.append(caller)
        if len(self._joined) == self._world:
            self._meet()

    def _meet(self) -> None:
        """All have come: settle the ranks and tell everybody."""
        asked = [caller.asked for caller in self._joined]
        if None in asked and any(rank is not None for rank in asked):
            text = "Some workers came with a rank and some without: give all a rank, or none."
            self._fail(Failure(kind="stopped", rank=None, text=text))
            return
        order: Callable[[_Caller], int] = lambda caller: caller.asked or 0  # noqa: E731
        if None in asked:
            hosts: dict[str, int] = {}  # neighbours share a host
            for caller in self._joined:
                hosts.setdefault(_member(caller).host, len(hosts))
            order = lambda caller: hosts[_member(caller).host]  # noqa: E731
        self._joined.sort(key=order)
        for rank, caller in enumerate(self._joined):
            caller.asked = rank
            caller.member = replace(_member(caller), rank=rank)
        self.members = tuple(_member(caller) for caller in self._joined)
        everyone = [asdict(member) for member in self.members]
        for caller in self._joined:
            content = {"rank": caller.rank, "members": everyone}
            self._say(caller, MET, json.dumps(content).encode())
        self.settled.set()

    # --- workers ---

    def _obey(self, caller: _Caller, kind: int, payload: bytes) -> None:
        if kind == PUT:
            reads, length = struct.unpack_from("!II", payload)
            start = struct.calcsize("!II")
            key = payload[start : start + length].decode()
            self._values[key] = payload[start + length :], reads or -1
            for request in self._wanted.pop(key, ()):
                request.missing -= 1
                self._answer(request)
        elif kind == GET:
            keys = json.loads(payload[4:])
            missing = [key for key in keys if key not in self._values]
            request = _Request(caller, payload[:4], keys, len(missing))
            for key in missing:
                self._wanted.setdefault(key, []).append(request)
            self._answer(request)
        elif kind == ABORT:
            failure = Failure(**json.loads(payload))
            if failure.kind == "raised":
                text = f"Worker {caller.asked} of {self._world} ({caller.member}) failed: "
                host = _member(caller).node
                failure = replace(failure, rank=caller.asked, text=text + failure.text, host=host)
            self._fail(failure)
        elif kind == CALL_ROLL:
            if self._roll is None:
                self._roll = _RollCall()
                self._tell_all(CALLED)
            self._roll.askers.append(caller)
        elif kind == HERE:
            if self._roll is not None:
                self._roll.here.add(caller.rank)
                if not self._absent(self._roll):
                    self._end_roll_call(self._roll)
        elif kind == BYE:
            if not self.members:
                self._gone(caller)  # it did not wait for the others
                return
            caller.has_left = True
            self._tell_all(LEFT, int(caller.rank or 0).to_bytes(4, "big"))
            if all(one.has_left for one in self._joined):
                self.over.set()

    def _absent(self, roll: _RollCall) -> list[int]:
        return [
            member.rank
            for member, caller in zip(self.members, self._joined, strict=True)
            if not caller.has_left and member.rank not in roll.here
        ]

    def _end_roll_call(self, roll: _RollCall) -> None:
        self._roll = None
        absent = json.dumps(self._absent(roll)).encode()
        for caller in roll.askers:
            self._say(caller, ABSENT, absent)

    def _answer(self, request: _Request) -> None:
        """Give a worker its values if all of them have come."""
        if request.missing == 0:
            values = pack_values(map(self._take, request.keys))
            self._say(request.caller, VALUES, request.number + values)

    def _take(self, key: str) -> bytes:
        value, reads = self._values[key]
        if reads == 1:
            del self._values[key]
        elif reads > 1:
            self._values[key] = value, reads - 1
        return value

    def _fail(self, failure: Failure) -> None:
        """The first failure is everybody's; what follows from it is nobody's news."""
        if self.failure is None:
            self.failure = failure
            self.settled.set()
            self.over.set()
            self._tell_all(FAILED, json.dumps(asdict(failure)).encode())

    def _tell_all(self, kind: int, payload: bytes = b"") -> None:
        for caller in list(self._joined):
            self._say(caller, kind, payload)


def _member(caller: _Caller) -> Member:
    if caller.member is None:
        raise KeyError("a stranger among the workers")
    return caller.member


def _ranks(ranks: Iterable[int]) -> str:
    """Ranks as text: "0, 2"; long lists are cut."""
    ranks = list(ranks)
    shown = ", ".join(map(str, ranks[:32])) + (" …" if len(ranks) > 32 else "")
    return shown or "none"
