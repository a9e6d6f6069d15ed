"""Running a module by torch itself: layouts, bf16, results with memory of their own."""

from __future__ import annotations

import copy
import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from bigdl._base.errors import ConfigError, NotReadyError
from bigdl.nano.accelerators.torch_modules import write_weights
from bigdl.nano.pytorch.export.structure import flatten, map_tensors

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from bigdl.nano.accelerators.base import Spec

__all__ = ["NativeCompiled", "in_layout", "own_memory", "prepare_bf16"]


def in_layout(module: nn.Module) -> None:
    """Put the weights of convolutions in ``module`` into channels_last, in place.

    Raises:
        ConfigError: There are none, so that this layout can change nothing.
    """
    ranks = {parameter.dim() for parameter in module.parameters()}
    if not ranks & {4, 5}:
        raise ConfigError("channels_last changes nothing: no 2-D or 3-D convolution in the model.")
    module.to(memory_format=torch.channels_last)
    if 5 in ranks:
        module.to(memory_format=torch.channels_last_3d)


# Autocast turns the weights of these into bf16 at every call; it can be done once.
_CAST_ONCE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d)


def prepare_bf16(module: nn.Module, example: Any) -> None:
    """Round the weights that autocast would round, once and for all.

    Left to autocast where the model's code reads such weights in another way: seen by running
    the example, if there is one, both ways.
    """
    wanted = _outputs(module, example) if example is not None else None
    weights = _cast_once(module)
    kept = [(owner, name, getattr(owner, name)) for owner, name in weights]
    for owner, name in weights:
        setattr(owner, name, nn.Parameter(getattr(owner, name).bfloat16(), requires_grad=False))
    if wanted is None:
        return
    try:
        same = all(map(_equal, wanted, _outputs(module, example)))
    except (RuntimeError, TypeError, ValueError):
        same = False
    if not same:
        for owner, name, parameter in kept:
            setattr(owner, name, parameter)


def _cast_once(module: nn.Module) -> list[tuple[nn.Module, str]]:
    """(layer, name) of weights that belong to one plain layer alone."""
    owners: dict[int, int] = {}
    for _, parameter in module.named_parameters(remove_duplicate=False):
        owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    found = []
    for layer in module.modules():
        if type(layer) not in _CAST_ONCE:
            continue
        for name in ("weight", "bias"):
            own = layer._parameters.get(name)
            if own is not None and own.dtype is torch.float32 and owners[id(own)] == 1:
                found.append((layer, name))
    return found


def _outputs(module: nn.Module, example: Any) -> list[torch.Tensor]:
    args, kwargs = example
    with torch.no_grad(), _bf16(_device(module)):
        return flatten(module(*args, **kwargs))[0]


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two results of bf16 arithmetic agree as well as it lets them."""
    if one.shape != other.shape or one.dtype is not other.dtype:
        return False
    a, b = one.double(), other.double()
    scale = a.abs().max().item() if a.numel() else 0.0
    return bool(torch.allclose(a, b, rtol=0, atol=1e-2 * scale + 1e-6, equal_nan=True))


def _bf16(device: str) -> torch.autocast:
    # weights are cast already, so that a cache of casts would only cost
    return torch.autocast(device, dtype=torch.bfloat16, cache_enabled=True)


def _device(module: nn.Module) -> str:
    for tensor in module.parameters():
        return tensor.device.type
    return "cpu"


class NativeCompiled:
    """A callable of torch's own kind: called with forward's arguments.

    Args:
        module: Holds the weights.
        call: Runs it.
        spec: What was asked for.
        channels_last: Give it pictures in that layout.
    """

    native = True

    def __init__(
        self,
        module: nn.Module,
        call: Callable[..., Any],
        spec: Spec,
        *,
        channels_last: bool,
    ) -> None:
        self._module, self._call, self._spec = module, call, spec
        self._channels_last = channels_last
        self._device = _device(module)
        self._bf16 = spec.precision == "bf16"
        self._dtypes = tuple(getattr(torch, output.dtype) for output in spec.outputs)
        self._weights = frozenset(
            tensor.untyped_storage().data_ptr()
            for tensor in (*module.parameters(), *module.buffers())
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """In another process: the same module, and a call made anew there."""
        build = functools.partial(NativeCompiled, channels_last=self._channels_last)
        return build, (self._module, self._call, self._spec)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.is_inference_mode_enabled():
            # its tensors cannot be changed by those who get them, and a compiled form would
            # have to be compiled once more for it
            with torch.inference_mode(False):
                return self(*args, **kwargs)
        if self._channels_last:
            args, kwargs = map_tensors(_pictures, (args, kwargs))
        with torch.no_grad():
            if self._bf16:
                with _bf16(self._device):
                    result = self._call(*args, **kwargs)
                result = _as_original(result, self._dtypes)
            else:
                result = self._call(*args, **kwargs)
        return own_memory(result, self._weights, args, kwargs)

    def clone(self) -> NativeCompiled:
        return copy.copy(self)

    def save(self, directory: Path) -> None:
        write_weights(self._module, directory)

    def close(self) -> None:
        self._call = _closed


def _closed(*args: Any, **kwargs: Any) -> Any:
    raise NotReadyError("This model was closed; make it again to call it.")


def _pictures(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dim() == 4:
        return tensor.contiguous(memory_format=torch.channels_last)
    if tensor.dim() == 5:
        return tensor.contiguous(memory_format=torch.channels_last_3d)
    return tensor


def _as_original(result: Any, dtypes: Sequence[torch.dtype]) -> Any:
    """``result`` with the types that the original gives."""
    if isinstance(result, torch.Tensor):
        return result if result.dtype is dtypes[0] else result.to(dtypes[0])
    tensors, structure = flatten(result)
    if len(tensors) == len(dtypes):
        return structure.build([t.to(d) for t, d in zip(tensors, dtypes, strict=True)])
    # another form than the sample's: an argument changed it
    return structure.build([t.float() if t.dtype is torch.bfloat16 else t for t in tensors])


def own_memory(
    result: Any, weights: frozenset[int], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """``result`` with copies of those tensors that lie in an input's or a weight's memory."""
    taken = _addresses(args, kwargs)

    def apart(tensor: torch.Tensor) -> torch.Tensor:
        address = tensor.untyped_storage().data_ptr()
        return tensor.clone() if address in taken or address in weights else tensor

    return map_tensors(apart, result)


def _addresses(args: tuple[Any, ...], kwargs: dict[str, Any]) -> set[int]:
    found = set()
    for value in args:
        if isinstance(value, torch.Tensor):  # the common case
            found.add(value.untyped_storage().data_ptr())
        else:
            found.update(t.untyped_storage().data_ptr() for t in flatten(value)[0])
    for value in kwargs.values():
        found.update(t.untyped_storage().data_ptr() for t in flatten(value)[0])
    return found
