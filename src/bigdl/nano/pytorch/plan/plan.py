"""The training plan: what was tried, what was chosen and why; and a plan in force.

Knows torch; imports no Lightning: a plan applies to any module and optimizer.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from bigdl._base.errors import ArgumentError, ConfigError
from bigdl._base.registry import nearest
from bigdl._base.tables import aligned
from bigdl.nano.pytorch.plan.candidates import NAMES, Applied, Candidate, Scene, candidate

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import TracebackType

__all__ = ["InForce", "Plan", "Row"]

Status = Literal["chosen", "slower", "refused", "skipped"]

_SCHEMA = 1
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One candidate of a plan.

    Args:
        name: Its name; "original" is the user's own setting.
        status: "chosen"; "slower": tried, and not worth it; "refused": cannot work here or
            broke the guard; "skipped": not tried.
        step_ms: Milliseconds of a training step with it and everything chosen above it.
        speedup: The user's own step over that step.
        loss_change: Largest relative move of the loss that the guard saw.
        cosine: Smallest cosine that the guard saw.
        reason: Why it is not chosen; of a chosen one, what exactly is in force ("" if there is
            nothing to add).
    """

    name: str
    status: Status
    step_ms: float | None = None
    speedup: float | None = None
    loss_change: float | None = None
    cosine: float | None = None
    reason: str = ""

    def __post_init__(self) -> None:
        wrong = []
        if self.name != "original" and self.name not in NAMES:
            wrong.append(f"name={self.name!r}{nearest(self.name, ['original', *NAMES])}")
        if self.status not in get_args(Status):
            wrong.append(f"status={self.status!r} (have {', '.join(get_args(Status))})")
        for name in ("step_ms", "speedup", "loss_change", "cosine"):
            value = getattr(self, name)
            if value is not None and (
                isinstance(value, bool) or not isinstance(value, (int, float))
            ):
                wrong.append(f"{name}={value!r} (need a number or None)")
        if not isinstance(self.reason, str):
            wrong.append(f"reason={self.reason!r} (need a string)")
        if wrong:
            raise ConfigError("Row cannot be used: " + ", ".join(wrong) + ".")


@dataclass(frozen=True)
class Plan:
    """What makes a training step faster, on one machine and for one kind of model.

    Args:
        rows: One for the user's own setting and one for each candidate, in the order tried.
        options: What a chosen candidate settled on, by name: plain values.
    """

    rows: tuple[Row, ...] = ()
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.rows, (str, Row)) or not isinstance(self.rows, Iterable):
            raise ArgumentError(
                f"Plan(rows=…) takes a sequence of Row, not {type(self.rows).__name__}."
            )
        object.__setattr__(self, "rows", tuple(self.rows))
        for row in self.rows:
            if not isinstance(row, Row):
                raise ArgumentError(f"Plan(rows=…) takes Rows, not {type(row).__name__}.")
        names = [row.name for row in self.rows]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ConfigError(f"Plan cannot be used: two rows for {', '.join(twice)}.")

    @classmethod
    def of(cls, *names: str) -> Plan:
        """A plan that chooses ``names`` without measuring anything, in that order.

        Raises:
            ConfigError: A name is not one of a candidate.
        """
        for name in names:
            if name not in NAMES:
                raise ConfigError(
                    f"No candidate {name!r}; have {', '.join(NAMES)}.{nearest(name, NAMES)}"
                )
        rest = [name for name in NAMES if name not in names]
        status: Status = "slower" if names else "chosen"
        own = Row(name="original", status=status, reason="not measured" if names else "")
        return cls(
            (
                own,
                *(Row(name=name, status="chosen") for name in names),
                *(Row(name=name, status="skipped", reason="not asked for") for name in rest),
            )
        )

    @property
    def chosen(self) -> tuple[str, ...]:
        """Names of what is in force, in order; () is "keep your own setting"."""
        return tuple(
            row.name for row in self.rows if row.status == "chosen" and row.name != "original"
        )

    def row(self, name: str) -> Row:
        """The row of one candidate.

        Raises:
            ConfigError: There is none of that name.
        """
        rows = {row.name: row for row in self.rows}
        if name not in rows:
            raise ConfigError(f"This plan has no row {name!r}.{nearest(name, rows)}")
        return rows[name]

    def with_row(self, row: Row) -> Plan:
        """This plan with another row for one candidate; the user's own gives way to a choice."""
        rows = [row if one.name == row.name else one for one in self.rows]
        if row.status == "chosen" and not self.chosen:
            rows = [
                replace(one, status="slower") if one.name == "original" else one for one in rows
            ]
        # in the order tried: what was never tried comes last
        rows.sort(key=lambda one: one.step_ms is None)
        return Plan(tuple(rows), self.options)

    def without(self, reasons: Mapping[str, str]) -> Plan:
        """This plan with some chosen rows refused, each for a reason."""
        rows = [
            replace(row, status="refused", reason=reasons[row.name])
            if row.name in reasons
            else row
            for row in self.rows
        ]
        kept = {name: value for name, value in self.options.items() if name not in reasons}
        plan = Plan(tuple(rows), kept)
        if plan.chosen or not self.chosen:
            return plan
        own = [
            replace(row, status="chosen", reason="") if row.name == "original" else row
            for row in plan.rows
        ]
        return Plan(tuple(own), kept)

    # --- in words ---

    def __str__(self) -> str:
        """The table."""
        if not self.rows:
            return "No plan: acceleration is off."
        heads = ("name", "status", "step ms", "speedup", "loss move", "cosine", "reason")
        lines = [heads, *map(_cells, self.rows)]
        return "\n".join(aligned(lines, right=range(2, 6)))

    def explain(self) -> str:
        """Sentences: what is in force, what it brought, and why the rest is not."""
        if not self.rows:
            return "Acceleration is off: this is stock Lightning."
        if self.chosen:
            last = self.row(self.chosen[-1])
            gain = "" if last.speedup is None else f": a step is {last.speedup:.2f} times as fast"
            sentences = [f"In force: {', '.join(self.chosen)}{gain}."]
        else:
            sentences = ["Your own setting is kept: nothing that was tried is worth a change."]
        for row in self.rows:
            if row.status == "chosen" and not row.reason:
                continue
            sentences.append(f"{row.name} ({row.status}): {row.reason or 'no reason given'}.")
        return "\n".join(sentences)

    # --- stored ---

    def to_json(self) -> str:
        """This plan as text, for ``Plan.from_json``."""
        return json.dumps(
            {
                "schema_version": _SCHEMA,
                "rows": [asdict(row) for row in self.rows],
                "options": {name: dict(value) for name, value in self.options.items()},
            },
            indent=1,
        )

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan that ``to_json`` wrote.

        Raises:
            ArgumentError: ``text`` is not a string.
            ConfigError: It is not a plan; the text says where it is wrong.
        """
        if not isinstance(text, str):
            raise ArgumentError(f"Plan.from_json takes a string, not {type(text).__name__}.")
        try:
            stored = json.loads(text)
        except json.JSONDecodeError as exc:
            raise ConfigError(f"Plan.from_json: this is not JSON: {exc}.") from exc
        _check_stored(stored)
        return cls(tuple(Row(**row) for row in stored["rows"]), stored["options"])

    # --- in force ---

    def apply(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
        *,
        batch: Any = None,
    ) -> InForce:
        """Put what is chosen in force on any module and optimizer; nothing is measured.

        Usable with ``with``. Each step of yours runs within ``whole()``, its forward and loss
        within ``step()`` on ``batch(…)``; after the first one call ``settle()``, which lets go
        of what turned out not to work. The watch over losses that are not finite is the
        Trainer's: here it is yours.

        Args:
            model: The module, changed in place until ``undo``.
            optimizer: Its optimizer, or several, or None.
            batch: One batch, if there is one already: some candidates look at it first.

        Raises:
            ArgumentError: ``model`` or ``optimizer`` is of another kind.
            ConfigError: A chosen candidate cannot work here; nothing is in force then.
        """
        if not isinstance(model, torch.nn.Module):
            raise ArgumentError(
                f"Plan.apply(model=…) takes a torch.nn.Module, not {type(model).__name__}."
            )
        several = () if optimizer is None else optimizer
        optimizers = tuple(several) if isinstance(several, Iterable) else (several,)
        for one in optimizers:
            if not isinstance(one, torch.optim.Optimizer):
                raise ArgumentError(
                    "Plan.apply(optimizer=…) takes a torch.optim.Optimizer or a sequence of "
                    f"them, not {type(one).__name__}."
                )
        scene = Scene(
            module=model,
            optimizers=optimizers,
            batch=batch,
            steps_left=None,
            epochs_left=None,
            deterministic=torch.are_deterministic_algorithms_enabled(),
            device=device_of(model),
        )
        # what works between a run's steps has no place in a loop that is not ours
        of_the_step = [one for one in self.candidates() if not one.is_of_the_run]
        return InForce.start(of_the_step, model, optimizers, scene, check=True)

    def candidates(self) -> list[Candidate]:
        """The chosen candidates, bound to what they settled on."""
        found = [candidate(name) for name in self.chosen]
        return [
            one.pinned(self.options[one.name]) if self.options.get(one.name) else one
            for one in found
        ]


class InForce:
    """Candidates applied to one module and its optimizers, as one thing; undone in reverse."""

    def __init__(self, applied: Mapping[Candidate, Applied]) -> None:
        self._applied = dict(applied)
        self._is_settled = False
        #: What turned out not to work after the first step, by name.
        self.lost: dict[str, str] = {}

    @classmethod
    def start(
        cls,
        candidates: Iterable[Candidate],
        module: torch.nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        scene: Scene,
        *,
        check: bool = False,
    ) -> InForce:
        """Apply ``candidates`` in order.

        Args:
            candidates: What to apply.
            module: Where to; may be a copy of ``scene.module``.
            optimizers: Its optimizers.
            scene: What the candidates may look at.
            check: Ask each first whether it can work here.

        Raises:
            ConfigError: One cannot be applied; all are undone.
        """
        force = cls({})
        try:
            for one in candidates:
                why_not = one.refuse(scene) if check else None
                if why_not is not None:
                    raise ConfigError(f"{one.name} cannot be used here: {why_not}.")
                force._applied[one] = one.apply(module, optimizers, scene)
        except BaseException:
            force.undo()
            raise
        return force

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(one.name for one in self._applied)

    @property
    def is_proven(self) -> bool:
        """Whether all that is in force has seen what it needs to be sure."""
        return all(one.is_proven for one in self._applied.values())

    def add(self, one: Candidate, applied: Applied) -> None:
        """Take in a candidate that is in force already."""
        self._applied[one] = applied

    @property
    def changes_numbers(self) -> bool:
        """Whether anything in force may change results."""
        return any(one.changes_numbers for one in self._applied)

    @property
    def wraps_step(self) -> bool:
        """Whether anything in force is entered around forward and loss or changes the batch."""
        return any(_overrides(one, "step", "batch", "output") for one in self._applied.values())

    @property
    def wraps_whole(self) -> bool:
        """Whether anything in force is entered around whole steps."""
        return any(_overrides(one, "whole") for one in self._applied.values())

    @property
    def options(self) -> dict[str, dict[str, Any]]:
        """What the candidates settled on, by name."""
        return {one.name: applied.options for one, applied in self._applied.items()}

    @property
    def details(self) -> dict[str, str]:
        """What exactly is in force, in words, by name."""
        return {one.name: applied.detail for one, applied in self._applied.items()}

    @contextmanager
    def step(self) -> Iterator[None]:
        """Entered around forward and loss of each training step."""
        with ExitStack() as stack:
            for applied in self._applied.values():
                stack.enter_context(applied.step())
            yield

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Entered around a whole step: forward, backward and the optimizer's."""
        with ExitStack() as stack:
            for applied in self._applied.values():
                stack.enter_context(applied.whole())
            yield

    def batch(self, batch: Any) -> Any:
        """The batch as the step should get it."""
        for applied in self._applied.values():
            batch = applied.batch(batch)
        return batch

    def output(self, output: Any) -> Any:
        """What the step returned, as the user's own step would have it."""
        for applied in reversed(self._applied.values()):
            output = applied.output(output)
        return output

    def epoch_started(self) -> None:
        """To be called at the start of each epoch that begins under the plan."""
        for applied in self._applied.values():
            applied.epoch_started()

    def as_users(self, checkpoint: dict[str, Any]) -> None:
        """Take what the candidates changed out of a checkpoint, in place."""
        for applied in self._applied.values():
            applied.as_users(checkpoint)

    def settle(self) -> None:
        """To be called after the first step, and after more of them until all ``is_proven``:
        drops what turned out not to work (``lost``).
        """
        first, self._is_settled = not self._is_settled, True
        for one, applied in list(self._applied.items()):
            try:
                if first:
                    applied.settle()
                if applied.problem is not None:
                    raise ConfigError(applied.problem)
            except ConfigError as exc:
                applied.undo()
                del self._applied[one]
                self.lost[one.name] = str(exc)
                _log.warning("%s is no longer in force: %s", one.name, exc)

    def undo(self) -> None:
        """Put module and optimizers back as they were; calling it twice is harmless."""
        applied, self._applied = self._applied, {}
        for one in reversed(applied.values()):
            one.undo()

    def __enter__(self) -> InForce:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.undo()


def _overrides(applied: Applied, *methods: str) -> bool:
    return any(getattr(type(applied), name) is not getattr(Applied, name) for name in methods)


def device_of(module: torch.nn.Module) -> torch.device:
    """Where the module's parameters live; the CPU if it has none."""
    first = next(module.parameters(), None)
    return torch.device("cpu") if first is None else first.device


def _cells(row: Row) -> tuple[str, ...]:
    def number(value: float | None, form: str) -> str:
        return "" if value is None or not math.isfinite(value) else form.format(value)

    return (
        row.name,
        row.status,
        number(row.step_ms, "{:.4g}"),
        number(row.speedup, "{:.2f}×"),  # noqa: RUF001  (the sign for "times")
        number(row.loss_change, "{:.2%}"),
        number(row.cosine, "{:.4f}"),
        row.reason,
    )


def _check_stored(stored: Any) -> None:
    """Refuse, with a place, what ``to_json`` cannot have written."""
    if not isinstance(stored, dict) or set(stored) != {"schema_version", "rows", "options"}:
        raise ConfigError(
            "Plan.from_json: this is no plan: need exactly schema_version, rows and options."
        )
    if stored["schema_version"] != _SCHEMA:
        raise ConfigError(
            f"Plan.from_json: schema_version is {stored['schema_version']!r}; "
            f"this version reads {_SCHEMA}. Let the plan be made anew."
        )
    known = {one.name for one in fields(Row)}
    if not isinstance(stored["rows"], list):
        raise ConfigError("Plan.from_json: rows is not a list.")
    for index, row in enumerate(stored["rows"]):
        if not isinstance(row, dict) or not {"name", "status"} <= set(row) <= known:
            raise ConfigError(f"Plan.from_json: rows[{index}] is not a row: {row!r}.")
    options = stored["options"]
    if not isinstance(options, dict) or not all(isinstance(v, dict) for v in options.values()):
        raise ConfigError("Plan.from_json: options is not a table of tables.")
    strange = sorted(set(options) - set(NAMES))
    if strange:
        raise ConfigError(f"Plan.from_json: options for {', '.join(strange)}: not known.")
