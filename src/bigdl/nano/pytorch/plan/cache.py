"""Plans of earlier runs, kept in the user's cache folder by model, machine and versions.

Knows torch; imports no Lightning. A damaged or foreign file is as good as none.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from bigdl import __version__
from bigdl._base import machine
from bigdl._base.errors import ArgumentError, ConfigError
from bigdl.nano.pytorch.plan.plan import Plan

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from bigdl.nano.pytorch.guard import Guard

__all__ = ["Kept", "key", "load", "store"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Kept:
    """A plan as it is kept.

    Args:
        plan: The plan.
        is_whole: Nothing was left untried because that run was too short for it.
        steps: Steps that the run had left when it chose, None if unknown.
    """

    plan: Plan
    is_whole: bool = True
    steps: int | None = None

    def serves(self, steps: int | None) -> bool:
        """Whether a run of so many steps would find no more than this plan did."""
        if self.is_whole:
            return True
        return steps is not None and self.steps is not None and steps <= 2 * self.steps


def key(
    module: torch.nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    batch: Any,
    guard: Guard,
    *rest: Any,
) -> str:
    """What must agree for a plan to serve again, as one short string.

    Args:
        module: Its structure counts: kinds, settings, shapes, types, what is frozen, modes.
        optimizers: Their kinds and settings, but not their rates.
        batch: Its shapes and types.
        guard: The limits.
        rest: Plain values that count too (precision, deterministic).
    """
    facts = [
        [_words(one) for one in module.named_modules()],
        [
            (name, _shape(p), str(p.dtype), p.requires_grad, str(p.device))
            for name, p in module.named_parameters()
        ],
        [_optimizer_words(one) for one in optimizers],
        [_leaf_words(leaf) for leaf in pytree.tree_leaves(batch)],
        [guard.loss, guard.cosine],
        [repr(one) for one in rest],
        _machine_words(),
    ]
    text = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _words(named: tuple[str, torch.nn.Module]) -> tuple[Any, ...]:
    name, module = named
    kind = type(module)
    settings = "" if list(module.children()) else module.extra_repr()
    return name, kind.__module__, kind.__qualname__, settings, module.training


def _optimizer_words(optimizer: torch.optim.Optimizer) -> tuple[Any, ...]:
    flags = [
        {
            name: value
            for name, value in group.items()
            if isinstance(value, (bool, type(None))) or name == "weight_decay"
        }
        | {"parameters": len(group["params"])}
        for group in optimizer.param_groups
    ]
    return type(optimizer).__qualname__, flags


def _shape(parameter: torch.nn.Parameter) -> Any:
    is_lazy = isinstance(parameter, torch.nn.parameter.UninitializedParameter)
    return "not known yet" if is_lazy else tuple(parameter.shape)


def _leaf_words(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        return tuple(leaf.shape), str(leaf.dtype), str(leaf.device)
    return type(leaf).__qualname__


def _machine_words() -> list[Any]:
    return [
        platform.machine(),
        machine.describe().processor,
        sorted(machine.isa()),
        machine.cores(),
        torch.get_num_threads(),
        torch.cuda.get_device_name() if torch.cuda.is_available() else "",
        [__version__, torch.__version__, _version("pytorch-lightning"), _version("lightning")],
    ]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _file(key: str) -> Path:
    return machine.cache_dir() / "plans" / f"{key}.json"


def load(key: str) -> Kept | None:
    """What is kept under ``key``, if it is undamaged."""
    try:
        stored = json.loads(_file(key).read_text(encoding="utf-8"))
        if not isinstance(stored, dict) or set(stored) != {"plan", "is_whole", "steps"}:
            raise ConfigError("it is of another form")
        steps, is_whole = stored["steps"], stored["is_whole"]
        if not isinstance(is_whole, bool) or not isinstance(steps, (int, type(None))):
            raise ConfigError("it is of another form")
        return Kept(plan=Plan.from_json(stored["plan"]), is_whole=is_whole, steps=steps)
    except OSError:
        return None
    except (UnicodeDecodeError, json.JSONDecodeError, ConfigError, ArgumentError) as exc:
        _log.info("a plan in the cache cannot be used and is made anew: %s", exc)
        return None


def store(key: str, kept: Kept) -> None:
    """Keep a plan under ``key``; a cache that cannot be written is no error."""
    text = json.dumps(
        {"plan": kept.plan.to_json(), "is_whole": kept.is_whole, "steps": kept.steps}
    )
    file = _file(key)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=file.parent, suffix=".part")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as part:
                part.write(text)
            os.replace(name, file)  # whole or not at all, also for a run beside this one
        except BaseException:
            with suppress(OSError):
                os.unlink(name)
            raise
    except OSError as exc:
        _log.info("a plan could not be kept in the cache: %s", exc)
