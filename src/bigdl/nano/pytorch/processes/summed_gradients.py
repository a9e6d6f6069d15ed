"""The gradients of a module's optimizers, added up among processes as soon as they are made."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, cast

from bigdl._base.errors import ConfigError
from bigdl.nano.pytorch.processes.exchange import gather_values
from bigdl.nano.pytorch.processes.gradients import Summing, connect_gradients

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch

    from bigdl._base.collective import Collective
    from bigdl._base.sync import Outcome
    from bigdl.nano.pytorch.processes.gradients import Gradients

__all__ = ["Moving", "SummedGradients"]


class Moving(Protocol):
    """Parameters in groups: an optimizer, or what has parameters as optimizers have."""

    @property
    def param_groups(self) -> list[dict[str, Any]]: ...


class SummedGradients:
    """Connections of the optimizers, each made when it is first needed.

    Args:
        collective: The processes; all of them make the same calls.
        summing: How gradients become one.
    """

    def __init__(self, collective: Collective, summing: Summing) -> None:
        self._collective = collective
        self._summing = summing
        self._connections: dict[int, _Connection] = {}

    def sum(self, optimizers: Iterable[Moving], *, rows: int, loss: float) -> float:
        """Make the optimizers' gradients those of the global batch.

        Args:
            optimizers: Those whose parameters have this process' part in their ``grad``.
            rows: Of this process.
            loss: Its part of the global batch's loss.

        Returns:
            The global batch's loss.
        """
        whole = loss
        for optimizer in optimizers:
            one = self._connection(optimizer)
            one.outcome = one.gradients.reduce(
                rows=rows, weight=float(rows), loss=loss, unit=1.0, stop=False
            )
            whole = one.outcome.loss
        return whole

    def sum_more(self, optimizers: Iterable[Moving], *, rows: int) -> _Apart:
        """In its block gradients are those of one backward pass; added up, and to those before."""
        return _Apart(self, list(optimizers), rows)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Let an optimizer of which each process has a slice make its step."""
        one = self._connection(optimizer)
        assert one.outcome is not None
        one.gradients.update(optimizer, one.outcome)

    def state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """As ``optimizer.state_dict()``, whole in every process."""
        one = self._connections.get(id(optimizer))
        return optimizer.state_dict() if one is None else one.gradients.optimizer_state(optimizer)

    def unsummed(self, module: torch.nn.Module) -> dict[str, torch.Tensor]:
        """By parameter, the sum of gradients that processes hold between two updates."""
        mine = {
            name: p.grad.detach() for name, p in module.named_parameters() if p.grad is not None
        }
        found: dict[str, torch.Tensor] = {}
        for one in gather_values(self._collective, mine):
            for name, gradient in one.items():
                found[name] = found[name] + gradient if name in found else gradient.clone()
        return found

    def finish(self, optimizers: Iterable[torch.optim.Optimizer]) -> None:
        """Leave optimizers whole."""
        for optimizer in optimizers:
            one = self._connections.pop(id(optimizer), None)
            if one is not None:
                one.gradients.finish(optimizer)
                one.gradients.close()

    def close(self) -> None:
        """Give back the memory that gradients were added up in."""
        for one in self._connections.values():
            one.gradients.close()
        self._connections.clear()

    def _connection(self, optimizer: Moving) -> _Connection:
        """The optimizer's, made anew when it has got other parameters to move."""
        one = self._connections.get(id(optimizer))
        if one is not None and one.fits(optimizer):
            return one
        if one is not None and self._summing.sync == "sharded":
            raise ConfigError(
                'sync="sharded" cannot go with parameters that are unfrozen, or given to the '
                'optimizer, during the run: its slices are cut at the start. Use sync="allreduce".'
            )
        kept = [(p, p.grad) for p in _moved(optimizer) if p.grad is not None]
        if one is not None:
            one.gradients.close()
        made = _Connection(self._collective, optimizer, self._summing)
        for parameter, gradient in kept:
            parameter.grad = gradient
        self._connections[id(optimizer)] = made
        return made


class _Connection:
    """One optimizer's."""

    def __init__(self, collective: Collective, optimizer: Moving, summing: Summing) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._frozen = [p for p in parameters if not p.requires_grad]
        self.gradients: Gradients = connect_gradients(
            collective,
            cast("torch.optim.Optimizer", optimizer),  # whole where slices are cut
            summing,
        )
        self.outcome: Outcome | None = None
        self._moved = _moved(optimizer)

    def fits(self, optimizer: Moving) -> bool:
        """Whether the optimizer still moves the same parameters."""
        moved = _moved(optimizer)
        if any(p.requires_grad for p in self._frozen):
            return False
        return len(moved) == len(self._moved) and all(map(_is, moved, self._moved))


class _Apart:
    """See ``SummedGradients.sum_more``."""

    def __init__(self, owner: SummedGradients, optimizers: list[Moving], rows: int) -> None:
        self._owner, self._optimizers, self._rows = owner, optimizers, rows
        self._before: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __enter__(self) -> None:
        parameters = {id(p): p for one in self._optimizers for p in _moved(one)}
        for parameter in parameters.values():
            if parameter.grad is not None:
                self._before.append((parameter, parameter.grad.clone()))
                parameter.grad = None

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            return
        self._owner.sum(self._optimizers, rows=self._rows, loss=0.0)
        for parameter, gradient in self._before:
            parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)


def _moved(optimizer: Moving) -> list[torch.Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]


def _is(one: object, other: object) -> bool:
    return one is other
