"""The user's own module on a true call: its answer, and what a trunk's form must give for it.

Knows torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from bigdl._base.errors import ConfigError
from bigdl.nano.pytorch.export.structure import Structure, flatten
from bigdl.nano.pytorch.frozen.call import Streams, as_now
from bigdl.nano.pytorch.frozen.find import stirred_by
from bigdl.nano.pytorch.frozen.forms import Subject, drift
from bigdl.nano.pytorch.frozen.steps import traces

if TYPE_CHECKING:
    from collections.abc import Callable

    from bigdl.nano.accelerators.base import Precision
    from bigdl.nano.pytorch.frozen.forms import Tensors
    from bigdl.nano.pytorch.frozen.split import Trunk

__all__ = ["FlatTrunk", "Reference", "take_reference"]

_FIXED = (type(None), bool, str)


class FlatTrunk(nn.Module):
    """A trunk as a module of flat tensors: tensors in, a tuple of tensors out."""

    def __init__(self, ahead: nn.Module) -> None:
        super().__init__()
        self.ahead = ahead
        self.training = ahead.training

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(flatten(self.ahead(*tensors))[0])


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What a true call showed.

    Args:
        answer: What the user's module returned.
        subject: What forms are made of.
        result: How the trunk's outputs are nested.
    """

    answer: Any
    subject: Subject | None
    result: Structure | None
    fault: ConfigError | None = None


def take_reference(
    trunk: Trunk,
    call: Callable[[], Any],
    tensors: Tensors,
    *,
    checks_rest: bool,
    module: nn.Module,
) -> Reference:
    """Run the user's module by ``call``, and the trunk on the same inputs.

    Args:
        trunk: Cut from ``module``.
        call: The user's own call with these arguments; no site acts within it.
        tensors: The tensors in the arguments.
        checks_rest: The part after the trunk may run once more, to see that the cut is right.
        module: The user's module.
    """
    with torch.inference_mode(False):
        inputs = tuple(tensor.detach().clone() for tensor in tensors)
    answer = call()
    with torch.inference_mode(False):
        return _after(answer, trunk, inputs, tensors, checks_rest=checks_rest, module=module)


def _after(
    answer: Any,
    trunk: Trunk,
    inputs: Tensors,
    tensors: Tensors,
    *,
    checks_rest: bool,
    module: nn.Module,
) -> Reference:
    flat = FlatTrunk(trunk.ahead)
    try:
        if not all(map(_same, inputs, tensors)):
            raise ConfigError("it writes to its inputs")
        outputs, result = _run_ahead(flat, inputs)
        _check_outputs(outputs, result, inputs, flat)
        if trunk.rest is None:
            _must_agree(answer, outputs)
        elif checks_rest and stirred_by(module) is None:
            with torch.no_grad():
                again = trunk.rest(*result.build(_copies(outputs)), *inputs)
            _must_agree(answer, tuple(flatten(again)[0]))
    except ConfigError as fault:
        return Reference(answer=answer, subject=None, result=None, fault=fault)
    subject = Subject(module=flat, inputs=inputs, outputs=outputs)
    return Reference(answer=answer, subject=subject, result=result)


def _copies(tensors: Tensors) -> Tensors:
    return tuple(tensor.clone() for tensor in tensors)


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    # bytes, so that NaN equals itself
    return torch.equal(one, other) or torch.equal(one.isnan(), other.isnan())


def _run_ahead(flat: FlatTrunk, inputs: Tensors) -> tuple[Tensors, Structure]:
    """The trunk's outputs; a fault if running it leaves a trace anywhere."""
    device = inputs[0].device
    streams, before = Streams(device), traces(flat.ahead)
    nested: list[Any] = []

    def run(tensors: Tensors) -> Tensors:
        nested.append(flat.ahead(*tensors))
        return ()

    try:
        as_now(run, device.type)(_copies(inputs))
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError) as exc:
        raise ConfigError(f"it cannot be run by itself: {exc}") from exc
    finally:
        drew = streams.moved()
        streams.restore()
    if drew:
        raise ConfigError("it draws random numbers")
    if before != traces(flat.ahead):
        raise ConfigError("it keeps state of its own from call to call")
    outputs, result = flatten(nested[0])
    return tuple(outputs), result


def _check_outputs(outputs: Tensors, result: Structure, inputs: Tensors, flat: FlatTrunk) -> None:
    if not outputs:
        raise ConfigError("it gives no tensors")
    for path, value in result.constants("output"):
        if not isinstance(value, _FIXED):
            raise ConfigError(f"{path} is a {type(value).__name__}, not a tensor")
    taken = {t.untyped_storage().data_ptr() for t in (*flat.parameters(), *flat.buffers())}
    for output in outputs:
        if type(output) is not torch.Tensor or output.layout is not torch.strided:
            raise ConfigError(f"an output is a {type(output).__name__} of a special kind")
        if output.numel() and output.untyped_storage().data_ptr() in taken:
            raise ConfigError("an output shares memory with a weight or another output")
        taken.add(output.untyped_storage().data_ptr())


def _must_agree(answer: Any, outputs: Tensors) -> None:
    """The trunk by itself gives what the user's module gave."""
    wanted = tuple(flatten(answer)[0])
    if [t.shape for t in wanted] != [t.shape for t in outputs]:
        raise ConfigError("taken out of its module it gives other results")
    plain = all(t.dtype is torch.float32 for t in wanted)
    precision: Precision = "fp32" if plain else "bf16"
    if drift(outputs, wanted).exceeds(precision) is not None:
        raise ConfigError("taken out of its module it gives other results")
