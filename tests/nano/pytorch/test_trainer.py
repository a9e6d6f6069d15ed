"""The Trainer against stock Lightning: equal where nothing is chosen, close where something is."""

from __future__ import annotations

import inspect
import json
import warnings

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from bigdl._base import machine
from bigdl.errors import ArgumentError, ConfigError
from bigdl.nano.pytorch import Guard, Plan, Trainer
from bigdl.nano.pytorch.lightning.session import Session
from bigdl.nano.pytorch.plan import cache as plan_cache
from bigdl.nano.pytorch.plan.candidates import NAMES
from bigdl.nano.pytorch.plan.rehearsal import Stage
from bigdl.nano.pytorch.plan.timing import Timing

pytestmark = [
    pytest.mark.usefixtures("one_thread", "bf16"),
    pytest.mark.filterwarnings(
        "ignore:The 'train_dataloader' does not have many workers",
        "ignore:The 'val_dataloader' does not have many workers",
        "ignore:The number of training batches",
        "ignore:Found .* module.s. in eval mode",
        "ignore:`isinstance.treespec, LeafSpec.` is deprecated",
    ),
]

QUIET = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Pictures(pl.LightningModule):
    """A small convolutional network that notes its losses."""

    def __init__(self, rate=1e-2):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2),
            nn.Flatten(), nn.Dropout(0.1), nn.Linear(32, 4),
        )  # fmt: skip
        self.rate = rate
        self.losses = []

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = nn.functional.cross_entropy(self.net(x), y)
        self.log("loss", loss)
        return loss

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), self.rate)


def pictures(rows=96, batch=8):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, 3, 12, 12, generator=generator)
    y = torch.randint(0, 4, (rows,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=batch, shuffle=True)


def fit(trainer_class=Trainer, model=None, loader=None, **arguments):
    pl.seed_everything(7, verbose=False)
    model = model or Pictures()
    trainer = trainer_class(**(QUIET | {"max_epochs": 2} | arguments))
    trainer.fit(model, loader or pictures())
    return trainer, model


def equal(one, other):
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)


@pytest.fixture
def clock(monkeypatch):
    """Steps on copies take what a test says: ``clock["bf16"] = 0.5`` halves them.

    The run may be as long as trying needs.
    """
    factors = {}

    def seconds(self, batches):
        for batch in batches[:1]:
            self._perform(batch)
        return 0.01 * float(np.prod([factors.get(name, 1.2) for name in self.force.names]))

    monkeypatch.setattr(Stage, "seconds", seconds)
    monkeypatch.setattr(Session, "_allowed_s", lambda self, choice: float("inf"))
    monkeypatch.setattr(Session, "_is_measured", lambda self: len(self._steps) >= 2)
    monkeypatch.setattr(Session, "_own_s", 0.01)
    monkeypatch.setattr(Session, "_steps_left", lambda self: 1000)
    return factors


# --- equal to stock ---------------------------------------------------------------------------


@pytest.mark.parametrize("acceleration", ["off", "auto"])
def test_a_run_in_which_nothing_is_chosen_is_stock_bit_for_bit(acceleration):
    _, stock = fit(pl.Trainer)
    trainer, ours = fit(acceleration=acceleration)
    assert equal(ours, stock)
    assert ours.losses == stock.losses
    assert trainer.plan.chosen == ()


def test_trying_everything_and_choosing_nothing_is_stock_bit_for_bit(clock):
    _, stock = fit(pl.Trainer)
    after_stock = torch.rand(3)
    trainer, ours = fit()
    assert torch.equal(torch.rand(3), after_stock)
    assert equal(ours, stock)
    assert ours.losses == stock.losses
    tried = {row.name for row in trainer.plan.rows if row.step_ms is not None}
    assert tried >= {"original", "channels_last", "fused_optimizer"}
    assert trainer.plan.chosen == ()
    assert trainer.plan.row("original").status == "chosen"


def test_off_has_no_rows_and_before_fit_there_is_no_plan():
    trainer = Trainer(**QUIET, max_epochs=1, acceleration="off")
    assert trainer.plan is None
    trainer.fit(Pictures(), pictures())
    assert trainer.plan.rows == ()


def test_every_candidate_is_a_row_with_a_reason_unless_chosen(clock):
    clock["channels_last"] = 0.5
    trainer, _ = fit()
    rows = {row.name: row for row in trainer.plan.rows}
    assert set(rows) == {"original", *NAMES}
    assert trainer.plan.rows[0].name == "original"
    for row in trainer.plan.rows:
        assert row.status == "chosen" or row.reason, row


# --- choosing ---------------------------------------------------------------------------------


def test_what_is_faster_is_chosen_and_the_numbers_are_known(clock):
    clock.update(channels_last=0.5, fused_optimizer=0.8, bf16=1.5, threads=2, allocator=3)
    _, stock = fit(pl.Trainer)
    trainer, ours = fit()
    plan = trainer.plan
    assert set(plan.chosen) == {"channels_last", "fused_optimizer"}
    assert plan.row("channels_last").speedup == pytest.approx(2.0, rel=0.02)
    assert plan.row("fused_optimizer").speedup == pytest.approx(2.5, rel=0.02)
    assert plan.row("original").status == "slower"
    # on top of channels_last, before the fused optimizer
    assert plan.row("bf16").status == "slower"
    assert plan.row("bf16").speedup == pytest.approx(2 / 1.5, rel=0.02)
    np.testing.assert_allclose(ours.losses, stock.losses, rtol=1e-3)


def test_losses_under_bf16_stay_close(clock):
    clock.update(bf16=0.3)
    _, stock = fit(pl.Trainer)
    trainer, ours = fit()
    assert "bf16" in trainer.plan.chosen
    assert ours.losses != stock.losses
    np.testing.assert_allclose(ours.losses[-6:], stock.losses[-6:], rtol=0.1)


def test_less_than_five_percent_altogether_is_no_gain(clock):
    clock.update(channels_last=0.97)
    _, stock = fit(pl.Trainer)
    trainer, ours = fit()
    assert trainer.plan.chosen == ()
    row = trainer.plan.row("channels_last")
    assert row.status == "slower"
    assert "less than 5%" in row.reason
    assert equal(ours, stock)


def test_caller_gets_everything_back(clock):
    clock.update(channels_last=0.5, fused_optimizer=0.5, bf16=0.5, threads=0.5, allocator=0.5)
    model = Pictures()
    parameters = list(model.parameters())
    attributes = set(vars(model))
    threads = torch.get_num_threads()
    filters = list(warnings.filters)
    trainer, _ = fit(model=model)
    assert set(trainer.plan.chosen) >= {"channels_last", "fused_optimizer"}
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert all(p.is_contiguous() and p.dtype is torch.float32 for p in model.parameters())
    assert {name for name in vars(model) if not name.startswith("_")} == {
        name for name in attributes if not name.startswith("_")
    }
    assert not trainer.optimizers[0].param_groups[0]["fused"]
    assert torch.get_num_threads() == threads
    assert warnings.filters == filters
    for owner in (trainer.strategy, trainer.fit_loop.epoch_loop.automatic_optimization):
        assert not {"training_step", "optimizer_step", "run"} & set(vars(owner))


def test_guard_zero_one_lets_only_equal_steps_pass(clock):
    clock.update(channels_last=0.5, bf16=0.5, fused_optimizer=0.5, allocator=0.5)
    _, stock = fit(pl.Trainer)
    trainer, ours = fit(guard=Guard(0, 1))
    assert "bf16" not in trainer.plan.chosen
    assert equal(ours, stock)
    assert "bit for bit" in trainer.plan.row("bf16").reason


def test_deterministic_tries_nothing_that_changes_numbers(clock):
    clock.update(channels_last=0.5, bf16=0.5, fused_optimizer=0.5)
    was = torch.are_deterministic_algorithms_enabled()
    try:
        trainer, _ = fit(deterministic=True, accelerator="cpu")
    finally:
        torch.use_deterministic_algorithms(was)
    assert not {"channels_last", "bf16", "fused_optimizer"} & set(trainer.plan.chosen)
    assert "deterministic" in trainer.plan.row("channels_last").reason


def test_fast_dev_run_is_never_probed(clock):
    clock.update(channels_last=0.5)
    trainer, _ = fit(fast_dev_run=True)
    assert trainer.plan.chosen == ()
    assert "fast_dev_run" in trainer.plan.row("channels_last").reason


def test_a_model_that_breaks_under_bf16_is_refused(clock):
    clock.update(bf16=0.1)

    class Broken(Pictures):
        def training_step(self, batch, batch_idx):
            x, y = batch
            out = self.net(x)
            if torch.is_autocast_enabled("cpu"):
                out = out.flip(1)  # as wrong as can be
            return nn.functional.cross_entropy(out, y) + 10 * nn.functional.mse_loss(
                out, torch.arange(4.0).expand_as(out)
            )

    trainer, _ = fit(model=Broken())
    row = trainer.plan.row("bf16")
    assert row.status == "refused"
    assert row.cosine is not None
    assert "bf16" not in trainer.plan.chosen


def test_a_step_that_draws_otherwise_is_refused(clock):
    clock.update(channels_last=0.1)

    class Draws(Pictures):
        def training_step(self, batch, batch_idx):
            if not batch[0].is_contiguous():
                torch.rand(1)
            return super().training_step(batch, batch_idx)

    trainer, _ = fit(model=Draws())
    assert "draws otherwise" in trainer.plan.row("channels_last").reason


def test_a_step_that_fails_under_a_candidate_is_refused_with_its_error(clock):
    clock.update(channels_last=0.1)

    class Flat(Pictures):
        def training_step(self, batch, batch_idx):
            batch[0].view(-1)
            return super().training_step(batch, batch_idx)

    _, stock = fit(pl.Trainer, Flat())
    trainer, ours = fit(model=Flat(), acceleration="auto")
    row = trainer.plan.row("channels_last")
    assert row.status == "refused"
    assert "RuntimeError" in row.reason
    assert "view" in row.reason
    del stock, ours


def test_copies_that_do_not_fit_are_not_made(clock, monkeypatch):
    clock.update(channels_last=0.5)
    monkeypatch.setattr(machine, "available_memory_bytes", lambda **_: 1000)
    trainer, _ = fit()
    assert trainer.plan.chosen == ()
    assert "GiB are free" in trainer.plan.row("channels_last").reason


def test_a_run_too_short_to_try_anything(monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("a trial in so short a run")

    monkeypatch.setattr(Stage, "__init__", never)
    trainer, _ = fit(max_epochs=1)
    assert {row.status for row in trainer.plan.rows[1:]} <= {"skipped", "refused"}
    assert all(row.reason for row in trainer.plan.rows[1:])


def test_an_interrupted_trial_leaves_nothing(clock, monkeypatch):
    """Ctrl-C inside a trial: Lightning ends the process; the model is as it was."""

    def interrupted(self, batches):
        raise KeyboardInterrupt

    monkeypatch.setattr(Stage, "seconds", interrupted)
    import signal

    handler = signal.getsignal(signal.SIGINT)
    model, trainer = Pictures(), Trainer(**QUIET, max_epochs=1)
    try:
        with pytest.raises(SystemExit):
            trainer.fit(model, pictures())
    finally:
        signal.signal(signal.SIGINT, handler)
    assert trainer.plan.chosen == ()
    assert all(p.is_contiguous() for p in model.parameters())
    assert not {"training_step", "optimizer_step"} & set(vars(trainer.strategy))
    assert "run" not in vars(trainer.fit_loop.epoch_loop.automatic_optimization)


def test_a_run_of_unknown_length_tries_when_it_can_afford_it(clock, monkeypatch):
    """A tenth of what has passed: never more, whatever the run's length will be."""
    clock.update(channels_last=0.5)
    monkeypatch.undo()
    spent = []
    real = Session._timed
    monkeypatch.setattr(Session, "_steps_left", lambda self: None)
    monkeypatch.setattr(
        Session, "_timed", lambda self, trial: real(self, trial) or spent.append(self._spent_s)
    )
    trainer, model = fit(loader=pictures(rows=800))
    assert len(model.losses) == 200
    assert all(row.status == "chosen" or row.reason for row in trainer.plan.rows)


# --- plans pinned, kept, carried --------------------------------------------------------------


def test_a_pinned_plan_measures_nothing(monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("a pinned plan was measured")

    monkeypatch.setattr(Stage, "__init__", never)
    plan = Plan.of("channels_last", "fused_optimizer")
    trainer, ours = fit(acceleration=Plan.from_json(plan.to_json()))
    assert trainer.plan == plan
    assert "channels_last" in trainer.plan.chosen
    assert np.isfinite(ours.losses).all()


def test_a_pinned_plan_that_cannot_work_is_an_error_before_a_step():
    class Flat(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(2, 1)

        def training_step(self, batch, batch_idx):
            raise AssertionError("no step should run")

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    loader = DataLoader(TensorDataset(torch.zeros(8, 2)), batch_size=2)
    with pytest.raises(ConfigError, match=r"channels_last cannot be used here: .*convolution"):
        fit(model=Flat(), loader=loader, acceleration=Plan.of("channels_last"))


def test_a_plan_is_kept_and_serves_again_without_the_clock(clock, cache_folder, monkeypatch):
    clock.update(channels_last=0.5)
    first, _ = fit()
    files = list((cache_folder / "bigdl" / "plans").iterdir())
    assert len(files) == 1

    def never(*args, **kwargs):
        raise AssertionError("a kept plan was timed")

    monkeypatch.setattr(Stage, "seconds", never)
    looks = []
    real = Stage.look
    monkeypatch.setattr(Stage, "look", lambda *a: looks.append(1) or real(*a))
    second, _ = fit()
    assert second.plan.chosen == first.plan.chosen == ("channels_last",)
    assert looks  # the guard was asked again

    monkeypatch.undo()


@pytest.mark.parametrize("damage", ["", "{", '{"schema_version": 99}', "\x00\xff"])
def test_a_damaged_cache_is_as_good_as_none(clock, cache_folder, damage):
    clock.update(channels_last=0.5)
    fit()
    (file,) = (cache_folder / "bigdl" / "plans").iterdir()
    file.write_text(damage, encoding="latin-1")
    again, _ = fit()
    assert again.plan.chosen == ("channels_last",)


def test_a_cache_that_cannot_be_written_is_no_error(clock, monkeypatch, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    clock.update(channels_last=0.5)
    trainer, _ = fit()
    assert trainer.plan.chosen == ("channels_last",)


def test_another_model_machine_or_guard_has_another_plan(clock, cache_folder, monkeypatch):
    fit()
    fit(model=Pictures(rate=0.5))  # rates do not count
    assert len(list((cache_folder / "bigdl" / "plans").iterdir())) == 1
    fit(guard=Guard(0.5, 0.5))
    fit(loader=pictures(batch=4))
    frozen = Pictures()
    frozen.net[0].requires_grad_(False)
    fit(model=frozen)
    assert len(list((cache_folder / "bigdl" / "plans").iterdir())) == 4


# --- the tripwire -----------------------------------------------------------------------------


class Trap(Pictures):
    """Under the plan (pictures in channels-last layout) one step's loss is not a number."""

    kind = "loss"

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if batch_idx == 3 and self.current_epoch == 0 and not batch[0].is_contiguous():
            self.before = [p.detach().clone() for p in self.parameters()]
            if self.kind == "loss":
                return loss * float("nan")
            loss.register_hook(lambda gradient: gradient * float("inf"))
        return loss

    def on_train_batch_end(self, outputs, batch, batch_idx):
        super().on_train_batch_end(outputs, batch, batch_idx)
        if batch_idx == 3 and self.current_epoch == 0:
            self.after = [p.detach().clone() for p in self.parameters()]


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_the_tripwire_leaves_the_update_out_and_goes_back(kind):
    model = Trap()
    model.kind = kind
    with pytest.warns(RuntimeWarning, match=f"the {kind} was not finite at step 3") as caught:
        trainer, _ = fit(model=model, acceleration=Plan.of("channels_last", "fused_optimizer"))
    assert len([w for w in caught if "not finite" in str(w.message)]) == 1
    assert all(map(torch.equal, model.before, model.after))
    assert trainer.plan.chosen == ()
    assert trainer.plan.row("channels_last").status == "refused"
    assert "your own setting is back" in trainer.plan.row("fused_optimizer").reason
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert trainer.global_step == 24


def test_a_run_that_diverged_leaves_the_kept_plan_alone(cache_folder, monkeypatch):
    """The next run may have a better rate; it must not find acceleration switched off."""
    stored = []
    monkeypatch.setattr(plan_cache, "store", lambda key, kept: stored.append(kept.plan.chosen))
    model = Trap()
    model.kind = "loss"
    monkeypatch.setattr(Session, "_has_plan", _puts_in_force(Plan.of("channels_last")))
    with pytest.warns(RuntimeWarning, match="the loss was not finite"):
        trainer, _ = fit(model=model)
    assert trainer.plan.chosen == ()
    assert stored == []


def _puts_in_force(plan):
    def has_plan(session, batch):
        session.key = "a key"
        session._decide(plan, plan.candidates(), must=True)
        return True

    return has_plan


def test_the_tripwire_in_manual_optimization():
    class Manual(Trap):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            loss = super().training_step(batch, batch_idx)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            return loss

    model = Manual()
    with pytest.warns(RuntimeWarning, match="the gradient was not finite"):
        trainer, _ = fit(model=model, acceleration=Plan.of("channels_last"))
    assert all(map(torch.equal, model.before, model.after))
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert trainer.plan.chosen == ()


# --- the face ---------------------------------------------------------------------------------


def test_signature_shows_every_argument():
    ours = list(inspect.signature(Trainer).parameters)
    theirs = list(inspect.signature(pl.Trainer).parameters)
    shared = ["num_processes", "distributed_backend", "cpu_for_each_process", "auto_lr", "sync"]
    assert ours == ["acceleration", "guard", *shared, *theirs]
    assert inspect.signature(Trainer).parameters["acceleration"].default == "auto"
    assert inspect.signature(Trainer).parameters["guard"].default == Guard()


def test_lightnings_environment_variables_still_count(monkeypatch):
    monkeypatch.setenv("PL_TRAINER_MAX_EPOCHS", "3")
    monkeypatch.setenv("PL_TRAINER_ACCELERATION", "off")
    trainer = Trainer(**QUIET)
    assert trainer.max_epochs == 3
    assert trainer._acceleration == "off"


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"max_epoch": 1}, ArgumentError, "no argument 'max_epoch'. Did you mean 'max_epochs'"),
        ({"accelerations": "off"}, ArgumentError, "Did you mean 'acceleration'"),
        ({"auto_lr": 2}, ArgumentError, "auto_lr takes True or False"),
        ({"use_ipex": True}, ArgumentError, "IPEX has ended"),
        ({"channels_last": True}, ArgumentError, "acceleration='auto' tries it"),
        ({"gpus": 1}, ArgumentError, "accelerator='gpu'"),
        ({"resume_from_checkpoint": "x"}, ArgumentError, "ckpt_path"),
        ({"auto_lr_find": True}, ArgumentError, "LearningRateFinder"),
        ({"acceleration": "fast"}, ConfigError, "have 'auto', 'off' or a Plan"),
        ({"acceleration": None}, ArgumentError, "not NoneType"),
        ({"acceleration": True}, ArgumentError, "not bool"),
        ({"guard": 0.01}, ArgumentError, "takes a Guard, not float"),
        ({"guard": None}, ArgumentError, "takes a Guard"),
    ],
)
def test_misuse(arguments, error, text):
    with pytest.raises(error, match=text):
        Trainer(**QUIET, **arguments)


def test_old_words_that_still_work():
    trainer = Trainer(logger=False, enable_progress_bar=False, checkpoint_callback=False)
    assert not trainer.checkpoint_callbacks
    assert Trainer(**QUIET, use_ipex=False, gpus=0).max_epochs is None


def test_quantize_refuses_contradictions():
    with pytest.raises(ConfigError, match="contradicts"):
        Trainer.quantize(nn.Linear(1, 1), accelerator="openvino", onnx=True)
    with pytest.raises(ArgumentError, match="takes True or False"):
        Trainer.quantize(nn.Linear(1, 1), onnx="yes")
    with pytest.raises(ArgumentError):
        Trainer.quantize(nn.Linear(1, 1), precisoin="int8")


def test_plan_of_a_run_is_json(clock):
    clock.update(channels_last=0.5)
    trainer, _ = fit()
    stored = json.loads(trainer.plan.to_json())
    assert {row["name"] for row in stored["rows"]} == {"original", *NAMES}
    assert Plan.from_json(trainer.plan.to_json()) == trainer.plan


def test_timing_is_no_gain_within_doubt():
    assert Timing(own_s=1, other_s=0.9, speedup=1.11, doubt=0.05).is_faster
    assert not Timing(own_s=1, other_s=0.9, speedup=1.11, doubt=0.12).is_faster
    assert not Timing(own_s=1, other_s=0.995, speedup=1.005, doubt=0.0).is_faster
