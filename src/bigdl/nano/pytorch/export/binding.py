"""How a model is called: which tensors go where, and what comes back. Precomputed, then lean."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from bigdl._base.errors import ArgumentError, DataError, StoredModelError
from bigdl._base.registry import nearest
from bigdl.nano.pytorch.export.structure import Structure, flatten

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    from bigdl.nano.accelerators.base import TensorSpec

__all__ = ["Interface", "TiedAxes", "bind_sample", "forward_signature", "to_array", "to_tensor"]

Sample = Any  # a tensor, a tuple (by position) or a dict (by keyword)


def forward_signature(model: nn.Module) -> inspect.Signature:
    """The parameters of ``model.forward``, without self."""
    schema = getattr(getattr(model, "forward", None), "schema", None)
    if isinstance(model, torch.jit.ScriptModule) and schema is not None:
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        return inspect.Signature(
            [
                inspect.Parameter(
                    arg.name,
                    kind,
                    default=arg.default_value if arg.has_default_value() else inspect._empty,
                )
                for arg in schema.arguments[1:]
            ]
        )
    return inspect.signature(model.forward)


def as_call(sample: Sample) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The (args, kwargs) that a sample stands for.

    Raises:
        ArgumentError: It is none of the three forms.
    """
    if isinstance(sample, torch.Tensor):
        return (sample,), {}
    if isinstance(sample, tuple) and not hasattr(sample, "_fields"):
        return sample, {}
    if isinstance(sample, Mapping):
        wrong = [key for key in sample if not isinstance(key, str)]
        if wrong:
            raise ArgumentError(f"A sample by keyword has text as keys, not {wrong[0]!r}.")
        return (), dict(sample)
    raise ArgumentError(
        f"input_sample is a {type(sample).__name__}: need a tensor, a tuple (inputs by position) "
        "or a dict (by keyword). For one input that is a list itself, give a tuple around it."
    )


def bind_sample(
    signature: inspect.Signature, sample: Sample
) -> tuple[dict[str, Any], inspect.Signature]:
    """Forward's arguments by parameter, as the sample gives them, and the signature.

    Raises:
        ArgumentError: They do not fit forward.
    """
    args, kwargs = as_call(sample)
    return dict(_bind(signature, args, kwargs).arguments), signature


def _bind(
    signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> inspect.BoundArguments:
    try:
        return signature.bind(*args, **kwargs)
    except TypeError as exc:
        known = list(signature.parameters)
        unknown = [name for name in kwargs if name not in known]
        hint = nearest(unknown[0], known) if unknown else ""
        raise ArgumentError(
            f"forward({', '.join(known)}) cannot be called so: {exc}.{hint}"
        ) from None


def torch_dtype(name: str) -> torch.dtype:
    """Torch's type for the name in a spec."""
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise StoredModelError(f"{name!r} is not the name of a tensor type.")
    return found


def spec_dtype(dtype: torch.dtype) -> str:
    """A spec's name for torch's type."""
    return str(dtype).removeprefix("torch.")


def to_array(tensor: torch.Tensor) -> np.ndarray:
    """``tensor`` as an array over the same memory where that can be; bfloat16 as float32."""
    if tensor.requires_grad:
        tensor = tensor.detach()
    if tensor.dtype is torch.bfloat16:
        tensor = tensor.float()
    try:
        return tensor.numpy()
    except (TypeError, RuntimeError) as exc:
        plain = tensor.resolve_conj().resolve_neg()
        if plain is not tensor:
            return plain.numpy()
        raise DataError(f"An input cannot be read as plain memory: {exc}") from exc


def to_tensor(array: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """``array`` as a tensor of ``dtype`` over the same memory where that can be."""
    tensor = torch.from_numpy(array)
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


@dataclass(frozen=True)
class TiedAxes:
    """Axes of inputs that always have one length, as rows of one batch do.

    Args:
        members: (input's number, axis) of each.
        least: The smallest length that the model gives right results for.
    """

    members: tuple[tuple[int, int], ...]
    least: int = 0


class _Check:
    """One input's own requirements, as plain attributes for a fast look."""

    __slots__ = ("dtype", "fixed", "path", "rank", "spec")

    def __init__(self, spec: TensorSpec, path: str) -> None:
        self.spec, self.path = spec, path
        self.dtype, self.rank = torch_dtype(spec.dtype), len(spec.shape)
        self.fixed = tuple((a, n) for a, n in enumerate(spec.shape) if n is not None)

    def __call__(self, value: Any, device: torch.device | None) -> None:
        if not isinstance(value, torch.Tensor):
            raise ArgumentError(
                f"{self.path} is a {type(value).__name__}; need a tensor of {self.wanted}."
            )
        if value.dtype is not self.dtype or value.dim() != self.rank:
            raise self.fault(value)
        shape = value.shape
        for axis, length in self.fixed:
            if shape[axis] != length:
                raise self.fault(value)
        if value.layout is not torch.strided:
            raise DataError(f"{self.path} is sparse; need a dense tensor, as to_dense() gives it.")
        if device is not None and value.device != device:
            raise DataError(
                f"{self.path} is on {value.device}, but this model runs on {device}; "
                f"give {self.path}.to({str(device)!r})."
            )

    @property
    def wanted(self) -> str:
        shape = ", ".join("any" if n is None else str(n) for n in self.spec.shape)
        return f"type {self.spec.dtype} and shape ({shape}{',' if self.rank == 1 else ''})"

    def fault(self, value: torch.Tensor) -> DataError:
        hint = ""
        if value.dtype is self.dtype and value.dim() == self.rank:
            axis = next(a for a, n in self.fixed if value.shape[a] != n)
            hint = f" Name axis {axis} in dynamic_axes to let its length vary."
        return DataError(
            f"{self.path} has type {spec_dtype(value.dtype)} and shape {tuple(value.shape)}; this "
            f"model was made for {self.wanted}.{hint}"
        )


class Interface:
    """How one accelerated model is called.

    Args:
        signature: Forward's parameters.
        arguments: The structure of the sample's arguments, a dict by parameter.
        inputs: Its tensors, in the structure's order.
        outputs: The result's tensors.
        result: The structure of the result.
        ties: Axes of inputs that must agree.
    """

    def __init__(
        self,
        *,
        signature: inspect.Signature,
        arguments: Structure,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        result: Structure,
        ties: Sequence[TiedAxes] = (),
    ) -> None:
        self.signature, self.arguments, self.result = signature, arguments, result
        self.inputs, self.outputs, self.ties = tuple(inputs), tuple(outputs), tuple(ties)
        paths = [path for name, part in self._parts.items() for path, _ in part.paths(name)]
        self.checks = tuple(map(_Check, self.inputs, paths))
        self.output_dtypes = tuple(torch_dtype(spec.dtype) for spec in self.outputs)
        self.plain = self._plain_count()
        self._ranges = tuple(tie for tie in self.ties if len(tie.members) > 1 or tie.least > 0)

    @property
    def _parts(self) -> dict[str, Structure]:
        return dict(zip(self.arguments.keys, self.arguments.children, strict=True))

    def _plain_count(self) -> int:
        """How many positional tensors make a whole call; -1 if some argument is no tensor."""
        positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        first = list(self.signature.parameters.values())[: len(self.inputs)]
        if [p.name for p in first] != list(self.arguments.keys):
            return -1
        fits = all(part.is_tensor for part in self.arguments.children)
        return len(first) if fits and all(p.kind in positional for p in first) else -1

    # --- a call ----------------------------------------------------------------------------

    def tensors(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Sequence[torch.Tensor]:
        """The flat inputs of a call, unchecked; every other argument is as in the sample.

        Raises:
            ArgumentError: An argument that forward lacks, or one that this compilation has
                fixed to another value.
            DataError: A tensor is missing or nested otherwise than in the sample.
        """
        if not kwargs and len(args) == self.plain:
            return args
        given = _bind(self.signature, args, kwargs).arguments
        parts = self._parts
        for name, value in given.items():
            if name not in parts:
                self._must_be_default(name, value)
        tensors: list[torch.Tensor] = []
        for name, part in parts.items():
            tensors += self._part(name, part, given)
        return tensors

    def _must_be_default(self, name: str, value: Any) -> None:
        parameter = self.signature.parameters[name]
        hint = ""
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            name, value = next(iter(value.items()))
            hint = nearest(name, list(self.signature.parameters))
        elif _same(value, parameter.default):
            return
        default = parameter.default
        shown = "out" if default is inspect.Parameter.empty else f"at its default ({default!r})"
        raise ArgumentError(
            f"{name}={_short(value)} was given, but the sample left {name!r} {shown}, and this "
            f"model was compiled for that. Give {name!r} in the input_sample to use it.{hint}"
        )

    def _part(self, name: str, part: Structure, given: Mapping[str, Any]) -> list[torch.Tensor]:
        if name not in given:
            default = self.signature.parameters[name].default
            found = flatten(default)[1] if default is not inspect.Parameter.empty else None
            if found != part:
                raise DataError(
                    f"{name!r} is missing; the sample had it, and this model was compiled for it."
                )
            return []
        tensors, structure = flatten(given[name], part)
        if structure != part:
            raise _difference(name, part, structure, given[name])
        return tensors

    def check(self, tensors: Sequence[Any], device: torch.device | None = None) -> None:
        """Hold flat inputs to what this model was made for.

        Raises:
            ArgumentError: One is not a tensor.
            DataError: Wrong type, rank, shape or device, or lengths that disagree.
        """
        for check, tensor in zip(self.checks, tensors, strict=True):
            check(tensor, device)
        for tie in self._ranges:
            self._check_tie(tie, tensors)

    def _check_tie(self, tie: TiedAxes, tensors: Sequence[Any]) -> None:
        first, axis = tie.members[0]
        length = tensors[first].shape[axis]
        for other, other_axis in tie.members[1:]:
            found = tensors[other].shape[other_axis]
            if found != length:
                raise DataError(
                    f"axis {axis} of {self.checks[first].path} has length {length}, but axis "
                    f"{other_axis} of {self.checks[other].path} has {found}; they must agree."
                )
        if length < tie.least:
            raise DataError(
                f"axis {axis} of {self.checks[first].path} has length {length}; this model needs "
                f"at least {tie.least} there: below that the original's result has another form."
            )

    def known_tensors(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> list[tuple[int, torch.Tensor]]:
        """(number, tensor) of the inputs that stand where the sample had them.

        For forms that run the user's code: what differs from the sample is that code's matter.

        Raises:
            ArgumentError: An argument that forward lacks.
        """
        given = _bind(self.signature, args, kwargs).arguments
        found: list[tuple[int, torch.Tensor]] = []
        number = 0
        for name, part in self._parts.items():
            count = sum(1 for _ in part.paths(name))
            tensors, structure = flatten(given.get(name), part)
            if structure == part:
                found += zip(range(number, number + count), tensors, strict=True)
            number += count
        return found

    def check_known(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Check the inputs that ``known_tensors`` finds, each by itself."""
        for number, tensor in self.known_tensors(args, kwargs):
            self.checks[number](tensor, None)

    def call_form(self, tensors: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Forward's (args, kwargs) for flat inputs."""
        arguments = self.arguments.build(tensors)
        bound = inspect.BoundArguments(self.signature, arguments)
        return bound.args, bound.kwargs

    # --- as JSON ---------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """Plain values that ``from_json`` reads."""
        return {
            "parameters": [_parameter_json(p) for p in self.signature.parameters.values()],
            "arguments": self.arguments.to_json(),
            "result": self.result.to_json(),
            "ties": [[list(map(list, tie.members)), tie.least] for tie in self.ties],
        }

    @staticmethod
    def from_json(
        written: Any, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]
    ) -> Interface:
        """What ``to_json`` wrote.

        Raises:
            StoredModelError: It is not that.
        """
        if not isinstance(written, dict) or set(written) != {
            "parameters", "arguments", "result", "ties",
        }:  # fmt: skip
            raise StoredModelError("The stored description of forward is not complete.")
        try:
            ties = [
                TiedAxes(tuple((int(i), int(a)) for i, a in members), int(least))
                for members, least in written["ties"]
            ]
            signature = inspect.Signature([_parameter(p) for p in written["parameters"]])
            arguments = Structure.from_json(written["arguments"])
            result = Structure.from_json(written["result"])
            _must_count(arguments, inputs)
            _must_count(result, outputs)
            for input_, axis in (member for tie in ties for member in tie.members):
                inputs[input_].shape[axis]
            return Interface(
                signature=signature, arguments=arguments, inputs=inputs,
                outputs=outputs, result=result, ties=ties,
            )  # fmt: skip
        except (TypeError, ValueError, KeyError, IndexError) as exc:
            if isinstance(exc, StoredModelError):
                raise
            raise StoredModelError(f"The stored description of forward is damaged: {exc}") from exc


def _must_count(structure: Structure, specs: Sequence[TensorSpec]) -> None:
    if sum(1 for _ in structure.paths("x")) != len(specs):
        raise StoredModelError("The stored description of forward has another count of tensors.")


def _same(value: Any, default: Any) -> bool:
    """Whether a constant argument is the default, for values of any kind."""
    if value is default:
        return True
    if isinstance(value, torch.Tensor) or type(value) is not type(default):
        return False
    return flatten(value) == ([], flatten(default)[1])


def _difference(name: str, wanted: Structure, found: Structure, value: Any) -> Exception:
    if not any(True for _ in wanted.paths(name)) and wanted.kind == "constant":
        return ArgumentError(
            f"{name}={_short(value)} was given, but this model was compiled for "
            f"{name}={wanted.value!r}. Give the other value in the input_sample to use it."
        )
    if wanted.is_tensor:
        return ArgumentError(f"{name} is a {type(value).__name__}; need a tensor.")
    constants = dict(found.constants(name))
    for path, fixed in wanted.constants(name):
        if path in constants and not _same(constants[path], fixed):
            return ArgumentError(
                f"{path}={_short(constants[path])} was given, but this model was compiled for "
                f"{path}={fixed!r}."
            )
    want = [path for path, _ in wanted.paths(name)]
    have = [path for path, _ in found.paths(name)]
    return DataError(
        f"{name} is not nested as in the sample: found tensors {', '.join(have) or 'none'}; "
        f"need {', '.join(want)}."
    )


def _short(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"<tensor of shape {tuple(value.shape)}>"
    text = repr(value)
    return text if len(text) <= 60 else f"<{type(value).__name__}>"


_KINDS = {kind.name: kind for kind in inspect._ParameterKind}


def _parameter_json(parameter: inspect.Parameter) -> dict[str, Any]:
    written: dict[str, Any] = {"name": parameter.name, "kind": parameter.kind.name}
    default = parameter.default
    if default is not inspect.Parameter.empty:
        plain = isinstance(default, (type(None), bool, int, float, str))
        written["default"] = default if plain else None
        written["plain"] = plain
    return written


class _Unstored:
    """Stands for a default that JSON cannot hold; equal to nothing."""

    def __repr__(self) -> str:
        return "the original's"


def _parameter(written: dict[str, Any]) -> inspect.Parameter:
    default: Any = inspect.Parameter.empty
    if "default" in written:
        default = written["default"] if written["plain"] else _Unstored()
    return inspect.Parameter(written["name"], _KINDS[written["kind"]], default=default)
