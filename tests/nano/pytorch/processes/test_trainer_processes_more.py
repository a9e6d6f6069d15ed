"""Trainer(num_processes=): the many ways to train, measure and resume, against one process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torchmetrics
from pytorch_lightning.callbacks import BaseFinetuning, BasePredictionWriter, ModelCheckpoint
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    TensorDataset,
    WeightedRandomSampler,
)

from bigdl.errors import ConfigError, DataError, WorkerError
from bigdl.nano.pytorch import Trainer

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="worker processes, cores"),
    pytest.mark.filterwarnings(
        "ignore:The '(train|val|test|predict)_dataloader' does not have many workers",
        "ignore:The number of training batches",
        "ignore:You're resuming from a checkpoint that ended before the epoch",
        "ignore:predict returned None if it was on purpose",
        "ignore:`isinstance.treespec, LeafSpec.` is deprecated",
        "ignore:You defined a `validation_step` but have no `val_dataloader`",
    ),
]

SLOW = pytest.mark.slow

QUIET: dict[str, Any] = {
    "acceleration": "off",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}

ROWS = torch.randn(401, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
KINDS = (ROWS[:, 0] > 0).long() + (ROWS[:, 1] > 0).long()
DATA = TensorDataset(ROWS, KINDS)


class Stream(IterableDataset):
    """Rows in an order drawn from the global stream."""

    def __iter__(self) -> Any:
        for row in torch.randperm(401).tolist():
            yield ROWS[row], KINDS[row]


class Net(pl.LightningModule):
    """Logs by the step, by the epoch, through metrics of each sort, and by hand."""

    def __init__(self, optimizer: str = "SGD", manual: bool = False) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()
        self.optimizer, self.automatic_optimization = optimizer, not manual
        classes = torchmetrics.classification
        self.accuracy = classes.MulticlassAccuracy(3, average="micro")
        self.f1 = classes.MulticlassF1Score(3)
        self.auc = classes.MulticlassAUROC(3)  # keeps every row
        self.by_hand = torchmetrics.MeanMetric()

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        x, y = batch
        output = self.net(x)
        loss = nn.functional.cross_entropy(output, y)
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.accuracy(output, y)
        self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            nn.utils.clip_grad_norm_(self.parameters(), 0.05)
            optimizer.step()
        return loss

    def validation_step(self, batch: Any, index: int) -> None:
        x, y = batch
        output = self.net(x)
        self.log("val_loss", nn.functional.cross_entropy(output, y))
        self.log("val_largest", output.max(), reduce_fx="max")
        for name in ("f1", "auc"):
            metric = getattr(self, name)
            metric.update(output, y)
            self.log(f"val_{name}", metric)
        self.by_hand.update(output.sum(1))

    def on_validation_epoch_end(self) -> None:
        self.log("val_by_hand", self.by_hand.compute())
        self.by_hand.reset()

    def predict_step(self, batch: Any, index: int) -> Any:
        return self.net(batch[0])

    def configure_optimizers(self) -> Any:
        kind = getattr(torch.optim, self.optimizer)
        more = (
            {"max_iter": 4, "line_search_fn": "strong_wolfe"} if kind.__name__ == "LBFGS" else {}
        )
        optimizer = kind(self.parameters(), lr=0.05, **more)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return {"optimizer": optimizer, "lr_scheduler": scheduler}


def loader(kind: str = "plain") -> Any:
    """50 rows a batch: the last batch has one row, and none for the second process."""
    if kind == "stream":
        return DataLoader(Stream(), batch_size=50)
    if kind == "batch_sampler":
        order = WeightedRandomSampler(torch.ones(401), 401)
        return DataLoader(DATA, batch_sampler=BatchSampler(order, 37, drop_last=True))
    more: dict[str, Any] = {}
    if kind == "loader_workers":
        more["num_workers"] = 1
    if kind == "generator":
        more["generator"] = torch.Generator().manual_seed(9)
    return DataLoader(DATA, batch_size=50, shuffle=True, **more)


def fit(processes: int, kind: str = "plain", model: Any = None, **arguments: Any) -> Any:
    torch.manual_seed(0)
    made = Net() if model is None else model()
    ckpt_path = arguments.pop("ckpt_path", None)
    trainer = Trainer(**{**QUIET, "num_processes": processes, "max_epochs": 2, **arguments})
    torch.manual_seed(5)
    given = loader(kind)
    trainer.fit(made, given, DataLoader(DATA, batch_size=50), ckpt_path=ckpt_path)
    generator = getattr(given, "generator", None)
    drawn = torch.rand(1), None if generator is None else torch.rand(1, generator=generator)
    return trainer, made, drawn


def distance(one: nn.Module, other: nn.Module) -> float:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)


# --- the same numbers -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("processes", "kind", "optimizer", "manual", "arguments"),
    [
        (3, "plain", "SGD", False, {}),
        (2, "loader_workers", "Adam", False, {"accumulate_grad_batches": 3}),
        (2, "batch_sampler", "SGD", True, {}),
        pytest.param(2, "generator", "SGD", False, {"gradient_clip_val": 0.05}, marks=SLOW),
        pytest.param(2, "stream", "SGD", False, {"gradient_clip_val": 0.01,
                     "gradient_clip_algorithm": "value"}, marks=SLOW),
        pytest.param(2, "plain", "LBFGS", False, {"max_steps": 7}, marks=SLOW),
        pytest.param(2, "plain", "Adam", False,
                     {"sync": "sharded", "gradient_clip_val": 0.05}, marks=SLOW),
    ],
)  # fmt: skip
def test_training_and_all_that_is_logged_are_those_of_one_process(
    processes, kind, optimizer, manual, arguments
):
    model = lambda: Net(optimizer, manual)  # noqa: E731
    alone, one, drawn = fit(1, kind, model, **{k: v for k, v in arguments.items() if k != "sync"})
    shared, other, drawn_too = fit(processes, kind, model, **arguments)
    assert distance(one, other) < 1e-9
    assert shared.callback_metrics.keys() == alone.callback_metrics.keys()
    for name, value in alone.callback_metrics.items():
        assert shared.callback_metrics[name].item() == pytest.approx(value.item(), abs=1e-6), name
    assert drawn == drawn_too  # the next epoch's order is that of one process, too


@SLOW
def test_several_loaders_and_a_second_fit():
    class Two(Net):
        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            losses = [
                nn.functional.cross_entropy(self.net(x), y) for x, y in (batch["a"], batch["b"])
            ]
            return losses[0] + 2 * losses[1]

    models = []
    for processes in (1, 2):
        torch.manual_seed(0)
        model = Two("Adam")
        both = {
            name: DataLoader(DATA, batch_size=40, shuffle=True, drop_last=True) for name in "ab"
        }
        trainer = Trainer(**QUIET, num_processes=processes, max_epochs=1)
        trainer.fit(model, both)
        trainer.fit_loop.max_epochs = 2
        trainer.fit(model, both)
        assert (trainer.current_epoch, trainer.global_step) == (2, 20)
        models.append(model)
    assert distance(*models) < 1e-9


def test_a_compiled_module_with_the_callers_own_optimizer():
    seen = []
    for processes in (1, 2):
        torch.manual_seed(0)
        net = nn.Linear(5, 3).double()
        optimizer = torch.optim.Adam(net.parameters(), lr=0.05)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        model = Trainer.compile(net, nn.CrossEntropyLoss(), optimizer, scheduler)
        trainer = Trainer(**QUIET, num_processes=processes, max_epochs=2)
        trainer.fit(model, DataLoader(DATA, batch_size=50))
        assert trainer.optimizers[0] is optimizer
        state = optimizer.state[net.weight]
        rate = optimizer.param_groups[0]["lr"]
        seen.append((net.weight.detach(), state["exp_avg"], state["step"], rate))
        assert scheduler.last_epoch == 2
    for one, other in zip(*seen, strict=True):
        assert torch.allclose(torch.as_tensor(one), torch.as_tensor(other), atol=1e-9)


class Thaw(BaseFinetuning):
    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.net[0])

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net[0], optimizer, lr=0.01)


class Thawing(Net):
    def configure_optimizers(self) -> Any:
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=0.05)


def test_parameters_that_are_unfrozen_later():
    _, one, _ = fit(1, model=Thawing, callbacks=[Thaw()])
    _, other, _ = fit(2, model=Thawing, callbacks=[Thaw()])
    assert distance(one, other) < 1e-9
    with pytest.raises(ConfigError, match="unfrozen"):
        fit(2, model=Thawing, callbacks=[Thaw()], sync="sharded")


# --- checkpoints ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        ("plain", {}),
        pytest.param("stream", {}, marks=SLOW),
        # gradients on their way to an update
        pytest.param("plain", {"accumulate_grad_batches": 3}, marks=SLOW),
        pytest.param("plain", {"sync": "sharded"}, marks=SLOW),
    ],
)
def test_a_checkpoint_within_an_epoch_resumes_with_any_number_of_processes(
    tmp_path, kind, arguments
):
    class Saves(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *rest: Any) -> None:
            if trainer.fit_loop.epoch_loop.total_batch_idx == 12:
                trainer.save_checkpoint(tmp_path / "within.ckpt")

    model = lambda: Net("Adam")  # noqa: E731
    _, whole, _ = fit(2, kind, model, callbacks=[Saves()], **arguments)
    path = str(tmp_path / "within.ckpt")
    torch.load(path, weights_only=True)
    for processes in (1, 2, 3):
        kept = {k: v for k, v in arguments.items() if k != "sync" or processes > 1}
        _, resumed, _ = fit(processes, kind, model, ckpt_path=path, **kept)
        assert distance(whole, resumed) < 1e-9
    stock = pl.Trainer(**{k: v for k, v in QUIET.items() if k != "acceleration"}, max_epochs=2)
    stock.fit(model(), loader(kind), ckpt_path=path)


def test_paths_of_checkpoints_come_back_and_serve(tmp_path):
    best = ModelCheckpoint(tmp_path, monitor="val_loss", save_last=True)
    arguments = {"enable_checkpointing": True, "callbacks": [best]}
    trainer, model, _ = fit(2, **arguments)
    assert trainer.checkpoint_callback is best
    assert Path(best.best_model_path).exists()
    assert Path(best.last_model_path).exists()
    found = trainer.validate(
        model, DataLoader(DATA, batch_size=50), ckpt_path="best", verbose=False
    )
    assert found[0]["val_loss"] == pytest.approx(best.best_model_score.item())


# --- predictions ------------------------------------------------------------------------------


class Says(Net):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def predict_step(self, batch: Any, index: int, dataloader_idx: int = 0) -> Any:
        output = self.net(batch[0])
        kinds: dict[str, Any] = {
            "nest": {"all": output, "parts": (output.argmax(1), output.numpy())},
            "words": [f"{value:.6f}" for value in output[:, 0].tolist()],
            "rows": list(output),
            "nothing": None,
            "mean": output.mean(),
            "by_column": output.mean(0),
        }
        return kinds[self.kind]


@pytest.mark.parametrize(
    "kind",
    ["nest", "rows", pytest.param("words", marks=SLOW), pytest.param("nothing", marks=SLOW)],
)
def test_predictions_of_any_kind_of_two_loaders(kind):
    model = Says(kind)
    given = [DataLoader(DATA, batch_size=50), DataLoader(TensorDataset(ROWS[:7]), batch_size=3)]
    one, two = (Trainer(**QUIET, num_processes=n).predict(model, given) for n in (1, 2))
    assert [len(batches) for batches in two] == [9, 3]
    assert_same(two, one)


def assert_same(one: Any, other: Any) -> None:
    assert type(one) is type(other)
    if isinstance(one, (list, tuple)):
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif hasattr(one, "shape"):
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), atol=1e-12)
    else:
        assert one == other


class Writes(BasePredictionWriter):
    """Of each process: which rows it says to have predicted."""

    def __init__(self, folder: Path) -> None:
        super().__init__("batch")
        self.folder = folder

    def write_on_batch_end(
        self, trainer: Any, pl_module: Any, prediction: Any, batch_indices: Any, *rest: Any
    ) -> None:
        with (self.folder / f"of_{trainer.global_rank}").open("a") as file:
            for row, value in zip(batch_indices, prediction, strict=True):
                file.write(f"{row} {value[0].item()!r}\n")


def test_a_prediction_writer_gets_the_rows_of_its_process(tmp_path):
    model = Net()
    given = DataLoader(DATA, batch_size=70)
    trainer = Trainer(**QUIET, num_processes=2, callbacks=[Writes(tmp_path)])
    trainer.predict(model, given)
    lines = [(tmp_path / f"of_{rank}").read_text().splitlines() for rank in (0, 1)]
    written = {int(row): float(value) for one in lines for row, value in map(str.split, one)}
    assert len(lines[0]) + len(lines[1]) == len(written) == 401
    values = model.net(ROWS)[:, 0].tolist()
    assert [written[row] for row in range(401)] == pytest.approx(values)


@pytest.mark.parametrize("kind", ["mean", "by_column"])
def test_predictions_without_rows_are_an_error(kind):
    with pytest.raises(DataError, match="rows"):
        Trainer(**QUIET, num_processes=2).predict(Says(kind), DataLoader(DATA, batch_size=50))


# --- arguments --------------------------------------------------------------------------------


class Looks(pl.Callback):
    """What a worker's process is like, of every rank."""

    def __init__(self) -> None:
        self.seen: Any = None
        self.rates: list[float] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        mine = (os.getpid(), os.sched_getaffinity(0), torch.get_num_threads())
        mask = nn.functional.dropout(torch.ones(64))
        self.seen = [trainer.strategy.broadcast((*mine, mask), rank) for rank in (0, 1)]

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])


@pytest.mark.parametrize("backend", ["subprocess", "spawn"])
def test_cores_threads_and_streams_are_each_processs_own(backend):
    cores = sorted(os.sched_getaffinity(0))
    lists = [cores[:1], cores[-1:]]
    looks = Looks()
    fit(2, callbacks=[looks], cpu_for_each_process=lists, distributed_backend=backend)
    pids, found, threads, masks = zip(*looks.seen, strict=True)
    assert len({*pids, os.getpid()}) == 3
    assert [sorted(one) for one in found] == lists
    assert threads == (1, 1)
    assert not torch.equal(*masks)  # rows of different processes are dropped differently


def test_auto_lr_rises_and_then_follows_the_schedule():
    looks = Looks()
    trainer, _, _ = fit(2, callbacks=[looks], auto_lr=True, max_epochs=4)
    assert len(looks.rates) == 36
    rise = 3.6
    for step, rate in enumerate(looks.rates):
        factor = 1 + min(1.0, (step + 1) / rise)
        assert rate == pytest.approx(0.05 * 0.9 ** (step // 9) * factor)
    # what is kept is the schedule's
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.05 * 0.9**4)


@SLOW
def test_auto_lr_has_to_know_the_length():
    with pytest.raises(ConfigError, match="max_steps"):
        fit(2, "stream", auto_lr=True)


def test_manual_optimization_refuses_a_batch_with_too_few_rows():
    with pytest.raises(DataError, match="drop_last"):
        fit(2, model=lambda: Net(manual=True))


def test_the_plan_says_that_nothing_is_tried():
    trainer, _, _ = fit(2, acceleration="auto", max_epochs=1)
    assert trainer.plan.chosen == ()
    assert trainer.plan.row("original").status == "chosen"
    assert trainer.plan.row("processes").status == "skipped"


# --- what the caller has afterwards -----------------------------------------------------------


class Late(Net):
    """Makes in the worker what cannot travel, and what can."""

    def setup(self, stage: str) -> None:
        self.lock = threading.Lock()
        self.head = nn.Linear(2, 2)
        self.stages = [stage]


def test_what_is_made_in_setup_comes_back_unless_it_cannot_travel():
    _, model, _ = fit(2, model=Late)
    assert model.stages == ["fit"]
    assert model.head.weight.shape == (2, 2)
    assert not hasattr(model, "lock")


class Locked(Net):
    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


def test_what_cannot_be_sent_is_named():
    with pytest.raises(ConfigError, match=r"lock.*setup"):
        fit(2, model=Locked)


class Prepared(pl.LightningDataModule):
    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def prepare_data(self) -> None:
        time.sleep(0.2)
        with (self.folder / "prepared").open("a") as file:
            file.write("once")

    def setup(self, stage: str) -> None:
        assert (self.folder / "prepared").read_text() == "once"

    def train_dataloader(self) -> Any:
        return loader()


def test_prepare_data_runs_once_before_any_setup(tmp_path):
    Trainer(**QUIET, num_processes=2, max_epochs=1).fit(Net(), datamodule=Prepared(tmp_path))
    assert (tmp_path / "prepared").read_text() == "once"


class Normed(Net):
    """With a layer that looks across rows."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 3)).double()


class Means(pl.Callback):
    """The running means of every process, where they have to be the same."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def on_validation_batch_start(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
        mine = pl_module.net[0].running_mean.clone()
        self.seen += [trainer.strategy.broadcast(mine, rank) for rank in (0, 1)]


@SLOW
def test_running_means_are_rank_0s_wherever_they_are_read():
    means = Means()
    _, model, _ = fit(2, "batch_sampler", model=Normed, callbacks=[means])
    assert torch.equal(means.seen[0], means.seen[1])
    assert torch.equal(means.seen[-2], means.seen[-1])
    assert torch.equal(means.seen[-1], model.net[0].running_mean)
    assert model.net[0].num_batches_tracked == 20


@SLOW
@pytest.mark.xfail(
    strict=True,
    raises=AssertionError,
    reason="batch norm takes its statistics from the rows of its own process",
)
def test_batch_norm_as_in_one_process():
    _, one, _ = fit(1, "batch_sampler", model=Normed)
    _, other, _ = fit(2, "batch_sampler", model=Normed)
    assert distance(one, other) < 1e-9


# --- its end ----------------------------------------------------------------------------------

_PROGRAM = """
import os, sys, time
import torch
import pytorch_lightning as pl
from torch.utils.data import DataLoader, TensorDataset
from bigdl.nano.pytorch import Trainer

class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.line = torch.nn.Linear(4, 1)

    def training_step(self, batch, index):
        if index == 2:
            with open("pids", "a") as file:
                file.write(f"{os.getpid()}\\n")
        time.sleep(PAUSE)
        return self.line(batch[0]).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

net = Net()
try:
    Trainer(num_processes=2, max_epochs=1, logger=False, enable_progress_bar=False,
            enable_checkpointing=False, enable_model_summary=False, acceleration="off").fit(
        net, DataLoader(TensorDataset(torch.randn(4000, 4)), batch_size=400))
except KeyboardInterrupt:
    print("interrupted")
    sys.exit(5)
print("done", net.trainer.global_step)
"""


def test_a_program_from_a_pipe_needs_no_file_and_no_guard(tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "ignore"],
        input=_PROGRAM.replace("PAUSE", "0"),
        cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert "done 10" in done.stdout, done.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 5), (signal.SIGKILL, -9)])
def test_when_the_program_ends_the_workers_end(tmp_path, number, code):
    program = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", _PROGRAM.replace("PAUSE", "0.3")],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    pids = tmp_path / "pids"
    deadline = time.monotonic() + 90
    while not pids.exists() or len(pids.read_text().splitlines()) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    program.send_signal(number)
    program.communicate(timeout=30)
    assert program.returncode == code
    workers = [int(line) for line in pids.read_text().splitlines()]
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in workers) or list(tmp_path.glob("bigdl-*")):
        assert time.monotonic() < deadline
        time.sleep(0.1)


@SLOW
def test_an_error_in_setting_up_comes_as_itself():
    class Broken(Net):
        def configure_optimizers(self) -> Any:
            raise LookupError("no optimizer")

    with pytest.raises(LookupError, match="no optimizer") as raised:
        fit(2, model=Broken)
    assert isinstance(raised.value.__cause__, WorkerError)
