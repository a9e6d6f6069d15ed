"""The calls of ``Collective`` over PyTorch's own backends: gloo, and nccl where there are GPUs.

They take tensors as well as NumPy arrays. What the ground floor's collectives do better on CPUs:
they are faster on one host, add in the order of ranks, and tell workers whose calls differ.
"""

from __future__ import annotations

import datetime
import select
import time
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
import torch.distributed as dist

from bigdl._base.collective import Collective, Compress
from bigdl._base.errors import (
    ArgumentError,
    BigDLError,
    ConfigError,
    TimeLimitError,
    WorkerLostError,
)

if TYPE_CHECKING:
    from bigdl._base.gang import Gang

__all__ = ["Gloo", "Nccl", "TorchCollective", "connect_torch"]

_SUMMABLE = (torch.float32, torch.float64, torch.int32, torch.int64)
#: A broken link is explained by the rendezvous within so long, or not at all.
_EXPLANATION_S = 3.0
#: Who is late for a call is asked for so long.
_ROLL_CALL_S = 1.0
#: The backend's own limit comes so long after ours, whose error says more.
_LATER_S = 2.0
_FOREVER = datetime.timedelta(days=3650)
#: Seconds of asking at every turn whether a call is done, before it is asked now and then.
_ASKING_S = 0.001
_NAP_S = 0.002


def connect_torch(
    gang: Gang, *, backend: str = "gloo", timeout_s: float | None = 600.0
) -> TorchCollective:
    """Connect the workers of ``gang`` by a backend of PyTorch; all of them have to call it.

    Args:
        gang: From ``rendezvous.join``; it has to stay open while the collective is used.
        backend: "gloo" or "nccl".
        timeout_s: How long a call waits for workers that live but do not come; None = for ever.

    Raises:
        ConfigError: This PyTorch or this machine cannot do that.
        WorkerError: Another worker failed meanwhile (or ``WorkerLostError``: is gone).
    """
    kinds: dict[str, type[TorchCollective]] = {"gloo": Gloo, "nccl": Nccl}
    if backend not in kinds:
        raise ConfigError(f"No backend {backend!r}; have {', '.join(kinds)}.")
    try:
        return kinds[backend](gang, timeout_s=timeout_s)
    except BaseException as exc:
        gang.abort(f"{type(exc).__name__}: {exc}")
        raise


class _GangStore(dist.Store):  # type: ignore[name-defined,misc]
    """Where a backend lays down its addresses: at the rendezvous, so behind the run's token."""

    def __init__(self, gang: Gang, stem: str, timeout_s: float | None) -> None:
        super().__init__()
        self._gang = gang
        self._stem = stem
        self._timeout_s = timeout_s

    def set(self, key: str, value: str | bytes) -> None:
        self._gang.put(self._stem + key, value.encode() if isinstance(value, str) else value)

    def get(self, key: str) -> bytes:
        return self._gang.get([self._stem + key], timeout_s=self._timeout_s)[0]

    def wait(self, keys: list[str], timeout: datetime.timedelta | None = None) -> None:
        limit = self._timeout_s if timeout is None else timeout.total_seconds()
        self._gang.get([self._stem + key for key in keys], timeout_s=limit)

    def check(self, keys: list[str]) -> bool:
        try:
            self._gang.get([self._stem + key for key in keys], timeout_s=_NAP_S)
        except TimeLimitError:
            return False
        return True


class TorchCollective(Collective):
    """A collective that hands its calls to a process group of PyTorch, one of its own.

    Sums are made in the backend's order; they are the same on every worker and in every run.
    """

    is_exact: ClassVar[bool] = False

    def __init__(self, gang: Gang, *, timeout_s: float | None = 600.0) -> None:
        super().__init__(gang, tuple(range(gang.world)), timeout_s=timeout_s)
        self._gang: Gang = gang
        gang.share(self.kind.encode(), timeout_s=timeout_s)
        self._stem = f"{self.kind}/{gang.shares}/"  # nobody else's
        later = _FOREVER
        if timeout_s is not None:
            later = datetime.timedelta(seconds=timeout_s + _LATER_S)
        store = _GangStore(gang, self._stem, timeout_s)
        self._group_of_torch: Any = self._make_group(store, later)

    def _make_group(self, store: _GangStore, timeout: datetime.timedelta) -> Any:
        raise NotImplementedError

    def close(self) -> None:
        super().close()
        self._group_of_torch = None

    # --- arrays and tensors ---

    def _flat(self, array: Any, *, summed: bool = False) -> Any:
        if not isinstance(array, torch.Tensor):
            if not isinstance(array, np.ndarray):
                raise ArgumentError(f"Need a NumPy array or a tensor, not {type(array).__name__}.")
            return super()._flat(array, summed=summed)
        if summed and array.dtype not in _SUMMABLE:
            raise ConfigError(
                f"Cannot add tensors of {array.dtype}: need float32, float64, int32 or int64."
            )
        if not array.is_contiguous() or array.requires_grad:
            fault = "not contiguous" if not array.is_contiguous() else "part of a graph"
            raise ConfigError(
                f"The tensor of shape {tuple(array.shape)} is {fault}; it is changed in place, "
                "so give a contiguous one that is detached."
            )
        return array.view(-1)

    def _check_compress(self, flat: Any, compress: Compress) -> None:
        if not isinstance(flat, torch.Tensor):
            super()._check_compress(flat, compress)
        elif compress is not None and (compress != "bf16" or flat.dtype != torch.float32):
            raise ConfigError(f"compress={compress!r} cannot be for {flat.dtype}.")

    def part(self, n: int) -> slice:
        return self.parts(int(n))[self.rank]

    def reduce_scatter(self, array: Any, *, compress: Compress = None) -> Any:
        flat = self._flat(array, summed=True)
        self._check_compress(flat, compress)
        self._together("reduce_scatter", self._reduce_scatter, flat, compress)
        return flat[self.part(len(flat))]

    def _on_device(self, flat: Any) -> torch.Tensor:
        """The memory of ``flat`` where the backend wants it."""
        return flat if isinstance(flat, torch.Tensor) else torch.from_numpy(flat)

    def _as_bytes(self, flat: Any) -> torch.Tensor:
        """Elements of any kind, as bytes: they are moved, not understood."""
        if isinstance(flat, torch.Tensor):
            return self._on_device(flat).view(torch.uint8)
        return self._on_device(flat.view(np.uint8))

    def _put_back(self, tensor: torch.Tensor, flat: Any) -> None:
        """Write the result to where it was asked for, if it is not there already."""

    # --- calls ---

    def _all_reduce(self, flat: Any, compress: Compress) -> None:
        if len(flat) == 0:
            self._barrier()
            return
        tensor = self._on_device(flat)
        if compress is None:
            self._wait(self._group_of_torch.allreduce([tensor]))
        else:
            coded = torch.empty(len(tensor), dtype=torch.bfloat16, device=tensor.device)
            parts = self.parts(len(tensor))
            coded[parts[self.rank]] = self._add_compressed(tensor)
            for owner, part in enumerate(parts):
                self._send(coded[part].view(torch.uint8), owner)
            tensor.copy_(coded)
        self._put_back(tensor, flat)

    def _reduce_scatter(self, flat: Any, compress: Compress) -> None:
        tensor = self._on_device(flat)
        if compress is None:
            for owner, part in enumerate(self.parts(len(flat))):
                if part.stop > part.start:
                    options = dist.ReduceOptions()
                    options.rootRank = owner
                    self._wait(self._group_of_torch.reduce([tensor[part]], options))
        else:
            tensor[self.part(len(flat))] = self._add_compressed(tensor)
        self._put_back(tensor, flat)

    def _add_compressed(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of this worker's part, of numbers that travel as bf16; added in float32."""
        parts = self.parts(len(tensor))
        sizes = [2 * (part.stop - part.start) for part in parts]  # in bytes
        own = sizes[self.rank]
        sent = tensor.to(torch.bfloat16).view(torch.uint8)
        came = torch.empty(self.world * own, dtype=torch.uint8, device=tensor.device)
        self._wait(self._group_of_torch.alltoall_base(came, sent, [own] * self.world, sizes))
        terms = came.view(torch.bfloat16).view(self.world, -1)
        total = terms[0].float()
        for term in terms[1:]:
            total += term
        return total

    def _all_gather(self, flat: Any) -> None:
        if len(flat) == 0:
            self._barrier()
            return
        tensor = self._as_bytes(flat)
        size = len(tensor) // len(flat)
        for owner, part in enumerate(self.parts(len(flat))):
            self._send(tensor[part.start * size : part.stop * size], owner)
        self._put_back(tensor, flat)

    def _broadcast(self, flat: Any, root: int) -> None:
        if len(flat) == 0:
            self._barrier()
            return
        tensor = self._as_bytes(flat)
        self._send(tensor, root)
        self._put_back(tensor, flat)

    def _send(self, tensor: torch.Tensor, root: int) -> None:
        if len(tensor):
            options = dist.BroadcastOptions()
            options.rootRank = root
            self._wait(self._group_of_torch.broadcast([tensor], options))

    def _barrier(self) -> None:
        self._wait(self._group_of_torch.barrier())

    # --- waiting ---

    def _wait(self, work: Any) -> None:
        """Wait for the backend, with an ear for the gang, which it does not know of."""
        started = time.monotonic()
        while not work.is_completed():
            waited = time.monotonic() - started
            if waited > _ASKING_S:
                if select.select([self._gang], [], [], _NAP_S)[0]:
                    self._gang.check()
                if self._timeout_s is not None and waited > self._timeout_s:
                    raise self._late()
        try:
            work.wait()
        except (RuntimeError, ValueError) as exc:
            if isinstance(exc, BigDLError):
                raise
            self._explain(exc)

    def _explain(self, exc: Exception) -> None:
        """Raise what the backend's own error stands for."""
        end = time.monotonic() + _EXPLANATION_S
        while (left := end - time.monotonic()) > 0:
            select.select([self._gang], [], [], left)
            self._gang.check()
            if self._gang.left:
                rank = min(self._gang.left)
                raise WorkerLostError(
                    f"W{self._gang.name(rank)[1:]} has left while worker {self.rank} still "
                    "needed it.",
                    rank=rank,
                    host=self._gang.members[rank].node,
                ) from exc
        raise exc

    def _late(self) -> TimeLimitError:
        """All who wait run into their limits now and say so; who does not is late."""
        self._gang.put(f"{self._stem}late/{self.rank}", b"")
        late = []
        for rank in range(self.world):
            try:
                self._gang.get([f"{self._stem}late/{rank}"], timeout_s=_ROLL_CALL_S)
            except TimeLimitError:
                late.append(self._gang.name(rank))
        who = ", ".join(late) or "all: they wait in different calls"
        return TimeLimitError(
            f"Worker {self.rank} of {self.world} waited {self._timeout_s:g} s in {self._doing} "
            f"for {who}."
        )


class Gloo(TorchCollective):
    """By gloo, on CPUs."""

    kind = "gloo"

    def _make_group(self, store: _GangStore, timeout: datetime.timedelta) -> Any:
        if not dist.is_available() or not dist.is_gloo_available():
            raise ConfigError("This PyTorch was built without gloo.")
        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        # at the worker's own address: by default gloo asks the name service for this host's name
        address = self._gang.me.address
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]
        options._timeout = timeout
        options._threads = 2
        return dist.ProcessGroupGloo(store, self.rank, self.world, options)


class Nccl(TorchCollective):
    """By nccl, on GPUs: each worker's current device. NumPy arrays travel to it and back."""

    kind = "nccl"

    def _make_group(self, store: _GangStore, timeout: datetime.timedelta) -> Any:
        if not dist.is_available() or not dist.is_nccl_available():
            raise ConfigError("This PyTorch was built without nccl.")
        if not torch.cuda.is_available():
            raise ConfigError("nccl needs an NVIDIA GPU, and PyTorch sees none. Use gloo.")
        self._device = torch.device("cuda", torch.cuda.current_device())
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        return dist.ProcessGroupNCCL(store, self.rank, self.world, options)

    def _on_device(self, flat: Any) -> torch.Tensor:
        return super()._on_device(flat).to(self._device)

    def _put_back(self, tensor: torch.Tensor, flat: Any) -> None:
        there = flat if isinstance(flat, torch.Tensor) else torch.from_numpy(flat.view(np.uint8))
        if there.data_ptr() != tensor.data_ptr():
            there.view(torch.uint8).copy_(tensor.view(torch.uint8))

    def _barrier(self) -> None:
        self._wait(self._group_of_torch.allreduce([torch.zeros(1, device=self._device)]))

    def _wait(self, work: Any) -> None:
        super()._wait(work)
        torch.cuda.current_stream(self._device).synchronize()

    def abort(self, words: str) -> None:
        super().abort(words)
        if self._group_of_torch is not None:
            self._group_of_torch.abort()  # a kernel that waits for a dead peer never ends
