"""Who is who among the workers of one run: ranks, addresses, hosts; and one fate for all.

Standard library only, and the same for every engine. Whoever starts the workers opens a
``Rendezvous`` and hands its ``ticket`` to each of them by whatever way the engine has; each
worker calls ``join(ticket, rank)`` and gets a ``Gang`` once all have come.

The line between a worker and the rendezvous stays open while they work. Through it the first
failure reaches everybody: a worker that gives up says why (``abort``), one that dies is noticed
because its line breaks, and if the rendezvous itself goes every worker knows. Nobody is let in
without the ticket's token, which never travels; so two programs on one machine cannot meet.
"""

from __future__ import annotations

import secrets
import socket
import threading
import time

from bigdl._base import wire
from bigdl._base.errors import ConfigError, TimeLimitError
from bigdl._base.gang import Failure, Gang, Member, Ticket
from bigdl._base.rendezvous_server import Server

__all__ = ["Failure", "Gang", "Member", "Rendezvous", "Ticket", "join"]

#: A worker waits so much longer than the rendezvous, whose answer says who is missing.
_GRACE_S = 5.0


class Rendezvous:
    """Where workers meet. A thread serves it; ``close`` ends the thread and frees the port.

    A ``with`` block of a worker that owns it ends when all workers have left, or failed; a
    caller's block ends at once, so there the workers' results have to be waited for first.

    Args:
        world: How many workers will come.
        address: One of this machine's addresses; the default is for workers on this machine.
        timeout_s: Seconds from now until all must have come.
        owner: This worker's own rank, if it is a worker that holds the rendezvous.

    Raises:
        ConfigError: A value is not allowed, or the address is not this machine's.
    """

    def __init__(
        self,
        world: int,
        *,
        address: str = "127.0.0.1",
        timeout_s: float = 60.0,
        owner: int | None = None,
    ) -> None:
        if world < 1 or not timeout_s > 0 or not (owner is None or 0 <= owner < world):
            raise ConfigError(
                f"A rendezvous of {world} workers within {timeout_s} s, held by "
                f"{'the caller' if owner is None else f'worker {owner}'}, cannot be: "
                "need at least 1 worker, more than 0 s, and an owner among the workers."
            )
        token = secrets.token_hex(32)
        self._server = Server(world, address, token.encode(), timeout_s)
        self._ticket = Ticket(
            address=address,
            port=self._server.port,
            token=token,
            world=world,
            timeout_s=timeout_s,
            owner=owner,
        )
        self._thread = threading.Thread(
            target=self._server.run, name="bigdl-rendezvous", daemon=True
        )
        self._thread.start()

    def __enter__(self) -> Rendezvous:
        return self

    def __exit__(self, kind: object, exc: BaseException | None, trace: object) -> None:
        if exc is None and self._ticket.owner is not None:
            self.wait_until_left()  # the others may need it longer than its owner does
        self.close()

    @property
    def ticket(self) -> Ticket:
        return self._ticket

    @property
    def failure(self) -> Failure | None:
        """What has ended the gang, None while nothing has."""
        return self._server.failure

    def members(self) -> tuple[Member, ...]:
        """Wait until all have come, and say who they are, by rank.

        Raises:
            TimeLimitError: Some have not come in time; the text says which have.
            WorkerError: A worker failed meanwhile (or ``WorkerLostError``: is gone).
        """
        self._server.settled.wait()
        if self._server.failure is not None:
            raise self._server.failure.error()
        return self._server.members

    def abort(self, words: str) -> None:
        """End the work of all workers; each hears ``words``."""
        self._server.ask_abort(words)

    def wait_until_left(self, timeout_s: float | None = None) -> bool:
        """Wait until all workers have left, or failed; whether that was so in time."""
        return self._server.over.wait(timeout_s)

    def close(self) -> None:
        """End the rendezvous; workers that are still there hear of it. Harmless twice."""
        self._server.ask_close()
        self._thread.join()


def join(
    ticket: Ticket,
    rank: int | None = None,
    *,
    host: str | None = None,
    address: str | None = None,
) -> Gang:
    """Come to the rendezvous as a worker and wait for the others.

    Args:
        ticket: From the ``Rendezvous``.
        rank: This worker's number. With None, which then holds for all workers, ranks are given
            so that workers on one host are neighbours.
        host: Another name for this host than its own; workers with the same share memory.
        address: Where other workers reach this one; by default the address of the network
            interface that leads to the rendezvous.

    Raises:
        TimeLimitError: Nobody answers there, or some workers have not come in time.
        ContextError: The rendezvous is another program's, or does not take this worker.
        WorkerError: A worker failed meanwhile (or ``WorkerLostError``: is gone).
    """
    if rank is not None and not 0 <= rank < ticket.world:
        raise ConfigError(f"Rank {rank} is none of 0 … {ticket.world - 1}.")
    deadline = time.monotonic() + ticket.timeout_s + _GRACE_S
    sock = _reach(ticket, deadline)
    try:
        wire.settle(sock)
        gang = Gang(ticket, sock)
        gang.introduce(rank, host, address or sock.getsockname()[0], deadline)
    except BaseException:
        sock.close()
        raise
    return gang


def _reach(ticket: Ticket, deadline: float) -> socket.socket:
    while True:
        left = deadline - _GRACE_S - time.monotonic()
        try:
            return socket.create_connection((ticket.address, ticket.port), max(left, 0.01))
        except OSError as exc:  # it may still be starting, or a network be waking up
            if left <= 0.2:
                raise TimeLimitError(
                    f"The rendezvous at {ticket.address}:{ticket.port} could not be reached in "
                    f"{ticket.timeout_s:g} s: {exc}. Does it still run, and does a firewall "
                    "stand between?"
                ) from exc
            time.sleep(0.1)
