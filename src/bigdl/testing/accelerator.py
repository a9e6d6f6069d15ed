"""What every ``Accelerator`` has to do, as tests: subclass ``AcceleratorContract`` to run them.

class TestMine(AcceleratorContract):
    precision = "fp32"

    @pytest.fixture(scope="class")
    @classmethod
    def accelerator(cls):
        return MyAccelerator()
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from bigdl.errors import BigDLError
from bigdl.nano.accelerators.base import (
    Accelerator,
    Calibration,
    Compiled,
    Config,
    Precision,
    Spec,
    make_config,
)
from bigdl.nano.pytorch.export.source import TorchSource
from bigdl.nano.pytorch.export.structure import flatten

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

__all__ = ["AcceleratorContract"]

# Difference allowed: the largest, as a share of the original's largest output; of int8 the root
# of the mean square, as a share of the original's.
_TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2, "int8": 1e-1}
# The same for a model that was loaded, against the one that was saved: a compiler may make other
# kernels of it, which round to bf16 in other places.
_AGAIN = {"fp32": 1e-5, "bf16": 2.0**-7, "int8": 1e-5}
_ROWS = 6


class _Small(nn.Module):
    """Two pictures in, two results out; one of them is an input as it came."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.linear = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = torch.relu(self.norm(self.conv(x + y)))
        return self.linear(features.mean((2, 3))), y


class AcceleratorContract:
    """Every accelerator passes these; a subclass supplies the fixture ``accelerator``."""

    precision: ClassVar[Precision] = "fp32"
    #: The accelerator's own options.
    config: ClassVar[Mapping[str, Any]] = {}

    @pytest.fixture(scope="class")
    @classmethod
    def accelerator(cls) -> Accelerator:
        raise NotImplementedError("A subclass supplies the accelerator.")

    @pytest.fixture(scope="class")
    @classmethod
    def source(cls) -> TorchSource:
        """A small model; a subclass may give another with two inputs and two outputs."""
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            model = _Small()
            nn.init.uniform_(model.norm.weight, 0.5, 1.5)
            return TorchSource(model, (torch.randn(4, 3, 9, 9), torch.randn(4, 3, 9, 9)))

    @pytest.fixture(scope="class")
    @classmethod
    def spec(cls, accelerator: Accelerator, source: TorchSource) -> Spec:
        return Spec(
            precision=cls.precision,
            inputs=source.inputs,
            outputs=source.outputs,
            threads=1,
            config=make_config(accelerator.options, cls.config),
        )

    @pytest.fixture(scope="class")
    @classmethod
    def compiled(cls, accelerator: Accelerator, source: TorchSource, spec: Spec) -> Compiled:
        reason = accelerator.refuse(spec)
        if reason is not None:
            pytest.skip(f"refused here: {reason}")
        return accelerator.compile(source, spec, cls.calibration())

    @pytest.fixture
    def call(self, source: TorchSource, compiled: Compiled) -> Callable[..., list[np.ndarray]]:
        return _flat_call(source, compiled)

    @classmethod
    def calibration(cls) -> Calibration | None:
        """What int8 looks at."""
        if cls.precision != "int8":
            return None
        return Calibration(batches=[_inputs(seed) for seed in range(4)])

    # --- numbers ---------------------------------------------------------------------------

    def test_same_numbers_as_the_source(self, source: TorchSource, call: Any) -> None:
        arrays = _inputs(10)
        self.assert_close(call(*arrays), source.reference(*arrays))

    @pytest.mark.parametrize("rows", [1, 2, 5, 17])
    def test_any_number_of_rows(self, source: TorchSource, call: Any, rows: int) -> None:
        arrays = _inputs(11, rows)
        self.assert_close(call(*arrays), source.reference(*arrays))

    def test_rows_do_not_influence_each_other(self, source: TorchSource, call: Any) -> None:
        arrays = _inputs(12)
        alone = call(*(array[2:3] for array in arrays))
        self.assert_close([output[2:3] for output in call(*arrays)], alone)

    def test_any_memory_layout(self, source: TorchSource, call: Any) -> None:
        arrays = _inputs(13)
        odd = [np.ascontiguousarray(a.transpose(3, 1, 0, 2)).transpose(2, 1, 3, 0) for a in arrays]
        assert not odd[0].flags.c_contiguous
        self.assert_close(call(*odd), source.reference(*arrays))

    def assert_close(self, found: Sequence[np.ndarray], wanted: Sequence[np.ndarray]) -> None:
        """Equal within what the precision allows, and of one type and shape."""
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            assert one.shape == other.shape
            assert one.dtype == other.dtype
            if self.precision == "int8":  # a value outside the calibrated range may be far off
                assert _spread(one - other) <= _TOLERANCE["int8"] * _spread(other) + 1e-6
                continue
            scale = float(np.abs(other).max(initial=0.0))
            limit = _TOLERANCE[self.precision] * scale + 1e-6
            np.testing.assert_allclose(one, other, rtol=0, atol=limit)

    # --- memory ----------------------------------------------------------------------------

    def test_inputs_are_never_written(self, call: Any) -> None:
        arrays = _inputs(14)
        before = [array.copy() for array in arrays]
        call(*arrays)
        for array, old in zip(arrays, before, strict=True):
            np.testing.assert_array_equal(array, old)

    def test_outputs_have_memory_of_their_own(self, call: Any) -> None:
        arrays = _inputs(15)
        first = call(*arrays)
        kept = [output.copy() for output in first]
        call(*_inputs(16))
        for output, old in zip(first, kept, strict=True):
            np.testing.assert_array_equal(output, old)
            for array in arrays:
                assert not np.shares_memory(output, array)
            output[...] = 0  # the caller's to change
        again = call(*arrays)
        for output, old in zip(again, kept, strict=True):
            np.testing.assert_array_equal(output, old)

    # --- use -------------------------------------------------------------------------------

    def test_calls_from_several_threads(self, call: Any) -> None:
        jobs = [_inputs(20 + n, rows=1 + n % 3) for n in range(4)]
        for job in jobs:  # a compiler may make another program once it has seen several sizes
            call(*job)
        wanted = [call(*job) for job in jobs]
        wrong: list[str] = []

        def work(number: int) -> None:
            try:
                for _ in range(15):
                    self.assert_close(call(*jobs[number]), wanted[number])
            except Exception as exc:  # noqa: BLE001  (handed on to the test)
                wrong.append(f"thread {number}: {exc}")

        threads = [threading.Thread(target=work, args=(n,)) for n in range(len(jobs))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []

    def test_a_clone_outlives_the_one_it_was_made_from(
        self, accelerator: Accelerator, source: TorchSource, spec: Spec, compiled: Compiled
    ) -> None:
        first = compiled.clone()
        second = first.clone()
        first.close()
        arrays = _inputs(17)
        self.assert_close(_flat_call(source, second)(*arrays), source.reference(*arrays))
        second.close()

    def test_saved_and_loaded(
        self,
        accelerator: Accelerator,
        source: TorchSource,
        spec: Spec,
        compiled: Compiled,
        call: Any,
        tmp_path: Path,
    ) -> None:
        compiled.save(tmp_path)
        assert any(tmp_path.iterdir())
        loaded = accelerator.load(tmp_path, spec, source.native if compiled.native else None)
        arrays = _inputs(18)
        found = _flat_call(source, loaded)(*arrays)
        for one, other in zip(found, call(*arrays), strict=True):
            limit = _AGAIN[self.precision] * float(np.abs(other).max()) + 1e-6
            np.testing.assert_allclose(one, other, rtol=0, atol=limit)
        loaded.close()

    def test_closed_twice_and_called_after(self, source: TorchSource, compiled: Compiled) -> None:
        closed = compiled.clone()
        closed.close()
        closed.close()
        with pytest.raises(BigDLError):
            _flat_call(source, closed)(*_inputs(19))

    # --- saying no -------------------------------------------------------------------------

    @pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
    def test_refuses_in_one_sentence(
        self, accelerator: Accelerator, source: TorchSource, precision: Precision
    ) -> None:
        spec = Spec(
            precision=precision,
            inputs=source.inputs,
            outputs=source.outputs,
            threads=1,
            config=accelerator.options(),
        )
        reason = accelerator.refuse(spec)
        assert reason is None or (reason.strip() and "\n" not in reason)
        assert not (reason or "").endswith(".")  # it stands in the middle of others' sentences

    def test_options_check_themselves(self, accelerator: Accelerator) -> None:
        assert issubclass(accelerator.options, Config)
        with pytest.raises(TypeError):
            make_config(accelerator.options, {"no_such_option": 1})


def _inputs(seed: int, rows: int = _ROWS) -> tuple[np.ndarray, ...]:
    draw = np.random.default_rng(seed)
    shape = (rows, 3, 9, 9)
    return tuple(draw.standard_normal(shape, dtype=np.float32) for _ in range(2))


def _spread(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))


def _flat_call(source: TorchSource, compiled: Compiled) -> Callable[..., list[np.ndarray]]:
    """``compiled`` as a function of flat arrays, of whichever kind it is."""

    def call(*arrays: np.ndarray) -> list[np.ndarray]:
        if not compiled.native:
            return list(compiled(*arrays))
        args, kwargs = source.bind(arrays)
        outputs, _ = flatten(compiled(*args, **kwargs))
        assert not any(output.requires_grad for output in outputs)
        return [output.numpy() for output in outputs]

    return call
