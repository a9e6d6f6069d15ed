"""Which axes of a model's inputs may vary: asked of the model itself, by running it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from bigdl._base.errors import ArgumentError, ConfigError
from bigdl._base.registry import nearest
from bigdl.nano.pytorch.export.binding import TiedAxes

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from bigdl.nano.pytorch.export.structure import Structure

__all__ = ["Probe", "Run", "declared_axes", "probe_axes", "resize"]

Axis = tuple[int, int]  # (input's number, axis)


@dataclass(frozen=True)
class Run:
    """One run of the original: flat inputs, flat outputs, the outputs' structure."""

    inputs: tuple[torch.Tensor, ...]
    outputs: tuple[torch.Tensor, ...]
    result: Structure

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(output.dim() for output in self.outputs)


@dataclass(frozen=True)
class _Group:
    """Axes that are resized together."""

    members: tuple[Axis, ...]
    length: int  # in the sample

    @property
    def trials(self) -> tuple[tuple[int, int], ...]:
        """Pairs of lengths, one pair of which must work; the likeliest first."""
        n = self.length
        if all(axis == 0 for _, axis in self.members):
            return ((2, 3),)  # never 1: it would hide behind broadcasting
        pairs = [(n, n + 1), (n, 2 * n), (n - 1, n), (n // 2, n), (n + 1, n + 2)]
        return tuple((a, b) for a, b in pairs if 1 < a < b)


@dataclass(frozen=True)
class Probe:
    """What was found.

    Args:
        ties: The axes that vary, those of one length together.
        runs: Runs at different lengths, all of outputs with the same ranks.
        varying: For each output, its axes whose length follows the inputs'.
        base: Flat inputs of a small run, the one that is exported.
    """

    ties: tuple[TiedAxes, ...]
    runs: tuple[Run, ...]
    varying: tuple[frozenset[int], ...]
    base: tuple[torch.Tensor, ...] = field(repr=False)


def resize(tensor: torch.Tensor, axis: int, length: int) -> torch.Tensor:
    """``tensor`` with ``length`` entries along ``axis``: its first ones, over and over."""
    index = torch.arange(length, device=tensor.device) % max(1, tensor.shape[axis])
    return tensor.index_select(axis, index)


def declared_axes(
    dynamic_axes: bool | Mapping[str, Sequence[int]],
    arguments: Structure,
    tensors: Sequence[torch.Tensor],
) -> list[Axis]:
    """The axes that the caller wants to vary.

    Raises:
        ArgumentError: Neither True or False nor a mapping, or a name that forward lacks.
        ConfigError: An axis that an input does not have.
    """
    if isinstance(dynamic_axes, bool):
        return [(i, 0) for i, t in enumerate(tensors) if t.dim()] if dynamic_axes else []
    if not hasattr(dynamic_axes, "items"):
        raise ArgumentError(
            f"dynamic_axes is a {type(dynamic_axes).__name__}; need True, False or "
            "{forward's parameter: [axes]}."
        )
    numbers: dict[str, list[int]] = {}
    number = 0
    for name, part in zip(arguments.keys, arguments.children, strict=True):
        count = sum(1 for _ in part.paths(name))
        numbers[name] = list(range(number, number + count))
        number += count
    axes: list[Axis] = []
    for name, wanted in dynamic_axes.items():
        if name not in numbers:
            raise ConfigError(
                f"dynamic_axes names {name!r}, which the sample does not give; it gives "
                f"{', '.join(numbers)}.{nearest(str(name), list(numbers))}"
            )
        for axis in [wanted] if isinstance(wanted, int) else wanted:
            for i in numbers[name]:
                axes.append((i, _real_axis(axis, tensors[i].dim(), name)))
    return list(dict.fromkeys(axes))


def _real_axis(axis: Any, rank: int, name: str) -> int:
    if not isinstance(axis, int) or isinstance(axis, bool):
        raise ArgumentError(f"dynamic_axes[{name!r}] holds {axis!r}; need numbers of axes.")
    if not -rank <= axis < rank:
        raise ConfigError(
            f"dynamic_axes names axis {axis} of {name!r}, which has {rank} axes in the sample."
        )
    return axis % rank


class _Prober:
    """Runs the model at other lengths and keeps what it gave."""

    def __init__(
        self,
        run: Callable[[Sequence[torch.Tensor]], Run],
        tensors: Sequence[torch.Tensor],
        must: bool,
        paths: Sequence[str],
    ) -> None:
        self.run, self.base, self.must, self.paths = run, tuple(tensors), must, paths
        self.runs: list[Run] = []
        self.fault: Exception | None = None

    def resized(
        self, members: Sequence[Axis], length: int, base: Sequence[torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, ...]:
        inputs = list(self.base if base is None else base)
        for i, axis in members:
            inputs[i] = resize(inputs[i], axis, length)
        return tuple(inputs)

    def attempt(self, inputs: Sequence[torch.Tensor]) -> Run | None:
        """A run, or None if the model cannot take these inputs."""
        try:
            return self.run(inputs)
        except Exception as exc:  # noqa: BLE001  (the user's code may raise anything)
            self.fault = exc
            return None

    def pair(self, group: _Group) -> tuple[Run, Run] | None:
        """Two runs of different lengths with outputs of the same ranks."""
        for lengths in group.trials:
            first = self.attempt(self.resized(group.members, lengths[0]))
            second = first and self.attempt(self.resized(group.members, lengths[1]))
            if first and second and first.ranks == second.ranks and first.result == second.result:
                return first, second
        return None

    def accept(self, group: _Group, pair: tuple[Run, Run]) -> list[_Group]:
        """Go on from the first run; say which members stand alone."""
        self.runs += pair
        self.base = pair[0].inputs
        if len(group.members) == 1:
            return [group]
        found = {m: self._apart((m,), pair[0]) for m in group.members}
        alone = [m for m in group.members if found[m] is not None]
        together = tuple(m for m in group.members if found[m] is None)
        # Both sides must be able to go their own way: where a model looks at an argument only
        # when it has to (a mask of ones), the others seem to need no company, and do.
        rest = self._apart(together, pair[0]) if together and alone else None
        if together and rest is None:
            return [group]
        self.runs += [run for run in (*found.values(), rest) if run is not None]
        groups = [_Group((m,), group.length) for m in alone]
        return groups + ([_Group(together, group.length)] if together else [])

    def _apart(self, members: Sequence[Axis], run: Run) -> Run | None:
        """A run with ``members`` longer than the others; None if they cannot be, to an effect."""
        i, axis = members[0]
        inputs = self.resized(members, run.inputs[i].shape[axis] + 1, run.inputs)
        found = self.attempt(inputs)
        if found is None or found.ranks != run.ranks:
            return None
        # a model may silently leave out the rows that are too many: they must have had a part
        if all(map(_same, found.outputs, run.outputs)):
            return None
        return found

    def least(self, group: _Group) -> int:
        """1 if the model gives outputs of the same form for a length of 1, else 2."""
        found = self.attempt(self.resized(group.members, 1))
        if found is None or found.ranks != self.runs[0].ranks:
            return 2
        self.runs.append(found)
        return 0


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(
        one.double(), other.double(), rtol=1e-4, atol=1e-6, equal_nan=True
    )


def probe_axes(
    run: Callable[[Sequence[torch.Tensor]], Run],
    tensors: Sequence[torch.Tensor],
    axes: Sequence[Axis],
    *,
    must: bool,
    paths: Sequence[str],
) -> Probe:
    """Find which of ``axes`` vary, and with which others.

    Args:
        run: Runs the original on flat inputs.
        tensors: The sample's.
        axes: Those that are wanted to vary.
        must: They were named by the caller: one that cannot vary is an error. Else it stays
            fixed to the sample's length.
        paths: What error texts call each input.

    Raises:
        ConfigError: A named axis cannot vary, or the model cannot run its sample.
    """
    prober = _Prober(run, tensors, must, paths)
    by_length: dict[tuple[bool, int, int], list[Axis]] = {}
    for i, axis in axes:
        key = (axis == 0, axis, tensors[i].shape[axis])
        by_length.setdefault(key, []).append((i, axis))
    found: list[_Group] = []
    failed: list[_Group] = []
    for (_, _, length), members in sorted(by_length.items(), key=lambda item: item[0][1]):
        group = _Group(tuple(members), length)
        pair = prober.pair(group)
        if pair:
            found += prober.accept(group, pair)
        else:
            failed.append(group)
    for group in _merged(failed):
        pair = prober.pair(group)
        if pair:
            found += prober.accept(group, pair)
            failed = [g for g in failed if not set(g.members) <= set(group.members)]
    if failed and must:
        _refuse(failed[0], prober)
    last = prober.attempt(prober.base)  # the sample itself, or its first rows
    if last is None:
        raise ConfigError(
            f"The model cannot run its sample: {type(prober.fault).__name__}: {prober.fault}"
        ) from prober.fault
    prober.runs.append(last)
    ties = [
        TiedAxes(group.members, prober.least(group) if group.members[0][1] == 0 else 0)
        for group in found
    ]
    return _summed_up(prober, ties)


def _merged(failed: Sequence[_Group]) -> list[_Group]:
    """Groups of one length that may only vary together, as the sides of a square do."""
    by_length: dict[int, list[Axis]] = {}
    for group in failed:
        by_length.setdefault(group.length, []).extend(group.members)
    return [
        _Group(tuple(members), length)
        for length, members in by_length.items()
        if sum(group.length == length for group in failed) > 1
    ]


def _refuse(group: _Group, prober: _Prober) -> None:
    i, axis = group.members[0]
    lengths = sorted({length for pair in group.trials for length in pair})
    why = f": {prober.fault}" if prober.fault else ""
    raise ConfigError(
        f"dynamic_axes names axis {axis} of {prober.paths[i]}, but the model itself cannot take "
        f"other lengths there (tried {', '.join(map(str, lengths))}){why}"
    ) from prober.fault


def _summed_up(prober: _Prober, ties: Sequence[TiedAxes]) -> Probe:
    last = next(run for run in prober.runs if run.inputs is prober.base)
    runs = [run for run in prober.runs if run.ranks == last.ranks and run.result == last.result]
    varying = [
        frozenset(
            axis
            for axis in range(rank)
            if len({run.outputs[number].shape[axis] for run in runs}) > 1
        )
        for number, rank in enumerate(last.ranks)
    ]
    return Probe(tuple(ties), tuple(runs), tuple(varying), prober.base)
