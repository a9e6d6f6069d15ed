"""A training loop of the user's own in one of several processes that share each batch.

The loop is not changed: what it calls is. Loaders give this process' rows of each batch; a
backward pass leaves the global batch's gradients behind, whoever calls it, as each parameter
scales what arrives by the share of rows and the sum is taken when the pass ends. Knows torch;
imports no Lightning.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from bigdl._base.errors import DataError
from bigdl.nano.pytorch.processes.gradients import Summing
from bigdl.nano.pytorch.processes.loader_parts import Parts
from bigdl.nano.pytorch.processes.memory import broadcast
from bigdl.nano.pytorch.processes.part_loader import PartLoader
from bigdl.nano.pytorch.processes.shared_streams import SharedStreams
from bigdl.nano.pytorch.processes.streams import Streams
from bigdl.nano.pytorch.processes.summed_gradients import SummedGradients

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bigdl._base.collective import Collective

__all__ = ["LoopLoader", "OwnLoop"]

_autograd: Any = torch.autograd


class OwnLoop:
    """What the loop's modules, optimizers and loaders share in one process.

    Args:
        collective: The processes; all of them run the same loop.
        word: Names the random streams that this process' own come from.
    """

    def __init__(self, collective: Collective, word: int) -> None:
        self.collective = collective
        self._word = word
        self._sums = SummedGradients(collective, Summing(averages=False))
        self._modules: list[torch.nn.Module] = []
        self._optimizers: list[torch.optim.Optimizer] = []
        self._hooked: set[int] = set()
        self._watches: list[Any] = []
        #: Rows of this process, and of all, in the batch that was drawn last.
        self._rows, self._global_rows = 1, collective.world
        self._pass: tuple[int, Any] | None = None
        self._draws_alike = True

    def add_module(self, module: torch.nn.Module) -> None:
        """Let all processes begin with what rank 0 has, and its gradients be added up."""
        for tensor in (*module.parameters(), *module.buffers()):
            broadcast(self.collective, tensor.detach())
        self._modules.append(module)
        self._hook(module)
        # what the loop unfreezes later is met before its first backward pass
        watch = module.register_forward_pre_hook(lambda owner, _: self._hook(owner))
        self._watches.append(watch)

    def add_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Its parameters' gradients are added up."""
        self._optimizers.append(optimizer)

    @property
    def trains(self) -> bool:
        """Whether what is drawn from a loader now is to be trained on, and so shared out."""
        return torch.is_grad_enabled() and any(one.training for one in self._modules)

    def met(self, rows: int, global_rows: int) -> None:
        """A batch was drawn.

        Raises:
            DataError: Some process has no rows of it.
        """
        if global_rows < self.collective.world:
            rows_of = f"{global_rows} row{'s' * (global_rows != 1)}"
            raise DataError(
                f"A batch of {rows_of} has none for some of {self.collective.world} processes, "
                "and each of them has to make the steps of your loop. Use drop_last=True, or "
                "fewer processes."
            )
        self._rows, self._global_rows = rows, global_rows

    def draw_apart(self) -> None:
        """From the first batch on, other ranks have random streams of their own.

        Until then all draw alike: layers and data that the loop makes are equal everywhere. The
        first one's streams are those that one process would have.
        """
        if self._draws_alike and self.collective.rank > 0:
            Streams(self._word, 0, self.collective.rank).put_in_force()
        self._draws_alike = False

    def finish(self) -> None:
        """Leave modules and optimizers as they came, and let go of the memory for gradients."""
        for watch in self._watches:
            watch.remove()
        self._sums.finish(self._optimizers)
        self._sums.close()

    # --- gradients ---

    def _hook(self, module: torch.nn.Module) -> None:
        for parameter in module.parameters():
            if parameter.requires_grad and id(parameter) not in self._hooked:
                self._hooked.add(id(parameter))
                parameter.register_hook(self._scaled)  # type: ignore[no-untyped-call]

    def _scaled(self, gradient: torch.Tensor) -> torch.Tensor:
        """A parameter's gradient arrives, before it is added to those that are there."""
        number = int(torch._C._current_graph_task_id())
        if self._pass is None or self._pass[0] != number:
            apart = self._sums.sum_more(self._optimizers, rows=self._rows)
            apart.__enter__()
            self._pass = number, apart
            _autograd.Variable._execution_engine.queue_callback(self._passed)
        return gradient * (self._rows / self._global_rows)

    def _passed(self) -> None:
        """A backward pass has ended."""
        assert self._pass is not None
        apart, self._pass = self._pass[1], None
        apart.__exit__(None, None, None)


class LoopLoader:
    """A loader of the loop's: this process' rows while it trains, else whole batches.

    What is met without gradients, or while no module is in training mode, is met by every
    process: metrics that the loop computes there are those of one process.

    Args:
        loader: A DataLoader, or one that Fabric has made of it.
        loop: What it belongs to.
    """

    def __init__(self, loader: Any, loop: OwnLoop) -> None:
        vars(self).update(vars(loader), loader=loader, _loop=loop)

    def __iter__(self) -> Iterator[Any]:
        loop: OwnLoop = self._loop
        if not loop.trains:
            whole = Parts(self.loader, 0, 1).meet(SharedStreams(loop.collective))
            return (one.data for one in whole)
        parts = iter(PartLoader(self.loader, loop.collective))
        loop.draw_apart()
        return self._parts(parts)

    def _parts(self, parts: Iterator[Any]) -> Iterator[Any]:
        loop: OwnLoop = self._loop
        for one in parts:
            loop.met(one.rows, one.global_rows)
            yield one.data

    def __len__(self) -> int:
        return len(self.loader)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(vars(self)["loader"], name)
