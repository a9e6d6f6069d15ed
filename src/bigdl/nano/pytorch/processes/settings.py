"""How many processes train together, and how each of them runs. Knows no framework."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from bigdl._base.calls import shown
from bigdl._base.errors import ArgumentError, ConfigError
from bigdl._base.registry import nearest
from bigdl.nano.cores import check_count, divided

if TYPE_CHECKING:
    from bigdl._base.environment import ProcessSettings

__all__ = ["Settings", "check_settings"]

_BACKENDS = ("subprocess", "spawn")
_SYNCS = ("allreduce", "sharded")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Arguments of a call in several processes, checked.

    Args:
        each: How each process runs, by rank.
        backend: "subprocess": forked from one fresh interpreter, which has loaded the libraries
            once. "spawn": an interpreter each, with its number of threads in its environment.
        auto_lr: Whether learning rates grow with the number of processes.
        sync: "allreduce", or "sharded": each process has its slice of the optimizer.
    """

    each: tuple[ProcessSettings, ...]
    backend: Literal["subprocess", "spawn"] = "subprocess"
    auto_lr: bool = False
    sync: Literal["allreduce", "sharded"] = "allreduce"

    @property
    def world(self) -> int:
        return len(self.each)


def check_settings(
    num_processes: Any,
    distributed_backend: Any,
    cpu_for_each_process: Any,
    auto_lr: Any,
    sync: Any,
) -> Settings:
    """Hold the arguments to what they may be.

    Raises:
        ArgumentError: One is of another kind.
        ConfigError: One has a value that cannot be, or that this machine does not have.
    """
    check_count("num_processes", num_processes)
    _check_word("distributed_backend", distributed_backend, _BACKENDS)
    _check_word("sync", sync, _SYNCS)
    if not isinstance(auto_lr, bool):
        raise ArgumentError(f"auto_lr takes True or False, not {shown(auto_lr)}.")
    if num_processes == 1 and cpu_for_each_process is not None:
        raise ConfigError(
            "cpu_for_each_process= is for processes that are started; num_processes=1 trains in "
            "this one. Give num_processes=, or leave it out."
        )
    return Settings(
        each=divided(num_processes, lists=cpu_for_each_process),
        backend=distributed_backend,
        auto_lr=auto_lr,
        sync=sync,
    )


def _check_word(name: str, value: Any, words: tuple[str, ...]) -> None:
    if not isinstance(value, str):
        raise ArgumentError(f"{name} takes {' or '.join(map(repr, words))}, not {shown(value)}.")
    if value not in words:
        raise ConfigError(
            f"{name}={value!r} cannot be used: have {' and '.join(map(repr, words))}."
            f"{nearest(value, words)}"
        )
