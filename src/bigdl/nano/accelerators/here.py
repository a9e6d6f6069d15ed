"""Why something cannot run in this process, in one sentence each. Imports no framework."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from pathlib import Path

from bigdl._base import machine
from bigdl._base.optional import is_installed

__all__ = ["Missing", "int8_saturates", "missing", "no_bf16", "no_cpp", "triton_hazard"]

# Any of these has instructions that multiply bfloat16; without them it is emulated, slowly.
_BF16 = ("amx_bf16", "avx512_bf16", "bf16")
# Any of these adds products of 8-bit numbers up in 32 bits.
_WIDE_SUMS = ("amx_int8", "avx512_vnni", "avx_vnni", "neon")


class Missing(str):
    """A refusal whose remedy is to install something."""

    __slots__ = ()


def missing(*modules: str, extra: str) -> Missing | None:
    """A sentence if one of ``modules`` is not installed, with the line that installs it."""
    absent = [module for module in modules if not is_installed(module)]
    if not absent:
        return None
    names = " and ".join(repr(module) for module in absent)
    verb = "is" if len(absent) == 1 else "are"
    return Missing(f"{names} {verb} not installed: pip install 'bigdl-next[{extra}]'")


def no_bf16() -> str | None:
    """A sentence if this CPU has no bfloat16 arithmetic."""
    if machine.isa().intersection(_BF16):
        return None
    return "this CPU has no bf16 instructions (AVX-512 BF16, AMX or Arm BF16)"


def int8_saturates() -> bool:
    """Whether a sum of two products of 8-bit numbers can overflow its 16 bits on this CPU.

    So it is on x86 without VNNI; weights that use half their range keep clear of it.
    """
    return not machine.isa().intersection(_WIDE_SUMS)


def no_cpp() -> str | None:
    """A sentence if generated C++ cannot be compiled here."""
    compiler = os.environ.get("CXX") or _default_compiler()
    if shutil.which(compiler.split()[0]) is None:
        return (
            f"no C++ compiler: {compiler!r} is not on the PATH; "
            "install one (Debian: apt-get install g++) or name it in CXX"
        )
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.is_file():
        return f"Python's headers are not installed ({header}); Debian: python3-dev"
    return None


def _default_compiler() -> str:
    return {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")


def triton_hazard() -> str | None:
    """A sentence if torch's compiler and exporter would crash this process.

    They load triton, and loading it after tensorflow ends the process with a segmentation fault.
    """
    if "tensorflow" in sys.modules and "triton" not in sys.modules and is_installed("triton"):
        return (
            "tensorflow is loaded and triton is not, and loading triton now would crash the "
            "process; import triton before tensorflow"
        )
    return None
