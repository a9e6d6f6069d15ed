"""What an estimator refuses before any work, whatever the framework."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bigdl._base.calls import shown
from bigdl._base.errors import ArgumentError, ConfigError
from bigdl.orca.learn.callbacks import Callback, ModelCheckpoint

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["check_fit", "checked_workers", "known_config"]


def checked_workers(workers: Any) -> int | tuple[int, int] | None:
    """``workers`` of an estimator.

    Raises:
        ArgumentError: It is no number, no pair, and not None.
        ConfigError: No such number of workers can be.
    """
    pair = workers if isinstance(workers, tuple) else (workers, workers)
    if workers is None:
        return None
    if len(pair) != 2 or not all(isinstance(n, int) and not isinstance(n, bool) for n in pair):
        raise ArgumentError(f"workers={shown(workers)}: need a number, (fewest, most) or None.")
    if not 1 <= pair[0] <= pair[1]:
        raise ConfigError(f"workers={workers!r}: need 1 or more, the fewest before the most.")
    return workers


def check_fit(
    epochs: Any,
    seed: Any,
    max_steps: Any,
    validate_every: Any,
    validate_every_steps: Any,
    max_failures: Any,
    hang_timeout_s: Any,
    callbacks: Sequence[Any],
) -> None:
    """Refuse what no data and no engine could make right; all faults in one text.

    Raises:
        ArgumentError: A callback is none.
        ConfigError: A number is not allowed.
    """
    if not isinstance(callbacks, (list, tuple)):
        raise ArgumentError(f"callbacks={shown(callbacks)}: need a list of them.")
    strange = [one for one in callbacks if not isinstance(one, Callback)]
    if strange:
        raise ArgumentError(
            f"callbacks holds {shown(strange[0])}; need objects of bigdl.orca.learn.callbacks."
        )
    least = {
        "epochs": (epochs, 1),
        "max_steps": (max_steps, 1),
        "validate_every": (validate_every, 1),
        "validate_every_steps": (validate_every_steps, 1),
        "max_failures": (max_failures, 0),
        "seed": (seed, 0),
    }
    wrong = [
        f"{name}={value!r} (need a whole number >= {low})"
        for name, (value, low) in least.items()
        if not (name in ("max_steps", "validate_every_steps") and value is None)
        and (isinstance(value, bool) or not isinstance(value, int) or value < low)
    ]
    if hang_timeout_s not in ("auto", None) and not (
        isinstance(hang_timeout_s, (int, float)) and hang_timeout_s > 0
    ):
        wrong.append(f'hang_timeout_s={hang_timeout_s!r} (need "auto", seconds > 0, or None)')
    if wrong:
        raise ConfigError("fit() cannot be called so: " + ", ".join(wrong) + ".")
    if max_failures and not any(isinstance(one, ModelCheckpoint) for one in callbacks):
        raise ConfigError(
            f"fit(max_failures={max_failures}) needs a ModelCheckpoint among the callbacks, to "
            "go on from when a worker was lost."
        )


def known_config(config: Mapping[str, Any] | None) -> dict[str, Any]:
    """The user's config as a dict of our own.

    Raises:
        ArgumentError: It is no mapping.
    """
    if config is None:
        return {}
    if not hasattr(config, "items"):
        raise ArgumentError(f"config has to be a dict, not {shown(config)}.")
    return dict(config)
