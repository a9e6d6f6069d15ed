"""Modules and callbacks of ``lightning`` under a Trainer that is built on ``pytorch_lightning``.

Needs an environment with both packages: pip install 'lightning==2.6.6' beside the [torch] extra.
"""

from __future__ import annotations

import pytest

lp = pytest.importorskip("lightning.pytorch", reason="an environment with both Lightnings")

import torch  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils.data import DataLoader, TensorDataset  # noqa: E402

from bigdl.nano.pytorch import Plan, Trainer  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


class Module(lp.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        loss = self.net(batch[0]).square().mean()
        self.log("loss", loss, on_epoch=True, on_step=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("v", self.net(batch[0]).mean())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)


class Counting(lp.Callback):
    def __init__(self):
        self.count = 0

    def on_train_batch_end(self, *args):
        self.count += 1


@pytest.mark.parametrize("acceleration", ["off", "auto", Plan.of("fused_optimizer")])
def test_guests_train_and_keep_their_classes(acceleration, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    loader = DataLoader(TensorDataset(torch.randn(64, 4)), batch_size=8)
    counting, saving = Counting(), lp.callbacks.ModelCheckpoint(tmp_path, monitor="v")
    stopping = lp.callbacks.EarlyStopping("v", patience=9)
    trainer = Trainer(
        max_epochs=2, logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[saving, counting, stopping], acceleration=acceleration,
    )  # fmt: skip
    module = Module()
    before = module.net.weight.detach().clone()
    trainer.fit(module, loader, loader)
    assert counting.count == 16
    assert not torch.equal(module.net.weight, before)
    assert {"loss", "v"} <= set(trainer.callback_metrics)
    assert saving.best_model_path
    assert type(module) is Module
    assert type(counting) is Counting
    assert type(saving) is lp.callbacks.ModelCheckpoint
    assert trainer.plan is not None
