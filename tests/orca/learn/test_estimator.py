"""An estimator on local worker processes: known answers, resume, lost workers, callbacks."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from bigdl.errors import (
    ContextError,
    NotReadyError,
    StoredModelError,
    WorkerLostError,
)
from bigdl.orca import init_orca_context, stop_orca_context
from bigdl.orca.context import current_engine
from bigdl.orca.learn import estimator as estimator_module
from bigdl.orca.learn.callbacks import Callback, EarlyStopping, ModelCheckpoint
from bigdl.orca.learn.pytorch import Estimator


@pytest.fixture(scope="module", autouse=True)
def context():
    yield init_orca_context(cores=4)
    stop_orca_context()  # whichever there is by then


def table(rows=101, seed=0):
    draw = np.random.default_rng(seed)
    x = draw.standard_normal((rows, 5)).astype(np.float32)
    return x, (x.sum(1) > 0).astype(np.int64)


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 2))


def make(workers=2, seed=0, rate=0.1, **more):
    model = network(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    return Estimator.from_torch(model, optimizer, nn.CrossEntropyLoss(), workers=workers, **more)


def flat(estimator):
    return torch.cat([p.detach().flatten() for p in estimator.get_model().parameters()])


# --- known answers ----------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2])
def test_a_weight_that_can_be_reckoned(workers):
    """w = 1 - 0.25 · 2 · mean(x²) · w: x = 0, 0 leaves it; x = 1, 1 halves it, twice."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
    est = Estimator.from_torch(model, optimizer, nn.MSELoss(), workers=workers)
    x = np.array([[0.0], [0.0], [1.0], [1.0]], np.float32)
    rows = est.fit((x, np.zeros_like(x)), epochs=2, batch_size=2, shuffle=False)
    assert model.weight.item() == 0.25
    assert [row["epoch"] for row in rows] == [1, 2]
    assert [row["rows"] for row in rows] == [4, 4]
    assert [row["steps"] for row in rows] == [2, 2]
    assert rows[0]["loss"] == 0.5  # losses of the steps: 0 and 1


def test_any_number_of_workers_gives_the_same_weights():
    ends = []
    for workers in (1, 2, 3):
        est = make(workers)
        rows = est.fit(table(), epochs=3, batch_size=16)
        assert [row["rows"] for row in rows] == [101] * 3
        ends.append(flat(est))
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], rtol=1e-5, atol=1e-6)


def test_a_plain_loop_gives_the_same_weights():
    x, y = map(torch.from_numpy, table(64))
    est = make(2)
    est.fit((x, y), epochs=2, batch_size=16, shuffle=False)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(2):
        for start in range(0, 64, 16):
            optimizer.zero_grad()
            nn.functional.cross_entropy(
                model(x[start : start + 16]), y[start : start + 16]
            ).backward()
            optimizer.step()
    expected = torch.cat([p.detach().flatten() for p in model.parameters()])
    torch.testing.assert_close(flat(est), expected, rtol=1e-5, atol=1e-6)


def accuracy(output, labels):
    return (output.argmax(1) == labels).float().mean()


def test_evaluate_scores_each_row_once():
    x, y = table(401)
    est = make(3, metrics=[accuracy])
    found = est.evaluate((x, y), batch_size=32)
    with torch.no_grad():
        output = est.get_model()(torch.from_numpy(x))
    labels = torch.from_numpy(y)
    assert found["rows"] == 401
    assert found["loss"] == pytest.approx(
        nn.functional.cross_entropy(output, labels).item(), rel=1e-6
    )
    assert found["accuracy"] == pytest.approx(accuracy(output, labels).item(), rel=1e-6)


def test_predict_keeps_rows_and_order():
    x, _ = table(203)
    est = make(2)
    found = est.predict(x, batch_size=10)
    with torch.no_grad():
        wanted = est.get_model()(torch.from_numpy(x)).numpy()
    assert found.shape == (203, 2)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_a_frame_gets_a_column():
    pd = pytest.importorskip("pandas")
    x, y = table(30)
    frame = pd.DataFrame(x, columns=list("abcde")).assign(y=y, name="n")
    frame.index = frame.index[::-1]
    model = Columns()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    est = Estimator.from_torch(model, optimizer, nn.CrossEntropyLoss(), workers=2)
    est.fit(frame, feature_cols=list("abcde"), label_cols="y", batch_size=8)
    found = est.predict(frame, feature_cols=list("abcde"))
    assert list(found.columns) == [*frame.columns, "prediction"]
    pd.testing.assert_frame_equal(found[list(frame.columns)], frame)


class Columns(nn.Module):
    """Takes columns one by one, as a table gives them."""

    def __init__(self):
        super().__init__()
        self.net = network()

    def forward(self, *columns):
        return self.net(torch.stack(columns, 1))


# --- going on ---------------------------------------------------------------------------------


def test_two_fits_of_one_epoch_are_one_of_two():
    once, twice = make(), make()
    once.fit(table(), epochs=2, batch_size=16)
    for _ in range(2):
        twice.fit(table(), epochs=1, batch_size=16)
    assert torch.equal(flat(once), flat(twice))
    assert (twice.epoch, twice.step) == (2, 14)


def test_what_the_caller_changes_in_the_model_counts():
    """Between calls the model and the optimizer are the caller's."""
    model = nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
    est = Estimator.from_torch(model, optimizer, nn.MSELoss(), workers=2)
    x = np.ones((4, 1), np.float32)
    est.fit((x, x), batch_size=4)
    with torch.no_grad():
        model.weight.fill_(7.0)
    np.testing.assert_array_equal(est.predict(x), 7 * x)
    assert est.evaluate((x, 7 * x))["loss"] == 0
    optimizer.param_groups[0]["lr"] = 0.5
    est.fit((x, 0 * x), batch_size=4)  # 7 - 0.5 · 2 · 7
    assert model.weight.item() == 0


@pytest.mark.parametrize(("before", "after"), [(2, 2), (2, 3), (3, 1)])
def test_resumed_in_mid_epoch_with_other_workers(before, after, tmp_path):
    whole = make(2)
    whole.fit(table(), epochs=2, batch_size=16)
    broken = make(before)
    broken.fit(table(), epochs=2, batch_size=16, max_steps=9)
    assert (broken.epoch, broken.step) == (1, 9)
    broken.save_checkpoint(tmp_path / "c")
    resumed = make(after, seed=9)
    resumed.load_checkpoint(tmp_path / "c")
    (row,) = resumed.fit(table(), epochs=1, batch_size=16)
    assert row["rows"] == 101 - 2 * 16
    torch.testing.assert_close(flat(resumed), flat(whole), rtol=1e-5, atol=1e-6)


class KillAt(Callback):
    """Kills its own worker at a step, once."""

    def __init__(self, mark: Path, step: int) -> None:
        self.mark, self.step = str(mark), step

    def on_step_end(self, state):
        if state.step == self.step and not Path(self.mark).exists():
            Path(self.mark).touch()
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("step", [3, 10])
def test_a_killed_worker_is_survived(step, tmp_path):
    whole = make()
    rows = whole.fit(table(), epochs=2, batch_size=16)
    est = make()
    saver = ModelCheckpoint(tmp_path / "saved", every_steps=2)
    found = est.fit(
        table(),
        epochs=2,
        batch_size=16,
        callbacks=[KillAt(tmp_path / "mark", step), saver],
        max_failures=1,
    )
    torch.testing.assert_close(flat(est), flat(whole), rtol=1e-6, atol=1e-7)
    for one, other in zip(found, rows, strict=True):
        for key in ("epoch", "rows", "steps"):
            assert one[key] == other[key]
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
    assert est.step == whole.step


class KillAtEnd(Callback):
    """Kills its own worker after the last step, once."""

    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def on_fit_end(self, state):
        if not Path(self.mark).exists():
            Path(self.mark).touch()
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("max_steps", "saving"),
    [(4, {"every_steps": 1}), (7, {"every_steps": 1}), (7, {"every_epochs": 1})],
    ids=["in mid-epoch", "all rows had", "epoch over"],
)
def test_a_worker_killed_after_the_last_of_max_steps(max_steps, saving, tmp_path):
    """The checkpoint leaves no update to make, but maybe an epoch's end."""
    options = {"epochs": 2, "batch_size": 16, "max_steps": max_steps, "validation_data": table(9)}
    whole = make()
    (row,) = whole.fit(table(), **options)
    est = make()
    callbacks = [KillAtEnd(tmp_path / "mark"), ModelCheckpoint(tmp_path / "saved", **saving)]
    (found,) = est.fit(table(), **options, callbacks=callbacks, max_failures=1)
    assert (tmp_path / "mark").exists()
    assert torch.equal(flat(est), flat(whole))
    assert (est.epoch, est.step) == (whole.epoch, whole.step) == (max_steps // 7, max_steps)
    assert found.keys() == row.keys()
    for key in found.keys() - {"seconds"}:
        assert found[key] == pytest.approx(row[key], rel=1e-6), key


def test_callbacks_go_on_as_they_were_at_the_checkpoint(tmp_path):
    """Patience that was used up stays used, and what was kept of checkpoints is kept."""

    def stopping():
        return EarlyStopping(monitor="loss", patience=2, min_delta=1e9)  # nothing is progress

    whole = make()
    rows = whole.fit(table(), epochs=9, batch_size=16, callbacks=[stopping()])
    assert len(rows) == 4  # the best, and three without progress
    est, early = make(), stopping()
    saver = ModelCheckpoint(tmp_path / "saved", keep_last=2)
    callbacks = [KillAt(tmp_path / "mark", 3 * 7 + 2), early, saver]
    found = est.fit(table(), epochs=9, batch_size=16, callbacks=callbacks, max_failures=1)
    assert (tmp_path / "mark").exists()
    assert [row["epoch"] for row in found] == [1, 2, 3, 4]
    assert (early.waited, early.stopped_epoch) == (3, 4)
    assert torch.equal(flat(est), flat(whole))
    assert sorted(map(str, (tmp_path / "saved").iterdir())) == saver.paths
    assert len(saver.paths) == 2


def test_a_killed_worker_does_not_take_back_the_end(tmp_path):
    early = EarlyStopping(monitor="loss", patience=0, min_delta=1e9)
    est = make()
    callbacks = [KillAtEnd(tmp_path / "mark"), early, ModelCheckpoint(tmp_path / "saved")]
    found = est.fit(table(), epochs=9, batch_size=16, callbacks=callbacks, max_failures=1)
    assert (tmp_path / "mark").exists()
    assert [row["epoch"] for row in found] == [1, 2]
    assert est.epoch == 2


def test_a_killed_worker_is_an_error_without_max_failures(tmp_path):
    est = make()
    before = flat(est)
    with pytest.raises(WorkerLostError, match="SIGKILL"):
        est.fit(table(), batch_size=16, callbacks=[KillAt(tmp_path / "mark", 2)])
    assert torch.equal(flat(est), before)
    est.fit(table(), batch_size=16)  # all is usable


class Shrinking:
    """An engine that offers a slot less after each lost worker."""

    def __init__(self, engine):
        self._engine, self.lost = engine, 0

    def __getattr__(self, name):
        return getattr(self._engine, name)

    def slots(self):
        return self._engine.slots() - self.lost

    def gang(self, *arguments, **options):
        try:
            return self._engine.gang(*arguments, **options)
        except WorkerLostError:
            self.lost += 1
            raise


class Worlds(Callback):
    """How many workers each start had, in a file: a killed worker's attributes are lost."""

    def __init__(self, path):
        self.path = str(path)

    def on_fit_start(self, state):
        with Path(self.path).open("a") as file:
            file.write(f"{state.world} ")


def test_training_goes_on_with_what_the_cluster_still_offers(tmp_path, monkeypatch):
    engine = Shrinking(current_engine())
    monkeypatch.setattr(estimator_module, "current_engine", lambda: engine)
    whole = make(1)
    whole.fit(table(), epochs=2, batch_size=16)
    est = make((2, 9))
    callbacks = [
        Worlds(tmp_path / "worlds"),
        KillAt(tmp_path / "first", 3),
        KillAt(tmp_path / "second", 9),
        ModelCheckpoint(tmp_path / "saved", every_steps=2),
    ]
    rows = est.fit(table(), epochs=2, batch_size=16, callbacks=callbacks, max_failures=2)
    assert (tmp_path / "worlds").read_text().split() == ["4", "3", "2"]
    assert [(row["rows"], row["steps"]) for row in rows] == [(101, 7)] * 2
    torch.testing.assert_close(flat(est), flat(whole), rtol=1e-5, atol=1e-6)


# --- checkpoints ------------------------------------------------------------------------------


def test_checkpoints_of_a_run(tmp_path):
    est = make()
    saver = ModelCheckpoint(tmp_path, keep_last=2)
    est.fit(table(), epochs=3, batch_size=16, callbacks=[saver])
    assert len(saver.paths) == 2
    assert sorted(map(str, tmp_path.iterdir())) == saver.paths
    assert Estimator.latest_checkpoint(tmp_path) == saver.paths[-1]
    other = make(seed=5)
    other.load_checkpoint(tmp_path)
    assert torch.equal(flat(other), flat(est))
    assert (other.epoch, other.step) == (3, 21)


def test_a_damaged_checkpoint_is_passed_over(tmp_path, caplog):
    est = make()
    saver = ModelCheckpoint(tmp_path)
    est.fit(table(), epochs=2, batch_size=16, callbacks=[saver])
    (Path(saver.paths[-1]) / "state.bin").write_bytes(b"no")
    assert Estimator.latest_checkpoint(tmp_path) == saver.paths[0]
    assert saver.paths[-1] in caplog.text
    with pytest.raises(StoredModelError, match="damaged"):
        est.load_checkpoint(saver.paths[-1])


def test_a_checkpoint_of_another_model_changes_nothing(tmp_path):
    est = make()
    est.fit(table(), batch_size=16)
    est.save_checkpoint(tmp_path / "c")
    other = Estimator.from_torch(nn.Linear(5, 3))
    before = flat(other)
    with pytest.raises(StoredModelError, match=r"'0\.weight'|'weight'"):
        other.load_checkpoint(tmp_path / "c")
    assert torch.equal(flat(other), before)


def test_a_saved_model_is_plain_safetensors(tmp_path):
    from safetensors.torch import load_file

    est = make()
    est.fit(table(), batch_size=16)
    est.save(tmp_path / "m")
    plain = network(7)
    plain.load_state_dict(load_file(tmp_path / "m" / "model.safetensors"))
    other = make(seed=3)
    other.load(tmp_path / "m")
    assert torch.equal(flat(other), flat(est))
    assert torch.equal(torch.cat([p.detach().flatten() for p in plain.parameters()]), flat(est))


# --- callbacks --------------------------------------------------------------------------------


class Noting(Callback):
    def __init__(self):
        self.moments = []

    def on_fit_start(self, state):
        self.moments.append(("fit", state.world))

    def on_epoch_end(self, state):
        self.moments.append((state.epoch, state.step))
        state.row["mine"] = state.epoch * 10

    def on_validation_end(self, state):
        self.moments.append(("val", "val_loss" in state.row))


def test_callbacks_come_back_as_they_have_become():
    noting = Noting()
    rows = make().fit(
        table(), epochs=2, batch_size=16, callbacks=[noting], validation_data=table(20, 1)
    )
    assert noting.moments == [("fit", 2), ("val", True), (1, 7), ("val", True), (2, 14)]
    assert [row["mine"] for row in rows] == [10, 20]
    assert all(row["val_loss"] > 0 for row in rows)


def test_early_stopping():
    stopper = EarlyStopping(monitor="loss", patience=1, min_delta=1e9)
    rows = make().fit(table(), epochs=9, batch_size=16, callbacks=[stopper])
    assert len(rows) == 3
    assert stopper.stopped_epoch == 3
    assert stopper.best == rows[0]["loss"]


class Failing(Callback):
    def on_step_end(self, state):
        raise ZeroDivisionError("of the user's own")


def test_an_exception_of_a_callback_reaches_the_caller():
    with pytest.raises(ZeroDivisionError, match="of the user's own") as caught:
        make().fit(table(), batch_size=16, callbacks=[Failing()])
    assert "worker 0 of 2" in str(caught.value.__cause__)


# --- creators and a loader --------------------------------------------------------------------


def test_creators_and_a_loader():
    est = Estimator.from_torch(
        lambda config: nn.Linear(config["width"], 2),
        lambda model, config: torch.optim.Adam(model.parameters(), lr=config["lr"]),
        nn.CrossEntropyLoss(),
        config={"width": 5, "lr": 0.05},
        workers=2,
    )
    x, y = map(torch.from_numpy, table())
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(x, y), batch_size=16, shuffle=True
    )
    rows = est.fit(loader, epochs=5)
    assert [row["rows"] for row in rows] == [101] * 5
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert est.get_model().weight.shape == (2, 5)
    assert est.predict(x).shape == (101, 2)


# --- out of order ---------------------------------------------------------------------------


def test_after_shutdown():
    est = make()
    est.shutdown()
    with pytest.raises(NotReadyError, match="shut down"):
        est.fit(table())


def test_without_a_context(context):
    stop_orca_context()
    try:
        with pytest.raises(ContextError, match="init_orca_context"):
            make().fit(table())
    finally:
        init_orca_context(cores=4)
