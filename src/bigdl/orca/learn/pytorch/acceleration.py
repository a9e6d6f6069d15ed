"""Nano's training plan inside a replica: given, or measured by rank 0, in force on all ranks.

Rank 0 tries candidates on copies, between updates of the first epoch, as far as the run can
afford; the others wait meanwhile. What it comes to is told to all, checked on each, and is in
force from the same update on.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bigdl._base.errors import ConfigError
from bigdl._base.sync import gather_bytes
from bigdl.nano.pytorch.guard import Guard
from bigdl.nano.pytorch.plan.best_known import best_known
from bigdl.nano.pytorch.plan.candidates import NAMES, Scene, candidate
from bigdl.nano.pytorch.plan.choice import Choice
from bigdl.nano.pytorch.plan.plan import InForce, Plan, Row, device_of
from bigdl.nano.pytorch.plan.rehearsal import Cast, Rehearsal, copy_optimizer, strip_hooks
from bigdl.nano.pytorch.plan.timing import LONG_STEP_S
from bigdl.orca.learn.pytorch import calling
from bigdl.orca.learn.pytorch.work import PlainWork

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from bigdl.nano.pytorch.plan.candidates import Candidate
    from bigdl.orca.data.contract import Batch
    from bigdl.orca.learn.program import Hooks, ReplicaContext
    from bigdl.orca.learn.pytorch.work import Work

__all__ = ["Acceleration", "check_acceleration"]

#: What has no place in a worker, and why.
_NOT_HERE = {
    "threads": "a worker's threads are those of its cores",
    "processes": "the engine's workers are the processes",
    "prefetch": "a worker reads ahead as its data says",
}
_SLICED = "with sync='sharded' each worker has its slice of the optimizer"
_FEWEST = 2  # updates that are timed, after the first


def check_acceleration(asked: Any, *, is_lightning: bool) -> str:
    """What ``acceleration=`` says, as text for the workers: "off", "auto", or a plan.

    Raises:
        ConfigError: It is none of these, or cannot be used for this model.
    """
    if isinstance(asked, Plan):
        return asked.to_json() if asked.chosen else "off"
    if not isinstance(asked, str) or asked not in ("off", "auto"):
        raise ConfigError(
            f'acceleration={asked!r}: need "off", "auto" or a bigdl.nano.pytorch.Plan.'
        )
    if asked == "auto" and is_lightning:
        raise ConfigError(
            'acceleration="auto" tries steps of plain modules. A LightningModule brings steps of '
            "its own: let bigdl.nano.pytorch.Trainer make the plan, and give "
            "acceleration=trainer.plan here."
        )
    return asked


class Acceleration:
    """From the first update on: watches, tries, and puts in force.

    Args:
        ctx: This worker's place; its options say what is asked.
        model: The module.
        optimizer: Its optimizer.
        work: Does the steps; what is in force goes through it.
        hooks: Of the run.
    """

    def __init__(
        self,
        ctx: ReplicaContext,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        work: Work,
        hooks: Hooks,
    ) -> None:
        self._ctx, self._model, self._optimizer = ctx, model, optimizer
        self._work, self._hooks = work, hooks
        self._asked = ctx.options.acceleration
        self._batches: list[Any] = []
        self._steps: list[float] = []  # seconds of a batch, by update
        self._starts: list[float] = []
        self._many: list[int] = []  # batches, by update
        self._began = 0.0
        self._spent_s = 0.0
        self._choice: Choice | None = None
        self._is_settled = True
        self._is_decided = False
        #: What was decided; None while it is open.
        self.plan: Plan | None = None
        #: In force now; None = the user's own steps.
        self.force: InForce | None = None

    # --- what the loop tells ---

    def begin(self) -> None:
        """Before the first update: a plan that is given is in force from there on."""
        if self._asked != "auto":
            plan = Plan.from_json(self._asked)
            self._put_in_force(plan, plan.candidates(), must=True)

    def meets(self, window: Sequence[Batch]) -> None:
        """The batches of an update are there."""
        if self._is_decided:
            return
        if self._ctx.rank == 0:
            full = [batch for batch in window if batch.rows]
            # copies, made before the step: it may write into them
            wanted = full[: 2 - len(self._batches)]
            self._batches += [copy.deepcopy(_data(batch)) for batch in wanted]
        self._began = time.perf_counter()

    def updated(self, batches: int) -> None:
        """The update of so many batches is made."""
        if not self._is_decided:
            self._starts.append(self._began)
            self._many.append(max(1, batches))
            self._steps.append((time.perf_counter() - self._began) / max(1, batches))

    def stepped(self) -> None:
        """All that follows an update is done; all workers say so of the same one."""
        if not self._is_decided:
            self._agree(self._tried() if self._ctx.rank == 0 else None)
        elif not self._is_settled and self.force is not None and self.plan is not None:
            self.force.settle()
            self._is_settled = self.force.is_proven
            if self.force.lost:
                self._tell(self.plan.without(self.force.lost))

    def epoch_started(self) -> None:
        """An epoch, or the rest of one, begins."""
        if self.force is not None:
            self.force.epoch_started()
        if self._starts and not self._is_decided:
            plan = None
            if self._ctx.rank == 0:
                plan = self._given_up("the first epoch ended before the run could afford it")
            self._agree(plan)

    def end(self) -> None:
        """The run ends; what is open by now stays untried."""
        if not self._is_decided and self._ctx.rank == 0:
            plan = self._given_up("the run ended before it could be tried")
            late = "faster, but the run ended before it could be put in force"
            self._tell(plan.without(dict.fromkeys(plan.chosen, late)))

    def is_finite(self) -> bool:
        """Whether this worker's gradients are; looked at under a choice that changes numbers."""
        if self.force is None or self._work.leaves_traces or not self.force.changes_numbers:
            return True
        made = [one.grad for one in self._model.parameters() if one.grad is not None]
        flat = [one.coalesce().values() if one.is_sparse else one for one in made]
        return not flat or bool(torch.isfinite(torch.nn.utils.get_total_norm(flat)))

    def is_tripped(self, loss: float) -> bool:
        """Whether an update's loss, that of all workers, says that one of them stumbled."""
        if self.force is None or self._work.leaves_traces:  # a step with traces runs once
            return False
        return self.force.changes_numbers and not math.isfinite(loss)

    def give_up(self, step: int) -> None:
        """Loss or gradient were not finite: the user's own steps from here on, on all workers."""
        assert self.plan is not None
        chosen = self.plan.chosen
        reason = (
            f"loss or gradient was not finite at step {step}: that update was made again, with "
            "your own setting, which is back in force"
        )
        self.undo()
        self._tell(self.plan.without(dict.fromkeys(chosen, reason)))
        if self._ctx.rank == 0:
            warnings.warn(
                f"Under the training plan ({', '.join(chosen)}) {reason}.",
                RuntimeWarning,
                stacklevel=2,
            )

    def undo(self) -> None:
        """Put module and optimizer back as they were; calling it twice is harmless."""
        self._close()
        self._work.force = None
        if self.force is not None:
            self.force.undo()
            self.force = None

    # --- rank 0 tries ---

    def _tried(self) -> Plan | None:
        """The plan, once there is one."""
        if not self._batches or not self._is_measured():
            return None
        if self._choice is None:
            self._choice = self._new_choice()
        choice = self._choice
        choice.went_on()
        left = self._hooks.batches_left()
        while not choice.is_done:
            if self._spent_s + choice.next_cost_s <= self._allowed_s(choice, left):
                self._timed(choice.trial)
            elif left is not None:
                choice.skip_next(
                    f"trying takes some {choice.next_cost_s:.2g} s; this run allows "
                    f"{choice.share:.0%} of itself"
                )
            else:
                return None  # later, when the run has lasted longer
        return self._with_others(choice.plan())

    def _is_measured(self) -> bool:
        """Whether the user's own step is known well enough; the first one is no measure."""
        timed = self._steps[1:]
        if len(timed) < _FEWEST:
            return False
        return timed[0] >= LONG_STEP_S or sum(timed) >= 0.1 or len(timed) >= 20

    def _given_up(self, reason: str) -> Plan:
        if self._choice is None:
            rows = [Row(name=name, status="skipped", reason=reason) for name in self._names()]
            return self._with_others(Plan((Row(name="original", status="chosen"), *rows)))
        self._choice.skip(reason)
        return self._with_others(self._choice.plan())

    def _timed(self, trial: Callable[[], None]) -> None:
        began = time.perf_counter()
        with self._hooks.pausing():
            trial()
        self._spent_s += time.perf_counter() - began

    def _allowed_s(self, choice: Choice, left: int | None) -> float:
        passed = time.perf_counter() - self._starts[0] - self._spent_s
        return choice.share * (passed + (left or 0) * self._wall_s())

    def _wall_s(self) -> float:
        """Seconds from batch to batch, reading and callbacks included."""
        gaps = [
            (after - before) / many
            for before, after, many in zip(
                self._starts[1:], self._starts[2:], self._many[1:], strict=False
            )
        ]
        return max(self._own_s, statistics.median(gaps) if gaps else 0.0)

    @property
    def _own_s(self) -> float:
        return statistics.median(self._steps[1:] or self._steps)

    def _new_choice(self) -> Choice:
        assert isinstance(self._work, PlainWork)  # see check_acceleration
        names = self._names()
        order = [name for name in best_known(self._model).order if name in names]
        return Choice(
            _Rehearsal(self._work, self._batches, self._scene(self._batches[-1])),
            Guard(),
            own_step_s=self._own_s,
            steps_left=self._hooks.batches_left(),
            candidates=[candidate(name) for name in order],
        )

    def _names(self) -> list[str]:
        others = self._others()
        return [name for name in NAMES if name not in others]

    def _others(self) -> dict[str, str]:
        """Candidates that are not for a worker."""
        sliced = {"fused_optimizer": _SLICED} if self._ctx.options.sync == "sharded" else {}
        return _NOT_HERE | sliced

    def _with_others(self, plan: Plan) -> Plan:
        rows = [
            Row(name=name, status="skipped", reason=reason)
            for name, reason in self._others().items()
        ]
        return Plan((*plan.rows, *rows), plan.options)

    def _scene(self, batch: Any) -> Scene:
        left = self._hooks.batches_left()
        return Scene(
            module=self._model,
            optimizers=(self._optimizer,),
            batch=batch,
            steps_left=left,
            epochs_left=None,
            deterministic=torch.are_deterministic_algorithms_enabled(),
            device=device_of(self._model),
            precision="bf16-mixed" if self._ctx.options.precision == "bf16" else "32-true",
            step_s=self._own_s if self._steps else None,
        )

    def _close(self) -> None:
        if self._choice is not None:
            self._choice.close()
            self._choice = None

    # --- all agree ---

    def _agree(self, plan: Plan | None) -> None:
        """Take rank 0's plan, if it has one by now; all workers call it."""
        collective = self._ctx.collective
        content = b"" if plan is None else plan.to_json().encode()
        length = collective.broadcast(np.array([len(content)], np.int64))
        if not length[0]:
            return
        payload = np.zeros(int(length[0]), np.uint8)
        payload[: len(content)] = np.frombuffer(content, np.uint8)
        told = Plan.from_json(collective.broadcast(payload).tobytes().decode())
        # what rank 0 built on its copies serves again
        mine = self._choice.chosen if self._choice is not None else told.candidates()
        self._put_in_force(told, mine if told.chosen else ())
        self._close()
        self._batches = []

    def _put_in_force(
        self, plan: Plan, candidates: Sequence[Candidate], *, must: bool = False
    ) -> None:
        """Put the same in force on all workers, or on none.

        Raises:
            ConfigError: It ``must`` be, as the user gave it, and one worker cannot.
        """
        self._is_decided = True
        others = self._others()
        own = [one for one in candidates if one.name not in others]
        force, problem = None, ""
        if own:
            scene = self._scene(self._batches[-1] if self._batches else None)
            try:
                force = InForce.start(own, self._model, (self._optimizer,), scene, check=True)
            except ConfigError as exc:
                problem = str(exc)
        problems = gather_bytes(self._ctx.collective, problem.encode())
        first = next((rank for rank, one in enumerate(problems) if one), None)
        if first is not None:
            if force is not None:
                force.undo()
                force = None
            reason = f"{problems[first].decode()} (worker {first})"
            if must:
                raise ConfigError(f"acceleration=: {reason}")
            plan = plan.without(dict.fromkeys(plan.chosen, reason))
        left_out = {name: why for name, why in others.items() if name in plan.chosen}
        self.force = self._work.force = force
        self._is_settled = force is None
        self._tell(plan.without(left_out) if left_out else plan)

    def _tell(self, plan: Plan) -> None:
        self.plan = plan
        self._hooks.on_settled(plan.to_json())


def _data(batch: Batch) -> tuple[Any, Any, int]:
    return (*calling.split(calling.to_tensors(batch.data)), batch.rows)


class _Cast(Cast):
    """A copy of the replica's module and optimizer; the work does its steps."""

    def __init__(self, work: PlainWork, scene: Scene) -> None:
        memo: dict[int, Any] = {}
        self.module = copy.deepcopy(scene.module, memo)
        self.optimizers = tuple(copy_optimizer(one, memo) for one in scene.optimizers)
        strip_hooks(self.module)
        self._work = work
        self._call = calling.caller(self.module)

    def perform(self, batch: Any, force: InForce) -> float | None:
        with force.whole():
            _, term = self._work.term_of(self._call, *batch, force=force)
            for optimizer in self.optimizers:
                optimizer.zero_grad()
            if not term.is_void:
                term.value.backward()  # type: ignore[no-untyped-call]
            for optimizer in self.optimizers:
                optimizer.step()
        value = float(term.value.detach())
        return value if math.isfinite(value) or not term.is_void else None


class _Rehearsal(Rehearsal):
    """Steps of plain work, on copies."""

    def __init__(self, work: PlainWork, batches: Sequence[Any], scene: Scene) -> None:
        super().__init__(batches, scene)
        self._work = work

    def cast(self) -> Cast:
        return _Cast(self._work, self.scene)
