"""A killed run that resumes ends as the undisturbed run does, bit for bit."""

from __future__ import annotations

import random

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from bigdl.errors import StoredModelError
from bigdl.nano.pytorch import Plan, Trainer
from bigdl.nano.pytorch.lightning.session import Session
from bigdl.nano.pytorch.plan import streams
from bigdl.nano.pytorch.plan.rehearsal import Stage

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings(
        "ignore:The '.*_dataloader' does not have many workers",
        "ignore:The number of training batches",
        "ignore:`isinstance.treespec, LeafSpec.` is deprecated",
        "ignore:.*fork",
        "ignore:Your `IterableDataset` has `__len__` defined",
        "ignore:The dirpath has changed from",
        "ignore:This process .* is multi-threaded",
    ),
]

QUIET = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "accelerator": "cpu",
}
ROWS, BATCH = 24, 4


class Rows(Dataset):
    """Numbered rows; reads are noted, and may draw from the global streams."""

    def __init__(self, draws=False):
        self.draws = draws
        self.read = []

    def __len__(self):
        return ROWS

    def __getitem__(self, index):
        self.read.append(index)
        value = torch.full((3,), float(index))
        if self.draws:
            value = value + torch.rand(3) + random.random() + float(np.random.rand())
        return value / ROWS, index


class Noting(pl.LightningModule):
    """Dropout draws from the global stream; the rows of each step are noted."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.3), nn.Linear(8, 1))
        self.met = []

    def training_step(self, batch, batch_idx):
        x, index = batch
        self.met.append(tuple(index.tolist()))
        return (self.net(x).squeeze(1) - index / ROWS).square().mean()

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), 1e-2)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.7)]


class Save(pl.Callback):
    """Writes one checkpoint at a hook, and may end the run there."""

    def __init__(self, path, hook, step, *, ends=False):
        self.path, self.step, self.ends = path, step, ends
        setattr(self, hook, self._save)

    def _save(self, trainer, module, *args, **kwargs):
        if trainer.global_step == self.step and not trainer.sanity_checking:
            trainer.save_checkpoint(self.path)
            if self.ends:
                raise KilledError


class KilledError(Exception):
    pass


def make(loader, trainer_class=Trainer, callbacks=(), seed=5, **arguments):
    pl.seed_everything(seed, verbose=False)
    model = Noting()
    trainer = trainer_class(
        **(QUIET | {"max_epochs": 3, "callbacks": list(callbacks)} | arguments)
    )
    return trainer, model, loader()


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def undisturbed_and_resumed(make_loader, path, hook, step, **arguments):
    """(whole run's model, resumed run's model, its trainer)."""
    trainer, whole, loader = make(make_loader, **arguments)
    trainer.fit(whole, loader)
    after = torch.rand(2)

    trainer, broken, loader = make(
        make_loader, callbacks=[Save(path, hook, step, ends=True)], **arguments
    )
    with pytest.raises(KilledError):
        trainer.fit(broken, loader)
    # another process would have other streams
    trainer, resumed, loader = make(make_loader, seed=99, **arguments)
    trainer.fit(resumed, loader, ckpt_path=path, weights_only=True)
    assert torch.equal(torch.rand(2), after)
    return whole, broken, resumed, trainer


def shuffled(**more):
    return lambda: DataLoader(Rows(), batch_size=BATCH, **({"shuffle": True} | more))


def own_generator():
    return DataLoader(
        Rows(), batch_size=BATCH, shuffle=True, generator=torch.Generator().manual_seed(8)
    )


def own_sampler():
    return DataLoader(
        Rows(),
        batch_size=BATCH,
        sampler=RandomSampler(
            range(ROWS), generator=torch.Generator().manual_seed(4), replacement=True
        ),
    )


def numpy_sampler():
    class Sampler(torch.utils.data.Sampler):
        def __init__(self):
            self.rng = np.random.default_rng(3)
            self.old = random.Random(5)
            self.state = np.random.RandomState(6)

        def __len__(self):
            return ROWS

        def __iter__(self):
            order = self.rng.permutation(ROWS)
            shift = self.old.randrange(ROWS) + self.state.randint(ROWS)
            yield from ((order + shift) % ROWS).tolist()

    return DataLoader(Rows(), batch_size=BATCH, sampler=Sampler())


LOADERS = {
    "shuffled": shuffled(),
    "in order": shuffled(shuffle=False),
    "own generator": own_generator,
    "own sampler with replacement": own_sampler,
    "weighted": shuffled(shuffle=False, sampler=WeightedRandomSampler([1.0] * ROWS, ROWS)),
    "subset": shuffled(shuffle=False, sampler=SubsetRandomSampler(range(ROWS))),
    "sampler with NumPy's and Python's generators": numpy_sampler,
    "rows that draw": lambda: DataLoader(Rows(draws=True), batch_size=BATCH, shuffle=True),
    "drop_last": lambda: DataLoader(Rows(), batch_size=5, shuffle=True, drop_last=True),
}


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("step", [2, 8])
def test_broken_in_mid_epoch(name, step, tmp_path):
    whole, broken, resumed, trainer = undisturbed_and_resumed(
        LOADERS[name], tmp_path / "c.ckpt", "on_train_batch_end", step
    )
    assert broken.met + resumed.met == whole.met
    assert torch.equal(weights(resumed), weights(whole))
    assert trainer.global_step == len(whole.met)


def test_rows_that_were_trained_on_are_not_read_again(tmp_path):
    loaders = []

    def make_loader():
        loaders.append(DataLoader(Rows(), batch_size=BATCH, shuffle=True))
        return loaders[-1]

    undisturbed_and_resumed(make_loader, tmp_path / "c.ckpt", "on_train_batch_end", 8)
    whole, _, resumed = (loader.dataset.read for loader in loaders)
    assert resumed == whole[8 * BATCH :]


class Stream(IterableDataset):
    def __iter__(self):
        for index in range(ROWS):
            yield torch.full((3,), index / ROWS), index


class SizedStream(Stream):
    def __len__(self):
        return ROWS


@pytest.mark.parametrize("kind", [Stream, SizedStream])
def test_streams_go_on_at_the_next_row(kind, tmp_path):
    whole, broken, resumed, _ = undisturbed_and_resumed(
        lambda: DataLoader(kind(), batch_size=BATCH), tmp_path / "c.ckpt", "on_train_batch_end", 8
    )
    assert broken.met + resumed.met == whole.met
    assert torch.equal(weights(resumed), weights(whole))


class Drawing(Dataset):
    """Each worker process draws for its rows."""

    def __len__(self):
        return ROWS

    def __getitem__(self, index):
        return torch.full((3,), index / ROWS) + torch.rand(3), index


def test_worker_processes_draw_as_they_would_have(tmp_path):
    def make_loader():
        return DataLoader(Drawing(), batch_size=BATCH, shuffle=True, num_workers=2)

    whole, broken, resumed, _ = undisturbed_and_resumed(
        make_loader, tmp_path / "c.ckpt", "on_train_batch_end", 8, max_epochs=2
    )
    assert broken.met + resumed.met == whole.met
    assert torch.equal(weights(resumed), weights(whole))


def test_several_loaders_of_unequal_length(tmp_path):
    class Two(Noting):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch[0], batch_idx) + super().training_step(
                batch[1], batch_idx
            )

    from pytorch_lightning.utilities import CombinedLoader

    def make_loader():
        short = torch.utils.data.Subset(Rows(), range(8))
        return CombinedLoader(
            [shuffled()(), DataLoader(short, batch_size=BATCH, shuffle=True)], "max_size_cycle"
        )

    runs = []
    for ends in (False, True):
        save = Save(tmp_path / "c.ckpt", "on_train_batch_end", 9, ends=ends)
        pl.seed_everything(5, verbose=False)
        model = Two()
        trainer = Trainer(**QUIET, max_epochs=2, callbacks=[save])
        if ends:
            with pytest.raises(KilledError):
                trainer.fit(model, make_loader())
        else:
            trainer.fit(model, make_loader())
        runs.append(model)
    pl.seed_everything(99, verbose=False)
    resumed = Two()
    Trainer(**QUIET, max_epochs=2).fit(resumed, make_loader(), ckpt_path=tmp_path / "c.ckpt")
    whole, broken = runs
    assert broken.met + resumed.met == whole.met
    assert torch.equal(weights(resumed), weights(whole))


@pytest.mark.parametrize(
    "hook", ["on_train_epoch_end", "on_train_epoch_start", "on_train_batch_start"]
)
def test_other_hooks_that_save(hook, tmp_path):
    step = {"on_train_epoch_end": 6, "on_train_epoch_start": 6, "on_train_batch_start": 8}[hook]
    whole, broken, resumed, _ = undisturbed_and_resumed(
        LOADERS["shuffled"], tmp_path / "c.ckpt", hook, step
    )
    assert broken.met + resumed.met == whole.met
    assert torch.equal(weights(resumed), weights(whole))


def test_lightnings_own_checkpoints_with_validation(tmp_path):
    class Validated(Noting):
        def validation_step(self, batch, batch_idx):
            self.log("val", self.net(batch[0]).mean())

        def val_dataloader(self):
            return DataLoader(Rows(), batch_size=BATCH)

    def fit(directory, **more):
        saver = pl.callbacks.ModelCheckpoint(
            directory, every_n_train_steps=4, save_top_k=-1, filename="{step}"
        )
        pl.seed_everything(5, verbose=False)
        model = Validated()
        trainer = Trainer(
            **(QUIET | {"enable_checkpointing": True, "callbacks": [saver], "max_epochs": 3}),
            val_check_interval=3,
        )
        trainer.fit(model, shuffled()(), **more)
        return model

    whole = fit(tmp_path / "whole")
    for step in (4, 8, 12, 16):
        (file,) = (tmp_path / "whole").glob(f"step={step}.ckpt")
        resumed = fit(tmp_path / f"again-{step}", ckpt_path=file)
        assert resumed.met == whole.met[step:], step
        assert torch.equal(weights(resumed), weights(whole)), step


@pytest.mark.parametrize("step", [1, 2, 3])
def test_between_two_updates_of_an_accumulation(step, tmp_path):
    """24 rows, 6 batches, two to an update; saved after an odd batch."""

    class AtBatch(Save):
        def _save(self, trainer, module, *args, **kwargs):
            if trainer.fit_loop.total_batch_idx == 2 * step:
                trainer.save_checkpoint(self.path)
                raise KilledError

    path = tmp_path / "c.ckpt"
    more = {"accumulate_grad_batches": 2}
    trainer, whole, loader = make(shuffled(), **more)
    trainer.fit(whole, loader)
    trainer, broken, loader = make(
        shuffled(), callbacks=[AtBatch(path, "on_train_batch_end", 0)], **more
    )
    with pytest.raises(KilledError):
        trainer.fit(broken, loader)
    trainer, resumed, loader = make(shuffled(), seed=99, **more)
    trainer.fit(resumed, loader, ckpt_path=path)
    assert broken.met + resumed.met == whole.met
    assert torch.equal(weights(resumed), weights(whole))


def test_a_run_resumed_twice(tmp_path):
    first, second = tmp_path / "1.ckpt", tmp_path / "2.ckpt"
    trainer, whole, loader = make(shuffled())
    trainer.fit(whole, loader)
    trainer, model, loader = make(
        shuffled(), callbacks=[Save(first, "on_train_batch_end", 2, ends=True)]
    )
    with pytest.raises(KilledError):
        trainer.fit(model, loader)
    trainer, model, loader = make(
        shuffled(), callbacks=[Save(second, "on_train_batch_end", 4, ends=True)], seed=98
    )
    with pytest.raises(KilledError):
        trainer.fit(model, loader, ckpt_path=first)
    trainer, model, loader = make(shuffled(), seed=99)
    trainer.fit(model, loader, ckpt_path=second)
    assert torch.equal(weights(model), weights(whole))


# --- interchangeable --------------------------------------------------------------------------


def test_checkpoints_go_both_ways(tmp_path):
    """Ours in stock Lightning with weights_only=True, stock ones in ours."""
    path = tmp_path / "ours.ckpt"
    trainer, ours, loader = make(
        shuffled(), callbacks=[Save(path, "on_train_epoch_end", 6)], acceleration="auto"
    )
    trainer.fit(ours, loader)
    stored = torch.load(path, weights_only=True)
    assert set(stored) - {"bigdl"} == {
        "epoch", "global_step", "pytorch-lightning_version", "state_dict", "loops", "callbacks",
        "optimizer_states", "lr_schedulers",
    }  # fmt: skip
    trainer, stock, loader = make(shuffled(), pl.Trainer)
    trainer.fit(stock, loader, ckpt_path=path, weights_only=True)
    assert len(stock.met) == 12

    path = tmp_path / "stock.ckpt"
    trainer, stock, loader = make(
        shuffled(), pl.Trainer, callbacks=[Save(path, "on_train_epoch_end", 6)]
    )
    trainer.fit(stock, loader)
    trainer, again, loader = make(shuffled(), seed=99)
    trainer.fit(again, loader, ckpt_path=path, weights_only=True)
    assert len(again.met) == 12


def test_stock_resumes_ours_as_its_own(tmp_path):
    """Stock from our checkpoint ends as stock from its own."""
    ends = []
    for kind in (Trainer, pl.Trainer):
        path = tmp_path / f"{kind.__module__}.ckpt"
        trainer, model, loader = make(
            shuffled(), kind, callbacks=[Save(path, "on_train_epoch_end", 6)]
        )
        trainer.fit(model, loader)
        trainer, model, loader = make(shuffled(), pl.Trainer, seed=99)
        trainer.fit(model, loader, ckpt_path=path)
        ends.append(weights(model))
    assert torch.equal(*ends)


def test_a_weights_only_checkpoint_has_no_streams(tmp_path):
    trainer, model, loader = make(shuffled(), max_epochs=1)
    trainer.fit(model, loader)
    trainer.save_checkpoint(tmp_path / "w.ckpt", weights_only=True)
    stored = torch.load(tmp_path / "w.ckpt", weights_only=True)
    assert "data" not in stored["bigdl"]
    assert "optimizer_states" not in stored


def test_users_flags_are_in_the_checkpoint(tmp_path):
    path = tmp_path / "c.ckpt"
    trainer, model, loader = make(
        shuffled(),
        callbacks=[Save(path, "on_train_batch_end", 8)],
        acceleration=Plan.of("fused_optimizer"),
    )
    trainer.fit(model, loader)
    stored = torch.load(path, weights_only=True)
    assert stored["optimizer_states"][0]["param_groups"][0]["fused"] is None


@pytest.mark.usefixtures("bf16")
def test_a_plan_travels_in_checkpoints(tmp_path, monkeypatch):
    def seconds(self, batches):
        self._perform(batches[0])
        return 0.01 * 0.5 ** len(self.force.names)

    monkeypatch.setattr(Stage, "seconds", seconds)
    monkeypatch.setattr(Session, "_allowed_s", lambda self, choice: float("inf"))
    monkeypatch.setattr(Session, "_is_measured", lambda self: len(self._steps) >= 2)
    monkeypatch.setattr(Session, "_own_s", 0.01)
    path = tmp_path / "c.ckpt"
    trainer, model, loader = make(shuffled(), callbacks=[Save(path, "on_train_batch_end", 8)])
    trainer.fit(model, loader)
    chosen = trainer.plan.chosen
    assert chosen, str(trainer.plan)

    def never(*args):
        raise AssertionError("timed")

    monkeypatch.setattr(Stage, "seconds", never)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another machine's"))
    trainer, model, loader = make(shuffled(), seed=99)
    trainer.fit(model, loader, ckpt_path=path)
    assert trainer.plan.chosen == chosen
    assert "measured in an earlier run" in trainer.plan.row("original").reason


def test_a_plan_of_another_version_is_no_reason_not_to_resume(tmp_path, caplog):
    path = tmp_path / "c.ckpt"
    trainer, model, loader = make(shuffled(), callbacks=[Save(path, "on_train_batch_end", 8)])
    trainer.fit(model, loader)
    stored = torch.load(path, weights_only=True)
    stored["bigdl"]["plan"] = {"key": "k", "json": '{"rows": [{"name": "warp_drive"}]}'}
    torch.save(stored, path)
    trainer, model, loader = make(shuffled(), seed=99)
    with caplog.at_level("INFO", "bigdl"):
        trainer.fit(model, loader, ckpt_path=path, weights_only=True)
    assert "plan cannot be read" in caplog.text
    assert trainer.global_step == 18


def test_a_checkpoint_of_another_kind_of_loader_is_an_error(tmp_path):
    path = tmp_path / "c.ckpt"
    trainer, model, loader = make(
        own_generator, callbacks=[Save(path, "on_train_batch_end", 8, ends=True)]
    )
    with pytest.raises(KilledError):
        trainer.fit(model, loader)
    trainer, model, loader = make(shuffled())
    with pytest.raises(StoredModelError, match=r"made with 1 random generators.*these have 0"):
        trainer.fit(model, loader, ckpt_path=path)


def test_a_checkpoint_of_a_version_to_come_is_an_error(tmp_path):
    path = tmp_path / "c.ckpt"
    trainer, model, loader = make(shuffled(), callbacks=[Save(path, "on_train_batch_end", 8)])
    trainer.fit(model, loader)
    stored = torch.load(path, weights_only=True)
    stored["bigdl"]["schema_version"] = 99
    torch.save(stored, path)
    trainer, model, loader = make(shuffled())
    with pytest.raises(StoredModelError, match="schema 99"):
        trainer.fit(model, loader, ckpt_path=path)


# --- streams ----------------------------------------------------------------------------------


def draw():
    return random.random(), float(np.random.rand()), float(np.random.randn()), torch.rand(1).item()


def test_streams_are_put_back_after_a_trip_through_a_file(tmp_path):
    np.random.randn()  # leaves a second normal number waiting
    random.gauss(0, 1)
    torch.save(streams.read(), tmp_path / "s.pt")
    first = draw(), random.gauss(0, 1)
    streams.write(torch.load(tmp_path / "s.pt", weights_only=True))
    assert (draw(), random.gauss(0, 1)) == first


def test_equal_streams_and_others():
    state = streams.read()
    assert streams.same(state, streams.read())
    for draws in (random.random, np.random.rand, lambda: torch.rand(1)):
        with streams.kept():
            draws()
            assert not streams.same(state, streams.read())
    assert streams.same(state, streams.read())
