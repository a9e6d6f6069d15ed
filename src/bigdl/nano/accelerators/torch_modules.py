"""What torch's own accelerators share: private copies of modules, their weights in a file."""

from __future__ import annotations

import contextlib
import copy
import json
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from bigdl._base.errors import ConfigError, StoredModelError
from bigdl._base.optional import need

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["freeze", "frozen_copy", "read_weights", "write_weights"]

WEIGHTS = "weights.safetensors"
_TIES = "ties"  # key of the file's own metadata: left-out name -> name that holds its values

# A Lightning module knows its run; a copy of the module must not copy the run.
_RUN = ("_trainer", "_fabric")


def frozen_copy(model: nn.Module) -> nn.Module:
    """A copy of ``model`` in eval mode that shares no weight with it and needs no gradient.

    What cannot be copied (locks, files, a Lightning run) is shared by reference. The model
    itself is not touched: not its modes, not its flags.
    """
    return freeze(_deepcopy(model))


def freeze(model: nn.Module) -> nn.Module:
    """``model`` itself, in eval mode and without gradients."""
    with contextlib.suppress(NotImplementedError):  # a graph of torch.export has no modes
        model.eval()
    for parameter in model.parameters():
        if parameter.is_leaf:
            parameter.requires_grad_(False)
        else:  # in a copy of TorchScript they hang on the copying
            parameter.detach_()
    return model


def _deepcopy(model: nn.Module) -> Any:
    memo = _shared(model)
    try:
        return copy.deepcopy(model, dict(memo))
    except (TypeError, RuntimeError, ValueError, AttributeError, NotImplementedError):
        for value in _attributes(model):
            try:
                copy.deepcopy(value, dict(memo))
            except (TypeError, RuntimeError, ValueError, AttributeError, NotImplementedError):
                memo[id(value)] = value
        return copy.deepcopy(model, memo)


def _shared(model: nn.Module) -> dict[int, Any]:
    """What deepcopy must not copy by itself, with what stands for it in the copy."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for name, value in vars(module).items():
            if name in _RUN and value is not None:
                memo[id(value)] = value
            for tensor in (value, *(value.values() if name == "_buffers" else ())):
                # deepcopy refuses tensors that were computed with gradients
                if isinstance(tensor, torch.Tensor) and not tensor.is_leaf:
                    memo[id(tensor)] = tensor.detach().clone()
    return memo


def _attributes(model: nn.Module) -> Iterator[Any]:
    """The plain attributes of all submodules."""
    own = set(vars(nn.Module()))
    for module in model.modules():
        for name, value in vars(module).items():
            if name not in own and not isinstance(value, nn.Module):
                yield value


def write_weights(model: nn.Module, directory: Path) -> None:
    """Write the ``state_dict`` of ``model`` as safetensors; tied tensors are written once.

    Raises:
        ConfigError: The state holds something that is not a tensor.
    """
    safetensors = need("safetensors.torch", extra="torch", purpose="Saving weights")
    kept: dict[str, torch.Tensor] = {}
    ties: dict[str, str] = {}
    seen: dict[Any, str] = {}
    for name, value in model.state_dict().items():
        if not isinstance(value, torch.Tensor):
            raise ConfigError(
                f"Cannot save the state {name!r}, a {type(value).__name__}: only tensors can be "
                "written without pickling."
            )
        identity = (value.data_ptr(), value.shape, value.stride(), value.dtype)
        if value.numel() and identity in seen:
            ties[name] = seen[identity]
            continue
        seen[identity] = name
        # a copy: two different views of one memory cannot be written otherwise
        kept[name] = value.detach().cpu().contiguous().clone()
    safetensors.save_file(kept, directory / WEIGHTS, metadata={_TIES: json.dumps(ties)})


def read_weights(model: nn.Module, directory: Path) -> nn.Module:
    """A copy of ``model`` that has the weights of ``directory``; modes are kept.

    Raises:
        StoredModelError: The file is damaged, or is not of such a model.
    """
    safetensors = need("safetensors", extra="torch", purpose="Loading weights")
    try:
        with safetensors.safe_open(directory / WEIGHTS, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            ties = json.loads((file.metadata() or {}).get(_TIES, "{}"))
        state.update({name: state[kept] for name, kept in ties.items()})
    except (OSError, KeyError, ValueError, AttributeError, safetensors.SafetensorError) as exc:
        raise StoredModelError(f"{directory / WEIGHTS} cannot be read: {exc}") from exc
    copied: nn.Module = _deepcopy(model)
    _fit(copied, state)
    return copied


def _fit(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Load ``state`` into ``model``, or say where the two differ."""
    own = model.state_dict()
    differing = sorted(own.keys() ^ state.keys())
    if differing:
        name = differing[0]
        where = "the stored weights" if name in state else "the given model"
        more = f" (and {len(differing) - 1} more)" if len(differing) > 1 else ""
        raise StoredModelError(f"The given model does not fit: only {where} has {name!r}{more}.")
    for name, value in state.items():
        if own[name].shape != value.shape:
            raise StoredModelError(
                f"The given model does not fit: {name!r} has shape {tuple(own[name].shape)}, "
                f"stored is {tuple(value.shape)}."
            )
    model.load_state_dict(state)
