"""Metrics, states, schedulers, stopping and mistakes of a PyTorch program."""

from __future__ import annotations

import functools
import sys

import numpy as np
import pytest

from bigdl._base.collective.alone import Alone
from bigdl.errors import (
    ArgumentError,
    ConfigError,
    DataError,
    NotReadyError,
    StoredModelError,
)
from tests.orca.learn import learning

torch = pytest.importorskip("torch", reason="needs the [torch] extra")
torchmetrics = pytest.importorskip("torchmetrics", reason="needs the [torch] extra")

from bigdl.orca.learn.program import (  # noqa: E402
    Cursor,
    Hooks,
    Options,
    Program,
    Replica,
    ReplicaContext,
)
from bigdl.orca.learn.pytorch.program import TorchProgram  # noqa: E402

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="worker processes")

cases = learning.Cases()
nn = torch.nn


def same(found, expected, limit):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=limit, atol=limit, err_msg=name)


def data(rows=101):
    random = np.random.default_rng(1)
    x = random.standard_normal((rows, 6))
    return x, (x[:, :1] - x[:, 1:2] * x[:, 2:3])


# --- metrics -----------------------------------------------------


def scores(rows=401):
    """Features, and labels that a linear model half knows."""
    x, _ = data(rows)
    noise = np.random.default_rng(5).standard_normal(rows)
    return x.astype(np.float32), (x[:, 0] + noise > 0.3).astype(np.int64)


def classifier():
    torch.manual_seed(7)
    layer = nn.Linear(6, 1)
    layer.weight.data[0, 0] = 1.0
    return nn.Sequential(layer, nn.Flatten(0))


def hits(output, labels):
    return ((output > 0) == labels.bool()).float().mean()


def binary_loss(output, labels):
    return nn.functional.binary_cross_entropy_with_logits(output, labels.float())


class Correlation(torchmetrics.PearsonCorrCoef):
    """Its states are put together by itself."""

    def update(self, output, labels):
        super().update(output, labels.float())


def metrics():
    binary = {"task": "binary"}
    together = torchmetrics.MetricCollection(
        [torchmetrics.classification.BinaryPrecision(), torchmetrics.classification.BinaryRecall()]
    )
    return {
        "accuracy": torchmetrics.Accuracy(**binary),
        "auroc": torchmetrics.AUROC(**binary),
        "f1": torchmetrics.F1Score(**binary),
        "correlation": Correlation(),
        "both": together,
        "hits": hits,
    }


def measured(collective):
    """The metrics, over 401 rows: evaluated, then trained on and evaluated in between."""
    model = classifier()
    program = TorchProgram(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.0),
        loss=binary_loss,
        metrics=metrics(),
    )
    ctx = ReplicaContext(collective=collective)
    replica = program.build(ctx)
    arrays = scores()
    evaluated = replica.evaluate(learning.parts(arrays, 32, ctx.rank, ctx.world))

    class Nosy(learning.FromArrays):
        def on_step_end(self, replica, step):
            if step.cursor.step == 5:  # leaves the epoch's own metrics alone
                replica.evaluate(learning.parts(arrays, 64, ctx.rank, ctx.world))

    (row,) = replica.train(1, Cursor(), Nosy(ctx, arrays, 32))
    return evaluated, row


cases.add("metrics", measured)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_metrics_of_401_rows_equal_one_process(world):
    x, y = (torch.from_numpy(array) for array in scores())
    output = classifier()(x).detach()
    wanted = {"loss": binary_loss(output, y).item(), "hits": hits(output, y).item()}
    for name in ("accuracy", "auroc", "f1"):
        wanted[name] = metrics()[name](output, y).item()
    wanted["correlation"] = metrics()["correlation"](output, y.float()).item()
    wanted |= {name: value.item() for name, value in metrics()["both"](output, y).items()}
    assert 0.6 < wanted["auroc"] < 0.99
    for evaluated, row in cases.of("metrics", world):
        assert evaluated["rows"] == row["rows"] == 401
        for name, value in wanted.items():
            assert evaluated[name] == pytest.approx(value, abs=1e-6), name
            assert row[name] == pytest.approx(value, abs=1e-6), name  # lr = 0
        assert row["steps"] == 13
        assert list(row)[:5] == ["epoch", "loss", "rows", "steps", "seconds"]


def without_loss(collective):
    program = TorchProgram(model=classifier(), metrics=torchmetrics.Accuracy(task="binary"))
    replica = program.build(ReplicaContext(collective=collective))
    ours = learning.parts(scores(3), 32, collective.rank, collective.world)
    found = replica.evaluate(ours)
    return found, replica.model.training


cases.add("without loss", without_loss)


def test_fewer_rows_than_workers_and_no_loss():
    alone = cases.of("without loss", 1)[0][0]
    assert alone.keys() == {"rows", "BinaryAccuracy"}
    assert alone["rows"] == 3
    for found, is_training in cases.of("without loss", 4):
        assert found == alone
        assert is_training  # as it was


# --- states: resume, resize --------------------------------------


class Dropping(nn.Module):
    """A model with random numbers, a buffer, and a scheduler's worth of steps."""

    def __init__(self, p):
        super().__init__()
        torch.manual_seed(4)
        self.body = nn.Sequential(nn.Linear(6, 8), nn.Dropout(p), nn.Tanh(), nn.Linear(8, 1))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        self.calls += self.training
        return self.body(x)


def dropping(p):
    model = Dropping(p).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02, weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 9, 12], gamma=0.5)
    return TorchProgram(
        model=model,
        optimizer=optimizer,
        loss=nn.MSELoss(),
        scheduler=scheduler,
        scheduler_interval="step",
    )


class Saving(learning.FromArrays):
    """Takes the state after one step, inside training."""

    def __init__(self, *args, at):
        super().__init__(*args)
        self.at = at
        self.saved = None

    def on_step_end(self, replica, step):
        super().on_step_end(replica, step)
        if step.cursor.step == self.at:
            self.saved = replica.state(), step.cursor


def straight(p, sync, at, collective):
    """Two epochs; the end state and the one after step ``at``."""
    ctx = ReplicaContext(collective=collective, options=Options(sync=sync))
    replica = dropping(p).build(ctx)
    hooks = Saving(ctx, data(), 16, at=at)
    replica.train(2, Cursor(), hooks)
    return replica.state(), *hooks.saved, hooks.rows


def resumed(p, sync, state, cursor, epochs, collective):
    ctx = ReplicaContext(collective=collective, options=Options(sync=sync))
    replica = dropping(p).build(ctx)
    replica.load(state)
    hooks = learning.FromArrays(ctx, data(), 16)
    rows = replica.train(epochs, cursor, hooks)
    return replica.state(), rows


def resume_in_gang(p, sync, at, collective):
    """Straight on; from a middle of the first epoch; from the end of it, all in one gang."""
    end, state, cursor, _ = straight(p, sync, at, collective)
    epochs = 2 if cursor.row < 101 and cursor.epoch == 0 else 1
    again, rows = resumed(p, sync, state, cursor, epochs, collective)
    return end, again, rows, cursor


for _sync in ("allreduce", "sharded"):
    for _at in (3, 7, 11):
        _case = functools.partial(resume_in_gang, 0.3, _sync, _at)
        cases.add(f"resume {_sync} {_at}", _case)


def flat(state):
    """All numbers of a state by name."""
    found = {f"model.{name}": value.numpy() for name, value in state["model"].items()}
    for place, values in state["optimizer"]["state"].items():
        found |= {f"{place}.{name}": np.asarray(value) for name, value in values.items()}
    for index, group in enumerate(state["optimizer"]["param_groups"]):
        found[f"lr.{index}"] = np.asarray(group["lr"])
    found["last_epoch"] = np.asarray(state["scheduler"]["last_epoch"])
    return found


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("sync", ["allreduce", "sharded"])
@pytest.mark.parametrize("at", [3, 11])
def test_resumed_is_as_undisturbed(world, sync, at):
    """Dropout and all: random streams of each rank go on."""
    for end, again, rows, cursor in cases.of(f"resume {sync} {at}", world):
        assert flat(end).keys() == flat(again).keys()
        assert flat(end)["0.exp_avg"].shape == (8, 6)
        for name, value in flat(end).items():
            np.testing.assert_array_equal(flat(again)[name], value, err_msg=name)
        assert sum(row["rows"] for row in rows) == 2 * 101 - (cursor.epoch * 101 + cursor.row)
        assert [one.tolist() for one in end["streams"]] == [
            one.tolist() for one in again["streams"]
        ]


def test_ranks_draw_different_numbers():
    end = cases.of("resume allreduce 3", 2)[0][0]
    first, second = (one.tolist() for one in end["streams"])
    assert first != second


@pytest.mark.parametrize(("before", "after"), [(2, 3), (3, 1), (1, 2)])
def test_resume_with_other_workers_and_sync(before, after):
    """Without random numbers in the model: those are of a rank."""
    ways = {2: "sharded", 3: "allreduce", 1: "allreduce"}
    end, state, cursor, _ = learning.gang(before, straight, 0.0, ways[before], 3)[0]
    found = learning.gang(after, resumed, 0.0, "sharded", state, cursor, 2)
    for again, rows in found:
        same(flat(again), flat(end) | {"model.calls": flat(again)["model.calls"]}, 1e-9)
        assert [row["rows"] for row in rows] == [101 - 48, 101]
        assert [row["epoch"] for row in rows] == [1, 2]


def test_a_state_goes_into_the_users_own_objects():
    state = cases.of("resume allreduce 3", 2)[0][0]
    program = dropping(0.0)
    weight = program.model.body[0].weight
    model = program.take(state)
    assert model is program.model
    assert model.body[0].weight is weight
    np.testing.assert_array_equal(weight.detach(), state["model"]["body.0.weight"])
    assert program.optimizer.state[weight]["step"] == 14
    assert program.scheduler.last_epoch == 14
    assert program.optimizer.param_groups[0]["lr"] == 0.02 / 8


def test_a_state_makes_a_model_of_the_users_function():
    program = TorchProgram(model=make_model, config={"out": 1})
    replica = program.build(alone())
    state = replica.state()
    state["model"]["weight"] += 1
    model = program.model_of(state)
    np.testing.assert_array_equal(model.weight.detach(), replica.model.weight.detach() + 1)
    assert program.model_of(None) is not model
    given = TorchProgram(model=model)
    assert given.model_of(state) is model


def test_a_state_is_tensors_and_plain_values(tmp_path):
    from bigdl.orca.learn import checkpoint

    def kinds(value):
        if isinstance(value, dict):
            return set().union(*map(kinds, [*value.keys(), *value.values()]))
        if isinstance(value, (list, tuple)):
            return set().union(set(), *map(kinds, value))
        return {type(value)}

    state = cases.of("resume sharded 3", 2)[0][0]
    assert kinds(state) <= {torch.Tensor, str, int, float, bool, type(None)}
    replica, codec = dropping(0.0).build(alone()), dropping(0.0).codec
    saved = checkpoint.Checkpoint(state=state, cursor=Cursor(), seed=0)
    checkpoint.write(str(tmp_path / "one"), saved, codec)
    replica.load(checkpoint.read(str(tmp_path / "one"), codec).state)
    same(flat(replica.state()), flat(state), 0)
    assert replica.scheduler.milestones == dropping(0.0).scheduler.milestones


def test_the_codec_gives_back_what_it_got():
    codec = dropping(0.0).codec
    base = torch.arange(6.0).reshape(2, 3)
    tensors = {"a": base, "b": base.t(), "c": torch.tensor(3), "d": base[:0].bfloat16()}
    for name, value in codec.unpack(codec.pack(tensors)).items():
        assert codec.is_tensor(value)
        assert value.dtype == tensors[name].dtype
        assert torch.equal(value, tensors[name])
    with pytest.raises(StoredModelError, match="no tensors"):
        codec.unpack(b"nonsense")


def alone(**options):
    return ReplicaContext(collective=Alone(), options=Options(**options))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda s: s["model"].pop("calls"), "'calls' is in the model and not in the state"),
        (lambda s: s["model"].update(more=torch.ones(1)), "'more' is in the state and not"),
        (
            lambda s: s["model"].update({"body.0.bias": torch.ones(3)}),
            r"'body.0.bias' has shape \(3,\) in the state and \(8,\)",
        ),
        (lambda s: s["optimizer"]["param_groups"][0]["params"].pop(), "groups of"),
    ],
)
def test_another_models_state_changes_nothing(change, text):
    replica = dropping(0.0).build(alone())
    before, state = replica.state(), dropping(0.0).build(alone()).state()
    state["model"]["body.0.weight"] += 1
    change(state)
    with pytest.raises(StoredModelError, match=text):
        replica.load(state)
    same(flat(replica.state()), flat(before), 0)


def test_training_leaves_the_process_as_it_was():
    program = dropping(0.5)
    program.model.body[1].eval()
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    replica = program.build(alone())
    replica.train(1, Cursor(), learning.FromArrays(alone(), data(), 32))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]
    assert program.model.training
    assert not program.model.body[1].training
    assert program.model.body[0].weight.grad is None
    assert program.model.calls == 4


# --- batch norm, creators ----------------------------------------


def normed(collective):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    ctx = ReplicaContext(collective=collective)
    replica = TorchProgram(model=model, optimizer=optimizer, loss=nn.MSELoss()).build(ctx)
    hooks = Saving(ctx, data(), 32, at=2)
    x, y = data()
    replica.train(1, Cursor(), Saving(ctx, (x[:96], y[:96]), 32, at=2))
    found = replica.evaluate(learning.parts((x, y), 32, ctx.rank, ctx.world))
    buffers = {name: value.numpy() for name, value in model.named_buffers()}
    return buffers, found["loss"], hooks.saved


cases.add("normed", normed)


def test_all_workers_end_with_the_buffers_of_rank_0():
    (first, loss, _), (other, other_loss, _) = cases.of("normed", 2)
    same(first, other, 0)
    assert np.abs(first["1.running_mean"]).max() > 0
    assert loss == other_loss
    x = torch.from_numpy(np.concatenate([data()[0][b : b + 16] for b in (0, 32, 64)]))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)).double()
    model(x[:16])  # what rank 0 has seen first
    assert not np.allclose(first["1.running_mean"], model[1].running_mean)
    assert first["1.num_batches_tracked"] == 3


def make_model(config):
    return nn.Linear(6, config["out"]).double()


def make_optimizer(model, config):
    return torch.optim.SGD(model.parameters(), lr=config["lr"])


def make_scheduler(optimizer, config):
    return torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=config["gamma"])


def created(collective):
    program = TorchProgram(
        model=make_model,
        optimizer=make_optimizer,
        loss=nn.MSELoss(),
        scheduler=make_scheduler,
        config={"out": 1, "lr": 0.1, "gamma": 0.5},
    )
    ctx = ReplicaContext(collective=collective, seed=3)
    replica = program.build(ctx)
    initial = learning.weights(replica)
    replica.train(2, Cursor(), learning.FromArrays(ctx, data(), 32))
    return initial, learning.weights(replica), replica.optimizer.param_groups[0]["lr"]


cases.add("created", created)


def test_creators_make_the_same_for_any_number_of_workers():
    alone_initial, alone_end, _ = cases.of("created", 1)[0]
    for initial, end, lr in cases.of("created", 3):
        same(initial, alone_initial, 0)
        same(end, alone_end, 1e-9)
        assert lr == 0.1 * 0.5**2  # an epoch's scheduler


# --- stopping ----------------------------------------------------


def stopped(collective):
    """Rank 1 asks for the end after step 2; then the epoch's rest, for 3 steps."""
    model = make_model({"out": 1})
    program = TorchProgram(
        model=model, optimizer=make_optimizer(model, {"lr": 0.1}), loss=nn.MSELoss()
    )
    ctx = ReplicaContext(collective=collective, options=Options(max_steps=3))
    replica = program.build(ctx)
    hooks = learning.FromArrays(ctx, data(), 16)
    if ctx.rank == ctx.world - 1:
        hooks.stop_after = 2
    rows = replica.train(3, Cursor(), hooks)
    more = learning.FromArrays(ctx, data(), 16)
    later = replica.train(3, hooks.steps[-1].cursor, more)
    return rows, hooks.rows, later, more.rows


cases.add("stopped", stopped)


@pytest.mark.parametrize("world", [1, 2])
def test_stopping(world):
    for rows, told, later, told_later in cases.of("stopped", world):
        assert [(row["epoch"], row["rows"], row["steps"]) for row in rows] == [(1, 32, 2)]
        assert told[-1][0] == Cursor(epoch=0, row=32, step=2)
        assert [(row["epoch"], row["rows"], row["steps"]) for row in later] == [(1, 48, 3)]
        assert told_later[-1][0] == Cursor(epoch=0, row=80, step=5)


def test_max_steps_at_the_end_of_an_epoch_is_a_whole_epoch():
    model = make_model({"out": 1})
    program = TorchProgram(
        model=model, optimizer=make_optimizer(model, {"lr": 0.1}), loss=nn.MSELoss()
    )
    ctx = alone(max_steps=7)
    hooks = learning.FromArrays(ctx, data(), 16)
    (row,) = program.build(ctx).train(5, Cursor(), hooks)
    assert row["rows"] == 101
    assert hooks.rows[-1][0] == Cursor(epoch=1, row=0, step=7)


def test_plateaus_see_the_validation_loss():
    model = make_model({"out": 1})
    optimizer = make_optimizer(model, {"lr": 1.0})
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    program = TorchProgram(
        model=model, optimizer=optimizer, loss=nn.MSELoss(), scheduler=scheduler
    )

    class Worse(learning.FromArrays):
        def validate(self, replica, cursor):
            return {"val_loss": float(cursor.epoch)}

    rows = program.build(alone()).train(3, Cursor(), Worse(alone(), data(), 101))
    assert optimizer.param_groups[0]["lr"] == 0.25
    assert [row["val_loss"] for row in rows] == [1.0, 2.0, 3.0]


# --- what a model is called with, and gives ----------------------


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))

    def forward(self, user, item):
        return {"sum": user + item, "scaled": (self.weight * user).bfloat16()}


class One(nn.Module):
    def forward(self, features):
        return features["a"] * 10


def test_predict():
    user, item = np.ones((3, 1), np.float32), np.full((3, 1), 4.0, np.float32)
    user.flags.writeable = False
    replica = TorchProgram(model=Two()).build(alone())
    for features in ((user, item), [user, item], {"item": item, "user": user}):
        found = replica.predict(features)
        np.testing.assert_array_equal(found["sum"], np.full((3, 1), 5.0))
        assert found["scaled"].dtype == np.float32
    assert replica.model.training
    found = TorchProgram(model=One()).build(alone()).predict({"a": np.arange(3)})
    np.testing.assert_array_equal(found, [0, 10, 20])
    with pytest.raises(DataError, match=r"transform="):
        replica.predict((np.array(["a"], object), item[:1]))


# --- mistakes ----------------------------------------------------


def test_it_is_a_program():
    program = dropping(0.0)
    assert isinstance(program, Program)
    assert isinstance(program.build(alone()), Replica)


def given(**parts):
    model = parts.pop("model", None) or nn.Linear(6, 1)
    return TorchProgram(model=model, **parts)


FOREIGN = torch.optim.SGD(nn.Linear(6, 1).parameters(), lr=0.1)
MISUSE = {
    "a model that is none": (lambda: given(model=3), ArgumentError, "model has to be a Module"),
    "a model's function": (lambda: given(model=lambda: 3), ArgumentError, r"\(config\)"),
    "an optimizer of others": (lambda: given(optimizer=FOREIGN), ConfigError, "2 parameters"),
    "an optimizer that is none": (
        lambda: given(optimizer=lambda model, config: 3).build(alone()),
        ConfigError,
        "need a Optimizer",
    ),
    "an optimizer's name": (lambda: given(optimizer="adam"), ArgumentError, "'adam'"),
    "an instance with a function": (
        lambda: given(model=make_model, optimizer=FOREIGN),
        ConfigError,
        "other parameters",
    ),
    "a scheduler of others": (
        lambda: given(scheduler=torch.optim.lr_scheduler.StepLR(FOREIGN, 1)),
        ConfigError,
        "another optimizer",
    ),
    "an interval": (lambda: given(scheduler_interval="day"), ConfigError, "'day'"),
    "a loss's class": (lambda: given(loss=nn.MSELoss), ArgumentError, r"MSELoss\(\)"),
    "a loss for each row": (
        lambda: given(loss=nn.MSELoss(reduction="none")),
        ConfigError,
        "reduction='mean'",
    ),
    "contradicting sums": (
        lambda: given(loss=nn.MSELoss(), loss_reduction="sum"),
        ConfigError,
        "contradicts",
    ),
    "a reduction": (lambda: given(loss=hits, loss_reduction="max"), ConfigError, "'max'"),
    "a metric's class": (
        lambda: given(metrics=[torchmetrics.AUROC]),
        ArgumentError,
        "Give an instance",
    ),
    "a metric's name": (lambda: given(metrics="accuracy"), ArgumentError, "'accuracy'"),
    "two metrics of a name": (lambda: given(metrics=[hits, hits]), ConfigError, "'hits'"),
    "LBFGS": (
        lambda: given(
            model=make_model,
            optimizer=lambda model, config: torch.optim.LBFGS(model.parameters()),
            config={"out": 1},
        ).build(alone()),
        ConfigError,
        "closure",
    ),
    "options": (
        lambda: Options(accumulation_steps=0, precision="int8", clip_norm=-1),
        ConfigError,
        "accumulation_steps=0.*precision='int8'.*clip_norm=-1",
    ),
    "no loss": (
        lambda: given().build(alone()).train(1, Cursor(), Hooks()),
        NotReadyError,
        "optimizer=",
    ),
    "no rows": (
        lambda: (
            TorchProgram(
                model=make_model,
                optimizer=make_optimizer,
                loss=nn.MSELoss(),
                config={"out": 1, "lr": 0.1},
            )
            .build(alone())
            .train(1, Cursor(), Hooks())
        ),
        DataError,
        "no rows",
    ),
}


@pytest.mark.parametrize("name", MISUSE)
def test_misuse(name):
    call, kind, text = MISUSE[name]
    with pytest.raises(kind, match=text):
        call()


def bad_loss(kind, collective):
    losses = {
        "shape": lambda output, labels: (output - labels).squeeze(),
        "kind": lambda output, labels: 1.0,
        "weight": lambda output, labels: ((output - labels).mean(), -1),
        "labels": nn.MSELoss(),
    }
    model = make_model({"out": 1})
    optimizer = make_optimizer(model, {"lr": 0.1})
    program = TorchProgram(model=model, optimizer=optimizer, loss=losses[kind])
    arrays = data()[: 1 if kind == "labels" else 2]
    ctx = ReplicaContext(collective=collective)
    program.build(ctx).train(1, Cursor(), learning.FromArrays(ctx, arrays, 32))


@pytest.mark.parametrize(
    ("kind", "error", "text"),
    [
        ("shape", ConfigError, r"shape \(32,\)"),
        ("kind", ConfigError, "gave a float"),
        ("weight", ConfigError, "the weight -1"),
        ("labels", DataError, r"tuple of 1 parts.*\(features, labels\)"),
    ],
)
def test_losses_and_batches_that_cannot_be(kind, error, text):
    with pytest.raises(error, match=text):
        bad_loss(kind, Alone())


def unsliceable(collective):
    model = make_model({"out": 1})
    program = TorchProgram(
        model=model, optimizer=torch.optim.Adafactor(model.parameters()), loss=nn.MSELoss()
    )
    ctx = ReplicaContext(collective=collective, options=Options(sync="sharded"))
    program.build(ctx).train(1, Cursor(), learning.FromArrays(ctx, data(), 32))


def test_optimizers_that_need_whole_parameters_are_not_sliced():
    for error in learning.in_gang(2, unsliceable, preload=learning.PRELOAD):
        assert "Adafactor" in str(error)


def failing(collective):
    class Failing(learning.FromArrays):
        def on_step_end(self, replica, step):
            if self.ctx.rank == 1:
                raise KeyError("mine")

    model = make_model({"out": 1})
    program = TorchProgram(
        model=model, optimizer=make_optimizer(model, {"lr": 0.1}), loss=nn.MSELoss()
    )
    ctx = ReplicaContext(collective=collective)
    program.build(ctx).train(1, Cursor(), Failing(ctx, data(), 16))


def test_a_hooks_exception_ends_all_workers():
    first, second = learning.in_gang(2, failing, preload=learning.PRELOAD)
    assert isinstance(second, KeyError)
    assert "mine" in str(first)
