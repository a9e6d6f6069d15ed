"""Which candidates a run should take: tried in best-known order on copies, guarded, timed.

Knows torch; imports no Lightning. Greedy: each candidate is tried on top of what was chosen
before it, and kept if the guard agrees and the step is faster beyond doubt.
"""

from __future__ import annotations

import copy
import logging
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from bigdl._base.errors import ConfigError
from bigdl.nano.pytorch.guard import Difference, compare
from bigdl.nano.pytorch.plan import streams
from bigdl.nano.pytorch.plan.best_known import best_known
from bigdl.nano.pytorch.plan.candidates import Candidate, candidate
from bigdl.nano.pytorch.plan.original import Original
from bigdl.nano.pytorch.plan.plan import Plan, Row
from bigdl.nano.pytorch.plan.rehearsal import Stage, StageError, dtypes, untouched
from bigdl.nano.pytorch.plan.timing import LONG_STEP_S, Timing, slower, time_in_turns

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from bigdl.nano.pytorch.guard import Guard
    from bigdl.nano.pytorch.plan.rehearsal import Rehearsal

__all__ = ["WORTH", "Choice"]

_log = logging.getLogger(__name__)

#: Faster by less than this, all together, and the user's own setting is kept.
WORTH = 1.05


class Choice:
    """The search for a plan, one trial at a time, so that a run can go on in between.

    Args:
        rehearsal: How to take a step on a copy.
        guard: How far a step may stray.
        own_step_s: Seconds of the user's own step in the run itself.
        steps_left: Steps that the run still has, None if unknown.
        candidates: What to try, in order; None is what is best known for the model.
    """

    def __init__(
        self,
        rehearsal: Rehearsal,
        guard: Guard,
        *,
        own_step_s: float,
        steps_left: int | None,
        candidates: Iterable[Candidate] | None = None,
    ) -> None:
        self._rehearsal = rehearsal
        self._guard = guard
        self._own_s = own_step_s
        self._steps_left = steps_left
        self._known = best_known(rehearsal.scene.module)
        if candidates is None:
            candidates = [candidate(name) for name in self._known.order]
        self._rows: dict[str, Row] = {}
        self._chosen: list[Candidate] = []
        self._options: dict[str, dict[str, Any]] = {}
        #: Nothing is left untried because the run is too short for it.
        self.is_whole = True
        self._original: Original | None = None
        self._best: Stage | None = None  # has what is chosen in force, and has taken a step
        self._own_copy_s = 0.0  # the user's own step on a copy
        self._copy_s = 0.0  # a step with what is chosen, on a copy
        self._overhead_s = 0.0  # what a step of the run takes beyond its copy
        may = [one for one in candidates if self._may(one)]
        self._waiting = [one for one in may if not one.is_of_the_run]
        #: To be tried on the run itself, once the rest is decided.
        self.on_run = [one for one in may if one.is_of_the_run]

    @property
    def share(self) -> float:
        """Share of the planned run that trying may take."""
        return self._known.share

    @property
    def is_done(self) -> bool:
        return not self._waiting

    @property
    def chosen(self) -> list[Candidate]:
        """The candidate objects chosen so far: what they built on copies serves again."""
        return list(self._chosen)

    @property
    def next_cost_s(self) -> float:
        """About how long the next trial takes."""
        return self._cost_s([self._waiting[0]]) if self._waiting else 0.0

    def together(self) -> list[Candidate]:
        """Those still waiting that are known to help together."""
        return [one for one in self._waiting if one.name in self._known.together]

    def cost_together_s(self) -> float:
        """About how long trying them as one takes."""
        return self._cost_s(self.together())

    def cost_each_s(self) -> float:
        """About how long trying them one by one takes."""
        together = self.together()
        later = 5 * self._own_s if self._own_s >= LONG_STEP_S else 4 * self._own_s + self._limit_s
        return self._cost_s(together[:1]) + max(0, len(together) - 1) * later

    def _cost_s(self, candidates: Sequence[Candidate]) -> float:
        is_long = self._own_s >= LONG_STEP_S
        first = 0 if self._original is not None else (2 if is_long else 6)
        others = 5 if is_long else 4
        # a trial takes its steps under what is chosen, and better yet
        step_s = self._overhead_s + self._copy_s if self._chosen else self._own_s
        setup = sum(one.setup_s(self._rehearsal.scene) for one in candidates)
        timing_s = 0.0 if is_long else self._limit_s
        return first * self._own_s + others * step_s + timing_s + setup

    # --- one trial ---

    def trial(self) -> None:
        """Try the next candidate on top of what is chosen."""
        self._try([self._waiting.pop(0)])

    def trial_together(self) -> None:
        """Try those that are known to help together, as one."""
        together = self.together()
        self._waiting = [one for one in self._waiting if one not in together]
        self._try(together)

    def check(self, candidates: Sequence[Candidate]) -> str | None:
        """Why candidates of an earlier plan no longer serve; nothing is timed."""
        scene = self._rehearsal.scene
        for one in candidates:
            if scene.deterministic and one.changes_numbers:
                return "deterministic=True: nothing that changes numbers is tried"
            reason = one.refuse(scene)
            if reason is not None:
                return reason
        on_copies = [one for one in candidates if not one.is_of_the_run]
        if not any(one.changes_numbers for one in on_copies):
            return None
        try:
            with untouched(scene.module):
                self._original = Original(self._rehearsal, is_long=True)
                with Stage(self._rehearsal, on_copies) as stage:
                    return self._guarded(stage, on_copies)[0]
        except (StageError, ConfigError) as exc:
            return str(exc)

    def went_on(self) -> None:
        """The run has taken steps since the last trial: its weights are others now."""
        self._original = None

    def skip_next(self, reason: str) -> None:
        """Do not try the next one, for a reason."""
        one = self._waiting.pop(0)
        self.is_whole = False
        self._rows[one.name] = Row(name=one.name, status="skipped", reason=reason)

    def skip(self, reason: str) -> None:
        """Try nothing more, for a reason."""
        waiting, self._waiting = self._waiting, []
        self.is_whole &= not waiting
        for one in waiting:
            self._rows[one.name] = Row(name=one.name, status="skipped", reason=reason)

    def _may(self, one: Candidate) -> bool:
        """Whether a trial makes sense; else the row says why not."""
        scene = self._rehearsal.scene
        if one.name == "processes":
            reason, status = one.refuse(scene), "skipped"
        elif scene.deterministic and one.changes_numbers:
            reason, status = "deterministic=True: nothing that changes numbers is tried", "skipped"
        else:
            reason, status = one.refuse(scene), "refused"
        if reason is None and not one.is_of_the_run:
            saving = self._saving_s(one)
            cost = 5 * self._own_s + one.setup_s(scene)
            if saving is not None and cost > saving:
                reason = f"trying takes some {cost:.3g} s, and the steps left cannot repay that"
                status = "skipped"
                self.is_whole = False
        if reason is None:
            return True
        self._rows[one.name] = Row(name=one.name, status=status, reason=reason)  # type: ignore[arg-type]
        return False

    def _saving_s(self, one: Candidate) -> float | None:
        if self._steps_left is None:
            return None
        return self._steps_left * self._own_s * (1 - 1 / one.hope_for(self._rehearsal.scene))

    def _try(self, candidates: list[Candidate]) -> None:
        module, names = self._rehearsal.scene.module, [one.name for one in candidates]
        if self._original is None:
            try:
                with untouched(module):
                    self._original = Original(self._rehearsal, is_long=self._own_s >= LONG_STEP_S)
            except StageError as exc:
                # not even the user's own step can be rehearsed
                _log.debug("the step cannot be rehearsed", exc_info=True)
                self._refuse(candidates, str(exc), "skipped")
                self.skip(str(exc))
                return
        kept = dict(self._rows), list(self._chosen), dict(self._options), self._copy_s
        try:
            with untouched(module):
                self._tried(candidates)
        except StageError as exc:
            _log.debug("the trial of %s failed", names, exc_info=True)
            self.close()
            self._rows, self._chosen, self._options, self._copy_s = kept
            self._refuse(candidates, str(exc))

    def _refuse(
        self, candidates: Sequence[Candidate], reason: str, status: str = "refused", **facts: Any
    ) -> None:
        for one in candidates:
            self._rows[one.name] = Row(
                name=one.name,
                status=status,  # type: ignore[arg-type]
                reason=reason,
                **facts,
            )

    def _tried(self, candidates: list[Candidate]) -> None:
        try:
            stage = Stage(self._rehearsal, [*self._chosen, *candidates])
        except ConfigError as exc:
            self._refuse(candidates, str(exc))
            return
        try:
            reason, difference = self._guarded(stage, candidates)
            if reason is None:
                timing = self._timed(stage, candidates)
                self._decide(stage, candidates, timing, difference)
        finally:
            if stage is not self._best:
                stage.close()
        if reason is not None:
            self._gentler(candidates, reason, difference)

    def _gentler(
        self, candidates: list[Candidate], reason: str, difference: Difference | None
    ) -> None:
        """The guard refused: try the gentler form of a single candidate, if it has one."""
        gentler = candidates[0].gentler() if len(candidates) == 1 and difference else None
        if gentler is not None:
            self._tried([gentler])
            return
        self._refuse(candidates, reason, **_facts(difference))

    # --- the guard ---

    def _guarded(
        self, stage: Stage, candidates: Sequence[Candidate]
    ) -> tuple[str | None, Difference | None]:
        """Why the guard refuses what is on ``stage``, and how far it strays."""
        assert self._original is not None
        original = self._original
        total: Difference | None = None
        is_update = all(one.changes_optimizer_only for one in candidates)
        for index, own in enumerate(original.seen):
            batch = self._rehearsal.batches[index]
            if index:  # from the same weights again
                with Stage(self._rehearsal, [*self._chosen, *candidates]) as again:
                    seen = again.look(batch, original.start)
            else:
                seen = stage.look(batch, original.start)
                lost = stage.settle()
                if lost is not None:
                    return lost, None
                changed = _changed_types(original.types, dtypes(stage.cast.module))
                if changed is not None:
                    return changed, None
            if not streams.same(own.draws, seen.draws):
                return "it draws otherwise from the global random streams than your step", None
            difference = compare(own, seen)
            if any(one.changes_optimizer_only for one in candidates):
                by_update = self._update_difference(candidates)
                if by_update is not None:
                    difference = by_update if is_update else difference.worse(by_update)
            total = difference if total is None else total.worse(difference)
            if not any(one.changes_numbers for one in candidates):
                continue  # what is chosen was judged before
            reason = self._guard.judge(total, original.noise)
            if reason is not None:
                beside = ", ".join(one.name for one in self._chosen)
                return reason + (f" (together with {beside})" if beside else ""), total
        if self._guard.is_exact and not self._stays_equal(candidates):
            return "the steps after the first are not equal bit for bit", total
        return None, total

    def _stays_equal(self, candidates: Sequence[Candidate]) -> bool:
        """Whether weights are equal after some steps, as rounding may show late."""
        assert self._original is not None
        batches, start = self._rehearsal.batches, self._original.start
        with (
            Stage(self._rehearsal, []) as own,
            Stage(self._rehearsal, [*self._chosen, *candidates]) as other,
        ):
            for step in range(5):
                for stage in (own, other):
                    stage.look(batches[step % len(batches)], start)
                mine, theirs = own.cast.module.state_dict(), other.cast.module.state_dict()
                if not all(map(torch.equal, mine.values(), theirs.values())):
                    return False
        return True

    def _update_difference(self, candidates: Sequence[Candidate]) -> Difference | None:
        """How the optimizers' arithmetic changes the update from the same gradients."""
        assert self._original is not None
        gradients = self._original.gradients
        if gradients is None:
            return None
        changing = [one for one in candidates if one.changes_optimizer_only]
        with Stage(self._rehearsal, []) as own, Stage(self._rehearsal, changing) as other:
            return compare(own.update(gradients), other.update(gradients))

    # --- the clock ---

    @property
    def _limit_s(self) -> float:
        """How long short steps may be timed in one trial."""
        planned_s = (self._steps_left or 0) * self._own_s
        return max(0.15, min(1.5, 0.3 * self.share * planned_s))

    def _best_stage(self) -> Stage:
        """A copy under what is chosen so far that has taken its first, slower, step."""
        if self._best is None:
            self._best = Stage(self._rehearsal, self._chosen)
            self._best.look(self._rehearsal.batches[0])
        return self._best

    def _timed(self, stage: Stage, candidates: Sequence[Candidate]) -> Timing:
        best = self._best_stage()
        if any(one.is_process_wide for one in candidates):
            stage.close()
            timing = self._timed_on_and_off(best, candidates)
        else:
            timing = time_in_turns(self._clock(best), self._clock(stage), limit_s=self._limit_s)
        if not self._copy_s:
            self._own_copy_s = self._copy_s = timing.own_s
            # hooks, loggers and callbacks of the run itself, which no candidate betters
            most = max(0.2 * timing.own_s, 0.005)
            self._overhead_s = min(max(0.0, self._own_s - timing.own_s), most)
        return timing

    def _timed_on_and_off(self, best: Stage, candidates: Sequence[Candidate]) -> Timing:
        """What changes the process: one copy is timed with it and without it."""
        clock = self._clock(best)
        in_force: list[Any] = []

        def off(steps: int) -> float:
            if in_force:
                while in_force:
                    in_force.pop().undo()
                clock(1)  # the first step after a change settles it
            return float(clock(steps))

        def on(steps: int) -> float:
            if not in_force:
                in_force.extend(
                    one.apply(best.cast.module, best.cast.optimizers, self._rehearsal.scene)
                    for one in candidates
                )
                clock(1)
            return float(clock(steps))

        try:
            return time_in_turns(off, on, limit_s=self._limit_s)
        finally:
            while in_force:
                in_force.pop().undo()

    def close(self) -> None:
        """Let the copies go."""
        if self._best is not None:
            self._best.close()
            self._best = None

    def _clock(self, stage: Stage) -> Any:
        batches = self._rehearsal.batches
        is_pure = self._original is not None and self._original.is_pure

        def seconds(steps: int) -> float:
            turn = [batches[index % len(batches)] for index in range(steps)]
            return stage.seconds(turn if is_pure else copy.deepcopy(turn))

        return seconds

    # --- the decision ---

    def _decide(
        self,
        stage: Stage,
        candidates: Sequence[Candidate],
        timing: Timing,
        difference: Difference | None,
    ) -> None:
        copy_s = self._copy_s / timing.speedup
        step_s = self._overhead_s + copy_s
        facts = _facts(difference) | {
            "step_ms": 1000 * step_s,
            "speedup": (self._overhead_s + self._own_copy_s) / step_s,
        }
        if not timing.is_faster:
            self._refuse(candidates, slower(timing), "slower", **facts)
            return
        self._copy_s = copy_s
        self._chosen += candidates
        if not any(one.is_process_wide for one in candidates):
            self.close()
            self._best = stage
        for one in candidates:
            self._rows[one.name] = Row(
                name=one.name,
                status="chosen",
                reason="tried together, as the run is too short to try each"
                if len(candidates) > 1
                else stage.force.details.get(one.name, ""),
                **facts,
            )
            if stage.force.options.get(one.name):
                self._options[one.name] = stage.force.options[one.name]

    def plan(self) -> Plan:
        """The plan as it stands; what still waits is left out."""
        rows = dict(self._rows)
        for one in self.on_run:
            text = "the run ended before it could be tried"
            rows[one.name] = Row(name=one.name, status="skipped", reason=text)
        own_s = self._overhead_s + (self._own_copy_s or self._own_s)
        best_s = self._overhead_s + self._copy_s
        speedup = own_s / best_s if self._chosen else 1.0
        is_worth = bool(self._chosen) and speedup >= WORTH
        if self._chosen and not is_worth:
            for one in self._chosen:
                row = rows[one.name]
                text = f"{speedup - 1:.1%} faster altogether; less than {WORTH - 1:.0%} is no gain"
                rows[one.name] = replace(row, status="slower", reason=text)
        original = Row(
            name="original",
            status="slower" if is_worth else "chosen",
            step_ms=1000 * own_s,
            speedup=1.0,
            loss_change=0.0,
            cosine=1.0,
            reason=f"what is chosen is {speedup:.2f} times as fast" if is_worth else "",
        )
        if not is_worth:
            self._options = {}
            self._chosen = []
        tried = [rows[name] for name in rows if rows[name].step_ms is not None]
        others = [rows[name] for name in rows if rows[name].step_ms is None]
        return Plan((original, *tried, *others), dict(self._options))


def _changed_types(own: dict[str, torch.dtype], other: dict[str, torch.dtype]) -> str | None:
    for name, dtype in own.items():
        if other.get(name, dtype) != dtype:
            return f"{name} would become {str(other[name]).removeprefix('torch.')}"
    return None


def _facts(difference: Difference | None) -> dict[str, Any]:
    if difference is None or not math.isfinite(difference.loss_change):
        return {}
    return {"loss_change": difference.loss_change, "cosine": difference.cosine}
