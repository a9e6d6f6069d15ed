"""Who is who, and one fate for all: with threads as workers, and with processes where they die."""

from __future__ import annotations

import contextlib
import os
import pickle
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from bigdl._base import wire
from bigdl._base.gang import CHALLENGE, HELLO, LANGUAGE, MEMBER_LIMIT
from bigdl._base.nursery import emit
from bigdl._base.rendezvous import Rendezvous, Ticket, join
from bigdl._base.workers import Workers
from bigdl.errors import (
    ConfigError,
    ContextError,
    TimeLimitError,
    WorkerError,
    WorkerLostError,
)


@contextlib.contextmanager
def meeting(world, *, ranks=None, hosts=None, **options):
    """(rendezvous, gangs by rank), with a thread for each worker while they meet."""
    with Rendezvous(world, timeout_s=20, **options) as rendezvous:
        ranks = range(world) if ranks is None else ranks
        hosts = hosts or [None] * world
        with ThreadPoolExecutor(world) as pool:
            coming = [
                pool.submit(join, rendezvous.ticket, rank, host=host)
                for rank, host in zip(ranks, hosts, strict=True)
            ]
            gangs = [one.result() for one in coming]
        try:
            yield rendezvous, sorted(gangs, key=lambda gang: gang.rank)
        finally:
            for gang in gangs:
                gang.close()


def all_at_once(fn, gangs):
    with ThreadPoolExecutor(len(gangs)) as pool:
        return list(pool.map(fn, gangs))


def sockets():
    return [
        os.readlink(f"/proc/self/fd/{fd}")
        for fd in os.listdir("/proc/self/fd")
        if os.path.exists(f"/proc/self/fd/{fd}")
        and os.readlink(f"/proc/self/fd/{fd}").startswith("socket:")
    ]


def heard(gang, kind=WorkerError, limit_s=5.0):
    """The error that ends ``gang``, which has to come within the limit."""
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        select.select([gang], [], [], 0.1)
        try:
            gang.check()
        except kind as exc:
            return exc
    pytest.fail("nothing was heard")


# --- meeting ----------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2, 4])
def test_all_know_all(world):
    with meeting(world, ranks=reversed(range(world))) as (rendezvous, gangs):
        assert [gang.rank for gang in gangs] == list(range(world))
        for gang in gangs:
            assert gang.members == rendezvous.members() == gangs[0].members
            assert [member.rank for member in gang.members] == list(range(world))
            assert {member.address for member in gang.members} == {"127.0.0.1"}
            assert {member.pid for member in gang.members} == {os.getpid()}
            assert gang.hosts == (tuple(range(world)),)
            gang.check()


def test_hosts_are_groups_in_the_order_of_their_lowest_rank():
    with meeting(5, hosts=["b", "a", "b", "c", "a"]) as (_, gangs):
        assert gangs[3].hosts == ((0, 2), (1, 4), (3,))


def test_ranks_can_be_given_out_so_that_a_host_s_are_neighbours():
    with meeting(4, ranks=[None] * 4, hosts=["x", "y", "x", "y"]) as (_, gangs):
        assert [gang.rank for gang in gangs] == [0, 1, 2, 3]
        assert gangs[0].hosts == ((0, 1), (2, 3))


def test_ranks_for_some_only_are_an_error_for_all():
    with Rendezvous(2, timeout_s=10) as rendezvous:

        def come(rank):
            with pytest.raises(WorkerError, match="give all a rank, or none"):
                join(rendezvous.ticket, rank)

        all_at_once(come, [1, None])


def test_this_host_has_one_key():
    code = "from bigdl._base.wire import host_key; print(host_key(), end='')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == wire.host_key()


def test_small_things_are_shared_in_order():
    with meeting(3) as (rendezvous, gangs):
        turns = [[b"", bytes([turn]) * turn, os.urandom(100_000)] for turn in range(20)]

        def share_all(gang):
            return [gang.share(values[gang.rank]) for values in turns]

        assert all_at_once(share_all, gangs) == [turns] * 3
        assert rendezvous._server._values == {}  # each was dropped after its last reader
        assert rendezvous._server._wanted == {}


def test_a_value_is_waited_for():
    with meeting(2) as (_, gangs), ThreadPoolExecutor(1) as pool:
        got = pool.submit(gangs[0].get, ["a", "b"], timeout_s=10)
        gangs[1].put("b", b"2")
        gangs[1].put("a", b"1")
        assert got.result() == [b"1", b"2"]
        assert gangs[1].get(["b"]) == [b"2"]


def test_a_value_that_came_too_late_is_not_taken_for_another():
    with meeting(2) as (_, gangs):
        with pytest.raises(TimeLimitError, match=r"Worker 0 of 2 waited 0\.2 s for late of"):
            gangs[0].get(["late"], timeout_s=0.2)
        gangs[1].put("late", b"late")
        gangs[1].put("next", b"next")
        assert gangs[0].get(["next"], timeout_s=10) == [b"next"]


def test_many_workers():
    with meeting(40) as (_, gangs):
        shared = all_at_once(lambda gang: gang.share(str(gang.rank).encode()), gangs)
        assert shared == [[str(rank).encode() for rank in range(40)]] * 40


# --- the time limit ---------------------------------------------------------------------------


def test_the_limit_names_who_came_and_who_did_not():
    with Rendezvous(5, timeout_s=1.0) as rendezvous:
        expected = r"1\.?0? s: 1, 3 came, 0, 2, 4 did not"

        def come(rank):
            with pytest.raises(TimeLimitError, match=expected):
                join(rendezvous.ticket, rank)

        all_at_once(come, [1, 3])
        with pytest.raises(TimeLimitError, match=expected):
            rendezvous.members()
        with pytest.raises(TimeLimitError, match=expected):  # who comes too late is told as well
            join(rendezvous.ticket, 0)


def test_nobody_came():
    with (
        Rendezvous(2, timeout_s=0.3) as rendezvous,
        pytest.raises(TimeLimitError, match="none came, 0, 1 did not"),
    ):
        rendezvous.members()


def test_nobody_is_there():
    with Rendezvous(1, timeout_s=0.5) as rendezvous:
        ticket = rendezvous.ticket
    started = time.monotonic()
    with pytest.raises(TimeLimitError, match=rf"127.0.0.1:{ticket.port} could not be reached"):
        join(ticket, 0)
    assert time.monotonic() - started < 5


def test_something_else_is_there():
    with socket.create_server(("127.0.0.1", 0)) as door:
        ticket = Ticket(
            address="127.0.0.1", port=door.getsockname()[1], token="t", world=1, timeout_s=0.1
        )

        def answer(words):
            sock, _ = door.accept()
            with sock:
                sock.sendall(words)
                sock.recv(1)

        for words in (b"HTTP/1.1 400 Bad Request\r\n\r\n", wire.frame(99, b"hello")):
            with ThreadPoolExecutor(1) as pool:
                pool.submit(answer, words)
                with pytest.raises(ContextError, match="not this run's rendezvous"):
                    join(ticket, 0)


# --- who is let in ----------------------------------------------------------------------------


def test_a_wrong_token_is_refused_and_harms_nobody():
    with Rendezvous(1, timeout_s=20) as rendezvous:
        with pytest.raises(ContextError, match="the worker's token is wrong"):
            join(replace(rendezvous.ticket, token="0" * 64), 0)
        with join(rendezvous.ticket, 0) as gang:
            gang.check()


def test_a_rendezvous_that_does_not_know_the_token_is_refused():
    """A thief of the port lets everybody in, but can not show that it knows the token."""
    with socket.create_server(("127.0.0.1", 0)) as door, ThreadPoolExecutor(1) as pool:

        def pretend():
            sock, _ = door.accept()
            with sock:
                sock.sendall(wire.frame(CHALLENGE, wire.nonce()))
                sock.recv(4096)
                sock.sendall(wire.frame(2, b"\0" * wire.PROOF_BYTES))
                sock.recv(1)

        pool.submit(pretend)
        ticket = Ticket(
            address="127.0.0.1", port=door.getsockname()[1], token="t", world=1, timeout_s=5
        )
        with pytest.raises(ContextError, match="does not know this run's token"):
            join(ticket, 0)


def test_an_answer_overheard_earlier_opens_nothing():
    with Rendezvous(1, timeout_s=20) as rendezvous:
        ticket = rendezvous.ticket
        spoken = []
        with socket.create_connection((ticket.address, ticket.port)) as sock:
            frames = wire.Frames(4096)
            frames.feed(sock.recv(4096))
            ((_, challenge),) = frames
            body = b'{"rank": 0, "host": "h", "address": "a", "pid": 1, "node": "n"}'
            mine = wire.nonce()
            shown = wire.proof(ticket.key, LANGUAGE, b"worker", challenge, mine, body)
            spoken = wire.frame(HELLO, mine + shown + body)
            # not sent here, but played on another line
        with socket.create_connection((ticket.address, ticket.port)) as sock:
            sock.recv(4096)
            sock.sendall(spoken)
            assert b"token is wrong" in sock.recv(4096)


@pytest.mark.parametrize(
    "words",
    [
        b"",
        b"GET / HTTP/1.1\r\n\r\n",
        b"\xff" * 100_000,
        struct.pack("!IB", 10, HELLO) + b"x" * 10,
        struct.pack("!IB", 4096, 77) + b"x" * 4096,
    ],
    ids=["silent", "http", "long", "short hello", "unknown kind"],
)
def test_strangers_disturb_nobody(words):
    with Rendezvous(2, timeout_s=20) as rendezvous, contextlib.ExitStack() as open_lines:
        for _ in range(20):
            line = socket.create_connection((rendezvous.ticket.address, rendezvous.ticket.port))
            open_lines.enter_context(line)
            with contextlib.suppress(ConnectionError):
                line.sendall(words)
        gangs = all_at_once(lambda rank: join(rendezvous.ticket, rank), [0, 1])
        for gang in gangs:
            gang.check()
            gang.close()
        assert rendezvous.failure is None


def test_a_silent_stranger_is_shown_out(monkeypatch):
    monkeypatch.setattr("bigdl._base.rendezvous_server._STRANGER_S", 0.3)
    with Rendezvous(1, timeout_s=20) as rendezvous:
        with socket.create_connection((rendezvous.ticket.address, rendezvous.ticket.port)) as line:
            line.settimeout(5)
            line.recv(4096)
            assert line.recv(4096) == b""
        with join(rendezvous.ticket, 0):
            pass


def test_a_rank_is_given_once():
    with Rendezvous(2, timeout_s=20) as rendezvous, ThreadPoolExecutor(2) as pool:
        first = pool.submit(join, rendezvous.ticket, 1)
        while not rendezvous._server._joined:
            time.sleep(0.01)
        with pytest.raises(ContextError, match=r"rank 1 is taken by process \d+ on"):
            join(rendezvous.ticket, 1)
        with (
            join(rendezvous.ticket, 0),
            first.result(),
            pytest.raises(ContextError, match="rank 0 is taken"),
        ):
            join(rendezvous.ticket, 0)


def test_one_too_many():
    full = pytest.raises(ContextError, match="all 2 workers are there")
    with meeting(2, ranks=[None, None]) as (rendezvous, _), full:
        join(rendezvous.ticket)


def test_two_programs_at_once_never_meet():
    with meeting(2) as (one, these), meeting(2) as (other, those):
        assert one.ticket.port != other.ticket.port
        assert one.ticket.token != other.ticket.token
        with pytest.raises(ContextError, match="token is wrong"):
            join(replace(one.ticket, token=other.ticket.token), 0)
        these[0].abort("only here")
        assert "only here" in str(heard(these[1]))
        for gang in those:
            gang.check()
        assert other.failure is None


# --- one fate ---------------------------------------------------------------------------------


def test_a_worker_s_last_words_reach_all():
    with meeting(4) as (rendezvous, gangs):
        started = time.monotonic()
        gangs[2].abort("ValueError: the loss is nan")
        for gang in (gangs[0], gangs[1], gangs[3]):
            error = heard(gang)
            assert type(error) is WorkerError
            assert error.rank == 2
            assert "Worker 2 of 4" in str(error)
            assert "ValueError: the loss is nan" in str(error)
        assert time.monotonic() - started < 2
        assert rendezvous.failure.rank == 2
        with pytest.raises(WorkerError, match="the loss is nan"):
            gangs[2].check()


def test_an_exception_in_the_block_is_told():
    with meeting(2) as (_, gangs):
        with pytest.raises(ZeroDivisionError), gangs[0]:
            1 / 0  # noqa: B018
        assert "ZeroDivisionError: division by zero" in str(heard(gangs[1]))


def test_only_the_first_failure_is_told():
    with meeting(3) as (rendezvous, gangs):
        gangs[0].abort("first")
        heard(gangs[1])
        gangs[1]._failure = None  # as if it had not heard
        gangs[1].abort("second")
        assert "first" in str(heard(gangs[2]))
        assert "first" in rendezvous.failure.text


def test_long_words_are_cut():
    with meeting(2) as (_, gangs):
        gangs[0].abort("x" * 10_000_000)
        assert 10_000 < len(str(heard(gangs[1]))) < 20_000


def test_the_caller_can_end_it():
    with meeting(2) as (rendezvous, gangs):
        rendezvous.abort("Ctrl-C")
        for gang in gangs:
            error = heard(gang)
            assert "The run was stopped: Ctrl-C" in str(error)
            assert error.rank is None


def test_waiting_for_a_value_ends_with_the_gang():
    with meeting(2) as (_, gangs), ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(gangs[0].share, b"x")
        time.sleep(0.1)
        gangs[1].abort("no more")
        with pytest.raises(WorkerError, match="no more"):
            waiting.result(timeout=5)


def test_waiting_for_a_socket_ends_with_the_gang():
    one, other = socket.socketpair()
    with meeting(2) as (_, gangs), ThreadPoolExecutor(1) as pool, one, other:
        with pytest.raises(TimeLimitError, match="for a byte"):
            gangs[0].wait_for(one, select.POLLIN, time.monotonic() + 0.2, "for a byte")
        waiting = pool.submit(gangs[0].wait_for, one, select.POLLIN, None, "for a byte")
        gangs[1].abort("no more")
        with pytest.raises(WorkerError, match="no more"):
            waiting.result(timeout=5)


def test_to_leave_is_not_to_fail():
    with meeting(3) as (rendezvous, gangs):
        gangs[1].close()
        gangs[1].close()
        end = time.monotonic() + 5
        while gangs[0].left != {1} and time.monotonic() < end:
            gangs[0].check()
        gangs[0].check()
        assert gangs[0].left == {1}
        assert rendezvous.failure is None
        with pytest.raises(ContextError, match="left its gang"):
            gangs[1].check()


def test_closing_the_rendezvous_ends_a_gang_that_still_works():
    with meeting(2) as (rendezvous, gangs):
        rendezvous.close()
        rendezvous.close()
        assert "its rendezvous was closed" in str(heard(gangs[0]))


def test_closing_before_all_came():
    with ThreadPoolExecutor(1) as pool:
        with Rendezvous(2, timeout_s=20) as rendezvous:
            first = pool.submit(join, rendezvous.ticket, 0)
            while not rendezvous._server._joined:
                time.sleep(0.01)
        with pytest.raises(WorkerError, match="was closed"):
            first.result(timeout=5)
        with pytest.raises(WorkerError, match="was closed"):
            rendezvous.members()


def _stay(ticket, rank):
    gang = join(ticket, rank)
    emit(os.getpid())
    heard(gang, limit_s=60)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV])
def test_a_killed_worker_is_missed(how):
    with Rendezvous(2, timeout_s=30) as rendezvous, Workers() as workers:
        worker = workers.start(_stay, rendezvous.ticket, 1)
        with join(rendezvous.ticket, 0) as gang:
            os.kill(gang.members[1].pid, how)
            started = time.monotonic()
            error = heard(gang, WorkerLostError)
            assert time.monotonic() - started < 5
            assert error.rank == 1
            assert f"Worker 1 of 2 (process {gang.members[1].pid} on " in str(error)
            assert rendezvous.failure.kind == "lost"
        with pytest.raises(WorkerLostError):
            worker.result(timeout_s=30)


def test_a_worker_that_dies_before_all_came_ends_the_meeting_at_once():
    def come_and_go(ticket):
        threading.Thread(target=join, args=(ticket, 1), daemon=True).start()
        time.sleep(1)
        os._exit(3)

    with Rendezvous(3, timeout_s=60) as rendezvous, Workers() as workers:
        workers.start(come_and_go, rendezvous.ticket)
        with pytest.raises(WorkerLostError, match="Worker 1 of 3"):
            join(rendezvous.ticket, 0)
        with pytest.raises(WorkerLostError, match="Worker 1 of 3") as lost:
            rendezvous.members()
        assert lost.value.rank == 1


def _hold(world):
    with Rendezvous(world, timeout_s=30, owner=0) as rendezvous:
        emit(rendezvous.ticket)
        with join(rendezvous.ticket, 0) as gang:
            heard(gang, limit_s=60)


def test_a_worker_can_hold_the_rendezvous_and_is_missed_too():
    with Workers() as workers:
        worker = workers.start(_hold, 2)
        tickets = []
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(worker.result, timeout_s=60, on_event=tickets.append)
            while not tickets:
                time.sleep(0.01)
            gang = join(tickets[0], 1)
            os.kill(gang.members[0].pid, signal.SIGKILL)
            error = heard(gang, WorkerLostError)
            assert error.rank == 0
            assert "worker 0, which held it" in str(error)
            gang.close()
            with pytest.raises(WorkerLostError):
                waiting.result()


def test_an_owner_stays_until_the_others_have_left():
    tickets = []

    def own():
        with Rendezvous(2, timeout_s=20, owner=0) as rendezvous:
            tickets.append(rendezvous.ticket)
            join(rendezvous.ticket, 0).close()

    with ThreadPoolExecutor(1) as pool:
        owning = pool.submit(own)
        while not tickets:
            time.sleep(0.01)
        with join(tickets[0], 1) as gang:
            time.sleep(0.5)
            gang.check()
            assert not owning.done()
        owning.result(timeout=10)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((tickets[0].address, tickets[0].port), timeout=2)


def test_an_owner_whose_work_failed_leaves_at_once():
    with pytest.raises(ZeroDivisionError), Rendezvous(2, timeout_s=20, owner=0):
        1 / 0  # noqa: B018


def test_it_is_known_when_all_have_left():
    with meeting(2) as (rendezvous, gangs):
        gangs[0].close()
        assert not rendezvous.wait_until_left(0.2)
        gangs[1].close()
        assert rendezvous.wait_until_left(10)


# --- nothing is left --------------------------------------------------------------------------


def test_nothing_is_left():
    for _ in range(2):  # the first time may load things
        threads, lines = threading.active_count(), len(sockets())
        with meeting(3) as (rendezvous, gangs):
            assert len(sockets()) > lines
            address = (rendezvous.ticket.address, rendezvous.ticket.port)
            gangs[0].abort("over")
        assert threading.active_count() == threads
        assert len(sockets()) == lines
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address, timeout=2)


def test_it_listens_on_the_loopback_only_unless_told():
    with Rendezvous(1) as rendezvous:
        assert rendezvous._server._door.getsockname()[0] == "127.0.0.1"


def test_an_address_of_the_sixth_kind():
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6 loopback")
    with meeting(2, address="::1") as (_, gangs):
        assert gangs[0].members[1].address == "::1"


def test_the_ticket_keeps_its_secret():
    with Rendezvous(3, timeout_s=7, owner=1) as rendezvous:
        ticket = rendezvous.ticket
    assert ticket.token not in repr(ticket)
    assert len(ticket.token) == 64
    assert Ticket.from_json(ticket.to_json()) == ticket
    assert pickle.loads(pickle.dumps(ticket)) == ticket


@pytest.mark.parametrize(
    "arguments",
    [
        {"world": 0},
        {"world": 1, "timeout_s": 0},
        {"world": 1, "timeout_s": float("nan")},
        {"world": 2, "owner": 2},
        {"world": 2, "address": "192.0.2.1"},  # nobody's
        {"world": 2, "address": "no.such.host.invalid"},
    ],
)
def test_misuse(arguments):
    with pytest.raises(ConfigError):
        Rendezvous(**arguments)


@pytest.mark.parametrize("rank", [-1, 2])
def test_a_rank_out_of_range(rank):
    with Rendezvous(2) as rendezvous, pytest.raises(ConfigError, match="none of 0 … 1"):
        join(rendezvous.ticket, rank)


# --- frames -----------------------------------------------------------------------------------


def test_frames_may_come_in_any_pieces():
    sent = [(1, b""), (2, b"abc"), (255, os.urandom(5000))]
    stream = b"".join(wire.frame(kind, payload) for kind, payload in sent)
    for size in (1, 3, 7, 4096, len(stream)):
        frames, got = wire.Frames(MEMBER_LIMIT), []
        for start in range(0, len(stream), size):
            frames.feed(stream[start : start + size])
            got += list(frames)
        assert got == sent


def test_a_proof_tells_parts_apart():
    assert wire.proof(b"k", b"ab", b"c") != wire.proof(b"k", b"a", b"bc")
    assert wire.proof(b"k", b"a") != wire.proof(b"other", b"a")


# --- roll calls ---


def test_a_roll_call_names_those_who_wait_for_nothing():
    with meeting(4) as (_, gangs):
        gangs[2].close()  # has left in good order

        def wait(gang):
            with pytest.raises(TimeLimitError):
                gang.get(["never"], timeout_s=3)

        with ThreadPoolExecutor() as pool:
            waiting = pool.submit(wait, gangs[1])
            assert gangs[0].call_roll() == [3]  # 3 is busy with something else
            assert gangs[0].call_roll() == [3]
            waiting.result()


def test_a_roll_call_ends_when_all_have_answered():
    with meeting(3) as (_, gangs):
        started = time.monotonic()
        assert all_at_once(lambda gang: gang.call_roll(), gangs) == [[], [], []]
        assert time.monotonic() - started < 1
