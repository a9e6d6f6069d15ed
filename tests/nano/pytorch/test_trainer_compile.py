"""``Trainer.compile``: a plain module trained as a hand-written loop trains it."""

from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch
import torchmetrics
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from bigdl.errors import ArgumentError, ConfigError, DataError, NotReadyError
from bigdl.nano.pytorch import Trainer

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings(
        "ignore:The '.*_dataloader' does not have many workers",
        "ignore:The number of training batches",
        "ignore:`isinstance.treespec, LeafSpec.` is deprecated",
    ),
]

QUIET = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "accelerator": "cpu",
    "acceleration": "off",
}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


def rows(count=40):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 4, generator=generator)
    return TensorDataset(x, torch.randint(0, 3, (count,), generator=generator))


def test_it_trains_the_callers_objects_as_a_loop_would():
    loss = nn.CrossEntropyLoss()
    by_hand = network()
    optimizer = torch.optim.Adam(by_hand.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    for _ in range(3):
        for x, y in DataLoader(rows(), batch_size=8):
            optimizer.zero_grad()
            loss(by_hand(x), y).backward()
            optimizer.step()
        schedule.step()

    model = network()
    parameters = list(model.parameters())
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    module = Trainer.compile(model, loss, optimizer, schedule)
    assert isinstance(module, pl.LightningModule)
    assert module.model is model
    Trainer(**QUIET, max_epochs=3).fit(module, DataLoader(rows(), batch_size=8))
    assert all(map(torch.equal, model.parameters(), by_hand.parameters()))
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-2 * 0.125)


def test_metrics_are_of_the_whole_set():
    """9 rows in batches of 4: a mean of batch means would be another number."""
    model = network()
    data = rows(9)
    module = Trainer.compile(
        model,
        loss=nn.CrossEntropyLoss(),
        optimizer=torch.optim.SGD(model.parameters(), 0.0),
        metrics=[torchmetrics.Accuracy("multiclass", num_classes=3), mean_absolute],
    )
    trainer = Trainer(**QUIET, max_epochs=1)
    loader = DataLoader(data, batch_size=4)
    trainer.fit(module, loader, loader)
    with torch.no_grad():
        output = model(data.tensors[0])
    y = data.tensors[1]
    got = trainer.callback_metrics
    assert set(got) == {"train_loss", "val_loss", "val_MulticlassAccuracy", "val_mean_absolute"}
    assert got["val_MulticlassAccuracy"] == pytest.approx(
        (output.argmax(1) == y).float().mean().item()
    )
    assert got["val_loss"] == pytest.approx(nn.functional.cross_entropy(output, y).item(), 1e-5)
    assert got["val_mean_absolute"] == pytest.approx(mean_absolute(output, y).item(), 1e-5)
    (tested,) = trainer.test(module, loader, verbose=False)
    assert tested["test_MulticlassAccuracy"] == pytest.approx(got["val_MulticlassAccuracy"].item())


def mean_absolute(output, target):
    return output.abs().mean()


def test_metrics_by_ones_own_names():
    model = network()
    module = Trainer.compile(
        model,
        nn.CrossEntropyLoss(),
        torch.optim.SGD(model.parameters(), 0.1),
        metrics={"mine": mean_absolute},
    )
    trainer = Trainer(**QUIET, max_epochs=1)
    trainer.fit(module, DataLoader(rows(), batch_size=8), DataLoader(rows(), batch_size=8))
    assert "val_mine" in trainer.callback_metrics


def test_several_inputs_and_prediction():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(4, 1)
            self.word = "mine"

        def forward(self, a, b, scale=1.0):
            return self.net(torch.cat([a, b], 1)) * scale

    model = Two()
    a, b, y = torch.randn(12, 2), torch.randn(12, 2), torch.randn(12, 1)
    module = Trainer.compile(
        model, nn.functional.mse_loss, torch.optim.SGD(model.parameters(), 0.1)
    )
    assert module.word == "mine"
    with pytest.raises(AttributeError, match="nothing"):
        _ = module.nothing
    trainer = Trainer(**QUIET, max_epochs=1)
    loader = DataLoader(TensorDataset(a, b, y), batch_size=5)
    trainer.fit(module, loader)
    predicted = torch.cat(trainer.predict(module, loader))
    torch.testing.assert_close(predicted, model(a, b))
    alone = DataLoader(TensorDataset(a, b), batch_size=5)
    torch.testing.assert_close(torch.cat(trainer.predict(module, alone)), model(a, b))


def test_plateau_watches_the_validation_loss():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.1)
    module = Trainer.compile(model, nn.CrossEntropyLoss(), optimizer, schedule)
    trainer = Trainer(**QUIET, max_epochs=3)
    loader = DataLoader(rows(), batch_size=8)
    trainer.fit(module, loader, loader)
    assert schedule.best == pytest.approx(trainer.callback_metrics["val_loss"].item())


def test_a_lightning_module_is_given_back_itself():
    module = pl.LightningModule()
    assert Trainer.compile(module) is module
    with pytest.raises(ConfigError, match="LightningModule and loss="):
        Trainer.compile(module, loss=nn.MSELoss())


def adam(model):
    return torch.optim.Adam(model.parameters())


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda m: Trainer.compile("resnet"), ArgumentError, "torch.nn.Module, not str"),
        (lambda m: Trainer.compile(m, "mse"), ArgumentError, "function .* not str"),
        (lambda m: Trainer.compile(m, optimizer="adam"), ArgumentError, "not 'adam'"),
        (lambda m: Trainer.compile(m, scheduler=3), ArgumentError, "not int"),
        (lambda m: Trainer.compile(m, optimizer=adam(network())), ConfigError, "none of the"),
        (
            lambda m: Trainer.compile(
                m, scheduler=torch.optim.lr_scheduler.StepLR(adam(m), 1), optimizer=adam(m)
            ),
            ConfigError,
            "not one of this optimizer",
        ),
        (lambda m: Trainer.compile(m, metrics="accuracy"), ArgumentError, "list or a dict"),
        (lambda m: Trainer.compile(m, metrics=[3]), ArgumentError, "is a int"),
        (
            lambda m: Trainer.compile(m, metrics=[torchmetrics.Accuracy]),
            ArgumentError,
            "need an object",
        ),
        (
            lambda m: Trainer.compile(m, metrics=[mean_absolute, mean_absolute]),
            ConfigError,
            "two metrics are called 'mean_absolute'",
        ),
        (lambda m: Trainer.compile(m, los=1), TypeError, "los"),
    ],
)
def test_misuse(call, error, text):
    with pytest.raises(error, match=text):
        call(network())


def test_what_is_missing_is_said_when_it_is_needed():
    model, loader = network(), DataLoader(rows(), batch_size=8)
    trainer = Trainer(**QUIET, max_epochs=1)
    with pytest.raises(NotReadyError, match="no optimizer"):
        trainer.fit(Trainer.compile(model, nn.CrossEntropyLoss()), loader)
    with pytest.raises(NotReadyError, match="no loss"):
        Trainer(**QUIET, max_epochs=1).fit(Trainer.compile(model, optimizer=adam(model)), loader)
    inputs = DataLoader(rows().tensors[0], batch_size=8)
    assert len(Trainer(**QUIET).predict(Trainer.compile(model), inputs)) == 5
    with pytest.raises(DataError, match=r"\(\*inputs, target\); this one is a Tensor"):
        Trainer(**QUIET, max_epochs=1).fit(
            Trainer.compile(model, nn.CrossEntropyLoss(), adam(model)), inputs
        )


def test_a_class_in_place_of_a_loss():
    with pytest.raises(ArgumentError, match=r"give CrossEntropyLoss\(\)"):
        Trainer.compile(nn.Linear(2, 2), loss=nn.CrossEntropyLoss)


def test_a_typo_is_answered():
    with pytest.raises(ArgumentError, match="Did you mean 'optimizer'"):
        Trainer.compile(nn.Linear(2, 2), optimiser=None)


def test_a_plain_module_is_pointed_to_compile():
    with pytest.raises(ArgumentError, match=r"Trainer.compile\(model, loss"):
        Trainer(logger=False, enable_checkpointing=False).fit(nn.Linear(2, 2), [])
