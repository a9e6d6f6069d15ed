"""A LightningModule's own steps, run by the workers of an estimator without Lightning's Trainer.

Imports no Lightning: an object of it brings it along, in either of its two packages.
"""

from __future__ import annotations

import contextlib
import pickle
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from bigdl._base.calls import shown
from bigdl._base.errors import ConfigError, NotReadyError
from bigdl._base.sync import gather_bytes
from bigdl.orca.learn.pytorch import calling
from bigdl.orca.learn.pytorch.configured import configured
from bigdl.orca.learn.pytorch.logged import Logbook, metric_states, named_metrics
from bigdl.orca.learn.pytorch.losses import Term
from bigdl.orca.learn.pytorch.metrics import Tally, put_together, state_of
from bigdl.orca.learn.pytorch.stand_in import StandIn, in_hook
from bigdl.orca.learn.pytorch.work import summed

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from bigdl._base.collective import Collective
    from bigdl._base.trees import Tree
    from bigdl.nano.pytorch.plan.plan import InForce
    from bigdl.orca.data.contract import Batch
    from bigdl.orca.learn.program import Cursor
    from bigdl.orca.learn.pytorch.metrics import Share
    from bigdl.orca.learn.pytorch.schedules import Schedule

__all__ = ["LightningWork", "check_accelerator", "check_training", "is_lightning", "package_of"]

_PACKAGES = ("pytorch_lightning", "lightning")
_STEPS = ("training_step", "validation_step", "test_step", "predict_step")

#: Hooks that take over what workers do together, and what to do instead.
_TAKEN = {
    "optimizer_step": "use a scheduler with interval 'step', or on_before_optimizer_step",
    "optimizer_zero_grad": "gradients are None before each update",
    "configure_gradient_clipping": "use fit(clip_norm=…) or fit(clip_value=…)",
    "lr_scheduler_step": "use a scheduler of torch.optim.lr_scheduler",
    "configure_callbacks": "give callbacks of bigdl.orca.learn.callbacks to fit()",
    "on_save_checkpoint": "keep what has to be saved in registered buffers",
    "on_load_checkpoint": "keep what has to be loaded in registered buffers",
}


def is_lightning(model: Any) -> bool:
    """Whether it is a LightningModule with a step of its own."""
    kinds = [
        getattr(sys.modules.get(name), "LightningModule", None)
        for name in ("pytorch_lightning", "lightning.pytorch")
    ]
    is_module = any(kind is not None and isinstance(model, kind) for kind in kinds)
    return is_module and any(_is_own(model, name) for name in _STEPS)


def _is_own(model: Any, name: str) -> bool:
    """Whether the user's class defines a hook, and not Lightning."""
    found = getattr(type(model), name, None)
    module = getattr(found, "__module__", None) or ""
    return found is not None and module.split(".")[0] not in _PACKAGES


def package_of(model: Any) -> str:
    """The package whose LightningModule it is."""
    for kind in type(model).__mro__:
        if kind.__name__ == "LightningModule":
            top = kind.__module__.split(".")[0]
            return "lightning.pytorch" if top == "lightning" else top
    raise AssertionError(f"{type(model).__name__} is no LightningModule")


def check_accelerator(model: Any) -> None:
    """Refuse a model whose own ``predict_step`` an accelerator would leave out.

    Raises:
        ConfigError: It has one.
    """
    if is_lightning(model) and _is_own(model, "predict_step"):
        raise ConfigError(
            f"{type(model).__name__} predicts by its own predict_step(), which an accelerator "
            "does not run: leave accelerator= away, or predict by forward()."
        )


def check_training(model: Any) -> None:
    """Refuse what cannot be trained by workers together.

    Raises:
        ConfigError: It optimizes by hand, or takes over what workers do together.
        NotReadyError: It has no training_step, or no configure_optimizers.
    """
    name = type(model).__name__
    if not model.automatic_optimization:
        raise ConfigError(
            f"{name} sets automatic_optimization = False: workers cannot do together what its "
            "training_step does by hand. Return the loss from training_step, or train it by "
            "bigdl.nano.pytorch.Trainer."
        )
    lacking = [
        step for step in ("training_step", "configure_optimizers") if not _is_own(model, step)
    ]
    if lacking:
        raise NotReadyError(f"Training needs {name}.{lacking[0]}(), which is not defined.")
    taken = [f"{hook}() ({_TAKEN[hook]})" for hook in _TAKEN if _is_own(model, hook)]
    if taken:
        raise ConfigError(
            f"{name} defines hooks that would be left out here: {'; '.join(taken)}. "
            "bigdl.nano.pytorch.Trainer calls all of Lightning's hooks."
        )


# --- steps ------------------------------------------------------------------------------------


class LightningWork:
    """See ``Work``: steps and hooks are the module's.

    Args:
        module: The LightningModule.
        rank: This worker's.
        world: How many there are.
        averages: Whether the losses of its steps are means over rows, else sums.
        precision: "fp32" or "bf16".
    """

    has_loss = True
    leaves_traces = True

    def __init__(
        self, module: Any, *, rank: int, world: int, averages: bool, precision: str
    ) -> None:
        self._module = module
        self.averages = averages
        self._precision = precision
        self._trainer = StandIn(rank=rank, world=world, precision=precision)
        self._call = calling.caller(module)
        self._book = Logbook(module, keeps_all=True)
        self._predicted = 0
        self._rows = 0
        #: (what the step returned, batch, number) of the update's batches, for hooks.
        self._done: list[tuple[Any, Any, int]] = []
        self._stages: set[str] = set()
        self.force: InForce | None = None

    # --- what a Trainer would have done before ---

    def set_up(self, stage: str) -> None:
        """The module's ``setup`` and ``configure_model``, once a stage."""
        if stage not in self._stages:
            self._stages.add(stage)
            with self._attached():
                self._hook("setup", stage)
                self._hook("configure_model")

    def configure(self) -> tuple[torch.optim.Optimizer, Schedule | None]:
        """The module's optimizer and scheduler, which its trainer then has too."""
        with self._attached():
            optimizer, schedule = configured(self._module)
        self._trainer.attach(optimizer, schedule)
        return optimizer, schedule

    @contextlib.contextmanager
    def _attached(self) -> Iterator[None]:
        """Within the block the module's ``trainer`` is ours."""
        before = self._module._trainer
        if before is self._trainer:
            yield
            return
        self._module.trainer = self._trainer
        try:
            yield
        finally:
            self._module.trainer = before

    def _hook(self, name: str, *arguments: Any) -> Any:
        with in_hook(self._module, name):
            return getattr(self._module, name)(*arguments)

    # --- training ---

    def tally(self, earlier: Sequence[Share] = ()) -> Tally:
        self._book = Logbook(self._module, keeps_all=True)
        self._rows = 0
        return Tally([self._book], averages=self.averages, earlier=earlier)

    def at(self, cursor: Cursor) -> None:
        self._trainer.at(cursor)

    def moment(self, name: str, *arguments: Any) -> None:
        with self._attached(), self._trainer.logging("fit", self._book):
            self._trainer.rows, self._trainer.number = 0, -1
            self._hook(name, *arguments)

    def loss_of(self, batch: Batch, number: int) -> Term:
        with self._attached(), self._logging_batch("fit", self._book, batch, number):
            data = self._batch(batch)
            if self._hook("on_train_batch_start", data, number) == -1:
                raise ConfigError(
                    "on_train_batch_start returned -1, to leave out the rest of the epoch, which "
                    "workers have to do together: call stop() in a callback of fit()."
                )
            output = self._training_step(data, number)
            self._done.append((output, data, number))
            self._rows += batch.rows
            return _term(output, batch.rows)

    def _training_step(self, data: Any, number: int) -> Any:
        force = self.force
        if force is None:
            with calling.precision(self._precision):
                return self._step("training_step", data, number)
        with force.step(), calling.precision(self._precision):
            output = self._step("training_step", force.batch(data), number)
        return force.output(output)

    def backward(self, loss: torch.Tensor) -> None:
        with self._attached(), self._trainer.logging("fit", self._book):
            self._hook("on_before_backward", loss)
            self._hook("backward", loss)
            self._hook("on_after_backward")

    def forget(self) -> None:
        """Never asked: what steps have logged cannot be taken back, see ``leaves_traces``."""

    def stepped(self, tally: Tally) -> None:
        with self._attached(), self._trainer.logging("fit", self._book):
            for output, data, number in self._done:
                self._trainer.number = number
                self._hook("on_train_batch_end", output, data, number)
        self._done.clear()

    def epoch_ended(self, tally: Tally, collective: Collective) -> None:
        self._done.clear()
        earlier = [share.parts[0][1] for share in tally.earlier]
        with (
            self._attached(),
            self._trainer.logging("fit", self._book),
            _merged(self._module, collective, earlier),
        ):
            self._trainer.rows, self._trainer.number = self._rows, -1
            self._hook("on_train_epoch_end")

    def recorded(self, row: dict[str, Any]) -> None:
        self._trainer.learn(row)
        self._book.end()

    # --- evaluation and prediction ---

    def evaluate(self, batches: Iterable[Batch], collective: Collective) -> dict[str, Any]:
        step = "validation_step" if _is_own(self._module, "validation_step") else "test_step"
        if not _is_own(self._module, step):
            raise NotReadyError(
                f"{type(self._module).__name__} has neither validation_step() nor test_step()."
            )
        stage, word = {"validation_step": ("validate", "validation")}.get(step, ("test", "test"))
        if "fit" not in self._stages:
            self.set_up(stage)
        book = Logbook(self._module)
        tally = Tally([book], averages=self.averages)
        with self._attached(), self._trainer.logging(stage, book):
            self._hook(f"on_{word}_start")
            self._hook(f"on_{word}_epoch_start")
            total = 0
            for number, batch in enumerate(batches):
                if batch.rows:
                    total += batch.rows
                    self._score(batch, number, (step, stage, word), tally, book)
            with _merged(self._module, collective):
                if total:  # a worker without rows has nothing to sum up
                    self._trainer.rows, self._trainer.number = total, -1
                    self._hook(f"on_{word}_epoch_end")
            found = tally.merge(collective, has_loss=None)
            self._trainer.learn(found)
            book.end()
            self._hook(f"on_{word}_end")
        return found

    def _score(
        self, batch: Batch, number: int, words: tuple[str, str, str], tally: Tally, book: Logbook
    ) -> None:
        step, stage, word = words
        with self._logging_batch(stage, book, batch, number):
            data = self._batch(batch)
            self._hook(f"on_{word}_batch_start", data, number)
            with calling.precision(self._precision):
                output = self._step(step, data, number)
            self._hook(f"on_{word}_batch_end", output, data, number)
        if _loss(output) is None:
            tally.add(loss=0.0, weight=0.0, rows=batch.rows)
            return
        term = _term(output, batch.rows)
        tally.add(loss=summed(term, self.averages), weight=term.weight, rows=batch.rows)

    def predict(self, features: Tree) -> Any:
        if "fit" not in self._stages:
            self.set_up("predict")
        data = calling.to_tensors(features)
        with self._attached(), calling.precision(self._precision):
            self._trainer.stage = "predict"
            if not _is_own(self._module, "predict_step"):
                return self._call(data)
            self._predicted += 1
            return self._step("predict_step", data, self._predicted - 1)

    # --- inside ---

    @contextlib.contextmanager
    def _logging_batch(
        self, stage: str, book: Logbook, batch: Batch, number: int
    ) -> Iterator[None]:
        with self._trainer.logging(stage, book):
            self._trainer.rows, self._trainer.number = batch.rows, number
            yield

    def _batch(self, batch: Batch) -> Any:
        """Arrays as tensors; what a loader gives as it is."""
        data = batch.data
        if type(data) is tuple and len(data) == 2:
            data = calling.to_tensors(data)
        if _is_own(self._module, "on_before_batch_transfer"):
            data = self._module.on_before_batch_transfer(data, 0)
        if _is_own(self._module, "on_after_batch_transfer"):
            data = self._module.on_after_batch_transfer(data, 0)
        return data

    def _step(self, name: str, data: Any, number: int) -> Any:
        """A step has the batch, its number, and that of the loader as far as it takes them."""
        takes = calling.positions(getattr(self._module, name))
        return self._hook(name, *(data, number, 0)[:takes])


def _loss(output: Any) -> torch.Tensor | None:
    found = output.get("loss") if isinstance(output, Mapping) else output
    return found if isinstance(found, torch.Tensor) else None


def _term(output: Any, rows: int) -> Term:
    """The loss of a step, which is a tensor, or stands in a dict; None leaves the rows out.

    Raises:
        ConfigError: It is something else, or no single number.
    """
    if output is None:
        return Term(torch.zeros(()), 0.0, is_void=True)
    loss = _loss(output)
    if loss is None or loss.numel() != 1:
        found = shown(output) if loss is None else f"a tensor of shape {tuple(loss.shape)}"
        raise ConfigError(
            f'A step gave {found}: need a loss of one number, {{"loss": loss}}, or None.'
        )
    weight = float(output.get("weight", rows)) if isinstance(output, Mapping) else float(rows)
    return Term(loss.reshape(()), weight, is_void=weight == 0)


@contextlib.contextmanager
def _merged(
    module: Any, collective: Collective, earlier: Sequence[dict[str, Any]] = ()
) -> Iterator[None]:
    """Within the block the module's metrics have the state of all workers' rows.

    A metric that was reset there stays so; others have this worker's own state again.
    """
    metrics = named_metrics(module)
    if not metrics or (collective.world == 1 and not earlier):
        yield
        return
    states = metric_states(module)
    # between workers of one gang, which trust each other
    payloads = gather_bytes(collective, pickle.dumps(states))
    every = [*earlier, *(pickle.loads(payload) for payload in payloads)]
    own = {name: state_of(metric) for name, metric in metrics.items()}
    for name, metric in metrics.items():
        put_together(metric, [one[name] for one in every if name in one])
    yield
    for name, metric in metrics.items():
        if metric._update_count or not any(name in one for one in every):
            count, state = own[name]
            for key, value in state.items():
                setattr(metric, key, value)
            metric._update_count, metric._computed = count, None
