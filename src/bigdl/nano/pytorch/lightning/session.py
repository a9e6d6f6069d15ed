"""One run's acceleration: its first steps are watched, a plan is chosen, put in force, undone.

While nothing is decided the two optimization loops are watched; afterwards only what a chosen
candidate needs stays between Lightning and its steps, and nothing where nothing is chosen.
"""

from __future__ import annotations

import copy
import logging
import math
import statistics
import time
import warnings
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from bigdl._base.errors import ConfigError
from bigdl.nano.pytorch.lightning.host import part
from bigdl.nano.pytorch.lightning.rehearsal import (
    LightningRehearsal,
    no_room_for_copies,
    why_not_rehearsed,
)
from bigdl.nano.pytorch.lightning.wiring import Wiring
from bigdl.nano.pytorch.plan import cache as plan_cache
from bigdl.nano.pytorch.plan.candidates import NAMES, Scene
from bigdl.nano.pytorch.plan.choice import WORTH, Choice
from bigdl.nano.pytorch.plan.on_run import TrialOnRun
from bigdl.nano.pytorch.plan.plan import InForce, Plan, Row, device_of
from bigdl.nano.pytorch.plan.process import page_faults
from bigdl.nano.pytorch.plan.timing import LONG_STEP_S, slower

if TYPE_CHECKING:
    from collections.abc import Callable

    from bigdl.nano.pytorch.guard import Guard
    from bigdl.nano.pytorch.plan.candidates import Applied, Candidate

__all__ = ["Session"]

_log = logging.getLogger(__name__)

_EarlyStopping = part("callbacks:EarlyStopping")
_Timer = part("callbacks:Timer")

#: With early stopping, a run is not counted on to last longer than this.
_EPOCHS_COUNTED_ON = 10


def unplanned(reason: str) -> Plan:
    """A plan that keeps the user's setting, with one reason for every candidate."""
    rows = [Row(name=name, status="skipped", reason=reason) for name in NAMES]
    return Plan((Row(name="original", status="chosen"), *rows))


def _remembered(plan: Plan) -> Plan:
    """A plan of an earlier run, which says so."""
    own, words = plan.row("original"), "measured in an earlier run"
    if words in own.reason:
        return plan
    reason = f"{own.reason}; {words}" if own.reason else words
    return plan.with_row(replace(own, reason=reason))


class Session:
    """What happens between a trainer and its steps during one ``fit``.

    Args:
        trainer: The trainer, inside ``fit``, before its first step.
        acceleration: "auto", "off" or a plan to put in force as it is.
        guard: Limits for what is chosen by itself.
        kept: A plan that came with a checkpoint, and the key it was made under.
        epochs: ``max_epochs`` as the user gave it, None if not given.
    """

    def __init__(
        self,
        trainer: Any,
        acceleration: str | Plan,
        guard: Guard,
        *,
        kept: tuple[str, Plan] | None = None,
        epochs: int | None = None,
    ) -> None:
        self._trainer = trainer
        self._guard = guard
        self._kept = kept
        self._epochs = epochs
        self._pinned = acceleration if isinstance(acceleration, Plan) else None
        self._is_off = acceleration == "off"
        self._loop = trainer.fit_loop.epoch_loop
        self._callbacks = trainer.callbacks
        self._watched: list[Any] = []
        self._batches: list[tuple[Any, int]] = []
        self._steps: list[float] = []  # seconds of each step
        self._starts: list[float] = []  # when each began
        self._faults: list[int] = []  # pages that the process had got when each ended
        self._choice: Choice | None = None
        self._spent_s = 0.0
        self._steps_at_choice: int | None = None
        self._first_epoch = 0
        self._wiring: Wiring | None = None
        self._trial: TrialOnRun | None = None
        self._is_whole = True
        self.force: InForce | None = None
        #: What a plan is kept under; None before the first batch.
        self.key: str | None = None
        self.plan: Plan | None = None

    # --- from start to end ---

    def begin(self) -> None:
        """Watch the steps to come, unless it is clear already that nothing is to be done."""
        trainer = self._trainer
        if self._is_off or (self._pinned is not None and not self._pinned.chosen):
            self.plan = self._pinned or Plan()
            return
        if self._pinned is None:
            reason = why_not_rehearsed(trainer)
            if trainer.fast_dev_run:
                reason = "fast_dev_run is never probed"
            if reason is not None:
                self.plan = unplanned(reason)
                return
        for loop in (self._loop.automatic_optimization, self._loop.manual_optimization):
            vars(loop)["run"] = self._watching(loop)
            self._watched.append(loop)
        self._first_epoch = trainer.current_epoch

    def end(self) -> None:
        """Put everything back as it was before the run."""
        if self.plan is None:
            self.plan = self._unfinished()
        if self._choice is not None:
            self._choice.close()
            self._choice = None
        self._unwatch()
        self._undo()

    def _unfinished(self) -> Plan:
        """The plan of a run that ended before it had decided; nothing of it was in force."""
        reason = "the run ended before it could be tried"
        if self._choice is None:
            return unplanned(reason)
        self._choice.skip(reason)
        plan = self._choice.plan()
        late = "faster, but the run ended before it could be put in force"
        return plan.without(dict.fromkeys(plan.chosen, late))

    def _unwatch(self) -> None:
        watched, self._watched = self._watched, []
        for loop in watched:
            vars(loop).pop("run", None)
        self._batches = []

    def _undo(self) -> None:
        if self._trial is not None:
            self._trial.undo()
            self._trial = None
        if self._wiring is not None:
            self._wiring.off()
            self._wiring = None
        if self.force is not None:
            self.force.undo()
            self.force = None
        self._loop.after_step = self._loop.epoch_started = None

    # --- watching ---

    def _watching(self, loop: Any) -> Callable[..., Any]:
        stock = loop.run

        def run(*args: Any, **kwargs: Any) -> Any:
            if self._trainer.callbacks is not self._callbacks:
                return stock(*args, **kwargs)  # a tuner's run inside this one
            self._before(args[-1])
            if not self._watched:  # decided: this very step is the first under the plan
                return loop.run(*args, **kwargs)
            start = time.perf_counter()
            result = stock(*args, **kwargs)
            self._after(start, time.perf_counter() - start)
            return result

        return run

    def _before(self, step: dict[str, Any]) -> None:
        """A step is about to run on ``step["batch"]``."""
        if "batch" not in step:
            self._decide(unplanned("the training step fetches its batches by itself"))
            return
        if not self._starts and self._has_plan(step["batch"]):
            return
        if len(self._batches) < 2:
            try:
                # a copy, made before the step: it may write into its batch
                copied = copy.deepcopy(step["batch"])
            except Exception as exc:  # noqa: BLE001
                # batches are the user's own classes: anything may come
                self._decide(unplanned(f"a batch cannot be copied: {type(exc).__name__}: {exc}"))
                return
            self._batches.append((copied, step.get("batch_idx", 0)))

    def _after(self, start: float, seconds: float) -> None:
        self._starts.append(start)
        self._steps.append(seconds)
        if (faults := page_faults()) is not None:
            self._faults.append(faults)
        if self._is_measured():
            self._try()
        if self._loop.after_step is not None:  # decided just now: this step was still the user's
            self._loop.after_step = self._settle_after_next

    def _is_measured(self) -> bool:
        """Whether the user's own step is known well enough; the first one is no measure."""
        timed = self._steps[1:]
        if len(timed) < 2:
            return False
        return timed[0] >= LONG_STEP_S or sum(timed) >= 0.1 or len(timed) >= 20

    @property
    def _own_s(self) -> float:
        return statistics.median(self._steps[1:] or self._steps)

    # --- a plan from elsewhere ---

    def _has_plan(self, batch: Any) -> bool:
        """Put a plan in force that was made before, if there is one that may serve."""
        trainer = self._trainer
        if self._pinned is not None:
            self._decide(self._pinned, self._pinned.candidates(), must=True)
            return True
        module = trainer.lightning_module
        self.key = plan_cache.key(
            module,
            trainer.optimizers,
            batch,
            self._guard,
            trainer.precision_plugin.precision,
            self._scene(batch).deterministic,
            trainer.accumulate_grad_batches,
            trainer.gradient_clip_val,
        )
        if self._kept is not None and self._kept[0] == self.key:
            return self._serves_again(self._kept[1], batch)
        kept = plan_cache.load(self.key)
        if kept is None or not kept.serves(self._steps_left()):
            return False
        return self._serves_again(kept.plan, batch)

    def _serves_again(self, known: Plan, batch: Any) -> bool:
        """Check a known plan against the guard once more; nothing is timed."""
        if not known.chosen:
            self._decide(_remembered(known))
            return True
        try:
            candidates = known.candidates()
            rehearsal = LightningRehearsal(
                self._trainer, [(copy.deepcopy(batch), 0)], self._scene(batch)
            )
        except Exception as exc:  # noqa: BLE001
            # batches are the user's own classes: anything may come
            _log.info("a known plan cannot be checked: %s", exc)
            return False
        choice = Choice(
            rehearsal, self._guard, own_step_s=LONG_STEP_S, steps_left=None, candidates=[]
        )
        reason = choice.check(candidates)
        choice.close()
        if reason is not None:
            _log.info("a known plan no longer serves: %s", reason)
            return False
        self._decide(_remembered(known), candidates)
        return True

    # --- choosing ---

    def _scene(self, batch: Any) -> Scene:
        import torch

        trainer = self._trainer
        left = self._steps_left()
        epochs = self._epochs_left()
        return Scene(
            module=trainer.lightning_module,
            optimizers=tuple(trainer.optimizers),
            batch=batch,
            steps_left=left,
            epochs_left=epochs,
            deterministic=torch.are_deterministic_algorithms_enabled(),
            device=device_of(trainer.lightning_module),
            precision=str(trainer.precision_plugin.precision),
            step_s=self._own_s if self._steps else None,
            loader_share=1 - self._own_s / self._wall_s() if len(self._steps) > 2 else None,
            page_faults=self._page_faults(),
            readers=self._readers if self._may_read_ahead() else None,
        )

    def _page_faults(self) -> float | None:
        counts = [after - before for before, after in pairwise(self._faults)]
        return statistics.median(counts) if counts else None

    def _readers(self) -> list[Any]:
        """Iterators of the training loaders, as they are now."""
        fetcher = self._trainer.fit_loop._data_fetcher
        combined = getattr(getattr(fetcher, "iterator", None), "_iterator", None)
        return list(getattr(combined, "iterators", []))

    def _may_read_ahead(self) -> bool:
        """Whether a thread may read: not beside loaders that fork worker processes."""
        loaders = getattr(self._trainer.fit_loop.epoch_loop.val_loop, "_combined_loader", None)
        beside = [] if loaders is None else loaders.flattened
        fetcher = self._trainer.fit_loop._data_fetcher
        return getattr(fetcher, "length", None) is not None and not any(
            getattr(one, "num_workers", 0) for one in beside
        )

    def _epochs_left(self) -> int | None:
        """Epochs after this one that can be counted on; None where that is not known."""
        trainer = self._trainer
        most: int | None = trainer.fit_loop.max_epochs
        if self._epochs is None or most is None or most < 0:
            return None
        left = max(0, most - int(trainer.current_epoch) - 1)
        if any(isinstance(one, _EarlyStopping) for one in trainer.callbacks):
            left = min(left, max(_EPOCHS_COUNTED_ON, trainer.fit_loop.min_epochs or 0))
        return left

    def _steps_left(self) -> int | None:
        """Steps (batches) that can be counted on; None where that is not known."""
        trainer = self._trainer
        bounds: list[float] = []
        batches, epochs = trainer.num_training_batches, self._epochs_left()
        if math.isfinite(batches):
            this = max(0, batches - self._loop.batch_progress.current.ready)
            bounds.append(this + epochs * batches if epochs is not None else math.inf)
        if trainer.fit_loop.max_steps >= 0:
            updates = max(0, trainer.fit_loop.max_steps - trainer.global_step)
            bounds.append(updates * trainer.accumulate_grad_batches)
        for timer in (one for one in trainer.callbacks if isinstance(one, _Timer)):
            remaining = timer.time_remaining()
            if remaining is not None and self._steps:
                bounds.append(remaining / max(self._own_s, 1e-6))
        most = min(bounds, default=math.inf)
        return int(most) if math.isfinite(most) else None

    def _allowed_s(self, choice: Choice) -> float:
        """Seconds that trying may take in all: a share of the run, or of what has passed."""
        left = self._steps_left()
        passed = time.perf_counter() - self._starts[0] - self._spent_s
        if left is None:
            return choice.share * passed
        return choice.share * (passed + left * self._wall_s())

    def _wall_s(self) -> float:
        """Seconds from step to step, loader and callbacks included."""
        gaps = [b - a for a, b in zip(self._starts[1:], self._starts[2:], strict=False)]
        return max(self._own_s, statistics.median(gaps) if gaps else 0.0)

    def _try(self) -> None:
        """Try what the run can afford by now; decide when there is nothing more to try."""
        if self._trainer.current_epoch != self._first_epoch:
            self._stop_trying("the first epoch ended before the run could afford it")
            return
        if self._choice is None:
            rehearsal = LightningRehearsal(
                self._trainer, self._batches, self._scene(self._batches[-1][0])
            )
            reason = no_room_for_copies(self._trainer)
            if reason is not None:
                self._decide(unplanned(reason))
                return
            self._steps_at_choice = self._steps_left()
            self._choice = Choice(
                rehearsal,
                self._guard,
                own_step_s=self._own_s,
                steps_left=self._steps_at_choice,
            )
        choice = self._choice
        choice.went_on()
        is_known = self._steps_left() is not None
        if is_known and self._only_together(choice):
            self._timed(choice.trial_together)
        while not choice.is_done:
            if self._spent_s + choice.next_cost_s <= self._allowed_s(choice):
                self._timed(choice.trial)
            elif is_known:
                choice.skip_next(
                    f"trying takes some {choice.next_cost_s:.2g} s; this run allows "
                    f"{choice.share:.0%} of itself"
                )
            else:
                return  # later, when the run has lasted longer
        self._conclude()

    def _conclude(self) -> None:
        """Take what the choice has come to, and keep it for later runs."""
        assert self._choice is not None
        choice = self._choice
        plan, chosen = choice.plan(), choice.chosen
        self._is_whole = choice.is_whole
        self._decide(plan, chosen)
        self._keep()
        if choice.on_run:
            self._try_on_run(choice.on_run[0])

    def _keep(self) -> None:
        """Keep the plan for later runs."""
        if self.key is not None and self.plan is not None:
            kept = plan_cache.Kept(
                plan=self.plan, is_whole=self._is_whole, steps=self._steps_at_choice
            )
            plan_cache.store(self.key, kept)

    # --- on the run itself ---

    def _try_on_run(self, one: Candidate) -> None:
        """Try a candidate on the steps to come, with and without, if they are enough."""
        batches = self._trainer.num_training_batches
        trial = TrialOnRun(
            one,
            self._applying(one),
            step_s=self._wall_s(),
            epoch_steps=int(batches) if math.isfinite(batches) else None,
        )
        left = self._steps_left()
        if not trial.has_room and self.plan is not None:
            row = Row(name=one.name, status="skipped", reason="epochs are too short to time it in")
            self.plan = self.plan.with_row(row)
            return
        if left is not None and left < trial.steps_needed:
            return
        self._trial = trial
        if self._loop.after_step is None:
            self._loop.after_step = self._after_step_of_trial
        self._loop.epoch_started = self._epoch_started

    def _applying(self, one: Candidate) -> Callable[[], Applied]:
        scene = self._scene(None)
        return lambda: one.apply(scene.module, scene.optimizers, scene)

    def _epoch_started(self) -> None:
        if self.force is not None:
            self.force.epoch_started()
        if self._trial is not None:
            self._trial.epoch_started()

    def _after_step_of_trial(self) -> None:
        trial = self._trial
        if trial is None or not trial.after_step():
            return
        self._trial = self._loop.after_step = None
        assert self.plan is not None
        name, timing = trial.candidate.name, trial.timing
        if timing is None or trial.applied is None:
            trial.undo()
            row = Row(name=name, status="refused", reason=trial.problem or "it did not take")
        else:
            before = self.plan.row(self.plan.chosen[-1]) if self.plan.chosen else None
            speedup = (before.speedup if before and before.speedup else 1.0) * timing.speedup
            needed = 1.0 if self.plan.chosen else WORTH
            is_kept = timing.is_faster and timing.speedup >= needed
            row = Row(
                name=name,
                status="chosen" if is_kept else "slower",
                step_ms=1000 * timing.other_s,
                speedup=speedup,
                reason="timed on the run itself, its loader included"
                if is_kept
                else slower(timing),
            )
            if is_kept:
                self.force = self.force or InForce({})
                self.force.add(trial.candidate, trial.applied)
            else:
                trial.undo()
        self.plan = self.plan.with_row(row)
        self._keep()

    def _only_together(self, choice: Choice) -> bool:
        """Whether the run can afford what helps together as one trial but not one by one."""
        room = self._allowed_s(choice) - self._spent_s
        together = choice.together()
        return len(together) > 1 and choice.cost_together_s() <= room < choice.cost_each_s()

    def _timed(self, trial: Callable[[], None]) -> None:
        start = time.perf_counter()
        trial()
        self._spent_s += time.perf_counter() - start

    def _stop_trying(self, reason: str) -> None:
        if self._choice is None:
            self._decide(unplanned(reason))
            return
        self._choice.skip(reason)
        self._conclude()

    # --- in force ---

    def _decide(self, plan: Plan, candidates: Any = (), *, must: bool = False) -> None:
        """Put ``candidates`` in force on the run itself and get out of its way.

        Args:
            plan: What to report.
            candidates: The chosen ones.
            must: They are the user's own wish: an error where one cannot work.
        """
        trainer = self._trainer
        batch = self._batches[-1][0] if self._batches else None
        if self._choice is not None:
            self._choice.close()
            self._choice = None
        self._unwatch()
        self.plan = plan
        if not candidates:
            return
        scene = self._scene(batch)
        try:
            self.force = InForce.start(
                candidates, scene.module, scene.optimizers, scene, check=must
            )
        except ConfigError as exc:
            if must:
                raise
            self.plan = plan.without(dict.fromkeys(plan.chosen, str(exc)))
            return
        self._wiring = Wiring(
            trainer.strategy,
            (self._loop.automatic_optimization, self._loop.manual_optimization),
            self.force,
            # several processes would have to leave out the same update
            self._tripped if trainer.world_size == 1 else None,
        )
        self._wiring.on()
        self._loop.after_step = self._settle
        self._loop.epoch_started = self.force.epoch_started
        _log.info("training plan in force: %s", ", ".join(plan.chosen))

    def _settle_after_next(self) -> None:
        self._loop.after_step = self._settle

    def _settle(self) -> None:
        """After the first steps under the plan, until all that is in force is sure."""
        if self.force is not None and self.plan is not None:
            self.force.settle()
            if self.force.lost:
                self.plan = self.plan.without(self.force.lost)
            if not self.force.is_proven:
                return
        self._loop.after_step = None if self._trial is None else self._after_step_of_trial

    def _tripped(self, what: str) -> None:
        """A step under the plan gave a loss or gradient that is not finite."""
        assert self.plan is not None
        chosen = self.plan.chosen
        reason = (
            f"the {what} was not finite at step {self._trainer.global_step}: "
            "that update was left out and your own setting is back in force"
        )
        self._undo()
        self.plan = self.plan.without(dict.fromkeys(chosen, reason))
        # Not kept for later runs: your own setting may have given the same there.
        warnings.warn(
            f"Under the training plan ({', '.join(chosen)}) {reason}.",
            RuntimeWarning,
            stacklevel=2,
        )
