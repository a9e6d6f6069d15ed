"""The seam of the training plan: one way to make a training step faster, tried and undone.

Knows torch; imports no Lightning. The table at the end names the candidates. A candidate is
applied to a module and its optimizers in place, wraps the step while it is applied, and takes
everything back when undone.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from bigdl._base.registry import Registry

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from contextlib import AbstractContextManager

    import torch


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What a candidate may look at before it says yes; nothing in it may be changed.

    Args:
        module: The user's module, as the training step calls it, in the user's modes.
        optimizers: The user's optimizers, in order.
        batch: One batch of the run, as the step gets it.
        steps_left: Optimizer steps still planned, None if unknown.
        epochs_left: Epochs still planned after this one, None if unknown.
        deterministic: The user asked for deterministic algorithms.
        device: Where the module's parameters live.
        precision: Lightning's word for the user's own precision.
        step_s: Seconds of the user's own step, None if it was not measured.
        loader_share: Share of the time from step to step that passes in fetching the batch, at
            most; None if unknown.
        page_faults: Pages that a step gets from the system, as a rule; None if unknown.
        readers: Gives the iterators of the run's DataLoaders, as they are at the call; None
            where there are none.
    """

    module: torch.nn.Module
    optimizers: tuple[torch.optim.Optimizer, ...]
    batch: Any
    steps_left: int | None
    epochs_left: int | None
    deterministic: bool
    device: torch.device
    precision: str = "32-true"
    step_s: float | None = None
    loader_share: float | None = None
    page_faults: float | None = None
    readers: Callable[[], Sequence[Any]] | None = None


class Applied:
    """A candidate in force. This base changes nothing: the null object."""

    #: What exactly is in force, in words for the plan's table ("backbone: openvino_int8").
    detail: str = ""
    #: It has seen all it needs to be sure that it is harmless.
    is_proven: bool = True
    #: Why it may not stay in force after all; None while it may.
    problem: str | None = None

    @property
    def options(self) -> dict[str, Any]:
        """Plain values (JSON) from which ``Candidate.pinned`` builds the same again."""
        return {}

    def settle(self) -> None:
        """Called once after the first step under the candidate, before any step is timed.

        What can only be built from true inputs was built in that step.

        Raises:
            ConfigError: It turned out not to work, or not to pay; the text says why.
        """

    def epoch_started(self) -> None:
        """Called at the start of each training epoch that begins while this is in force."""

    def step(self) -> AbstractContextManager[None]:
        """Entered around forward and loss of each training step (autocast, say)."""
        return nullcontext()

    def whole(self) -> AbstractContextManager[None]:
        """Entered around a whole step: forward, backward and the optimizer's."""
        return nullcontext()

    def batch(self, batch: Any) -> Any:
        """The batch as the step should get it."""
        return batch

    def output(self, output: Any) -> Any:
        """What the step returned, in the types and layouts that the user's own step gives."""
        return output

    def as_users(self, checkpoint: dict[str, Any]) -> None:
        """Take what this candidate changed out of a checkpoint that was just made, in place.

        ``optimizer_states`` in it, if there, are the optimizers' state dicts, in order.
        """

    def undo(self) -> None:
        """Put module and optimizers back as they were; calling it twice is harmless."""


class Candidate:
    """One row of the plan; subclasses state what they do."""

    name: ClassVar[str]
    #: Results may differ from the user's own setting: guarded, and never tried under
    #: ``deterministic``.
    changes_numbers: ClassVar[bool] = True
    #: Only the optimizer's arithmetic changes: compared on the update from equal gradients.
    changes_optimizer_only: ClassVar[bool] = False
    #: Changes the process, not the copy it is applied to: undone whenever another is timed.
    is_process_wide: ClassVar[bool] = False
    #: Changes what happens between the run's steps: tried on the run itself, not on copies.
    is_of_the_run: ClassVar[bool] = False
    #: How many times as fast a step may become where it helps most: what a trial can repay.
    hope: ClassVar[float] = 1.5

    def hope_for(self, scene: Scene) -> float:
        """``hope``, for the kind of model that there is."""
        return self.hope

    def setup_s(self, scene: Scene) -> float:
        """About how many seconds the first step under it takes longer than the others."""
        return 0.0

    def pinned(self, options: Mapping[str, Any]) -> Candidate:
        """This candidate, bound to what ``Applied.options`` said when a plan was made."""
        return self

    def gentler(self) -> Candidate | None:
        """The same idea, nearer to the user's own numbers: tried when the guard refuses this
        one as last applied. None if there is none.
        """
        return None

    def refuse(self, scene: Scene) -> str | None:
        """Why this cannot help or cannot work here, in one sentence; None if it may."""
        raise NotImplementedError

    def apply(
        self,
        module: torch.nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        scene: Scene,
    ) -> Applied:
        """Change ``module`` and ``optimizers`` in place.

        In a probe ``module`` is a copy of ``scene.module``, later it is the very same. One
        candidate object is applied to both, so that what was built for the copy serves again.

        Raises:
            ConfigError: It turned out not to work for this model; nothing was changed.
        """
        raise NotImplementedError


# --- the table --------------------------------------------------------------------------------

_TABLE: Registry[type[Candidate]] = Registry(
    "candidate",
    {
        "frozen_trunk": "bigdl.nano.pytorch.frozen:FrozenTrunk",
        "channels_last": "bigdl.nano.pytorch.plan.numerics:ChannelsLast",
        "bf16": "bigdl.nano.pytorch.plan.numerics:Bf16",
        "fused_optimizer": "bigdl.nano.pytorch.plan.numerics:FusedOptimizer",
        "compile": "bigdl.nano.pytorch.plan.compiling:Compile",
        "allocator": "bigdl.nano.pytorch.plan.process:Allocator",
        "threads": "bigdl.nano.pytorch.plan.process:Threads",
        "prefetch": "bigdl.nano.pytorch.plan.prefetching:Prefetch",
        "processes": "bigdl.nano.pytorch.plan.process:Processes",
    },
)

#: Every candidate's name.
NAMES: tuple[str, ...] = tuple(_TABLE)


def candidate(name: str) -> Candidate:
    """A candidate by name.

    Raises:
        ConfigError: There is none of that name; the text has the nearest.
    """
    return _TABLE.get(name)()
