"""LightningModules in an estimator: the numbers of stock Lightning, for any number of workers."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from bigdl.orca import init_orca_context, stop_orca_context
from bigdl.orca.learn.callbacks import Callback, ModelCheckpoint

torch = pytest.importorskip("torch", reason="needs the [torch] extra")
pl = pytest.importorskip("pytorch_lightning", reason="needs the [torch] extra")
torchmetrics = pytest.importorskip("torchmetrics", reason="needs the [torch] extra")

from bigdl.orca.learn.pytorch import Estimator  # noqa: E402

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="worker processes")
nn, functional = torch.nn, torch.nn.functional


@pytest.fixture(scope="module", autouse=True)
def context():
    yield init_orca_context(cores=3)
    stop_orca_context()


def table(rows=101, seed=0):
    draw = np.random.default_rng(seed)
    x = draw.standard_normal((rows, 5)).astype(np.float32)
    return torch.from_numpy(x), torch.from_numpy((x.sum(1) > 0).astype(np.int64))


def loader(rows=101, seed=0, size=16):
    data = torch.utils.data.TensorDataset(*table(rows, seed))
    return torch.utils.data.DataLoader(data, batch_size=size)


class Classifier(pl.LightningModule):
    """What people write: logged losses, a logged metric, one computed by hand, hooks."""

    def __init__(self, rate=0.1, width=8):
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(5, width), nn.Tanh(), nn.Linear(width, 2))
        self.train_accuracy = torchmetrics.Accuracy("multiclass", num_classes=2)
        self.val_scores = torchmetrics.MetricCollection(
            {
                "precision": torchmetrics.Precision("multiclass", num_classes=2, average="macro"),
                "recall": torchmetrics.Recall("multiclass", num_classes=2, average="macro"),
            }
        )
        self.area = torchmetrics.AUROC("binary")
        self.losses = []

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        output = self(x)
        loss = functional.cross_entropy(output, y)
        self.train_accuracy(output, y)
        self.log("train_loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        self.log("last_loss", loss)
        self.log("train_acc", self.train_accuracy, on_step=False, on_epoch=True)
        self.log("worst", loss, on_step=False, on_epoch=True, reduce_fx="max")
        self.log("epoch_at", float(self.current_epoch), on_step=False, on_epoch=True)
        self.log("steps_at", float(self.global_step))
        self.log("batch_at", float(batch_idx))
        self.losses.append(loss.detach())
        return loss

    def on_train_epoch_end(self):
        self.log("mean_of_losses", torch.stack(self.losses).mean())
        self.losses.clear()

    def validation_step(self, batch, batch_idx):
        x, y = batch
        output = self(x)
        self.log("val_loss", functional.cross_entropy(output, y), prog_bar=True)
        self.val_scores.update(output, y)
        self.area.update(output[:, 1], y)
        self.log("val_area", self.area)

    def on_validation_epoch_end(self):
        self.log_dict({f"val_{k}": v for k, v in self.val_scores.compute().items()})
        self.val_scores.reset()

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=self.hparams.rate, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, gamma=0.8)
        schedule = {"scheduler": scheduler, "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}


def stock(model, epochs=2, val=True, data=None):
    """What Lightning's Trainer makes of it: weights, and the metrics of the last epoch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = pl.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        trainer.fit(model, data or loader(), loader(53, 1) if val else None)
    return flat(model), {key: value.item() for key, value in trainer.callback_metrics.items()}


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_the_numbers_of_stock_lightning(workers):
    expected, metrics = stock(Classifier())
    model = Classifier()
    est = Estimator.from_torch(model, workers=workers)
    rows = est.fit(loader(), epochs=2, validation_data=loader(53, 1))
    assert est.get_model() is model
    torch.testing.assert_close(flat(model), expected, rtol=1e-5, atol=1e-6)
    assert [(row["epoch"], row["rows"], row["steps"]) for row in rows] == [
        (1, 101, 7),
        (2, 101, 7),
    ]
    missing = set(metrics) - set(rows[-1])
    assert not missing
    for key, value in metrics.items():
        # a mean that the module makes by hand of its own batches is not one of rows
        limit = 0.05 if key == "mean_of_losses" and workers > 1 else 1e-5
        # the largest loss is that of a worker's part
        if key != "worst" or workers == 1:
            assert rows[-1][key] == pytest.approx(value, rel=limit, abs=1e-6), key
    assert rows[-1]["loss"] == pytest.approx(rows[-1]["train_loss"], rel=1e-6)


def test_evaluate_and_predict():
    x, y = table(401)
    model = Classifier()
    est = Estimator.from_torch(model, workers=3)
    found = est.evaluate((x, y), batch_size=32)
    with torch.no_grad():
        output = model(x)
    assert found["rows"] == 401
    assert found["val_loss"] == pytest.approx(functional.cross_entropy(output, y).item(), rel=1e-6)
    area = torchmetrics.AUROC("binary")(output[:, 1], y).item()
    assert found["val_area"] == pytest.approx(area, abs=1e-6)
    recall = torchmetrics.Recall("multiclass", num_classes=2, average="macro")(output, y).item()
    assert found["val_recall"] == pytest.approx(recall, abs=1e-6)
    np.testing.assert_allclose(est.predict(x), output.numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 3)])
def test_resumed_in_mid_epoch_with_other_workers(before, after, tmp_path):
    whole = Estimator.from_torch(Classifier(), workers=2)
    whole.fit(loader(), epochs=2)
    broken = Estimator.from_torch(Classifier(), workers=before)
    broken.fit(loader(), epochs=2, max_steps=10)
    broken.save_checkpoint(tmp_path / "c")
    resumed = Estimator.from_torch(Classifier(), workers=after)
    resumed.load_checkpoint(tmp_path / "c")
    (row,) = resumed.fit(loader())
    assert row["rows"] == 101 - 3 * 16
    assert row["batch_at"] == 6
    assert row["steps_at"] == 13
    torch.testing.assert_close(
        flat(resumed.get_model()), flat(whole.get_model()), rtol=1e-5, atol=1e-6
    )


class KillAt(Callback):
    """Kills its own worker at a step, once."""

    def __init__(self, mark, step):
        self.mark, self.step = str(mark), step

    def on_step_end(self, state):
        if state.step == self.step and not Path(self.mark).exists():
            Path(self.mark).touch()
            os.kill(os.getpid(), signal.SIGKILL)


def test_the_record_of_a_broken_epoch_is_whole(tmp_path):
    whole = Estimator.from_torch(Classifier(), workers=2).fit(loader(), epochs=2)
    est = Estimator.from_torch(Classifier(), workers=2)
    callbacks = [KillAt(tmp_path / "mark", 12), ModelCheckpoint(tmp_path / "s", every_steps=2)]
    rows = est.fit(loader(), epochs=2, callbacks=callbacks, max_failures=1)
    assert (tmp_path / "mark").exists()
    for one, other in zip(rows, whole, strict=True):
        assert one.keys() == other.keys()
        for key in set(one) - {"seconds", "mean_of_losses"}:
            assert one[key] == pytest.approx(other[key], rel=1e-5), key


class OddBatches(pl.LightningModule):
    """Its loader gives dicts."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(5, 2)

    def training_step(self, batch, batch_idx):
        assert set(batch) == {"x", "y", "names"}
        assert all(isinstance(name, str) for name in batch["names"])
        return functional.cross_entropy(self.net(batch["x"]), batch["y"])

    def predict_step(self, batch):
        return self.net(batch["x"]).argmax(1)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.25)


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 20

    def __getitem__(self, index):
        x, y = table(20)
        return {"x": x[index], "y": y[index], "names": f"row {index}"}


def test_batches_reach_the_module_as_the_loader_gives_them():
    est = Estimator.from_torch(OddBatches(), workers=2)
    data = torch.utils.data.DataLoader(Rows(), batch_size=8)
    assert est.fit(data)[0]["rows"] == 20
    assert est.predict(data).shape == (20,)
