"""Trainer(num_processes=2): the numbers of one process, and the caller's objects hold them."""

from __future__ import annotations

import copy
import inspect
import os
import signal
import time
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

from bigdl.errors import ArgumentError, ConfigError, WorkerError, WorkerLostError
from bigdl.nano.pytorch import Trainer

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:The '(train|val|test|predict)_dataloader' does not have many workers",
        "ignore:The number of training batches",
        "ignore:`isinstance.treespec, LeafSpec.` is deprecated",
        "ignore:You defined a `validation_step` but have no `val_dataloader`",
    ),
]

_QUIET: dict[str, Any] = {
    "acceleration": "off",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class _Odd(Exception):
    """A user's own."""


class _Net(pl.LightningModule):
    def __init__(self, optimizer: str, rate: float, dtype: torch.dtype, at_step: str = "") -> None:
        super().__init__()
        self.net = torch.nn.Sequential(
            torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)
        ).to(dtype)
        self.optimizer, self.rate, self.at_step = optimizer, rate, at_step

    def _loss(self, batch: Any) -> torch.Tensor:
        x, y = batch
        return torch.nn.functional.mse_loss(self.net(x), y)

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        if index == 1 and self.global_rank == 1:
            if self.at_step == "raise":
                raise _Odd("row 7")
            if self.at_step == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
        loss = self._loss(batch)
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val_loss", self._loss(batch))

    def test_step(self, batch: Any, index: int) -> None:
        self.log("test_loss", self._loss(batch))

    def predict_step(self, batch: Any, index: int) -> torch.Tensor:
        return self.net(batch[0])

    def configure_optimizers(self) -> Any:
        return getattr(torch.optim, self.optimizer)(self.parameters(), lr=self.rate)


class _Counts(pl.Callback):
    def __init__(self) -> None:
        self.epochs = 0
        self.seen: list[tuple[int, int]] = []

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.epochs += 1
        self.seen.append((trainer.global_rank, trainer.world_size))


def _loader(dtype: torch.dtype = torch.float64, shuffle: bool = True) -> Any:
    rows = torch.Generator().manual_seed(3)
    x = torch.randn(401, 4, generator=rows).to(dtype)
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=32, shuffle=shuffle)


def _pair(*args: Any, **kwargs: Any) -> tuple[_Net, _Net]:
    torch.manual_seed(0)
    one = _Net(*args, **kwargs)
    return one, copy.deepcopy(one)


def _furthest(one: _Net, other: _Net) -> float:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)


def _fit(model: _Net, processes: int, dtype: torch.dtype, **kwargs: Any) -> Trainer:
    trainer = Trainer(num_processes=processes, max_epochs=3, **_QUIET, **kwargs)
    torch.manual_seed(1)
    trainer.fit(model, _loader(dtype))
    return trainer


@pytest.mark.parametrize(
    ("optimizer", "rate", "dtype", "within", "more"),
    [
        ("SGD", 0.1, torch.float64, 1e-9, {}),
        ("SGD", 0.1, torch.float32, 1e-5, {"distributed_backend": "spawn"}),
        ("Adam", 0.01, torch.float32, 1e-4, {"sync": "sharded"}),
    ],
    ids=["float64", "float32-spawn", "adam-sharded"],
)
def test_fit_is_that_of_one_process(
    optimizer: str, rate: float, dtype: torch.dtype, within: float, more: dict[str, Any]
) -> None:
    alone, shared = _pair(optimizer, rate, dtype)
    before, counts = list(shared.parameters()), _Counts()
    first = _fit(alone, 1, dtype)
    second = _fit(shared, 2, dtype, callbacks=[counts], **more)

    assert _furthest(alone, shared) <= within
    assert all(a is b for a, b in zip(before, shared.parameters(), strict=True))
    assert (second.global_step, second.current_epoch) == (first.global_step, first.current_epoch)
    expected = first.callback_metrics["loss"].item()
    assert second.callback_metrics["loss"].item() == pytest.approx(expected, abs=10 * within)
    assert (counts.epochs, counts.seen) == (3, [(0, 2)] * 3)
    moments = [one.optimizers[0].state_dict()["state"] for one in (first, second)]
    assert moments[0].keys() == moments[1].keys()
    for number, state in moments[0].items():
        for key, value in state.items():
            if value is not None:
                torch.testing.assert_close(moments[1][number][key], value, atol=within, rtol=1e-3)


def test_y_is_wx() -> None:
    class Line(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.w = torch.nn.Parameter(torch.ones(1))

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            return ((self.w * batch[0]) ** 2).mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.5)

    model = Line()
    data = TensorDataset(torch.tensor([0.0, 0.0, 1.0, 1.0]))
    Trainer(num_processes=2, max_epochs=2, **_QUIET).fit(model, DataLoader(data, batch_size=4))
    assert model.w.item() == 0.25


@pytest.mark.parametrize("call", ["validate", "test", "predict"])
def test_each_row_counts_once(call: str) -> None:
    model, _ = _pair("SGD", 0.1, torch.float64)
    one, two = (Trainer(num_processes=n, **_QUIET) for n in (1, 2))
    given = _loader(shuffle=False)
    alone, shared = (getattr(each, call)(model, given) for each in (one, two))
    if call == "predict":
        assert [len(batch) for batch in shared] == [32] * 12 + [17]
        torch.testing.assert_close(torch.cat(shared), torch.cat(alone), atol=1e-12, rtol=0)
    else:
        assert shared == [pytest.approx(alone[0], abs=1e-12)]


def test_the_users_exception_comes_as_itself_and_changes_nothing() -> None:
    model, before = _pair("SGD", 0.1, torch.float64, at_step="raise")
    with pytest.raises(_Odd, match="row 7") as raised:
        _fit(model, 2, torch.float64)
    assert isinstance(raised.value.__cause__, WorkerError)
    assert raised.value.__cause__.rank == 1
    assert _furthest(model, before) == 0


def test_a_killed_worker_is_noticed_and_changes_nothing() -> None:
    model, before = _pair("SGD", 0.1, torch.float64, at_step="kill")
    start = time.monotonic()
    with pytest.raises(WorkerLostError, match="SIGKILL"):
        _fit(model, 2, torch.float64)
    assert time.monotonic() - start < 60  # the start of workers on a busy machine included
    assert _furthest(model, before) == 0


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"num_processes": 2, "devices": 2}, ConfigError, "devices"),
        ({"num_processes": 2, "strategy": "ddp"}, ConfigError, "strategy"),
        ({"num_processes": 0}, ConfigError, "num_processes"),
        ({"num_processes": "2"}, ArgumentError, "num_processes"),
        ({"num_processes": 2, "distributed_backend": "ray"}, ConfigError, "distributed_backend"),
        ({"num_processes": 2, "sync": "none"}, ConfigError, "sync"),
        ({"num_processes": 2, "cpu_for_each_process": [[0]]}, ConfigError, "cpu_for_each"),
        ({"num_processes": 2, "cpu_for_each_process": [[0], []]}, ConfigError, "cpu_for_each"),
        ({"num_processes": 2, "cpu_for_each_process": [[0], [9999]]}, ConfigError, "9999"),
    ],
)
def test_misuse_is_answered_before_any_start(
    arguments: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        Trainer(**arguments)


def test_arguments_are_real_parameters() -> None:
    names = inspect.signature(Trainer.__init__).parameters
    ours = ("num_processes", "distributed_backend", "cpu_for_each_process", "auto_lr", "sync")
    assert all(name in names for name in ours)
