"""What is trained, and what a worker makes of it. Names no framework.

A ``Program`` is what the user has written: a model, its optimizer, its loss. It travels to the
workers, and each builds a ``Replica`` of it, which owns the loop over epochs. What the loop
needs from outside, batches first of all, and what it tells, goes through ``Hooks``.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, get_args, runtime_checkable

from bigdl._base.errors import ConfigError
from bigdl._base.registry import nearest
from bigdl.nano.accelerators import ACCELERATORS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from bigdl._base.collective import Collective, Compress
    from bigdl._base.sync import Sync
    from bigdl._base.trees import Tree
    from bigdl.orca.data.contract import Batch
    from bigdl.orca.learn.checkpoint import Codec

__all__ = [
    "Cursor",
    "Hooks",
    "Options",
    "Precision",
    "Program",
    "Replica",
    "ReplicaContext",
    "State",
    "StepEnd",
]

Precision = Literal["fp32", "bf16"]

#: Tensors of the framework and plain values (str, int, float, bool, None) in dicts and lists.
State: TypeAlias = "dict[str, Any]"


@dataclass(frozen=True, kw_only=True)
class Cursor:
    """How far training is: the same on all workers, and for any number of them.

    Args:
        epoch: Whole epochs done.
        row: Rows of the epoch after those that all workers together have had.
        step: Updates made, in all epochs.
    """

    epoch: int = 0
    row: int = 0
    step: int = 0


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to train.

    Args:
        accumulation_steps: Global batches in an update.
        clip_norm: Largest norm of the global gradient.
        clip_value: Largest absolute value in it.
        precision: "bf16" is autocast over weights that stay as they are.
        sync: Whether each worker has the whole optimizer, or its slice of it.
        compress: "bf16" rounds gradients where they travel between hosts.
        max_steps: Updates after which ``train`` returns; None = as the epochs have; 0 = only what
            follows the last one, such as the record of its epoch.
        accelerator: Of Nano's, through which the model predicts; None = the framework itself.
        acceleration: What makes training steps faster, in the program's own words: "off",
            "auto" (measured in the run), or what an earlier run has settled on.

    Raises:
        ConfigError: A value is not allowed; the text names all that are not.
    """

    accumulation_steps: int = 1
    clip_norm: float | None = None
    clip_value: float | None = None
    precision: Precision = "fp32"
    sync: Sync = "allreduce"
    compress: Compress = None
    max_steps: int | None = None
    accelerator: str | None = None
    acceleration: str = "off"

    def __post_init__(self) -> None:
        wrong = []
        if self.accumulation_steps < 1:
            wrong.append(f"accumulation_steps={self.accumulation_steps} (need >= 1)")
        if self.max_steps is not None and self.max_steps < 0:
            wrong.append(f"max_steps={self.max_steps} (need >= 0, or None)")
        if self.precision not in get_args(Precision):
            wrong.append(f'precision={self.precision!r} (need "fp32" or "bf16")')
        for name in ("clip_norm", "clip_value"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                wrong.append(f"{name}={value} (need > 0, or None)")
        if self.sync not in ("allreduce", "sharded"):
            wrong.append(f'sync={self.sync!r} (need "allreduce" or "sharded")')
        if self.compress not in (None, "bf16"):
            wrong.append(f'compress={self.compress!r} (need None or "bf16")')
        if self.accelerator is not None and self.accelerator not in ACCELERATORS:
            wrong.append(f"accelerator={self.accelerator!r} (have {', '.join(ACCELERATORS)})")
        if wrong:
            near = nearest(str(self.accelerator), list(ACCELERATORS)) if self.accelerator else ""
            raise ConfigError("This cannot be done so: " + ", ".join(wrong) + f".{near}")


@dataclass(frozen=True, kw_only=True)
class ReplicaContext:
    """A worker's place, as a program is built there.

    Args:
        collective: The connection to the other workers.
        options: How to train.
        seed: Of the random streams: of weights (the same on all workers), and of each rank.
        trains: Whether ``train`` will be called; without, nothing that only it needs is made.
    """

    collective: Collective
    options: Options = field(default_factory=Options)
    seed: int = 0
    trains: bool = True

    @property
    def rank(self) -> int:
        return self.collective.rank

    @property
    def world(self) -> int:
        return self.collective.world


@dataclass(frozen=True, kw_only=True)
class StepEnd:
    """An update that has just been made.

    Args:
        cursor: How far training is after it.
        loss: Of its rows.
        rows: Of all workers.
    """

    cursor: Cursor
    loss: float
    rows: int


class Hooks:
    """What the loop over epochs asks for and tells, on every worker.

    A hook may call ``state`` or ``evaluate`` of the replica, if it does so on all workers.
    """

    def batches(self, cursor: Cursor) -> Iterable[Batch]:
        """This rank's parts of the global batches of an epoch, from the cursor on."""
        return ()

    def had(self) -> Any:
        """What ``Replica.part`` gave of the first epoch, if it goes on with; None = nothing."""
        return None

    def on_epoch_start(self, replica: Replica, cursor: Cursor) -> None:
        """An epoch, or the rest of one, begins."""

    def on_step_end(self, replica: Replica, step: StepEnd) -> None:
        """An update was made."""

    def validate(self, replica: Replica, cursor: Cursor) -> Mapping[str, float]:
        """What ``evaluate`` says after a whole epoch, with the keys of its row; may be empty."""
        return {}

    def on_epoch_end(self, replica: Replica, cursor: Cursor, row: dict[str, Any]) -> None:
        """An epoch is over, scheduler included; ``row`` is its record and may be added to."""

    def batches_left(self) -> int | None:
        """Global batches still to come that can be counted on; None where that is not known."""
        return None

    def pausing(self) -> contextlib.AbstractContextManager[None]:
        """Entered where a worker does something long between updates, as the others wait."""
        return contextlib.nullcontext()

    def on_settled(self, acceleration: str) -> None:
        """What makes steps faster from here on, as ``Options.acceleration`` takes it."""

    def should_stop(self) -> bool:
        """Whether this worker asks for the end; all workers end before the same update."""
        return False


@runtime_checkable
class Replica(Protocol):
    """A worker's model. All workers make the same calls, but for ``predict``.

    Attributes:
        gradient_bytes: What several workers sum in a step.
    """

    @property
    def gradient_bytes(self) -> int: ...

    def train(self, epochs: int, start: Cursor, hooks: Hooks) -> list[dict[str, Any]]:
        """Train for ``epochs`` epochs; the rest of a broken one counts as one.

        Returns:
            A dict for each epoch begun: ``epoch`` (from 1), ``loss``, ``rows``, ``steps``,
            ``seconds``, metrics, and what ``hooks.validate`` gave. Numbers are those of all
            workers, the same on each.

        Raises:
            NotReadyError: There is no optimizer or no loss.
            DataError: An epoch has no rows.
        """

    def evaluate(self, batches: Iterable[Batch]) -> dict[str, Any]:
        """Loss (if there is one), ``rows`` and metrics over the batches of all workers."""

    def predict(self, features: Tree) -> Tree:
        """Outputs for one batch, as NumPy arrays in the model's structure, in eval mode."""

    def state(self) -> State:
        """All that a checkpoint of this moment needs; the same on all workers."""

    def part(self) -> Any:
        """What the record of the present epoch is made of so far, metrics too; picklable.

        The same on all workers, which all call it. An epoch that is broken off here, and gone on
        with by any number of workers that have it from ``Hooks.had``, ends with a record of all
        its rows.
        """

    def load(self, state: State) -> None:
        """Go on from a ``state``, of any number of workers.

        Raises:
            StoredModelError: It is of another model; the text names the parameter, and nothing
                has changed.
        """


@runtime_checkable
class Program(Protocol):
    """A recipe for replicas. It travels to the workers by cloudpickle.

    Attributes:
        preload: Modules that a worker can have imported before the program arrives.
        codec: How its states' tensors become bytes.
    """

    @property
    def preload(self) -> tuple[str, ...]: ...

    @property
    def codec(self) -> Codec: ...

    def check_training(self) -> None:
        """Refuse, in the caller's process, what ``Replica.train`` would refuse.

        Raises:
            NotReadyError: There is no optimizer or no loss.
            ConfigError: It trains in a way that workers cannot do together.
        """

    def check_acceleration(self, asked: Any) -> str:
        """What a user says makes steps faster, for ``Options.acceleration``.

        Raises:
            ConfigError: There is no such thing, or it cannot be had for this model.
        """

    def check_accelerator(self) -> None:
        """Refuse, in the caller's process, a model that no accelerator can stand for.

        Raises:
            ConfigError: Its predictions are made by more than its one call.
        """

    def build(self, ctx: ReplicaContext) -> Replica:
        """Make this worker's replica; all workers do it at the same time.

        Raises:
            ConfigError: Its parts do not go together.
        """

    def refreshed(self, state: State) -> State:
        """``state`` with what the user's own objects, as far as they are instances, hold now."""

    def take(self, state: State) -> Any:
        """Put a replica's state into the user's own objects, in the caller's process.

        Returns:
            The model: the user's own, or a new one where the user gave a function.

        Raises:
            StoredModelError: It is of another model; nothing has changed.
        """
