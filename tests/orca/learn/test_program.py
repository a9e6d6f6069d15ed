"""Training of a PyTorch program by 1 to 4 workers: the numbers of one plain loop."""

from __future__ import annotations

import copy
import functools
import sys

import numpy as np
import pytest

import tests.orca.learn.learning as learning

torch = pytest.importorskip("torch", reason="needs the [torch] extra")

from bigdl.orca.learn.pytorch.program import TorchProgram  # noqa: E402

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="worker processes")

functional = torch.nn.functional
WORLDS = (1, 2, 3, 4)
SYNCS = ("allreduce", "sharded")
cases = learning.Cases()


# --- w = 0.25 -----------------------------------------------------------------------------


def one_weight(lr):
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.ones_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    return TorchProgram(model=model, optimizer=optimizer, loss=torch.nn.MSELoss())


X01 = np.array([[0], [0], [1], [1]], np.float32)
Y0 = np.zeros((4, 1), np.float32)


@cases.case
def zeros_on_rank_0(collective):
    return learning.train(collective, one_weight(0.5), (X01, Y0), 4, epochs=2)[0]["weight"]


@cases.case
def batches_of_two(collective):
    return learning.train(collective, one_weight(0.25), (X01, Y0), 2, epochs=2)[0]["weight"]


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("name", ["zeros_on_rank_0", "batches_of_two"])
def test_a_quarter(name, world):
    for weight in cases.of(name, world):
        assert weight.item() == 0.25


# --- the same numbers ---------------------------------------------------------------------


def data(rows=101, dtype="float64"):
    random = np.random.default_rng(1)
    x = random.standard_normal((rows, 6))
    y = np.stack([np.sin(x[:, 0]) + x[:, 1], x[:, 2] * x[:, 3]], 1)
    return x.astype(dtype), y.astype(dtype)


def mlp(dtype, out=2):
    torch.manual_seed(0)
    layers = (torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, out))
    return torch.nn.Sequential(*layers).to(getattr(torch, dtype))


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)


def adam(model):
    return torch.optim.Adam(model.parameters(), lr=0.01)


NUMBERS = {
    "float64": ("float64", sgd, 1e-9),
    "float64_adam": ("float64", adam, 1e-9),
    "float32": ("float32", sgd, 1e-5),
    "float32_adam": ("float32", adam, 1e-4),
}


def plain_loop(model, optimizer, loss, arrays, size, epochs=1, *, after_backward=None, together=1):
    """What a user would write."""
    x, y = map(torch.from_numpy, arrays)
    for _ in range(epochs):
        for begin in range(0, len(x), size * together):
            batch = slice(begin, begin + size * together)
            optimizer.zero_grad()
            loss(model(x[batch]), y[batch]).backward()
            if after_backward is not None:
                after_backward(model)
            optimizer.step()
    return {name: value.detach().numpy() for name, value in model.state_dict().items()}


def trained(dtype, make_optimizer, sync, collective, **options):
    model = mlp(dtype)
    program = TorchProgram(model=model, optimizer=make_optimizer(model), loss=torch.nn.MSELoss())
    return learning.train(collective, program, data(dtype=dtype), 16, 3, sync=sync, **options)


for _name, (_dtype, _make, _) in NUMBERS.items():
    for _sync in SYNCS:
        cases.add(f"{_name} {_sync}", functools.partial(trained, _dtype, _make, _sync))


def same(found, expected, limit):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=limit, atol=limit, err_msg=name)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("sync", SYNCS)
@pytest.mark.parametrize("name", NUMBERS)
def test_workers_give_the_numbers_of_one(name, sync, world):
    dtype, make, limit = NUMBERS[name]
    model = mlp(dtype)
    arrays = data(dtype=dtype)
    expected = plain_loop(model, make(model), torch.nn.MSELoss(), arrays, 16, 3)
    results = cases.of(f"{name} {sync}", world)
    for found, rows, steps in results:
        same(found, expected, limit)
        assert [(row["epoch"], row["rows"], row["steps"]) for row in rows] == [
            (1, 101, 7),
            (2, 101, 7),
            (3, 101, 7),
        ]
        assert steps[-1].cursor.row == 101
        assert rows[-1]["loss"] < rows[0]["loss"]
    for found, _, _ in results[1:]:
        same(found, results[0][0], 0)


def test_one_worker_has_the_bits_of_the_plain_loop():
    model = mlp("float32")
    arrays = data(dtype="float32")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    expected = plain_loop(model, sgd(model), torch.nn.MSELoss(), arrays, 16, 3)
    torch.set_num_threads(before)
    same(cases.of("float32 allreduce", 1)[0][0], expected, 0)


# --- losses that are no means over rows -----------------------------------------------------


def labels(kind="ids"):
    random = np.random.default_rng(2)
    if kind == "probabilities":
        p = random.random((101, 4))
        return p / p.sum(1, keepdims=True)
    found = random.integers(0, 4, 101)
    if kind == "ignored":
        found[10:14] = -1  # a whole worker's part of the first batch is ignored
        found[random.random(101) < 0.3] = -1
    return found


def token_mean(output, target):
    """A mean over all but the label 0, which says what it is a mean over."""
    kept = target != 0
    each = functional.cross_entropy(output, target, reduction="none")
    return (each * kept).sum() / kept.sum(), kept.sum()


CLASS_WEIGHTS = torch.tensor([0.1, 1.0, 2.0, 5.0], dtype=torch.float64)
LOSSES = {
    "class weights": (torch.nn.CrossEntropyLoss(CLASS_WEIGHTS), "ids"),
    "ignored": (torch.nn.CrossEntropyLoss(ignore_index=-1), "ignored"),
    "both, smoothed": (
        torch.nn.CrossEntropyLoss(CLASS_WEIGHTS, ignore_index=-1, label_smoothing=0.1),
        "ignored",
    ),
    "sum": (torch.nn.CrossEntropyLoss(CLASS_WEIGHTS, reduction="sum"), "ids"),
    "probabilities": (torch.nn.CrossEntropyLoss(CLASS_WEIGHTS), "probabilities"),
    "function": (functional.cross_entropy, "ids"),
    "partial": (functools.partial(functional.cross_entropy, ignore_index=-1), "ignored"),
    "token mean": (token_mean, "ids"),
}


def with_loss(name, collective):
    loss, kind = LOSSES[name]
    model = mlp("float64", out=4)
    program = TorchProgram(model=model, optimizer=sgd(model), loss=loss)
    arrays = (data()[0], labels(kind))
    weights, rows, _ = learning.train(collective, program, arrays, 16, 2, accumulation_steps=1)
    return weights, rows


for _name in LOSSES:
    cases.add(f"loss {_name}", functools.partial(with_loss, _name))


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", LOSSES)
def test_losses_match_one_process(name, world):
    loss, kind = LOSSES[name]
    model = mlp("float64", out=4)
    arrays = (data()[0], labels(kind))
    plain = (lambda o, t: loss(o, t)[0]) if name == "token mean" else loss
    expected = plain_loop(model, sgd(model), plain, arrays, 16, 2)
    alone = cases.of(f"loss {name}", 1)[0][1]
    for found, rows in cases.of(f"loss {name}", world):
        same(found, expected, 1e-9)
        for row, wanted in zip(rows, alone, strict=True):
            assert row["loss"] == pytest.approx(wanted["loss"], rel=1e-9)


def user_sum(output, target):
    return ((output - target) ** 2).sum()


@cases.case
def a_users_sum(collective):
    model = mlp("float64")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    program = TorchProgram(model=model, optimizer=optimizer, loss=user_sum, loss_reduction="sum")
    return learning.train(collective, program, data(), 16)[0]


@pytest.mark.parametrize("world", [1, 3])
def test_loss_reduction_sum(world):
    model = mlp("float64")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    expected = plain_loop(model, optimizer, user_sum, data(), 16)
    for found in cases.of("a_users_sum", world):
        same(found, expected, 1e-9)


# --- ranks without rows, parameters without gradients ------------------------------------------


def on_one_rank(sync, collective):
    cuts = [0] * collective.world
    cuts[-1] = 16
    model = mlp("float64")
    program = TorchProgram(model=model, optimizer=sgd(model), loss=torch.nn.MSELoss())
    x, y = data()
    arrays = (x[:96], y[:96])
    return learning.train(collective, program, arrays, 16, cuts=cuts, sync=sync)


for _sync in SYNCS:
    cases.add(f"on_one_rank {_sync}", functools.partial(on_one_rank, _sync))


@pytest.mark.parametrize("sync", SYNCS)
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_without_rows(world, sync):
    model = mlp("float64")
    x, y = data()
    arrays = (x[:96], y[:96])
    expected = plain_loop(model, sgd(model), torch.nn.MSELoss(), arrays, 16)
    for found, rows, _ in cases.of(f"on_one_rank {sync}", world):
        same(found, expected, 1e-9)
        assert rows[0]["rows"] == 96


class Branches(torch.nn.Module):
    """Rows go one way or the other; one layer is never used, one is of no optimizer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.left, self.right = torch.nn.Linear(6, 2), torch.nn.Linear(6, 2)
        self.unused, self.frozen = torch.nn.Linear(3, 3), torch.nn.Linear(6, 6)
        self.frozen.requires_grad_(False)
        self.double()

    def forward(self, x):
        goes_left = x[:, 0] > 1.2  # few rows: often none of a worker's
        out = torch.zeros(len(x), 2, dtype=x.dtype)
        if goes_left.any():
            out = out.index_put((goes_left,), self.left(self.frozen(x[goes_left])))
        if not goes_left.all():
            out = out.index_put((~goes_left,), self.right(x[~goes_left]))
        return out


def branching(sync, collective):
    model = Branches()
    program = TorchProgram(model=model, optimizer=sgd(model), loss=torch.nn.MSELoss())
    weights = learning.train(collective, program, data(), 8, 2, sync=sync)[0]
    return weights, model.unused.weight.grad is None


for _sync in SYNCS:
    cases.add(f"branching {_sync}", functools.partial(branching, _sync))


@pytest.mark.parametrize("sync", SYNCS)
@pytest.mark.parametrize("world", WORLDS)
def test_branches_and_unused_parameters(world, sync):
    model = Branches()
    before = copy.deepcopy(model.state_dict())
    expected = plain_loop(model, sgd(model), torch.nn.MSELoss(), data(), 8, 2)
    for found, has_none in cases.of(f"branching {sync}", world):
        same(found, expected, 1e-9)
        assert has_none
        for name in ("unused.weight", "frozen.weight"):  # no weight decay either
            np.testing.assert_array_equal(found[name], before[name].numpy())


# --- clipping, accumulation, bf16 --------------------------------------------------------------


def clip_norm(model):
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)


def clip_value(model):
    torch.nn.utils.clip_grad_value_(model.parameters(), 0.01)


CLIPS = {"clip_norm": (0.1, clip_norm), "clip_value": (0.01, clip_value)}
for _name, (_limit, _) in CLIPS.items():
    for _sync in SYNCS:
        _case = functools.partial(trained, "float64", sgd, _sync, **{_name: _limit})
        cases.add(f"{_name} {_sync}", _case)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("sync", SYNCS)
@pytest.mark.parametrize("name", CLIPS)
def test_clipping_is_of_the_global_gradient(name, sync, world):
    model = mlp("float64")
    expected = plain_loop(
        model, sgd(model), torch.nn.MSELoss(), data(), 16, 3, after_backward=CLIPS[name][1]
    )
    for found, _, _ in cases.of(f"{name} {sync}", world):
        same(found, expected, 1e-9)


def accumulating(sync, collective):
    model = mlp("float64", out=4)
    program = TorchProgram(
        model=model, optimizer=adam(model), loss=torch.nn.CrossEntropyLoss(ignore_index=-1)
    )
    arrays = (data()[0], labels("ignored"))
    options = {"accumulation_steps": 3, "clip_norm": 0.5, "sync": sync}
    return learning.train(collective, program, arrays, 8, 2, **options)


for _sync in SYNCS:
    cases.add(f"accumulating {_sync}", functools.partial(accumulating, _sync))


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("sync", SYNCS)
def test_accumulation_equals_a_larger_batch(sync, world):
    model = mlp("float64", out=4)
    expected = plain_loop(
        model,
        adam(model),
        torch.nn.CrossEntropyLoss(ignore_index=-1),
        (data()[0], labels("ignored")),
        8,
        2,
        together=3,
        after_backward=lambda m: torch.nn.utils.clip_grad_norm_(m.parameters(), 0.5),
    )
    for found, rows, _ in cases.of(f"accumulating {sync}", world):
        same(found, expected, 1e-9)
        assert [row["steps"] for row in rows] == [5, 5]  # the epoch's rest is a step


def in_bf16(collective):
    return trained("float32", adam, "allreduce", collective, precision="bf16")


cases.add("bf16", in_bf16)


@pytest.mark.parametrize("world", [1, 2])
def test_bf16_is_autocast_over_float32_weights(world):
    exact = cases.of("float32_adam allreduce", world)[0][0]
    for found, rows, _ in cases.of("bf16", world):
        assert {value.dtype.name for value in found.values()} == {"float32"}
        moved = max(np.abs(found[name] - exact[name]).max() for name in exact)
        assert 1e-5 < moved < 0.1
        assert rows[-1]["loss"] < rows[0]["loss"]


def half_weights(collective):
    model = mlp("bfloat16")
    program = TorchProgram(model=model, optimizer=sgd(model), loss=torch.nn.MSELoss())
    replica = program.build(learning.ReplicaContext(collective=collective))
    hooks = learning.FromArrays(replica._ctx, data(), 16)
    plain = hooks.batches

    def batches(cursor):
        for batch in plain(cursor):
            parts = tuple(torch.from_numpy(a).bfloat16() for a in batch.data)
            yield learning.Batch(parts, batch.rows, batch.global_rows)

    hooks.batches = batches
    replica.train(1, learning.Cursor(), hooks)
    return {n: v.detach().float().numpy() for n, v in model.named_parameters()}


cases.add("half weights", half_weights)


def test_weights_in_half_precision():
    alone = cases.of("half weights", 1)[0]
    for found in cases.of("half weights", 2):
        same(found, alone, 0.05)


# --- layouts, sparse gradients, small and unequal parts -----------------------------------


def convolutions():
    """Weights whose order in memory is not that of their axes."""
    torch.manual_seed(5)
    layers = (torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Conv2d(4, 2, 3))
    model = torch.nn.Sequential(*layers, torch.nn.Flatten()).double()
    model = model.to(memory_format=torch.channels_last)
    assert not model[0].weight.is_contiguous()
    return model


def pictures():
    random = np.random.default_rng(6)
    return random.standard_normal((20, 3, 5, 5)), random.standard_normal((20, 2))


class Tied(torch.nn.Module):
    """One matrix reads words and writes them; its gradient from reading may be sparse."""

    def __init__(self, sparse):
        super().__init__()
        torch.manual_seed(6)
        self.words = torch.nn.Embedding(50, 4, sparse=sparse).double()
        self.head = torch.nn.Linear(4, 50, bias=not sparse).double()
        if not sparse:
            self.head.weight = self.words.weight

    def forward(self, x):
        return self.head(self.words(x).mean(1))


def sentences():
    random = np.random.default_rng(7)
    return random.integers(0, 50, (30, 5)), random.integers(0, 50, 30)


def adagrad(model):
    return torch.optim.Adagrad(model.parameters(), lr=0.1)


def tied(sparse):
    return Tied(sparse)


ODD = {
    "convolutions": (convolutions, sgd, pictures, torch.nn.MSELoss()),
    "tied": (functools.partial(tied, False), sgd, sentences, torch.nn.CrossEntropyLoss()),
    "sparse": (functools.partial(tied, True), adagrad, sentences, torch.nn.CrossEntropyLoss()),
    "one weight": (lambda: one_weight(0.5).model, adam, lambda: (X01, Y0), torch.nn.MSELoss()),
}


def odd(name, sync, collective):
    make, make_optimizer, arrays, loss = ODD[name]
    model = make()
    before = [parameter.stride() for parameter in model.parameters()]
    program = TorchProgram(model=model, optimizer=make_optimizer(model), loss=loss)
    options = {"accumulation_steps": 2, "clip_norm": 0.5, "sync": sync}
    found = learning.train(collective, program, arrays(), 3, 2, **options)[0]
    assert [parameter.stride() for parameter in model.parameters()] == before
    return found


for _name in ODD:
    for _sync in SYNCS:
        cases.add(f"{_name} {_sync}", functools.partial(odd, _name, _sync))


def clip_half(model):
    for parameter in model.parameters():
        if parameter.grad.is_sparse:
            parameter.grad = parameter.grad.to_dense()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("sync", SYNCS)
@pytest.mark.parametrize("name", ODD)
def test_odd_parameters(name, sync, world):
    make, make_optimizer, arrays, loss = ODD[name]
    model = make()
    expected = plain_loop(
        model, make_optimizer(model), loss, arrays(), 3, 2, together=2, after_backward=clip_half
    )
    for found in cases.of(f"{name} {sync}", world):
        same(found, expected, 1e-9 if name != "one weight" else 1e-6)


@cases.case
def unequal_streams(collective):
    """Rank r has 3 - r batches of 8 rows: whoever has ended brings zeros."""
    model = mlp("float64")
    program = TorchProgram(model=model, optimizer=sgd(model), loss=torch.nn.MSELoss())
    ctx = learning.ReplicaContext(collective=collective)
    replica = program.build(ctx)
    hooks = learning.FromArrays(ctx, (), 0)
    x, y = data()

    def batches(cursor):
        for step in range(3 - ctx.rank):
            mine = slice(16 * step + 8 * ctx.rank, 16 * step + 8 * ctx.rank + 8)
            yield learning.Batch((x[mine], y[mine]), 8, 16 if step < 2 else 8)

    hooks.batches = batches
    rows = replica.train(1, learning.Cursor(), hooks)
    return learning.weights(replica), rows


def test_streams_of_unequal_length():
    model = mlp("float64")
    x, y = data()
    expected = plain_loop(model, sgd(model), torch.nn.MSELoss(), (x[:40], y[:40]), 16)
    for found, rows in cases.of("unequal_streams", 2):
        same(found, expected, 1e-9)
        assert (rows[0]["rows"], rows[0]["steps"]) == (40, 3)
