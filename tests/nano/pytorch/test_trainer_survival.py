"""Programs that must survive ``acceleration="auto"``: each against stock Lightning.

Each runs twice under ours: with everything tried and nothing chosen (then it is stock Lightning's
run bit for bit), and with whatever the guard lets pass chosen (then it ends well).
"""

from __future__ import annotations

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning import callbacks as plc
from pytorch_lightning.utilities.combined_loader import CombinedLoader
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from bigdl.nano.pytorch import Trainer
from bigdl.nano.pytorch.lightning.session import Session
from bigdl.nano.pytorch.plan.rehearsal import Stage

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings(
        "ignore:The '.*_dataloader' does not have many workers",
        "ignore:The number of training batches",
        "ignore:Found .* module.s. in eval mode",
        "ignore:`isinstance.treespec, LeafSpec.` is deprecated",
        "ignore:`training_step` returned `None`",
        "ignore:Sparse invariant checks",
        "ignore:You are using the `dataloader_iter` step flavor",
        "ignore:Found `dataloader_iter` argument",
        "ignore:LightningCLI's args parameter",
        "ignore:Trying to infer the `batch_size`",
        "ignore:You requested to overfit",
        "ignore:.*`lr_scheduler.step",
        "ignore:Detected call of `lr_scheduler.step",
    ),
]

QUIET = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "accelerator": "cpu",
}


@pytest.fixture(params=["nothing chosen", "all chosen"])
def faster(request, monkeypatch):
    """Whether steps on copies seem faster under every candidate, or under none."""
    factor = 0.5 if request.param == "all chosen" else 2.0

    def seconds(self, batches):
        for batch in batches[:1]:
            self._perform(batch)
        return 0.01 * factor ** len(self.force.names)

    monkeypatch.setattr(Stage, "seconds", seconds)
    monkeypatch.setattr(Session, "_allowed_s", lambda self, choice: float("inf"))
    monkeypatch.setattr(Session, "_is_measured", lambda self: len(self._steps) >= 2)
    monkeypatch.setattr(Session, "_own_s", 0.01)
    monkeypatch.setattr(Session, "_steps_left", lambda self: 1000)
    return factor < 1


class Base(pl.LightningModule):
    """A small picture model; subclasses bring what is odd."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2),
            nn.Linear(4 * 36, 3),
        )  # fmt: skip
        self.losses = []

    def loss(self, x, y):
        return nn.functional.cross_entropy(self.net(x), y)

    def training_step(self, batch, batch_idx):
        loss = self.loss(*batch)
        self.log("loss", loss, on_epoch=True, on_step=True)
        return loss

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if outputs and "loss" in outputs:
            self.losses.append(float(outputs["loss"]))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-3)


def rows(count=48, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 1, 8, 8, generator=generator)
    return TensorDataset(x, torch.randint(0, 3, (count,), generator=generator))


def loader(**arguments):
    return DataLoader(rows(), **({"batch_size": 4, "shuffle": True} | arguments))


def run(trainer_class, make_model, make_loader, **arguments):
    pl.seed_everything(3, verbose=False)
    model = make_model()
    made = {k: v() if k == "callbacks" else v for k, v in arguments.items()}
    trainer = trainer_class(**(QUIET | {"max_epochs": 2} | made))
    trainer.fit(model, make_loader())
    return trainer, model


def survives(faster, make_model, make_loader=loader, **arguments):
    """Run under stock and under ours; what must be equal is."""
    stock_trainer, stock = run(pl.Trainer, make_model, make_loader, **arguments)
    after = torch.rand(2)
    trainer, ours = run(Trainer, make_model, make_loader, **arguments)
    assert torch.equal(torch.rand(2), after), "the random streams moved"
    assert trainer.global_step == stock_trainer.global_step
    mine, theirs = ours.state_dict(), stock.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(mine[k].dtype == theirs[k].dtype for k in mine)
    assert trainer.callback_metrics.keys() == stock_trainer.callback_metrics.keys()
    for optimizer, other in zip(trainer.optimizers, stock_trainer.optimizers, strict=True):
        flags = [g.get("fused") for g in optimizer.param_groups]
        assert flags == [g.get("fused") for g in other.param_groups]
    if not faster or not trainer.plan.chosen:
        assert trainer.plan.chosen == ()
        for key in mine:
            assert torch.equal(mine[key], theirs[key]), key
        assert ours.losses == stock.losses
    else:
        for key in mine:
            if mine[key].is_floating_point():
                assert torch.isfinite(mine[key].to_dense()).all(), key
                torch.testing.assert_close(
                    mine[key].to_dense(), theirs[key].to_dense(), rtol=0.2, atol=0.1
                )
        np.testing.assert_allclose(ours.losses, stock.losses, rtol=0.3, atol=0.3)
    return trainer


def rehearsed(trainer):
    """The user's own step could be rehearsed: something was looked at."""
    return any(row.loss_change is not None for row in trainer.plan.rows[1:])


# --- steps ------------------------------------------------------------------------------------


def test_manual_optimization(faster):
    class Manual(Base):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            loss = super().training_step(batch, batch_idx)
            optimizer.zero_grad()
            self.manual_backward(loss)
            self.clip_gradients(optimizer, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
            optimizer.step()
            self.lr_schedulers().step()
            return loss

        def configure_optimizers(self):
            optimizer = torch.optim.Adam(self.parameters(), 1e-3)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.9)]

    trainer = survives(faster, Manual)
    assert rehearsed(trainer)
    assert bool(trainer.plan.chosen) == faster


def test_several_optimizers_of_a_gan(faster):
    class Gan(Base):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.net = nn.ModuleDict(
                {
                    "make": nn.Sequential(nn.Linear(4, 64), nn.Unflatten(1, (1, 8, 8))),
                    "judge": nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(),
                                           nn.Linear(144, 1)),
                }
            )  # fmt: skip

        def training_step(self, batch, batch_idx):
            first, second = self.optimizers()
            x, _ = batch
            noise = torch.randn(len(x), 4)
            self.toggle_optimizer(first)
            made = -self.net["judge"](self.net["make"](noise)).mean()
            first.zero_grad()
            self.manual_backward(made)
            first.step()
            self.untoggle_optimizer(first)
            judged = (
                nn.functional.softplus(-self.net["judge"](x)).mean()
                + nn.functional.softplus(
                    self.net["judge"](self.net["make"](noise).detach())
                ).mean()
            )
            second.zero_grad()
            self.manual_backward(judged)
            second.step()
            self.log_dict({"made": made, "judged": judged})

        def configure_optimizers(self):
            return [
                torch.optim.Adam(self.net[name].parameters(), 1e-3) for name in ("make", "judge")
            ]

    assert rehearsed(survives(faster, Gan))


@pytest.mark.usefixtures("bf16")
def test_closures_of_lbfgs(faster):
    class Lbfgs(Base):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters(), lr=1e-3, max_iter=3)

    class Still(Lbfgs):
        def __init__(self):
            super().__init__()
            self.net[4] = nn.Identity()

    assert rehearsed(survives(faster, Still))


def test_own_optimizer_step_and_hooks(faster):
    class Hooked(Base):
        def optimizer_step(self, epoch, batch_idx, optimizer, closure):
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 / (1 + self.trainer.global_step)
            optimizer.step(closure=closure)

        def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
            optimizer.zero_grad(set_to_none=False)

        def on_after_backward(self):
            for p in self.parameters():
                if p.grad is not None:
                    p.grad.mul_(0.5)

        def configure_gradient_clipping(
            self, optimizer, gradient_clip_val, gradient_clip_algorithm
        ):
            self.clip_gradients(optimizer, 0.1, "value")

    assert rehearsed(survives(faster, Hooked))


def test_steps_returning_none_and_dicts(faster):
    class Odd(Base):
        def training_step(self, batch, batch_idx):
            if batch_idx % 5 == 4:
                return None
            return {"loss": super().training_step(batch, batch_idx), "rows": len(batch[0])}

    survives(faster, Odd)


def test_a_first_step_that_returns_none(faster):
    class Never(Base):
        def training_step(self, batch, batch_idx):
            return None if batch_idx < 4 else super().training_step(batch, batch_idx)

    survives(faster, Never)


def test_a_step_that_fetches_its_own_batches(faster):
    class Fetching(Base):
        def training_step(self, dataloader_iter):
            batch, _, _ = next(dataloader_iter)
            return self.loss(*batch)

    trainer = survives(faster, Fetching)
    assert "fetches its batches by itself" in trainer.plan.row("bf16").reason


def test_outputs_kept_for_the_end_of_the_epoch(faster):
    class Keeping(Base):
        def __init__(self):
            super().__init__()
            self.kept = []

        def training_step(self, batch, batch_idx):
            output = self.net(batch[0])
            self.kept.append(output.detach())
            self.log("loss", nn.functional.cross_entropy(output, batch[1]))
            return {"loss": nn.functional.cross_entropy(output, batch[1]), "output": output}

        def on_train_batch_end(self, outputs, batch, batch_idx):
            super().on_train_batch_end(outputs, batch, batch_idx)
            outputs["output"].detach().numpy()

        def on_train_epoch_end(self):
            assert torch.cat(self.kept).numpy().shape == (48, 3)
            self.kept.clear()

    survives(faster, Keeping)


def test_a_step_with_a_prints_and_a_global(faster, capsys):
    class Printing(Base):
        def training_step(self, batch, batch_idx):
            print("step", batch_idx)  # noqa: T201
            return super().training_step(batch, batch_idx)

    run(pl.Trainer, Printing, loader)
    stock = capsys.readouterr().out
    run(Trainer, Printing, loader)
    assert capsys.readouterr().out == stock


# --- data -------------------------------------------------------------------------------------


class Dicts(Base):
    def training_step(self, batch, batch_idx):
        return super().training_step((batch["x"][0], batch["y"]), batch_idx)


class DictRows(Dataset):
    def __len__(self):
        return 48

    def __getitem__(self, index):
        x, y = rows()[index]
        return {"x": [x, "a word"], "y": y, "number": index}


def test_dict_batches(faster):
    trainer = survives(faster, Dicts, lambda: DataLoader(DictRows(), batch_size=4, shuffle=True))
    assert rehearsed(trainer)


class Bag:
    """A batch of the user's own class, which no tree knows."""

    def __init__(self, items):
        self.x = torch.stack([x for x, _ in items])
        self.y = torch.stack([y for _, y in items])

    def __deepcopy__(self, memo):
        raise RuntimeError("not this one")


def test_batches_of_an_own_class(faster):
    class Bags(Base):
        def training_step(self, batch, batch_idx):
            return self.loss(batch.x, batch.y)

        def transfer_batch_to_device(self, batch, device, dataloader_idx):
            return batch

    trainer = survives(faster, Bags, lambda: loader(collate_fn=Bag))
    assert "cannot be copied" in trainer.plan.row("bf16").reason


def test_several_loaders(faster):
    class Two(Base):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch["a"], batch_idx) + self.loss(*batch["b"])

    def loaders():
        second = DataLoader(rows(20, 5), batch_size=4, shuffle=True)
        return CombinedLoader({"a": loader(), "b": second}, "max_size_cycle")

    assert rehearsed(survives(faster, Two, loaders))


def stream():
    """Readable once."""
    x, y = rows().tensors
    yield from zip(x.split(4), y.split(4), strict=True)


class Stream(IterableDataset):
    reads = 0

    def __iter__(self):
        for index in range(48):
            Stream.reads += 1
            yield rows()[index]


def test_streams_readable_once(faster):
    trainer = survives(faster, Base, stream, max_epochs=1)
    assert trainer.fit_loop.epoch_loop.batch_progress.total.completed == 12


def test_streams_of_unknown_length_are_read_no_further(faster):
    Stream.reads = 0
    survives(faster, Base, lambda: DataLoader(Stream(), batch_size=4), max_epochs=1)
    assert Stream.reads == 2 * 48


class Stateful(DataLoader):
    taken = 0

    def __iter__(self):
        for batch in super().__iter__():
            self.taken += 1
            yield batch

    def state_dict(self):
        return {"taken": self.taken}

    def load_state_dict(self, state):
        self.taken = state["taken"]


def test_loaders_with_state(faster):
    made = []

    def make():
        made.append(Stateful(rows(), batch_size=4, shuffle=True))
        return made[-1]

    survives(faster, Base, make)
    assert made[0].taken == made[1].taken == 24


def test_variable_shapes(faster):
    class Words(Base):
        def __init__(self):
            super().__init__()
            self.net = nn.Embedding(50, 8)
            self.head = nn.Linear(8, 3)

        def loss(self, x, y):
            return nn.functional.cross_entropy(self.head(self.net(x).mean(1)), y)

    def collate(items):
        length = 2 + int(items[0][1])
        return torch.stack([x[:length] for x, _ in items]), torch.tensor([y % 3 for _, y in items])

    def make():
        generator = torch.Generator().manual_seed(0)
        data = [(torch.randint(0, 50, (9,), generator=generator), i % 7) for i in range(48)]
        return DataLoader(data, batch_size=4, collate_fn=collate, shuffle=True)

    survives(faster, Words, make)


def test_a_step_that_writes_into_its_batch(faster):
    class Writing(Base):
        def training_step(self, batch, batch_idx):
            batch[0].mul_(0.5)
            return super().training_step(batch, batch_idx)

    survives(faster, Writing)


def test_numbers_of_training_batches(faster):
    survives(faster, Base, limit_train_batches=5)
    survives(faster, Base, max_steps=7, max_epochs=-1)
    survives(faster, Base, overfit_batches=3)


# --- models -----------------------------------------------------------------------------------


def test_tied_weights(faster):
    class Tied(Base):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU())
            self.back = nn.Linear(16, 64)
            self.back.weight = nn.Parameter(self.net[1].weight.t().contiguous())
            self.again = nn.Linear(64, 16)
            self.again.weight = self.net[1].weight

        def loss(self, x, y):
            hidden = self.net(x) + self.again(x.flatten(1))
            return nn.functional.mse_loss(self.back(hidden), x.flatten(1))

    trainer = survives(faster, Tied)
    module = trainer.lightning_module
    assert module.again.weight is module.net[1].weight


def test_sparse_gradients(faster):
    class Sparse(Base):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.net = nn.Embedding(20, 8, sparse=True)
            self.head = nn.Linear(8, 3)

        def training_step(self, batch, batch_idx):
            x, y = batch
            index = (x.flatten(1)[:, :5].abs() * 7).long() % 20
            loss = nn.functional.cross_entropy(self.head(self.net(index).mean(1)), y)
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(loss)
            assert self.net.weight.grad.is_sparse
            for optimizer in self.optimizers():
                optimizer.step()
            return loss

        def configure_optimizers(self):
            return [
                torch.optim.SparseAdam(self.net.parameters(), 1e-3),
                torch.optim.Adam(self.head.parameters(), 1e-3),
            ]

    assert rehearsed(survives(faster, Sparse))


def test_float64_stays(faster):
    class Double(Base):
        def training_step(self, batch, batch_idx):
            loss = super().training_step((batch[0].double(), batch[1]), batch_idx)
            assert loss.dtype is torch.float64
            return loss

    trainer = survives(faster, lambda: Double().double())
    assert "bf16" not in trainer.plan.chosen
    assert all(p.dtype is torch.float64 for p in trainer.lightning_module.parameters())


def test_hooks_of_the_user_hear_of_nothing(faster):
    heard = []

    class Hooked(Base):
        def __init__(self):
            super().__init__()
            self.count = 0
            self.register_buffer("seen", torch.zeros(()))
            self.net[0].register_forward_hook(lambda *a: heard.append(1))

        def training_step(self, batch, batch_idx):
            self.count += 1
            self.seen += 1
            return super().training_step(batch, batch_idx)

    trainer = survives(faster, Hooked)
    assert len(heard) == 2 * 24
    assert trainer.lightning_module.count == 24
    assert trainer.lightning_module.seen == 24


def test_weight_norm_and_pruning(faster):
    class Normed(Base):
        def __init__(self):
            super().__init__()
            self.net[5] = nn.utils.parametrizations.weight_norm(self.net[5])
            nn.utils.prune.l1_unstructured(self.net[0], "weight", 0.3)

    survives(faster, Normed)


@pytest.mark.usefixtures("bf16")
def test_a_step_that_reaches_around_its_module(faster):
    class Around(Base):
        def __init__(self):
            super().__init__()
            original = self.net
            self.call = lambda x: original(x)  # a copy of self still calls this one

        def loss(self, x, y):
            return nn.functional.cross_entropy(self.call(x), y)

    trainer = survives(faster, Around)
    assert trainer.plan.chosen == ()
    assert "reaches around" in trainer.plan.row("bf16").reason


@pytest.mark.usefixtures("bf16")
def test_a_module_that_cannot_be_copied(faster):
    class Holding(Base):
        def __init__(self):
            super().__init__()
            self.numbers = (i for i in range(1000))

        def training_step(self, batch, batch_idx):
            next(self.numbers)
            return super().training_step(batch, batch_idx)

    trainer = survives(faster, Holding)
    assert "cannot be copied" in trainer.plan.row("bf16").reason
    assert trainer.plan.row("bf16").status == "skipped"


# --- callbacks and options of Lightning -------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        {"accumulate_grad_batches": 3},
        {"gradient_clip_val": 0.1},
        {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"},
        {"precision": "bf16-mixed"},
        {"precision": "64-true"},
        {"detect_anomaly": True},
        {"profiler": "simple"},
        {"barebones": True, "logger": None, "enable_checkpointing": None,
         "enable_progress_bar": None, "enable_model_summary": None},
        {"reload_dataloaders_every_n_epochs": 1},
        {"callbacks": lambda: [plc.StochasticWeightAveraging(1e-3, swa_epoch_start=1)]},
        {"callbacks": lambda: [plc.EMAWeightAveraging()]},
        {"callbacks": lambda: [plc.GradientAccumulationScheduler({0: 1, 1: 2})]},
        {"callbacks": lambda: [plc.EarlyStopping("loss", patience=5)]},
        {"callbacks": lambda: [plc.Timer("00:01:00:00")]},
    ],
    ids=lambda one: " ".join(one) if "callbacks" not in one else "callback",
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:Swapping scheduler", "ignore:.*anomaly", "ignore:Anomaly")
def test_options(faster, arguments):
    class Plain(Base):
        def training_step(self, batch, batch_idx):
            x, y = batch
            loss = self.loss(x.to(self.dtype), y)
            if not self.trainer.barebones:
                self.log("loss", loss)
            return loss

    survives(faster, Plain, max_epochs=3, **arguments)


class Unfreezing(plc.BackboneFinetuning):
    def __init__(self):
        super().__init__(unfreeze_backbone_at_epoch=1, verbose=False)


def test_backbone_finetuning(faster):
    class Two(Base):
        def __init__(self):
            super().__init__()
            self.backbone = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten())
            self.net = nn.Linear(144, 3)

        def loss(self, x, y):
            return nn.functional.cross_entropy(self.net(self.backbone(x)), y)

        def configure_optimizers(self):
            return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], 1e-3)

    trainer = survives(faster, Two, max_epochs=3, callbacks=lambda: [Unfreezing()])
    groups = trainer.optimizers[0].param_groups
    assert len(groups) == 2
    assert all(not group.get("fused") for group in groups)


@pytest.mark.filterwarnings("ignore:.*lr_find")
def test_learning_rate_finder(faster, tmp_path):
    class Rated(Base):
        def __init__(self):
            super().__init__()
            self.lr = 1e-3

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), self.lr)

    rates = []

    class Noting(plc.LearningRateFinder):
        def on_fit_start(self, trainer, pl_module):
            super().on_fit_start(trainer, pl_module)
            rates.append(pl_module.lr)

    survives(
        faster,
        Rated,
        default_root_dir=tmp_path,
        callbacks=lambda: [Noting(num_training_steps=40)],
    )
    assert rates[0] == rates[1] != 1e-3


def test_batch_size_finder(faster, tmp_path):
    class Sized(Base):
        def __init__(self):
            super().__init__()
            self.batch_size = 2

        def train_dataloader(self):
            return loader(batch_size=self.batch_size)

    def go(trainer_class):
        pl.seed_everything(3, verbose=False)
        model = Sized()
        finder = plc.BatchSizeFinder(max_trials=2, steps_per_trial=2)
        trainer = trainer_class(
            **QUIET, max_epochs=1, default_root_dir=tmp_path, callbacks=[finder]
        )
        trainer.fit(model)
        return trainer, model

    _, stock = go(pl.Trainer)
    trainer, ours = go(Trainer)
    assert ours.batch_size == stock.batch_size == 4
    if not trainer.plan.chosen:
        assert ours.losses == stock.losses


def test_a_tuner_beside_fit(faster, tmp_path):
    from pytorch_lightning.tuner import Tuner

    class Rated(Base):
        def __init__(self):
            super().__init__()
            self.lr = 1e-3

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), self.lr)

    found = []
    for kind in (pl.Trainer, Trainer):
        pl.seed_everything(3, verbose=False)
        trainer = kind(**QUIET, max_epochs=1, default_root_dir=tmp_path)
        model = Rated()
        found.append(Tuner(trainer).lr_find(model, loader(), num_training=10).suggestion())
    assert found[0] == found[1]


def test_validation_and_metrics_hear_nothing(faster):
    import torchmetrics

    class Measured(Base):
        def __init__(self):
            super().__init__()
            self.accuracy = torchmetrics.Accuracy("multiclass", num_classes=3)

        def training_step(self, batch, batch_idx):
            self.accuracy(self.net(batch[0]), batch[1])
            self.log("accuracy", self.accuracy, on_epoch=True, on_step=False)
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx):
            self.log("val", self.loss(*batch))

        def val_dataloader(self):
            return loader(shuffle=False)

    def go(trainer_class):
        pl.seed_everything(3, verbose=False)
        model = Measured()
        trainer = trainer_class(**QUIET, max_epochs=2, val_check_interval=0.5)
        trainer.fit(model, loader())
        return trainer, {k: float(v) for k, v in trainer.callback_metrics.items()}

    _, stock = go(pl.Trainer)
    trainer, ours = go(Trainer)
    assert ours.keys() == stock.keys()
    if trainer.plan.chosen:
        assert ours == pytest.approx(stock, abs=0.2)
    else:
        assert ours == stock


def test_an_error_of_the_users_own_leaves_everything_as_it_was(faster):
    class Failing(Base):
        def training_step(self, batch, batch_idx):
            if batch_idx == 7:
                raise KeyError("mine")
            return super().training_step(batch, batch_idx)

    pl.seed_everything(3, verbose=False)
    model, trainer = Failing(), Trainer(**QUIET, max_epochs=1)
    with pytest.raises(KeyError, match="mine"):
        trainer.fit(model, loader())
    assert not {"training_step", "optimizer_step"} & set(vars(trainer.strategy))
    assert not trainer.optimizers[0].param_groups[0].get("fused")
    assert trainer.plan is not None
    trainer.fit(Base(), loader())  # usable again


def test_fit_twice_on_one_trainer(faster):
    pl.seed_everything(3, verbose=False)
    trainer = Trainer(**QUIET, max_epochs=1)
    trainer.fit(Base(), loader())
    first = trainer.plan
    trainer.fit_loop.max_epochs = 2
    trainer.fit(Base(), loader())
    assert trainer.plan.chosen == first.chosen


@pytest.mark.filterwarnings("ignore:(?s).*[Jj]sonargparse", "ignore:(?s).*deprecated")
def test_lightning_cli(faster, monkeypatch, tmp_path):
    from pytorch_lightning.cli import LightningCLI

    class Data(pl.LightningDataModule):
        def train_dataloader(self):
            return loader()

    monkeypatch.chdir(tmp_path)
    cli = LightningCLI(
        Base,
        Data,
        trainer_class=Trainer,
        seed_everything_default=3,
        save_config_callback=None,
        args=[
            "fit", "--trainer.max_epochs=1", "--trainer.acceleration=auto",
            "--trainer.guard.loss=0.02", "--trainer.logger=false",
            "--trainer.enable_checkpointing=false", "--trainer.enable_progress_bar=false",
            "--trainer.enable_model_summary=false",
        ],
    )  # fmt: skip
    assert cli.trainer._guard.loss == 0.02
    assert cli.trainer.plan is not None
    assert bool(cli.trainer.plan.chosen) == faster
