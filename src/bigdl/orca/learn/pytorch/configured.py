"""What a LightningModule's ``configure_optimizers`` gives, in any of Lightning's forms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from bigdl._base.calls import shown
from bigdl._base.errors import ConfigError
from bigdl.orca.learn.pytorch.schedules import Schedule, is_scheduler
from bigdl.orca.learn.pytorch.stand_in import in_hook

__all__ = ["configured"]


def configured(model: Any) -> tuple[torch.optim.Optimizer, Schedule | None]:
    """What ``configure_optimizers`` gives, in any of Lightning's forms.

    Raises:
        ConfigError: It is none of them, or has several optimizers or schedulers.
    """
    with in_hook(model, "configure_optimizers"):
        found = model.configure_optimizers()
    name = f"{type(model).__name__}.configure_optimizers()"
    optimizers, schedules, monitor = _read(found, name)
    if len(optimizers) != 1:
        raise ConfigError(
            f"{name} gave {len(optimizers)} optimizers. Workers share the steps of one: give it "
            "groups of parameters, or train by hand with bigdl.nano.pytorch.Trainer."
        )
    if len(schedules) > 1:
        raise ConfigError(
            f"{name} gave {len(schedules)} schedulers: put them together with "
            "torch.optim.lr_scheduler.ChainedScheduler or SequentialLR."
        )
    optimizer = optimizers[0]
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigError(f"{name} gave {shown(optimizer)} as an optimizer.")
    if not schedules:
        return optimizer, None
    return optimizer, _schedule(schedules[0], optimizer, monitor, name)


def _read(found: Any, name: str) -> tuple[list[Any], list[Any], str | None]:
    """Optimizers, schedulers (or their dicts), and the key that is monitored."""
    if isinstance(found, torch.optim.Optimizer):
        return [found], [], None
    if isinstance(found, Mapping):
        _check_keys(found, {"optimizer", "lr_scheduler", "monitor"}, {"optimizer"}, name)
        schedule = found.get("lr_scheduler")
        schedules = [] if schedule is None else [schedule]
        return [found["optimizer"]], schedules, found.get("monitor")
    if isinstance(found, (list, tuple)) and found:
        if len(found) == 2 and isinstance(found[0], (list, tuple)):
            several = found[1] if isinstance(found[1], (list, tuple)) else [found[1]]
            return list(found[0]), list(several), None
        if all(isinstance(one, torch.optim.Optimizer) for one in found):
            return list(found), [], None
        if all(isinstance(one, Mapping) for one in found):
            every = [_read(one, name) for one in found]
            monitor = every[0][2] if len(every) == 1 else None
            return (
                [optimizer for one in every for optimizer in one[0]],
                [schedule for one in every for schedule in one[1]],
                monitor,
            )
    raise ConfigError(
        f"{name} gave {shown(found)}: need an optimizer, [optimizer], ([optimizer], "
        '[scheduler]), or {"optimizer": …, "lr_scheduler": …}.'
    )


def _schedule(given: Any, optimizer: torch.optim.Optimizer, monitor: Any, name: str) -> Schedule:
    options: dict[str, Any] = {}
    if isinstance(given, Mapping):
        known = {"scheduler", "interval", "frequency", "monitor", "strict", "name"}
        _check_keys(given, known | {"reduce_on_plateau"}, {"scheduler"}, name)
        options = dict(given)
    scheduler = options.get("scheduler", given)
    if not is_scheduler(scheduler):
        raise ConfigError(f"{name} gave {shown(scheduler)} as a scheduler.")
    if scheduler.optimizer is not optimizer:
        raise ConfigError(f"{name} gave a scheduler of another optimizer than the one it gave.")
    interval, frequency = options.get("interval", "epoch"), options.get("frequency", 1)
    if interval not in ("epoch", "step"):
        raise ConfigError(f'{name}: interval={interval!r}; need "epoch" or "step".')
    if isinstance(frequency, bool) or not isinstance(frequency, int) or frequency < 1:
        raise ConfigError(f"{name}: frequency={frequency!r}; need a whole number >= 1.")
    monitor = options.get("monitor", monitor)
    needs = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
    if needs and monitor is None:
        raise ConfigError(f'{name}: ReduceLROnPlateau needs {{"monitor": key}} beside it.')
    return Schedule(scheduler, interval, frequency, monitor)


def _check_keys(given: Mapping[str, Any], known: set[str], needed: set[str], name: str) -> None:
    strange, lacking = sorted(set(given) - known), sorted(needed - set(given))
    if strange or lacking:
        wrong = [f"does not know {key!r}" for key in strange] + [f"lacks {k!r}" for k in lacking]
        raise ConfigError(f"{name} gave a dict that {', '.join(wrong)}.".replace(
            "that does not know", "with a key that nobody knows:"))  # fmt: skip
