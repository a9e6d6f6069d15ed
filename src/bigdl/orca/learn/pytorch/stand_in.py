"""What a LightningModule finds as ``self.trainer`` where no Trainer runs.

Lightning's own ``self.log`` checks its arguments, knows the defaults of each hook, and hands the
value to its trainer's results: here to a ``Logbook``. Imports no Lightning.
"""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bigdl.orca.learn.program import Cursor
    from bigdl.orca.learn.pytorch.logged import Logbook
    from bigdl.orca.learn.pytorch.schedules import Schedule

__all__ = ["StandIn", "in_hook"]

_STAGES = {
    "fit": "training",
    "validate": "validating",
    "test": "testing",
    "predict": "predicting",
}


class StandIn:
    """A trainer's facts, on one worker.

    Args:
        rank: This worker's.
        world: How many there are.
        precision: "fp32" or "bf16".
    """

    barebones = False
    is_last_batch = False
    sanity_checking = False
    logger = None
    progress_bar_callback = None
    datamodule = None
    fit_loop = None

    def __init__(self, *, rank: int, world: int, precision: str) -> None:
        self.global_rank = self.local_rank = rank
        self.world_size = self.num_devices = world
        self.num_nodes = 1
        self.is_global_zero = rank == 0
        self.precision = {"fp32": "32-true", "bf16": "bf16-mixed"}[precision]
        self.current_epoch = self.global_step = 0
        self.loggers: list[Any] = []
        self.callbacks: list[Any] = []
        self.optimizers: list[Any] = []
        self.lr_scheduler_configs: list[Any] = []
        self.callback_metrics: dict[str, torch.Tensor] = {}
        #: The stage that runs, in Lightning's word.
        self.stage = "fit"
        #: Rows of the batch at hand, and its number; at an epoch's end all of its rows, and -1.
        self.rows, self.number = 0, -1
        self.strategy = SimpleNamespace(reduce=None, _lightning_optimizers=self.optimizers)
        # what Lightning's log looks at, beside the above
        self._results: _Results | None = None
        self._logger_connector = SimpleNamespace(
            should_reset_tensors=lambda hook: False, _current_fx=None
        )
        self._accelerator_connector = SimpleNamespace(is_distributed=False)

    def __getattr__(self, name: str) -> Any:
        if name in _STAGES.values():
            return name == _STAGES[self.stage]
        if name.startswith("__"):
            raise AttributeError(name)
        raise AttributeError(
            f"self.trainer.{name} is of Lightning's Trainer, which does not run here: an "
            "Estimator trains. Give the module what it needs as an argument of its own; "
            "bigdl.nano.pytorch.Trainer runs modules that need a Trainer."
        )

    def at(self, cursor: Cursor) -> None:
        """Training is here."""
        self.current_epoch, self.global_step = cursor.epoch, cursor.step

    def attach(self, optimizer: torch.optim.Optimizer, schedule: Schedule | None) -> None:
        """What ``self.optimizers()`` and ``self.lr_schedulers()`` give."""
        self.optimizers.append(optimizer)
        if schedule is not None:
            self.lr_scheduler_configs.append(schedule)

    @contextlib.contextmanager
    def logging(self, stage: str, book: Logbook) -> Iterator[None]:
        """Within the block a stage runs, and what is logged goes to ``book``."""
        before = self.stage, self._results, self.rows, self.number
        self.stage, self._results = stage, _Results(self, book)
        try:
            yield
        finally:
            self.stage, self._results, self.rows, self.number = before

    def learn(self, values: dict[str, Any]) -> None:
        """Add to the metrics that hooks can ask for."""
        for key, value in values.items():
            if isinstance(value, (int, float)):
                self.callback_metrics[key] = torch.tensor(float(value))


class _Results:
    """Where Lightning's ``log`` leaves values."""

    def __init__(self, trainer: StandIn, book: Logbook) -> None:
        self._trainer, self._book = trainer, book

    def reset(self, **options: Any) -> None:
        """Epochs are told apart by their books."""

    def log(
        self,
        hook: str,
        name: str,
        value: Any,
        *,
        on_step: bool,
        on_epoch: bool,
        reduce_fx: Any,
        batch_size: int | None,
        metric_attribute: str | None,
        **others: Any,
    ) -> None:
        """Of the ``others`` each is about loggers, or about sums that are made here anyway."""
        trainer = self._trainer
        self._book.log(
            name,
            value,
            on_step=on_step,
            on_epoch=on_epoch,
            reduce_fx=reduce_fx,
            metric=metric_attribute,
            weight=float(trainer.rows if batch_size is None else batch_size),
            number=trainer.number,
        )


@contextlib.contextmanager
def in_hook(module: Any, name: str) -> Iterator[None]:
    """Within the block Lightning's ``log`` knows which hook calls it."""
    before, module._current_fx_name = module._current_fx_name, name
    try:
        yield
    finally:
        module._current_fx_name = before
