"""Sockets straight from worker to worker, opened only to those who know the run's token.

Standard library only. Works on non-blocking sockets throughout; while it waits it listens to
the gang too, so that a worker that dies meanwhile is noticed.
"""

from __future__ import annotations

import json
import select
import socket
import time
from typing import TYPE_CHECKING

from bigdl._base import wire
from bigdl._base.errors import ContextError, TimeLimitError, WorkerLostError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence
    from typing import NoReturn

    from bigdl._base.gang import Gang

__all__ = ["accept_all", "lost", "mesh", "reach", "receive", "too_late"]

_RANK_BYTES = 4
#: Whoever connects has so long to show that it is one of us.
_STRANGER_S = 10.0
#: A broken link is explained by the rendezvous within so long, or not at all.
_EXPLANATION_S = 3.0


def mesh(
    gang: Gang, group: Sequence[int] | None, deadline: float | None
) -> dict[int, socket.socket]:
    """Connect every worker of ``group`` with every other by TCP.

    All workers of the gang have to call this, each with its own group, or None for no group.

    Returns:
        A non-blocking socket to each other rank of the group.
    """
    address = gang.me.address
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    links: dict[int, socket.socket] = {}
    with socket.create_server((address, 0), family=family, backlog=gang.world) as door:
        here = json.dumps(door.getsockname()[:2]).encode() if group else b""
        places = gang.share(here, timeout_s=_left(deadline))
        try:
            for peer in group or ():
                if peer < gang.rank:
                    host, port = json.loads(places[peer])
                    family = socket.AF_INET6 if ":" in host else socket.AF_INET
                    links[peer] = reach(gang, peer, family, (host, port), deadline)
            later = {peer for peer in group or () if peer > gang.rank}
            links |= accept_all(gang, door, later, deadline)
        except BaseException:
            for link in links.values():
                link.close()
            raise
    for link in links.values():
        wire.settle(link)
    return links


def accept_all(
    gang: Gang, door: socket.socket, wanted: Collection[int], deadline: float | None
) -> dict[int, socket.socket]:
    """Let every worker of ``wanted`` in; strangers are turned away."""
    links: dict[int, socket.socket] = {}
    door.setblocking(False)
    try:
        while missing := sorted(set(wanted) - set(links)):
            what = f"for {', '.join(map(gang.name, missing))} to connect."
            gang.wait_for(door, select.POLLIN, deadline, what)
            try:
                link, _ = door.accept()
            except OSError:  # it has gone again
                continue
            rank = _recognise(gang, link)
            if rank in missing:
                links[rank] = link
            else:
                link.close()
    except BaseException:
        for link in links.values():
            link.close()
        raise
    return links


def _recognise(gang: Gang, link: socket.socket) -> int | None:
    """The rank of whoever is at the other end, None for a stranger."""
    link.setblocking(False)
    deadline = time.monotonic() + _STRANGER_S
    mine = wire.nonce()
    try:
        hello = receive(gang, link, wire.NONCE_BYTES + _RANK_BYTES, deadline, "for a hello.")
        theirs, rank = hello[: wire.NONCE_BYTES], hello[wire.NONCE_BYTES :]
        link.send(mine + wire.proof(gang.key, b"door", theirs, mine, rank))
        shown = receive(gang, link, wire.PROOF_BYTES, deadline, "for a proof.")
    except (TimeLimitError, EOFError, OSError):
        return None
    is_known = wire.same(shown, wire.proof(gang.key, b"guest", mine, theirs, rank))
    return int.from_bytes(rank, "big") if is_known else None


def reach(
    gang: Gang,
    peer: int,
    family: socket.AddressFamily,
    address: str | tuple[str, int],
    deadline: float | None,
) -> socket.socket:
    """Connect to a worker that is in, or on its way to, ``accept_all``."""
    what = f"for {gang.name(peer)} at {_shown(address)} to answer."
    link = socket.socket(family, socket.SOCK_STREAM)
    try:
        link.settimeout(_left(deadline))
        try:
            link.connect(address)
        except OSError as exc:
            gang.check()
            raise ContextError(
                f"Worker {gang.rank} of {gang.world} cannot reach {gang.name(peer)} at "
                f"{_shown(address)}: {exc}. Does a firewall stand between?"
            ) from exc
        link.setblocking(False)
        mine, rank = wire.nonce(), gang.rank.to_bytes(_RANK_BYTES, "big")
        link.send(mine + rank)
        try:
            reply = receive(gang, link, wire.NONCE_BYTES + wire.PROOF_BYTES, deadline, what)
        except EOFError:
            lost(gang, peer)
        theirs, shown = reply[: wire.NONCE_BYTES], reply[wire.NONCE_BYTES :]
        if not wire.same(shown, wire.proof(gang.key, b"door", mine, theirs, rank)):
            raise ContextError(f"What listens at {_shown(address)} is not {gang.name(peer)}.")
        link.send(wire.proof(gang.key, b"guest", theirs, mine, rank))
    except BaseException:
        link.close()
        raise
    return link


def receive(
    gang: Gang, link: socket.socket, size: int, deadline: float | None, what: str
) -> bytes:
    """Exactly ``size`` bytes.

    Raises:
        EOFError: The link ended before.
        TimeLimitError, WorkerError: As ``Gang.wait_for``.
    """
    received = b""
    while len(received) < size:
        gang.wait_for(link, select.POLLIN, deadline, what)
        piece = link.recv(size - len(received))
        if not piece:
            raise EOFError
        received += piece
    return received


def lost(gang: Gang, rank: int) -> NoReturn:
    """Say why the link to ``rank`` broke; the rendezvous usually knows in a moment."""
    end = time.monotonic() + _EXPLANATION_S
    while (left := end - time.monotonic()) > 0 and rank not in gang.left:
        select.select([gang], [], [], left)
        gang.check()
    raise WorkerLostError(
        f"W{gang.name(rank)[1:]} has left while worker {gang.rank} still needed it.",
        rank=rank,
        host=gang.members[rank].node,
    )


def too_late(
    gang: Gang, doing: str, waited_for: Iterable[int], limit_s: float | None
) -> TimeLimitError:
    """What a worker says that has waited for others in vain.

    It names those who wait for nobody: the ones it ``waited_for`` may only have had no more luck.

    Raises:
        WorkerError: Another has meanwhile said what is the matter.
    """
    late = ", ".join(map(gang.name, gang.call_roll() or waited_for))
    return TimeLimitError(
        f"Worker {gang.rank} of {gang.world} waited {limit_s:g} s in {doing} for {late}: alive, "
        "but not come."
    )


def _left(deadline: float | None) -> float | None:
    return None if deadline is None else max(0.01, deadline - time.monotonic())


def _shown(address: str | tuple[str, int]) -> str:
    return address.lstrip("\0") if isinstance(address, str) else f"{address[0]}:{address[1]}"
