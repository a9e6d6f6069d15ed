"""Lightning's strategy for several processes of one machine that share each batch.

A step's gradient is that of the global batch: each process brings the part of its rows, and a
process without rows brings nothing and moves its weights as the others do.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from bigdl._base.errors import ConfigError, DataError
from bigdl.nano.pytorch.lightning.host import part, pl
from bigdl.nano.pytorch.lightning.summed_logs import follow_metrics, sum_step
from bigdl.nano.pytorch.processes.gradients import Summing
from bigdl.nano.pytorch.processes.part_loader import PartLoader
from bigdl.nano.pytorch.processes.streams import Streams
from bigdl.nano.pytorch.processes.summed_gradients import SummedGradients
from bigdl.nano.pytorch.processes.telling import Telling

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from bigdl._base.collective import Collective
    from bigdl.nano.pytorch.processes.settings import Settings

__all__ = ["NO_ROWS", "SummedStrategy"]

_SingleDeviceStrategy = part("strategies:SingleDeviceStrategy")
#: What Lightning's packages ask before they log or warn.
_ONLY_RANK_ZERO = (part("utilities.rank_zero:rank_zero_only"),)


class _NoRows:
    """Stands for the batch, and what a step makes of it, in a process without rows of it."""

    def __reduce__(self) -> str:
        return "NO_ROWS"

    def __repr__(self) -> str:
        return "<no rows of this batch>"


NO_ROWS = _NoRows()


class SummedStrategy(Telling, _SingleDeviceStrategy):  # type: ignore[misc,valid-type]
    """One CPU process of several; gradients are added up, everything else is one device's.

    In the caller, where nothing is trained, it is rank 0 and connected to nobody.

    Args:
        settings: How the processes run.
    """

    strategy_name = "bigdl_processes"

    def __init__(self, settings: Settings) -> None:
        super().__init__("cpu")
        self.settings = settings
        self.world_size = settings.world
        self.collective: Collective | None = None
        #: Rows of this process, and of all, in the batch that is being worked on.
        self.rows, self.global_rows = 1, 1
        #: Rows of this process in each batch that was predicted.
        self.predicted: list[int] = []
        self._sums: SummedGradients | None = None
        self._loss = 0.0
        self._word = 0

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        state.update(collective=None, predicted=[], _sums=None, _launcher=None)
        return state

    # --- its place ---

    def take(self, collective: Collective, word: int) -> None:
        """Be the process of this rank; ``word`` names the streams that its own come from."""
        self.collective = collective
        self._word = word
        self.global_rank = self.local_rank = collective.rank
        for zero in _ONLY_RANK_ZERO:
            zero.rank = collective.rank

    @property
    def is_global_zero(self) -> bool:
        return bool(self.global_rank == 0)

    @property
    def has_rows(self) -> bool:
        return self.rows > 0

    # --- setup ---

    def process_dataloader(self, dataloader: object) -> object:
        return dataloader if self.collective is None else PartLoader(dataloader, self.collective)

    def setup(self, trainer: Any) -> None:
        super().setup(trainer)
        if self.collective is not None:
            self.share_values(trainer.lightning_module.parameters())
            self.share_values(trainer.lightning_module.buffers())
            follow_metrics(self.collective, trainer.lightning_module)
            self.check_whole()
            self._sums = SummedGradients(self.collective, self._summing())
            self.draw_own()

    def draw_own(self) -> None:
        """From here on, other processes than the first draw from streams of their own.

        Until then all draw alike: layers that setup() makes are equal everywhere. The first
        one's streams are those that one process would have.
        """
        if self.global_rank > 0:
            step = self.lightning_module.trainer.global_step
            Streams(self._word, step, self.global_rank).put_in_force()

    def share_buffers(self) -> None:
        """Running means and the like: those of rank 0, which are kept."""
        if self.collective is not None and self.lightning_module is not None:
            self.share_values(self.lightning_module.buffers())

    def on_validation_start(self) -> None:
        self.share_buffers()

    def on_train_end(self) -> None:
        self.share_buffers()
        if self._sums is not None:
            self._sums.finish(self.optimizers)

    def teardown(self) -> None:
        self._let_go()
        super().teardown()

    # --- steps ---

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        with self._logs():
            if self.has_rows:
                return super().training_step(*args, **kwargs)
            return torch.zeros((), requires_grad=True)  # nobody reads it: it weighs 0

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        with self._logs():
            return super().validation_step(*args, **kwargs) if self.has_rows else None

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        with self._logs():
            return super().test_step(*args, **kwargs) if self.has_rows else None

    @contextmanager
    def _logs(self) -> Iterator[None]:
        """What a step logs becomes the global batch's."""
        trainer = self.lightning_module.trainer
        if self.collective is None or trainer.barebones:
            yield
            return
        results = trainer._results
        before = {key: one._forward_cache for key, one in results.items()}
        yield
        sum_step(self.collective, results, before, self.rows)

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        self.predicted.append(self.rows)
        return super().predict_step(*args, **kwargs) if self.has_rows else NO_ROWS

    def backward(
        self, closure_loss: torch.Tensor, optimizer: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """As the stock one; where an update follows, hooks see the global batch's gradients."""
        if self._sums is None:
            return super().backward(closure_loss, optimizer, *args, **kwargs)
        module = self.lightning_module
        share = self.rows / self.global_rows
        self._loss = closure_loss.item() * share
        if not module.automatic_optimization:
            with self._sums.sum_more(self.optimizers, rows=self.rows):
                self._pass_back(closure_loss * share, optimizer, *args, **kwargs)
        else:
            if self.has_rows:
                self._pass_back(closure_loss * share, optimizer, *args, **kwargs)
            if not module.trainer.fit_loop._should_accumulate():
                self._loss = self._sums.sum(self.optimizers, rows=self.rows, loss=self._loss)
        loss = closure_loss.detach()
        return self.precision_plugin.post_backward(loss, module) if self.has_rows else loss

    def _pass_back(self, loss: torch.Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        module = self.lightning_module
        loss = self.precision_plugin.pre_backward(loss, module)
        self.precision_plugin.backward(loss, module, optimizer, *args, **kwargs)

    def optimizer_step(
        self, optimizer: Any, closure: Callable[[], Any], model: Any = None, **kwargs: Any
    ) -> Any:
        if self._sums is None:
            return super().optimizer_step(optimizer, closure, model, **kwargs)

        def shared() -> Any:
            loss = closure()
            # an optimizer that searches along a line needs the loss of the gradient that it gets
            is_tensor = isinstance(loss, torch.Tensor)
            return torch.tensor(self._loss, dtype=loss.dtype) if is_tensor else loss

        with self._faster(optimizer):
            if self.settings.sync != "sharded":
                return super().optimizer_step(optimizer, shared, model, **kwargs)
            # no process has whole gradients: the step is made after the closure, on own pieces
            loss = shared()
            self.precision_plugin._after_closure(model or self.lightning_module, optimizer)
            self._sums.step(optimizer)
            return loss

    # --- gradients ---

    def _summing(self) -> Summing:
        trainer = self.lightning_module.trainer
        summing: dict[str, Any] = {"averages": False, "sync": self.settings.sync}
        if self.settings.sync == "sharded" and trainer.gradient_clip_val:
            by_value = str(getattr(trainer.gradient_clip_algorithm, "value", "norm")) == "value"
            summing["clip_value" if by_value else "clip_norm"] = trainer.gradient_clip_val
        return Summing(**summing)

    def gathered_gradients(self) -> dict[str, Any] | None:
        """Gradients between two updates, of all processes; None where there is one."""
        return None if self._sums is None else self._sums.unsummed(self.lightning_module)

    def check_whole(self) -> None:
        """Refuse what needs whole gradients where there are slices."""
        module = self.lightning_module
        if self.settings.sync != "sharded":
            return
        hook = type(module).configure_gradient_clipping
        if hook is not pl.LightningModule.configure_gradient_clipping:
            raise ConfigError(
                'sync="sharded" cannot go with configure_gradient_clipping(): no process has '
                'whole gradients. Use gradient_clip_val=, or sync="allreduce".'
            )
        if not module.automatic_optimization:
            raise ConfigError(
                'sync="sharded" cannot go with manual optimization. Use sync="allreduce".'
            )

    def check_batch(self, global_rows: int) -> None:
        """Refuse a batch that some process has no rows of, where steps are the user's own."""
        module = self.lightning_module
        if global_rows < self.world_size and not module.automatic_optimization:
            raise DataError(
                f"A batch of {global_rows} rows has none for some of {self.world_size} processes, "
                "and with manual optimization each of them has to make its own steps. Use "
                "drop_last=True, or fewer processes."
            )

    # --- its end ---

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        inner = getattr(optimizer, "_optimizer", optimizer)
        if self._sums is not None and self.settings.sync == "sharded":
            return self._sums.state(inner)
        state: dict[str, Any] = super().optimizer_state(optimizer)
        return state

    def leave(self) -> None:
        """Be the caller's strategy again; what comes back is whole."""
        self._let_go()
        self.collective = None

    def _let_go(self) -> None:
        if self._sums is not None:
            self._sums.close()
            self._sums = None

    # --- learning rates ---

    @contextmanager
    def _faster(self, optimizer: Any) -> Iterator[None]:
        """With ``auto_lr``, the step's rates are larger; schedulers never see that."""
        if not self.settings.auto_lr:
            yield
            return
        groups = optimizer.param_groups
        before = [group["lr"] for group in groups]
        factor = self.rate_factor()
        for group, rate in zip(groups, before, strict=True):
            group["lr"] = rate * factor
        try:
            yield
        finally:
            for group, rate in zip(groups, before, strict=True):
                group["lr"] = rate

    def rate_factor(self) -> float:
        """From 1 to the number of processes over the first tenth of the run."""
        trainer = self.lightning_module.trainer
        steps = trainer.estimated_stepping_batches
        if not 0 < steps < math.inf:  # -1 where neither loader nor trainer says
            raise ConfigError(
                "auto_lr=True has to know how long the run is, to raise the rate over its first "
                "tenth: give max_steps=, or a loader that has a length and max_epochs=."
            )
        rise = max(1.0, steps / 10)
        share = min(1.0, (int(trainer.global_step) + 1) / float(rise))
        return 1.0 + (self.settings.world - 1) * share
