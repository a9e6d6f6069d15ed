"""The ways to run a model that ``optimize`` knows, as data: names, accelerators, what comes first.

Imports no framework: what a method needs is found by its accelerator's name.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from bigdl._base import machine
from bigdl._base.calls import shown
from bigdl._base.errors import ArgumentError, ConfigError
from bigdl._base.registry import nearest
from bigdl.nano.accelerators import ACCELERATORS
from bigdl.nano.selection import ORIGINAL

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping

    from bigdl.nano.accelerators.base import Config, Precision

__all__ = ["METHODS", "Method", "in_order", "known_name", "matching", "method_of", "select"]

PRECISIONS = ("fp32", "bf16", "int8")


@dataclass(frozen=True)
class Method:
    """One way to run a model.

    Args:
        name: Its name in reports.
        accelerator: The accelerator's name in the table.
        precision: The arithmetic.
        options: Options that make it differ from the accelerator's defaults.
        needs_model: It runs the user's own code, so it is made anew rather than loaded.
    """

    name: str
    accelerator: str
    precision: Precision
    options: Mapping[str, Any] = field(default_factory=dict)
    needs_model: bool = False

    def config(self) -> Config | None:
        """The accelerator's own options for this method, None for its defaults."""
        if not self.options:
            return None
        return ACCELERATORS.get(self.accelerator).options(**self.options)


_LAST = {"channels_last": True}
METHODS: Mapping[str, Method] = {
    method.name: method
    for method in (
        Method(ORIGINAL, "eager", "fp32", needs_model=True),
        Method("channels_last", "eager", "fp32", _LAST, needs_model=True),
        Method("bf16", "eager", "bf16", needs_model=True),
        Method("bf16_channels_last", "eager", "bf16", _LAST, needs_model=True),
        Method("compile", "compile", "fp32", needs_model=True),
        Method("compile_bf16", "compile", "bf16", needs_model=True),
        Method("torch_int8", "torch_int8", "int8"),
        Method("inc_int8", "inc", "int8"),
        Method("ipex_bf16", "ipex", "bf16"),
        Method("openvino_fp32", "openvino", "fp32"),
        Method("openvino_bf16", "openvino", "bf16"),
        Method("openvino_int8", "openvino", "int8"),
        Method("onnxruntime_fp32", "onnxruntime", "fp32"),
        Method("onnxruntime_int8", "onnxruntime", "int8"),
        Method("onnxruntime_int8_dynamic", "onnxruntime", "int8", {"quantization": "dynamic"}),
    )
}

# BigDL 2.x' names of methods, and what they are now.
OLD_NAMES = {
    "fp32_channels_last": "channels_last",
    "int8": "torch_int8",
    "int8_ipex": "torch_int8",
    "bf16_ipex": "ipex_bf16",
    "bf16_ipex_channels_last": "ipex_bf16",
    "fp32_ipex": "channels_last",
    "fp32_ipex_channels_last": "channels_last",
    "jit_fp32": "compile",
    "jit_fp32_channels_last": "compile",
    "jit_fp32_ipex": "compile",
    "jit_fp32_ipex_channels_last": "compile",
    "jit_bf16": "compile_bf16",
    "jit_bf16_channels_last": "compile_bf16",
    "jit_bf16_ipex": "compile_bf16",
    "jit_bf16_ipex_channels_last": "compile_bf16",
    "jit_int8": "torch_int8",
    "jit_int8_channels_last": "torch_int8",
    "onnxruntime_int8_qlinear": "onnxruntime_int8",
    "onnxruntime_int8_integer": "onnxruntime_int8_dynamic",
}

# Which methods have paid best, by what the CPU multiplies fast. Measured on convolution nets and
# small transformers; what is not named comes after, in the order of the table.
_WITH_INT8 = (
    "openvino_int8", "onnxruntime_int8", "openvino_bf16", "openvino_fp32", "bf16_channels_last",
    "onnxruntime_fp32", "compile_bf16", "torch_int8", "compile", "channels_last", "bf16",
    "onnxruntime_int8_dynamic",
)  # fmt: skip
_WITHOUT_INT8 = (
    "openvino_fp32", "onnxruntime_fp32", "openvino_int8", "compile", "channels_last",
    "onnxruntime_int8", "onnxruntime_int8_dynamic", "torch_int8", "openvino_bf16",
    "bf16_channels_last", "compile_bf16", "bf16",
)  # fmt: skip
_FAST_INT8 = {"avx512_vnni", "avx_vnni", "amx_int8", "asimddp"}


def in_order(names: Iterable[str], isa: Collection[str] | None = None) -> list[str]:
    """``names`` with the best-known first for a CPU with the instruction sets ``isa``.

    The original is always the first.
    """
    found = machine.isa() if isa is None else isa
    order = [ORIGINAL, *(_WITH_INT8 if _FAST_INT8.intersection(found) else _WITHOUT_INT8)]
    order += [name for name in METHODS if name not in order]
    return sorted(names, key=order.index)


def known_name(name: Any, what: str) -> str:
    """Today's name of a method; BigDL 2.x' names work too.

    Raises:
        ArgumentError: Not a string.
        ConfigError: No such method; the text has the nearest one.
    """
    if not isinstance(name, str):
        raise ArgumentError(f"{what} takes names of methods, not {type(name).__name__}.")
    found: str = OLD_NAMES.get(name, name)
    if found not in METHODS:
        raise ConfigError(f"{what}: no method {name!r}; have {', '.join(METHODS)}."
                          f"{nearest(name, METHODS)}")  # fmt: skip
    return found


def method_of(accelerator: str, precision: Precision) -> Method:
    """The method of an accelerator's own defaults, one of the table or made for it."""
    for method in METHODS.values():
        plain = not method.options and method.name != ORIGINAL
        if plain and (method.accelerator, method.precision) == (accelerator, precision):
            return method
    return Method(f"{accelerator}_{precision}", accelerator, precision)


def matching(accelerator: Any, precision: Any) -> Callable[[str], bool] | None:
    """Which methods two filters let through; None without a filter.

    Raises:
        ArgumentError: A filter is neither None, a string, nor a list of strings.
        ConfigError: A name is not known.
    """
    accelerators = _names(accelerator, "accelerator", list(ACCELERATORS))
    precisions = _names(precision, "precision", list(PRECISIONS))
    if accelerators is None and precisions is None:
        return None

    def fits(name: str) -> bool:
        method = METHODS[name]
        return (accelerators is None or method.accelerator in accelerators) and (
            precisions is None or method.precision in precisions
        )

    return fits


def _names(value: Any, what: str, known: list[str]) -> list[str] | None:
    if value is None:
        return None
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, (list, tuple, set)) or not all(isinstance(n, str) for n in names):
        raise ArgumentError(f"{what} takes a name or a list of names, not {shown(value)}.")
    for name in names:
        if name == "jit":
            raise ConfigError("accelerator='jit' (TorchScript) is gone: use 'compile'.")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"No {what} {name!r}; have {', '.join(known)}.{hint}")
    if not names:
        raise ConfigError(f"{what}={value!r} lets nothing through; leave it out for no filter.")
    return list(names)


def select(
    includes: Any = None, excludes: Any = None, accelerator: Any = None, precision: Any = None
) -> list[str]:
    """The methods to try, best-known first; the original is always among them.

    Raises:
        ArgumentError: Wrong types.
        ConfigError: Unknown names, a contradiction, or nothing left.
    """
    included, excluded = _methods(includes, "includes"), _methods(excludes, "excludes")
    fits = matching(accelerator, precision)
    if included is not None and excluded:
        both = sorted(set(included) & set(excluded))
        if both:
            raise ConfigError(f"includes and excludes both name {', '.join(both)}.")
    names = [name for name in (included or METHODS) if name not in (excluded or ())]
    if fits is not None:
        out = [name for name in included or () if not fits(name) and name != ORIGINAL]
        if out:
            raise ConfigError(
                f"includes names {', '.join(out)}, which accelerator={accelerator!r} and "
                f"precision={precision!r} leave out."
            )
        names = [name for name in names if fits(name)]
    if not set(names) - {ORIGINAL} and included != [ORIGINAL]:
        raise ConfigError(
            f"No method is left to try: includes={includes!r}, excludes={excludes!r}, "
            f"accelerator={accelerator!r}, precision={precision!r}."
        )
    return in_order({ORIGINAL, *names})


def _methods(value: Any, what: str) -> list[str] | None:
    if value is None:
        return None
    if isinstance(value, str) or not isinstance(value, (list, tuple, set, frozenset)):
        raise ArgumentError(
            f"{what} takes a list of methods, not {type(value).__name__}."
            + (f" Did you mean [{value!r}]?" if isinstance(value, str) else "")
        )
    names = [known_name(name, what) for name in value]
    if what == "includes" and not names:
        raise ConfigError("includes=[] includes nothing; leave it out to try every method.")
    if what == "excludes" and ORIGINAL in names:
        raise ConfigError("excludes names 'original', which every other row is compared with.")
    return names
