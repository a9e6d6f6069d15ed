"""A training plan in workers: given or measured there, the same on all, and left again."""

from __future__ import annotations

import contextlib
import copy
import sys

import numpy as np
import pytest

import tests.orca.learn.learning as learning

torch = pytest.importorskip("torch", reason="needs the [torch] extra")

from bigdl.errors import ConfigError  # noqa: E402
from bigdl.nano.pytorch import Plan  # noqa: E402
from bigdl.nano.pytorch.plan.candidates import NAMES  # noqa: E402
from bigdl.orca import init_orca_context, stop_orca_context  # noqa: E402
from bigdl.orca.learn.fit import Job  # noqa: E402
from bigdl.orca.learn.program import Cursor, Options, ReplicaContext  # noqa: E402
from bigdl.orca.learn.pytorch import Estimator  # noqa: E402
from bigdl.orca.learn.pytorch.program import TorchProgram  # noqa: E402
from bigdl.orca.learn.watch import Watch  # noqa: E402

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="worker processes")

WORLDS = (1, 2)
cases = learning.Cases()


def rows(count=96):
    draw = np.random.default_rng(0)
    x = draw.standard_normal((count, 5)).astype(np.float32)
    return x, (x.sum(1) > 0).astype(np.int64)


def network(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))


class StumblesInBf16(torch.nn.Module):
    """Its output is not finite at the tenth call under autocast, and only there."""

    def __init__(self, where=range(9, 10)):
        super().__init__()
        self.net = network()
        self.calls = 0
        self.where = where

    def forward(self, x):
        out = self.net(x)
        if torch.is_autocast_enabled("cpu"):
            self.calls += 1
            if self.calls - 1 in self.where:
                return out * float("inf")
        return out


class Told(learning.FromArrays):
    """Keeps what was settled on; 10,000 batches are counted on."""

    def __init__(self, *args):
        super().__init__(*args)
        self.settled = []
        self.paused = 0

    def batches_left(self):
        return 10_000

    @contextlib.contextmanager
    def pausing(self):
        self.paused += 1
        yield

    def on_settled(self, acceleration):
        self.settled.append(Plan.from_json(acceleration))


def total(prediction, target):
    return prediction.float().sum(1).mean()


def train(collective, acceleration, *, model=None, epochs=3, **options):
    """Weights, plans that were told of, the state, the record's rows."""
    model = model or network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    program = TorchProgram(
        model=model, optimizer=optimizer, loss=torch.nn.CrossEntropyLoss(), metrics={"sum": total}
    )
    asked = program.check_acceleration(acceleration)
    ctx = ReplicaContext(collective=collective, options=Options(acceleration=asked, **options))
    replica = program.build(ctx)
    hooks = Told(ctx, rows(), 8)
    record = replica.train(epochs, Cursor(), hooks)
    assert replica._acceleration is None
    assert replica.work.force is None
    state = replica.state()
    weights = {name: value.numpy() for name, value in state["model"].items()}
    assert all(np.isfinite([row["sum"] for row in record]))  # of no output that was given up
    return weights, hooks.settled, state["optimizer"], [row["rows"] for row in record]


@contextlib.contextmanager
def steps_seem(factor):
    """A step on copies seems to take ``factor`` times as long under each candidate."""
    from bigdl.nano.pytorch.plan.rehearsal import Stage
    from bigdl.orca.learn.pytorch.acceleration import Acceleration

    def seconds(stage, batches):
        for batch in batches[:1]:
            stage._perform(batch)
        return 0.01 * factor ** len(stage.force.names)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stage, "seconds", seconds)
        patch.setattr(Acceleration, "_is_measured", lambda self: len(self._steps) >= 2)
        patch.setattr(Acceleration, "_own_s", 0.01)
        patch.setattr(Acceleration, "_allowed_s", lambda self, choice, left: float("inf"))
        yield


@contextlib.contextmanager
def with_bf16():
    from bigdl._base import machine

    found = machine.isa()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "isa", lambda **_: found | {"avx512_bf16"})
        yield


def same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])


# --- given ----------------------------------------------------------------------------------


@cases.case
def off(collective):
    return train(collective, "off")


@cases.case
def fused(collective):
    return train(collective, Plan.of("fused_optimizer"))


@cases.case
def fused_in_slices(collective):
    return train(collective, Plan.of("fused_optimizer"), sync="sharded")


@cases.case
def empty(collective):
    return train(collective, Plan.of())


@pytest.mark.parametrize("world", WORLDS)
def test_a_given_plan_is_in_force_and_leaves_no_trace(world):
    plain = cases.of("off", world)[0][0]
    for weights, plans, optimizer, found in cases.of("fused", world):
        assert [plan.chosen for plan in plans] == [("fused_optimizer",)]
        for name in plain:
            np.testing.assert_allclose(weights[name], plain[name], rtol=1e-4, atol=1e-6)
        assert [group["fused"] for group in optimizer["param_groups"]] == [None]
        assert found == [96, 96, 96]


@pytest.mark.parametrize("world", WORLDS)
def test_an_empty_plan_is_off(world):
    plain = cases.of("off", world)[0][0]
    for weights, plans, *_ in cases.of("empty", world):
        assert plans == []
        same(weights, plain)


@pytest.mark.parametrize("world", WORLDS)
def test_what_is_not_for_slices_is_left_out(world):
    for _, plans, *_ in cases.of("fused_in_slices", world):
        assert plans[-1].chosen == ()
        assert "slice" in plans[-1].row("fused_optimizer").reason


@cases.case
def impossible(collective):
    with pytest.raises(ConfigError, match=r"no 2-D or 3-D convolution.*worker 0"):
        train(collective, Plan.of("channels_last"))
    return True


@pytest.mark.parametrize("world", WORLDS)
def test_a_given_plan_that_cannot_be_had_is_an_error_on_all(world):
    assert all(cases.of("impossible", world))


# --- measured -------------------------------------------------------------------------------


@cases.case
def nothing_helps(collective):
    with steps_seem(2.0), with_bf16():
        return train(collective, "auto")


@cases.case
def all_helps(collective):
    with steps_seem(0.5), with_bf16():
        return train(collective, "auto")


@pytest.mark.parametrize("world", WORLDS)
def test_where_nothing_helps_the_run_is_bit_identical(world):
    plain = cases.of("off", world)[0][0]
    for rank, (weights, plans, *_) in enumerate(cases.of("nothing_helps", world)):
        same(weights, plain)
        assert len(plans) == 1
        plan = plans[0]
        assert plan.chosen == ()
        assert {row.name for row in plan.rows} == {"original", *NAMES}
        assert plan.row("bf16").status in ("slower", "refused")
        assert plan.row("bf16").loss_change is not None
        assert "cores" in plan.row("threads").reason
        assert all(row.reason for row in plan.rows if row.status != "chosen"), rank


@pytest.mark.parametrize("world", WORLDS)
def test_what_helps_is_in_force_on_all(world):
    found = cases.of("all_helps", world)
    assert "fused_optimizer" in found[0][1][-1].chosen
    for weights, plans, optimizer, counted in found:
        assert str(plans[-1]) == str(found[0][1][-1])
        same(weights, found[0][0])
        assert optimizer["param_groups"][0]["fused"] is None
        assert counted == [96, 96, 96]
        plain = cases.of("off", world)[0][0]
        for name in plain:
            np.testing.assert_allclose(weights[name], plain[name], atol=0.05)


@cases.case
def too_short(collective):
    from bigdl.orca.learn.pytorch.acceleration import Acceleration

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Told, "batches_left", lambda self: None)
        patch.setattr(Acceleration, "_allowed_s", lambda self, choice, left: 0.0)
        return train(collective, "auto")


@pytest.mark.parametrize("world", WORLDS)
def test_what_the_first_epoch_cannot_afford_is_not_tried_later(world):
    for weights, plans, *_ in cases.of("too_short", world):
        same(weights, cases.of("off", world)[0][0])
        assert len(plans) == 1
        assert "first epoch ended" in plans[0].row("fused_optimizer").reason


# --- the tripwire ---------------------------------------------------------------------------


@cases.case
def stumbles(collective):
    with with_bf16(), pytest.warns(RuntimeWarning) if not collective.rank else _quiet():
        return train(collective, Plan.of("bf16"), model=StumblesInBf16())


@cases.case
def one_stumbles(collective):
    where = range(9, 10) if collective.rank == collective.world - 1 else ()
    is_told = collective.rank == 0
    with with_bf16(), pytest.warns(RuntimeWarning) if is_told else _quiet():
        return train(collective, Plan.of("bf16"), model=StumblesInBf16(where))


def _quiet():
    return contextlib.nullcontext()


@pytest.mark.parametrize("name", ["stumbles", "one_stumbles"])
@pytest.mark.parametrize("world", WORLDS)
def test_a_loss_that_is_not_finite_ends_the_plan_and_no_row_is_lost(world, name):
    found = cases.of(name, world)
    for weights, plans, _, counted in found:
        assert all(np.isfinite(value).all() for value in weights.values())
        same(weights, found[0][0])
        assert plans[0].chosen == ("bf16",)
        assert plans[-1].chosen == ()
        assert "not finite at step 10" in plans[-1].row("bf16").reason
        assert counted == [96, 96, 96]


# --- through the estimator ------------------------------------------------------------------


@pytest.fixture(scope="module")
def context():
    yield init_orca_context(cores=2)
    stop_orca_context()


def estimator(model, workers=2):
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    return Estimator.from_torch(model, optimizer, torch.nn.CrossEntropyLoss(), workers=workers)


def test_the_estimator_says_what_was_found(context):
    model = network()
    est = estimator(model)
    assert est.plan is None
    est.fit(rows(), epochs=2, batch_size=8, acceleration=Plan.of("fused_optimizer"))
    assert est.plan.chosen == ("fused_optimizer",)
    other = copy.deepcopy(network())
    plain = estimator(other)
    plain.fit(rows(), epochs=2, batch_size=8)
    assert plain.plan is None
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)
    est.fit(rows(), epochs=1, batch_size=8, acceleration="auto")
    assert {row.name for row in est.plan.rows} == {"original", *NAMES}
    assert est.epoch == 3
    est.fit(rows(), epochs=1, batch_size=8)
    assert est.plan is None


def test_a_lightning_module_takes_a_plan_and_is_not_measured(context):
    pl = pytest.importorskip("pytorch_lightning", reason="needs Lightning")

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = network()

        def training_step(self, batch, batch_idx):
            x, y = batch
            return torch.nn.functional.cross_entropy(self.net(x), y)

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=0.01)

    est = Estimator.from_torch(Module(), workers=1)
    with pytest.raises(ConfigError, match=r"trainer\.plan"):
        est.fit(rows(), acceleration="auto")
    found = est.fit(rows(), batch_size=8, acceleration=Plan.of("fused_optimizer"))
    assert est.plan.chosen == ("fused_optimizer",)
    assert found[0]["rows"] == 96


def test_a_new_start_keeps_what_was_settled_on():
    job = Job(program=None, data=None, options=Options(acceleration="auto"))
    watch = Watch(job, "auto", None)
    settled = Plan.of("fused_optimizer").to_json()
    watch.heard(0, ("settled", settled))
    assert watch.again(job).options.acceleration == settled


def test_a_pause_is_no_hang():
    watch = Watch(Job(program=None, data=None), "auto", None)
    watch.heard(0, ("step", 1, 1, 8, 0.5))
    assert watch.silence_s() == 60
    watch.heard(0, ("pausing", True))
    assert watch.silence_s() == 600
    watch.heard(0, ("pausing", False))
    assert watch.silence_s() == 60
