"""Reading ahead: every row once and in order, and nothing that a program could notice."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler

from bigdl.nano.pytorch.plan import on_run
from bigdl.nano.pytorch.plan.candidates import Applied, Scene, candidate
from bigdl.nano.pytorch.plan.on_run import TrialOnRun
from bigdl.nano.pytorch.plan.prefetching import Prefetch


class Rows(Dataset):
    def __init__(self, count=22, *, draws=False, broken=None, seconds=0.0):
        self.count, self.draws, self.broken, self.seconds = count, draws, broken, seconds
        self.read, self.threads = [], []

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        self.read.append(index)
        self.threads.append(threading.current_thread().name)
        if index == self.broken:
            raise OSError(f"row {index} is broken")
        if self.draws:
            torch.rand(1)
        time.sleep(self.seconds)
        return torch.tensor([float(index)])


def scene(readers, **facts):
    return Scene(
        module=torch.nn.Linear(1, 1),
        optimizers=(),
        batch=None,
        steps_left=None,
        epochs_left=None,
        deterministic=False,
        device=torch.device("cpu"),
        readers=readers,
        **facts,
    )


def ahead(*iterators):
    it = scene(lambda: list(iterators))
    assert Prefetch().refuse(it) is None
    return Prefetch().apply(it.module, (), it)


def numbers(batches):
    return [int(row) for batch in batches for row in batch]


@pytest.mark.parametrize("batch_size", [4, 1, None])
@pytest.mark.parametrize("shuffle", [False, True])
def test_same_rows_in_the_same_order_each_read_once(batch_size, shuffle):
    def loader(rows):
        return DataLoader(
            rows,
            batch_size,
            shuffle=shuffle,
            generator=torch.Generator().manual_seed(3) if shuffle else None,
        )

    expected, rows = numbers(loader(Rows())), Rows()
    iterator = iter(loader(rows))
    applied = ahead(iterator)
    assert numbers(iterator) == expected
    applied.undo()
    assert sorted(rows.read) == list(range(22))
    assert any(name.startswith("bigdl-prefetch") for name in rows.threads)
    assert applied.is_proven
    assert applied.problem is None


@pytest.mark.parametrize("after", range(7))
def test_undone_in_mid_epoch_nothing_is_lost_or_read_twice(after):
    rows = Rows()
    iterator = iter(DataLoader(rows, 3))
    fetcher = iterator._dataset_fetcher
    applied = ahead(iterator)
    seen = [next(iterator) for _ in range(after)]
    applied.undo()
    applied.undo()
    seen.extend(iterator)
    assert numbers(seen) == rows.read == list(range(22))
    assert iterator._dataset_fetcher is fetcher
    assert not [t for t in threading.enumerate() if t.name.startswith("bigdl-prefetch")]


def test_rows_that_draw_are_noticed_before_anything_is_read_ahead():
    rows = Rows(draws=True)
    iterator = iter(DataLoader(rows, 2))
    applied = ahead(iterator)
    assert numbers(iterator) == list(range(22))
    assert "draws random numbers" in applied.problem
    assert set(rows.threads) == {threading.current_thread().name}
    applied.undo()


def test_a_broken_row_fails_where_it_would_have_failed():
    iterator = iter(DataLoader(Rows(broken=12), 2))
    applied = ahead(iterator)
    assert numbers(next(iterator) for _ in range(6)) == list(range(12))
    with pytest.raises(OSError, match="row 12 is broken"):
        next(iterator)
    applied.undo()


class Stream(IterableDataset):
    def __iter__(self):
        return iter([torch.zeros(1)] * 4)


@pytest.mark.parametrize(
    ("loader", "facts", "reason"),
    [
        (lambda: DataLoader(Stream(), 2), {}, "stream"),
        (
            lambda: DataLoader(Rows(), 2, sampler=RandomSampler(Rows(), replacement=True)),
            {},
            "RandomSampler may choose",
        ),
        (lambda: DataLoader(Rows(), batch_sampler=[[1, 2], [3]]), {}, "list may choose"),
        (lambda: DataLoader(Rows(), 2), {"loader_share": 0.01}, "1.0% of a step's time"),
        (lambda: [1, 2], {}, "stream"),
    ],
)
def test_refuses(loader, facts, reason):
    iterator = iter(loader())
    assert reason in Prefetch().refuse(scene(lambda: [iterator], **facts))


def test_refuses_without_a_loader():
    assert "loader of this run" in Prefetch().refuse(scene(None))
    assert "DataLoader" in Prefetch().refuse(scene(list))


def test_a_plan_with_it_applies_to_a_hand_written_loop():
    from bigdl.nano.pytorch import Plan

    net = torch.nn.Linear(1, 1)
    with Plan.of("prefetch").apply(net, torch.optim.SGD(net.parameters(), 0.1)) as force:
        assert force.names == ()


# --- in a whole run ---------------------------------------------------------------------------


def fit(trainer_class, rows, **kwargs):
    pl = pytest.importorskip("pytorch_lightning")

    class Slow(pl.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = torch.nn.Linear(1, 1)

        def training_step(self, batch, index):
            time.sleep(0.01)
            return self.net(batch).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1e-5)

    trainer = trainer_class(
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **kwargs,
    )
    module = Slow()
    torch.manual_seed(1)
    trainer.fit(module, DataLoader(rows, 1, shuffle=True))
    return trainer, module, torch.get_rng_state()


@pytest.mark.filterwarnings("ignore")
def test_chosen_on_the_run_itself_where_it_pays():
    pl = pytest.importorskip("pytorch_lightning")
    from bigdl.nano.pytorch import Plan, Trainer

    _, stock, state = fit(pl.Trainer, rows := Rows(400))
    slow = Rows(400, seconds=0.01)
    trainer, ours, our_state = fit(Trainer, slow)
    row = trainer.plan.row("prefetch")
    assert row.status == "chosen", trainer.plan
    assert row.speedup > 1.3
    assert slow.read == rows.read
    assert torch.equal(stock.net.weight, ours.net.weight)
    assert torch.equal(state, our_state)

    replayed = Plan.from_json(trainer.plan.to_json())
    again = Rows(60)
    fit(Trainer, again, acceleration=replayed)
    assert len(again.read) == 60
    assert again.threads[0] != again.threads[-1]  # proven by its first reads, then ahead


@pytest.mark.filterwarnings("ignore")
def test_a_run_whose_rows_draw_keeps_its_own_loader():
    from bigdl.nano.pytorch import Trainer

    rows = Rows(400, draws=True, seconds=0.01)
    trainer, _, _ = fit(Trainer, rows)
    assert trainer.plan.row("prefetch").status == "refused"
    assert "draws random numbers" in trainer.plan.row("prefetch").reason
    assert len(set(rows.threads)) == 1


class Settling(Applied):
    """Watches the first three steps of each epoch, as reading ahead does."""

    def __init__(self):
        self.steps = 0

    @property
    def is_proven(self):
        self.steps += 1
        return self.steps > 3

    def epoch_started(self):
        self.steps = 0


@pytest.mark.parametrize("epoch_steps", [14, 20, 128])
def test_a_trial_on_the_run_ends_though_epochs_are_short(epoch_steps):
    trial = TrialOnRun(candidate("prefetch"), Settling, step_s=1e-4, epoch_steps=epoch_steps)
    assert trial.has_room
    for _ in range(200):
        trial.epoch_started()
        if any(trial.after_step() for _ in range(epoch_steps)):
            break
    assert trial.timing is not None


def test_a_trial_on_the_run_that_only_slows_it_ends_early(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(on_run, "time", clock)
    trials = {}
    for cost in (2.0, 0.5):  # of a step under it, beside 1 without
        trial = trials[cost] = TrialOnRun(
            candidate("prefetch"), Settling, step_s=0.01, epoch_steps=400
        )
        trial.epoch_started()
        for _ in range(2000):
            clock.now += 0.01 * (1.0 if trial.applied is None else cost)
            if trial.after_step():
                break
    slower, faster = (trials[cost].timing for cost in (2.0, 0.5))
    assert slower.speedup < 1 < faster.speedup
    assert len(trials[2.0]._blocks) == 6
    assert len(trials[0.5]._blocks) == 16


class Clock:
    """A time that moves when it is told to."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now


def test_no_trial_on_the_run_where_an_epoch_is_a_few_steps():
    assert not TrialOnRun(candidate("prefetch"), Settling, step_s=1, epoch_steps=8).has_room
