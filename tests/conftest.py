"""What all tests share."""

from __future__ import annotations

import faulthandler

import pytest
from _pytest.faulthandler import fault_handler_stderr_fd_key


@pytest.fixture(scope="module")
def bf16():
    """bf16 is not refused: torch and its runtimes emulate it where the processor has none.

    For this process only: a child that looks for itself finds what the machine has.
    """
    from bigdl._base import machine

    found = machine.isa()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "isa", lambda **_: found | {"avx512_bf16"})
        yield


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    """A crash names its test, to the end of the run.

    Lightning puts every signal's handler back as ``signal.getsignal`` gave it, which does not
    know of handlers set outside Python: after its first ``fit`` a crash would be silent.
    """
    file = item.config.stash.get(fault_handler_stderr_fd_key, None)
    if file is not None:
        faulthandler.disable()
        faulthandler.enable(file=file)
