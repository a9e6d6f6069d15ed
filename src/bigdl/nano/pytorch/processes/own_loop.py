"""A training loop of the user's own in one of several processes that share each batch.

The loop is not changed: what it calls is. Loaders give this process' rows of each batch; a
backward pass leaves the global batch's gradients behind, whoever calls it, as each parameter
scales what arrives by the share of rows and the sum is taken when the pass ends. Knows torch;
imports no Lightning.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from bigdl._base.errors import ConfigError, DataError
from bigdl.nano.pytorch.processes.gradients import Summing
from bigdl.nano.pytorch.processes.loader_parts import Parts
from bigdl.nano.pytorch.processes.memory import broadcast
from bigdl.nano.pytorch.processes.part_loader import PartLoader
from bigdl.nano.pytorch.processes.shared_streams import SharedStreams
from bigdl.nano.pytorch.processes.streams import Streams
from bigdl.nano.pytorch.processes.summed_gradients import SummedGradients

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

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
        self._moving = _Moving()
        self._watches: list[Any] = [register_optimizer_step_pre_hook(self._check)]
        #: Rows of this process, and of all, in the batch that was drawn last.
        self._rows, self._global_rows = 1, collective.world
        self._pass: tuple[int, Any] | None = None
        self._draws_alike = True

    def add_module(self, module: torch.nn.Module) -> None:
        """Let all processes begin with what rank 0 has, and its gradients be added up."""
        for tensor in (*module.parameters(), *module.buffers()):
            broadcast(self.collective, tensor.detach())
        self._modules.append(module)
        self._add(module.parameters())
        # what the loop adds or unfreezes later is met before its first backward pass
        watch = module.register_forward_pre_hook(lambda owner, _: self._add(owner.parameters()))
        self._watches.append(watch)

    def add_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Let gradients be added up of what it moves, in a module or not.

        An optimizer that the loop makes for itself moves parameters of modules.
        """
        for group in optimizer.param_groups:
            self._add(group["params"])

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
        self._sums.close()

    # --- gradients ---

    def _check(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Refuse an update that would be another one in each process."""
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and not self._moving.has(parameter):
                    raise ConfigError(
                        f"{type(optimizer).__name__} of your loop moves a parameter of shape "
                        f"{tuple(parameter.shape)} that is in no module or optimizer that was "
                        "set up: its gradient would be that of one process's rows. Make it part "
                        "of a module that setup(), or the decorated function, is given."
                    )

    def _add(self, parameters: Iterable[torch.Tensor]) -> None:
        for parameter in parameters:
            if parameter.requires_grad and self._moving.add(parameter):
                parameter.register_hook(self._scaled)  # type: ignore[no-untyped-call]

    def _scaled(self, gradient: torch.Tensor) -> torch.Tensor:
        """A parameter's gradient arrives, before it is added to those that are there."""
        number = int(torch._C._current_graph_task_id())
        if self._pass is None or self._pass[0] != number:
            apart = self._sums.sum_more([self._moving], rows=self._rows)
            apart.__enter__()
            self._pass = number, apart
            _autograd.Variable._execution_engine.queue_callback(self._passed)
        return gradient * (self._rows / self._global_rows)

    def _passed(self) -> None:
        """A backward pass has ended."""
        assert self._pass is not None
        apart, self._pass = self._pass[1], None
        apart.__exit__(None, None, None)


class _Moving:
    """All parameters whose gradients are added up, as an optimizer has its own."""

    def __init__(self) -> None:
        self._parameters: dict[int, torch.Tensor] = {}

    def add(self, parameter: torch.Tensor) -> bool:
        """Whether it was not there."""
        is_new = id(parameter) not in self._parameters
        self._parameters[id(parameter)] = parameter
        return is_new

    def has(self, parameter: torch.Tensor) -> bool:
        return id(parameter) in self._parameters

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self._parameters.values())}]


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
