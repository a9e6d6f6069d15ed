"""The same program on every engine, as tests: subclass ``ProgramContract`` to run them.

class TestMine(ProgramContract):
    @classmethod
    def open_engine(cls):
        return MyEngine.open(EngineSettings(cores=4))
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from bigdl.errors import ConfigError, WorkerError, WorkerLostError
from bigdl.orca.learn import estimator as estimator_module
from bigdl.orca.learn.callbacks import Callback, ModelCheckpoint
from bigdl.orca.learn.pytorch import Estimator

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bigdl.orca.engines.base import Engine
    from bigdl.orca.learn.callbacks import TrainingState

__all__ = ["ProgramContract"]

_ROWS, _SIZE, _RATE = 53, 16, 0.1
#: Updates of an epoch.
_STEPS = 4


class Spoiled(Exception):
    """What a user's callback raises."""


class KillAt(Callback):
    """Kills its own worker at an update; once, if a file is to mark that it did."""

    def __init__(self, step: int, mark: Path | None = None) -> None:
        self.step, self.mark = step, None if mark is None else str(mark)

    def on_step_end(self, state: TrainingState) -> None:
        if state.step != self.step:
            return
        if self.mark is not None:
            if Path(self.mark).exists():
                return
            Path(self.mark).touch()
        os.kill(os.getpid(), signal.SIGKILL)


class Counts(Callback):
    """What it has met, in attributes; spoils the fit at an update if asked to."""

    def __init__(self, spoils_at: int | None = None) -> None:
        self.spoils_at, self.met = spoils_at, 0
        self.worlds: list[int] = []

    def on_fit_start(self, state: TrainingState) -> None:
        self.worlds.append(state.world)

    def on_step_end(self, state: TrainingState) -> None:
        self.met += 1
        if state.step == self.spoils_at:
            raise Spoiled(f"at {state.step}")


def _data(rows: int = _ROWS) -> tuple[np.ndarray, np.ndarray]:
    x = np.random.default_rng(1).standard_normal((rows, 3))
    return x, np.tanh(x @ np.array([[1.0], [-2.0], [0.5]]))


def _network() -> torch.nn.Module:
    made = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.linspace(-0.5, 0.6, parameter.numel()).view_as(parameter))
    return made.double()


def _optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=_RATE, momentum=0.9)


def _make(workers: int | tuple[int, int]) -> Estimator:
    model = _network()
    return Estimator.from_torch(model, _optimizer(model), torch.nn.MSELoss(), workers=workers)


def _flat(model: torch.nn.Module) -> np.ndarray:
    values: np.ndarray = torch.cat([p.detach().flatten() for p in model.parameters()]).numpy()
    return values.copy()


def _plain(epochs: int) -> np.ndarray:
    """Weights of a plain loop over the rows in their order."""
    x, y = map(torch.from_numpy, _data())
    model = _network()
    optimizer = _optimizer(model)
    for _ in range(epochs):
        for start in range(0, _ROWS, _SIZE):
            optimizer.zero_grad()
            rows = slice(start, start + _SIZE)
            loss = torch.nn.functional.mse_loss(model(x[rows]), y[rows])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return _flat(model)


def _fit(est: Estimator, epochs: int = 2, **more: Any) -> list[dict[str, Any]]:
    return est.fit(_data(), epochs, _SIZE, shuffle=False, **more)


class ProgramContract:
    """One program, on any engine of at least 4 slots: fit, evaluate, predict, going on."""

    @classmethod
    def open_engine(cls) -> Engine:
        """A new engine of at least 4 slots; the tests close it."""
        raise NotImplementedError(f"{cls.__name__} has to define open_engine().")

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def engine(cls) -> Iterator[Engine]:
        """The engine that estimators find."""
        engine = cls.open_engine()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(estimator_module, "current_engine", lambda: engine)
            yield engine
        engine.close()

    # --- known answers ---

    @pytest.mark.parametrize("workers", [1, 2])
    def test_a_weight_that_can_be_reckoned(self, workers: int) -> None:
        """x = 0, 0 leaves w; x = 1, 1 makes it w - 0.25 · 2w; twice."""
        model = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.ones_(model.weight)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
        est = Estimator.from_torch(model, optimizer, torch.nn.MSELoss(), workers=workers)
        x = np.array([[0.0], [0.0], [1.0], [1.0]], np.float32)
        est.fit((x, np.zeros_like(x)), 2, 2, shuffle=False)
        assert model.weight.item() == 0.25

    @pytest.mark.parametrize(
        ("workers", "sync"), [(1, "allreduce"), (3, "allreduce"), (4, "sharded")]
    )
    def test_fit_is_a_plain_loop(self, workers: int, sync: Any) -> None:
        est = _make(workers)
        rows = _fit(est, 2, sync=sync)
        assert [(r["epoch"], r["rows"], r["steps"]) for r in rows] == [
            (1, _ROWS, _STEPS),
            (2, _ROWS, _STEPS),
        ]
        np.testing.assert_allclose(_flat(est.get_model()), _plain(2), rtol=1e-9, atol=1e-12)

    def test_evaluate_scores_each_row_once(self) -> None:
        x, y = _data(101)
        est = _make(3)
        found = est.evaluate((x, y), batch_size=8)
        with torch.no_grad():
            wanted = float(((est.get_model()(torch.from_numpy(x)).numpy() - y) ** 2).mean())
        assert found["rows"] == 101
        assert found["loss"] == pytest.approx(wanted, rel=1e-12)

    def test_predict_keeps_rows_and_order(self) -> None:
        x, _ = _data(101)
        est = _make(2)
        with torch.no_grad():
            wanted = est.get_model()(torch.from_numpy(x)).numpy()
        np.testing.assert_allclose(est.predict(x, 7), wanted, rtol=1e-12)

    # --- going on ---

    @pytest.mark.parametrize(("before", "after"), [(2, 3), (3, 1)])
    def test_a_checkpoint_goes_on_in_mid_epoch(
        self, before: int, after: int, tmp_path: Path
    ) -> None:
        broken = _make(before)
        _fit(broken, 1, max_steps=_STEPS + 2)
        _fit(broken, 1, max_steps=2)
        assert (broken.epoch, broken.step) == (1, _STEPS + 2)
        broken.save_checkpoint(tmp_path / "c")
        resumed = _make(after)
        resumed.load_checkpoint(tmp_path / "c")
        (row,) = _fit(resumed, 1)
        assert row["rows"] == _ROWS - 2 * _SIZE
        np.testing.assert_allclose(_flat(resumed.get_model()), _plain(2), rtol=1e-9, atol=1e-12)

    @pytest.mark.parametrize("step", [1, _STEPS + 1])
    def test_a_killed_worker_is_survived(self, step: int, tmp_path: Path) -> None:
        est = _make((1, 3))
        saver = ModelCheckpoint(tmp_path / "saved", every_steps=2)
        callbacks = [KillAt(step, tmp_path / "mark"), saver]
        rows = _fit(est, 2, callbacks=callbacks, max_failures=1)
        assert (tmp_path / "mark").exists()
        assert [(r["epoch"], r["rows"], r["steps"]) for r in rows] == [
            (1, _ROWS, _STEPS),
            (2, _ROWS, _STEPS),
        ]
        np.testing.assert_allclose(_flat(est.get_model()), _plain(2), rtol=1e-9, atol=1e-12)

    # --- failures ---

    def test_a_killed_worker_is_an_error_and_nothing_is_lost(self) -> None:
        est = _make(2)
        before = _flat(est.get_model())
        with pytest.raises(WorkerLostError):
            _fit(est, callbacks=[KillAt(2)])
        assert (_flat(est.get_model()) == before).all()
        _fit(est)
        np.testing.assert_allclose(_flat(est.get_model()), _plain(2), rtol=1e-9, atol=1e-12)

    def test_an_exception_of_the_users_comes_as_it_is(self) -> None:
        est = _make(2)
        before = _flat(est.get_model())
        with pytest.raises(Spoiled, match="at 3") as caught:
            _fit(est, callbacks=[Counts(spoils_at=3)])
        assert isinstance(caught.value.__cause__, WorkerError)
        assert (_flat(est.get_model()) == before).all()

    def test_what_callbacks_have_become_comes_back(self) -> None:
        counts = Counts()
        _fit(_make(2), 2, callbacks=[counts])
        assert (counts.met, counts.worlds) == (2 * _STEPS, [2])

    def test_more_workers_than_slots_are_refused(self, engine: Engine) -> None:
        many = engine.slots() + 1
        with pytest.raises(ConfigError, match=f"asked {many} workers"):
            _fit(_make(many))

    def test_so_many_as_there_are(self, engine: Engine) -> None:
        counts = Counts()
        _fit(_make((1, engine.slots() + 5)), 1, callbacks=[counts])
        assert counts.worlds == [engine.slots()]
