"""Frozen trunks within whole runs: stock Lightning's weights, callbacks and checkpoints."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

pl = pytest.importorskip("pytorch_lightning")
callbacks = pytest.importorskip("pytorch_lightning.callbacks")

from bigdl.nano.pytorch import Trainer  # noqa: E402
from bigdl.nano.pytorch.frozen.site import Site  # noqa: E402
from bigdl.nano.pytorch.plan.plan import Plan  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings(
        "ignore:The '.*_dataloader' does not have many workers",
        "ignore:The number of training batches",
        "ignore:Found .* module.s. in eval mode",
        "ignore:`isinstance.treespec, LeafSpec.` is deprecated",
        "ignore:Swapping scheduler",
        "ignore:The provided params to be frozen already exist",
    ),
]


class Program(pl.LightningModule):
    def __init__(self, freeze=True):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 16, 3, 2),
            nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        )  # fmt: skip
        self.head = nn.Sequential(nn.Dropout(0.2), nn.Linear(16, 3))
        if freeze:
            self.backbone.requires_grad_(False)
            self.backbone.eval()
        self.losses = []
        self.scores = []

    def forward(self, x):
        return self.head(self.backbone(x))

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = nn.functional.cross_entropy(self(x), y)
        self.losses.append(loss.detach())
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.scores.append(nn.functional.cross_entropy(self(x), y))

    def configure_optimizers(self):
        trained = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.SGD(trained, lr=0.1, momentum=0.9)


def loader(rows=22, seed=0, shuffle=True):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 3, 10, 10, generator=generator)
    y = torch.randint(0, 3, (rows,), generator=generator)
    return DataLoader(TensorDataset(x, y), 4, shuffle=shuffle)


def plan(form="fp32", place="backbone"):
    return Plan(Plan.of("frozen_trunk").rows, {"frozen_trunk": {"trunks": {place: form}}})


def fit(trainer_class, program, *, epochs=4, more=(), **options):
    trainer = trainer_class(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(more),
        **options,
    )
    torch.manual_seed(7)
    trainer.fit(program, loader(), loader(9, seed=1, shuffle=False))
    return trainer


def both(make=Program, more=lambda: (), **options):
    stock, ours = make(), make()
    fit(pl.Trainer, stock, more=more(), **options)
    trainer = fit(Trainer, ours, more=more(), acceleration=plan(), **options)
    for one, other in ((ours.losses, stock.losses), (ours.scores, stock.scores)):
        torch.testing.assert_close(torch.stack(one), torch.stack(other), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        dict(ours.state_dict()), dict(stock.state_dict()), atol=1e-4, rtol=1e-4
    )
    return trainer, ours


def test_a_run_with_validation():
    trainer, ours = both()
    assert trainer.plan.chosen == ("frozen_trunk",)
    assert "_compiled_call_impl" not in vars(ours.backbone)


def test_features_are_remembered(monkeypatch):
    caches = []
    put = Site._put_in_force

    def watched(self, *args):
        put(self, *args)
        caches.extend(self.caches)

    monkeypatch.setattr(Site, "_put_in_force", watched)
    both()
    assert sum(cache.hits for cache in caches) >= 3 * 22


@pytest.mark.parametrize("train_bn", [False, True])
def test_backbone_finetuning(train_bn):
    def make():
        program = Program(freeze=False)
        program.backbone.eval()
        return program

    def finetuning():
        return [
            callbacks.BackboneFinetuning(
                unfreeze_backbone_at_epoch=2,
                lambda_func=lambda epoch: 1.5,
                verbose=False,
                train_bn=train_bn,
            )
        ]

    _, ours = both(make, finetuning, epochs=5)
    assert all(p.requires_grad for p in ours.backbone.parameters())


def test_average_of_weights():
    both(more=lambda: [callbacks.EMAWeightAveraging(decay=0.5)])


def test_stochastic_weight_averaging():
    both(more=lambda: [callbacks.StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=2)])


def test_unfrozen_by_hand():
    class Hand(Program):
        def on_train_epoch_start(self):
            if self.current_epoch == 2:
                self.backbone[3].requires_grad_(True)
                self.trainer.optimizers[0].add_param_group(
                    {"params": list(self.backbone[3].parameters())}
                )

    both(Hand)


def test_toggled_optimizers():
    class Toggled(Program):
        def __init__(self):
            super().__init__(freeze=False)
            self.automatic_optimization = False
            self.backbone.eval()

        def configure_optimizers(self):
            return [
                torch.optim.SGD(part.parameters(), lr=0.05) for part in (self.backbone, self.head)
            ]

        def training_step(self, batch, batch_idx):
            x, y = batch
            for optimizer in self.optimizers():
                self.toggle_optimizer(optimizer)
                loss = nn.functional.cross_entropy(self(x), y)
                self.manual_backward(loss)
                optimizer.step()
                optimizer.zero_grad()
                self.untoggle_optimizer(optimizer)
                self.losses.append(loss.detach())

    stock, ours = Toggled(), Toggled()
    fit(pl.Trainer, stock)
    fit(Trainer, ours)  # by itself: nothing is frozen when it looks
    torch.testing.assert_close(dict(ours.state_dict()), dict(stock.state_dict()))


def test_checkpoint_is_lightnings(tmp_path):
    ours = Program()
    trainer = fit(Trainer, ours, acceleration=plan())
    trainer.save_checkpoint(tmp_path / "ours.ckpt")
    stored = torch.load(tmp_path / "ours.ckpt", weights_only=True)
    assert list(stored["state_dict"]) == list(Program().state_dict())
    again = Program.load_from_checkpoint(tmp_path / "ours.ckpt")
    again.eval()
    ours.eval()
    x = torch.randn(2, 3, 10, 10)
    assert torch.equal(again(x), ours(x))


def test_model_is_a_plain_module_afterwards():
    ours = Program()
    fit(Trainer, ours, acceleration=plan())
    own = copy.deepcopy(ours)
    ours.eval()
    own.eval()
    x = torch.randn(2, 3, 10, 10)
    assert torch.equal(ours(x), own(x))
