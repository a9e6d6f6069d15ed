"""The forms a frozen trunk can take, fastest first, and how each is held to the user's own.

Knows torch. Runtimes are reached through the table of accelerators.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from bigdl._base.errors import ConfigError
from bigdl.nano.accelerators import ACCELERATORS
from bigdl.nano.accelerators.base import Calibration, Spec
from bigdl.nano.accelerators.here import no_bf16
from bigdl.nano.pytorch.export.binding import to_array, to_tensor
from bigdl.nano.pytorch.frozen.split import Called
from bigdl.nano.pytorch.frozen.steps import CallTracer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from bigdl.nano.accelerators.base import Compiled, Precision

    Tensors = tuple[torch.Tensor, ...]
    Runner = Callable[[Tensors], Tensors]

__all__ = ["FORMS", "Drift", "Form", "Subject", "drift", "gentler_than"]


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What a form is made of.

    Args:
        module: The trunk as a module of flat tensors: tensors in, a tuple of tensors out.
        inputs: Inputs of a true call.
        outputs: What the user's own trunk gives for them, under the autocast of that call.
    """

    module: nn.Module
    inputs: Tensors
    outputs: Tensors
    #: What several forms need and one of them has made.
    shared: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def device(self) -> torch.device:
        return self.outputs[0].device

    @property
    def rows(self) -> int | None:
        """The common length of the first axes; None if there is none."""
        lengths = {t.shape[0] if t.dim() else None for t in (*self.inputs, *self.outputs)}
        return lengths.pop() if len(lengths) == 1 else None


@dataclass(frozen=True, kw_only=True)
class Form:
    """One way to run a trunk.

    Args:
        name: As in plans.
        precision: The arithmetic; ``gentler`` goes down this ladder.
        build: Makes the runner; ``ConfigError`` if it cannot.
        build_s: About how long that takes, apart from running the trunk.
        build_runs: How many runs of the user's own trunk the rest of it is worth.
        refuse: Why not here, in one sentence.
        any_shape: Runs inputs of other lengths in any axis.
    """

    name: str
    precision: Precision
    build: Callable[[Subject], Runner]
    build_s: float
    build_runs: float
    refuse: Callable[[Subject], str | None]
    any_shape: bool = False


# --- how far a form may be from the user's own ------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Drift:
    """How far outputs are from those wanted; the worst of all outputs.

    Args:
        cosine: Smallest cosine of a row.
        relative: Error's norm over the wanted norm.
        contrast: Cosine of the rows' differences from their mean. A trunk whose features are
            nearly the same for every row can have a fine cosine and still tell rows apart no
            more, which is what the layers after it live on. 1 where rows hardly differ at all.
    """

    cosine: float
    relative: float
    contrast: float

    def exceeds(self, precision: Precision) -> str | None:
        """Why this is too far for a form of ``precision``, in one sentence."""
        cosine, relative, contrast = _LIMITS[precision]
        if not self.cosine >= cosine:
            return f"its outputs turn: cosine {self.cosine:.4f}, below {cosine}"
        if not self.relative <= relative:
            return f"its outputs move by {self.relative:.2%}, more than {relative:.2%}"
        if not self.contrast >= contrast:
            return (
                f"what tells rows apart is lost: cosine {self.contrast:.3f} of their "
                f"differences, below {contrast}"
            )
        return None


_LIMITS: dict[Precision, tuple[float, float, float]] = {
    "int8": (0.99, 0.15, 0.9),
    "bf16": (0.995, 0.1, 0.95),
    "fp32": (0.9999, 1e-3, 0.999),
}
# Rows that differ by less than this share of their size are taken as equal.
_LEAST_SPREAD = 1e-3


def drift(found: Tensors, wanted: Tensors) -> Drift:
    """How far ``found`` is from ``wanted``."""
    worst = Drift(cosine=1.0, relative=0.0, contrast=1.0)
    for one, other in zip(found, wanted, strict=True):
        each = _drift_of_one(one.detach(), other.detach())
        worst = Drift(
            cosine=min(worst.cosine, each.cosine),
            relative=max(worst.relative, each.relative),
            contrast=min(worst.contrast, each.contrast),
        )
    return worst


def _drift_of_one(found: torch.Tensor, wanted: torch.Tensor) -> Drift:
    if not wanted.numel() or torch.equal(found, wanted):
        return Drift(cosine=1.0, relative=0.0, contrast=1.0)
    if not wanted.is_floating_point():
        return Drift(cosine=-1.0, relative=float("inf"), contrast=-1.0)
    rows = wanted.shape[0] if wanted.dim() else 1
    one, other = (t.reshape(rows, -1).double() for t in (found, wanted))
    norm = float(other.norm())
    error = float((one - other).norm())
    if not error < float("inf"):
        return Drift(cosine=-1.0, relative=float("inf"), contrast=-1.0)
    contrast, spread = 1.0, other - other.mean(0)
    if rows > 1 and float(spread.norm()) > _LEAST_SPREAD * norm:
        moved = one - other.mean(0)
        contrast = float((spread * moved).sum() / (spread.norm() * moved.norm()).clamp_min(1e-30))
    flat = other.norm(dim=1) == 0
    cosines = torch.cosine_similarity(one, other, dim=1)
    cosines[flat] = (one[flat].norm(dim=1) <= 1e-6 * (1 + norm)).double()
    return Drift(cosine=float(cosines.min()), relative=error / max(norm, 1e-30), contrast=contrast)


# --- torch's own forms ------------------------------------------------------------------------


def _no_reason(subject: Subject) -> str | None:
    return None


def _no_bf16(subject: Subject) -> str | None:
    if any(t.dtype is torch.float64 for t in (*subject.inputs, *subject.outputs)):
        return "float64 stays float64"
    if subject.device.type == "cpu":
        return no_bf16()
    if subject.device.type == "cuda" and not torch.cuda.is_bf16_supported():
        return "this GPU has no bf16 arithmetic"
    return None


def _build_eager(subject: Subject, dtype: torch.dtype | None) -> Runner:
    """A copy of its own: batch norm folded, channels last, weights in ``dtype``."""
    module = copy.deepcopy(subject.module).requires_grad_(False)
    module.ahead = _folded(module.get_submodule("ahead"))
    if dtype is not None:
        module = module.to(dtype)
    last = any(isinstance(part, (nn.Conv2d, nn.ConvTranspose2d)) for part in module.modules())
    if last:
        module = module.to(memory_format=torch.channels_last)

    def run(inputs: Tensors) -> Tensors:
        ready = [_prepared(t, dtype, last) for t in inputs]
        with torch.autocast(subject.device.type, enabled=False):
            outputs: Tensors = module(*ready)
        return outputs

    return run


def _prepared(tensor: torch.Tensor, dtype: torch.dtype | None, last: bool) -> torch.Tensor:
    wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
    if last and tensor.dim() == 4:
        return tensor.to(wanted, memory_format=torch.channels_last)
    return tensor.to(wanted)


def _folded(called: nn.Module) -> nn.Module:
    """``called`` with each batch norm folded into the layer before it, where that can be seen.

    ``called`` is used up.
    """
    module = called
    tracer = fx.Tracer()
    if isinstance(module, Called):
        tracer, module = CallTracer(module.arguments), module.module
    try:
        graph = tracer.trace(module)
    except Exception:  # noqa: BLE001  (the user's forward, run on stand-ins: it stays as it is)
        return called
    calls: dict[str, int] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            calls[str(node.target)] = calls.get(str(node.target), 0) + 1
    for node in list(graph.nodes):
        before = node.args[0] if node.op == "call_module" and node.args else None
        if not isinstance(before, fx.Node) or before.op != "call_module":
            continue
        layer, norm = (module.get_submodule(str(n.target)) for n in (before, node))
        fuse = _FOLDS.get((type(layer), type(norm)))
        once = calls[str(before.target)] == calls[str(node.target)] == len(before.users) == 1
        if fuse is None or not once or norm.training or norm.running_mean is None:
            continue
        # the layer's own mode has no meaning
        _put(module, str(before.target), fuse(layer.eval(), norm))
        node.replace_all_uses_with(before)
        graph.erase_node(node)
    return fx.GraphModule(module, graph)


_FOLDS: dict[tuple[type, type], Callable[..., nn.Module]] = {
    (nn.Conv1d, nn.BatchNorm1d): fuse_conv_bn_eval,
    (nn.Conv2d, nn.BatchNorm2d): fuse_conv_bn_eval,
    (nn.Conv3d, nn.BatchNorm3d): fuse_conv_bn_eval,
    (nn.Linear, nn.BatchNorm1d): fuse_linear_bn_eval,
}


def _put(module: nn.Module, name: str, part: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(module.get_submodule(parent), own, part)


# --- forms of other runtimes ------------------------------------------------------------------


def _through(name: str, precision: Precision) -> dict[str, Any]:
    """``build`` and ``refuse`` of a form that the accelerator ``name`` runs."""

    def refuse(subject: Subject) -> str | None:
        if subject.device.type != "cpu":
            return f"{name} runs on the CPU here"
        if any(t.dtype is torch.float64 for t in (*subject.inputs, *subject.outputs)):
            return "float64 stays float64"
        if subject.rows is None:
            return "inputs and outputs have no common rows"
        if precision == "int8" and subject.rows < 2:
            return "calibration needs a row more to be checked on"
        return None

    def build(subject: Subject) -> Runner:
        return _accelerated(name, precision, subject)

    return {"build": build, "refuse": refuse}


def _accelerated(name: str, precision: Precision, subject: Subject) -> Runner:
    from bigdl.nano.pytorch.export.source import TorchSource

    accelerator = ACCELERATORS.get(name)()
    source = subject.shared.get("source")
    if source is None:  # its export takes a while, and serves every runtime
        source = subject.shared["source"] = TorchSource(subject.module, subject.inputs)
    spec = Spec(
        precision=precision,
        inputs=source.inputs,
        outputs=source.outputs,
        threads=torch.get_num_threads(),
        config=accelerator.options(),
    )
    reason = accelerator.refuse(spec)
    if reason is not None:
        raise ConfigError(reason)
    compiled = accelerator.compile(source, spec, _calibration(subject, precision))
    dtypes = [tensor.dtype for tensor in subject.outputs]
    if compiled.native:
        return lambda inputs: tuple(compiled(*inputs))
    return _arrays_runner(compiled, dtypes)


def _arrays_runner(compiled: Compiled, dtypes: Sequence[torch.dtype]) -> Runner:
    def run(inputs: Tensors) -> Tensors:
        outputs = compiled(*map(to_array, inputs))
        return tuple(to_tensor(a, dtype) for a, dtype in zip(outputs, dtypes, strict=True))

    return run


def _calibration(subject: Subject, precision: Precision) -> Calibration | None:
    """Three quarters of the rows, one by one: on the others it is checked unseen."""
    if precision != "int8" or subject.rows is None:
        return None
    used = max(1, subject.rows * 3 // 4)
    arrays = [to_array(t.contiguous()) for t in subject.inputs]
    return Calibration(batches=[tuple(a[i : i + 1] for a in arrays) for i in range(used)])


FORMS: tuple[Form, ...] = (
    Form(
        name="openvino_int8",
        precision="int8",
        **_through("openvino", "int8"),
        build_s=8.0,
        build_runs=6.0,
    ),
    Form(
        name="openvino_bf16",
        precision="bf16",
        **_through("openvino", "bf16"),
        build_s=5.0,
        build_runs=2.0,
    ),
    Form(
        name="compile_bf16",
        precision="bf16",
        **_through("compile", "bf16"),
        build_s=60.0,
        build_runs=2.0,
    ),
    Form(
        name="bf16",
        precision="bf16",
        build=lambda subject: _build_eager(subject, torch.bfloat16),
        refuse=_no_bf16,
        build_s=0.2,
        build_runs=1.0,
        any_shape=True,
    ),
    Form(
        name="openvino_fp32",
        precision="fp32",
        **_through("openvino", "fp32"),
        build_s=5.0,
        build_runs=2.0,
    ),
    Form(
        name="fp32",
        precision="fp32",
        build=lambda subject: _build_eager(subject, None),
        refuse=_no_reason,
        build_s=0.2,
        build_runs=1.0,
        any_shape=True,
    ),
)


def gentler_than(forms: Sequence[Form], precision: Precision) -> tuple[Form, ...]:
    """Those of ``forms`` with a finer arithmetic than ``precision``."""
    ladder = list(_LIMITS)
    return tuple(f for f in forms if ladder.index(f.precision) > ladder.index(precision))
