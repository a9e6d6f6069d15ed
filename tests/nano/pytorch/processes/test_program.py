"""An ordinary Lightning program, by one process and by two: what a user looks at is equal."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
import torchmetrics
from pytorch_lightning.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from bigdl.nano.pytorch import Trainer

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="worker processes, cores"),
    pytest.mark.filterwarnings(
        "ignore:The '(train|val|test|predict)_dataloader' does not have many workers",
        "ignore:The number of training batches",
        "ignore:Be aware that when using `ckpt_path`",
        "ignore:`isinstance.treespec, LeafSpec.` is deprecated",
    ),
]

ROWS = 403


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(
            torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2)
        )
        self.accuracy = torchmetrics.Accuracy(task="multiclass", num_classes=2)

    def training_step(self, batch, index):
        loss = cross_entropy(self.net(batch["x"]), batch["y"])
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch, index):
        output = self.net(batch["x"])
        self.accuracy(output, batch["y"])
        self.log("val_accuracy", self.accuracy)
        self.log_dict({"val_loss": cross_entropy(output, batch["y"])}, batch_size=len(output))

    def predict_step(self, batch, index):
        return self.net(batch["x"]).argmax(1)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
        return {"optimizer": optimizer, "lr_scheduler": schedule}


def as_dict(rows):
    x, y = zip(*rows, strict=True)
    return {"x": torch.stack(x), "y": torch.stack(y)}


def loaders():
    torch.manual_seed(0)
    x = torch.randn(ROWS, 8)
    rows = TensorDataset(x, (x.sum(1) > 0).long())
    return [DataLoader(rows, size, collate_fn=as_dict) for size in (32, 64)]


def trainer(processes, **arguments):
    return Trainer(
        num_processes=processes, acceleration="off", enable_progress_bar=False,
        enable_model_summary=False, **arguments,
    )  # fmt: skip


def weights(net):
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def written(folder):
    [path] = Path(folder).rglob("metrics.csv")
    with open(path) as file:
        return list(csv.DictReader(file))


def run(processes, folder):
    train, validate = loaders()
    net = Net()
    best = ModelCheckpoint(monitor="val_loss", save_top_k=2, dirpath=folder / "best")
    watch = [best, EarlyStopping("val_loss", patience=5), LearningRateMonitor()]
    fitting = trainer(processes, max_epochs=3, callbacks=watch, logger=CSVLogger(folder))
    fitting.fit(net, train, validate)
    numbers = {name: float(value) for name, value in fitting.callback_metrics.items()}
    classes = torch.cat(fitting.predict(net, validate))
    return net, numbers, written(folder), Path(best.best_model_path), classes


def test_all_that_a_user_looks_at_is_equal(tmp_path):
    one, numbers, rows, path, classes = run(1, tmp_path / "one")
    two, others, more_rows, other_path, other_classes = run(2, tmp_path / "two")
    torch.testing.assert_close(weights(two), weights(one), rtol=1e-5, atol=1e-6)
    assert others == pytest.approx(numbers, rel=1e-5)
    assert other_path.name == path.name
    assert torch.equal(other_classes, classes)
    assert len(classes) == ROWS
    assert len(more_rows) == len(rows)
    for row, other in zip(rows, more_rows, strict=True):  # written once, the same
        assert row.keys() == other.keys()
        for name in row:
            assert (row[name] == "") == (other[name] == "")
            if row[name]:
                assert float(other[name]) == pytest.approx(float(row[name]), rel=1e-4)

    train, validate = loaders()
    found = []
    for processes in (1, 2):  # what two have saved, either goes on with
        net = Net()
        fitting = trainer(processes, max_epochs=5, logger=False, enable_checkpointing=False)
        fitting.fit(net, train, validate, ckpt_path=other_path)
        assert (fitting.current_epoch, fitting.global_step) == (5, 65)
        found.append(weights(net))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)
