"""PyTorch loaders, datasets and their creators: batches as a plain loop meets them."""

from __future__ import annotations

import random
from collections import Counter
from itertools import chain

import numpy as np
import pytest

from bigdl.errors import ConfigError, DataError
from bigdl.orca.data.adapters import adapt
from bigdl.orca.data.contract import Request
from bigdl.testing.sharded import ShardedContract

torch = pytest.importorskip("torch", reason="needs the [torch] extra")
from torch.utils.data import (  # noqa: E402
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    TensorDataset,
    WeightedRandomSampler,
    get_worker_info,
)

FIT, PREDICT = Request(), Request(call="predict")


class Rows(Dataset):
    """Row i is (i, 2i); remembers what was read."""

    def __init__(self, rows):
        self.rows = rows
        self.read = []

    def __len__(self):
        return self.rows

    def __getitem__(self, i):
        self.read.append(int(i))
        return torch.tensor([float(i)]), 2 * int(i)


class Stream(IterableDataset):
    """Rows 0, 1, …, shared out among loader processes."""

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        info = get_worker_info()
        first, step = (info.id, info.num_workers) if info else (0, 1)
        for i in range(first, self.rows, step):
            yield torch.tensor([float(i)]), 2 * i


class ShuffledStream(Stream):
    """Draws its order from global streams of every kind."""

    def __iter__(self):
        rows = list(range(self.rows))
        random.shuffle(rows)
        rows = np.random.permutation(rows)
        for i in rows[torch.randperm(len(rows)).numpy()]:
            yield torch.tensor([float(i)]), 2 * int(i)


class ByHand(Sampler):
    """Draws row by row from Python's stream; odd epochs begin at the other end."""

    def __init__(self, rows):
        self.rows, self.epoch = rows, 0

    def __iter__(self):
        self.epoch += 1
        left = list(range(self.rows))
        if self.epoch % 2:
            yield left.pop()
        while left:
            yield left.pop(random.randrange(len(left)))

    def __len__(self):
        return self.rows


class TheirOwn(DataLoader):
    """Makes batches in a way of its own."""

    def __iter__(self):
        yield from map(tuple, super().__iter__())


def pairs(samples):
    x, y = zip(*samples, strict=True)
    return {"x": torch.stack(x), "n": [str(i) for i in y]}


class LoaderContract(ShardedContract):
    shuffles = False
    own_batch = 4
    recipe_bytes = 6_000

    def ids(self, data):
        x, y = data
        np.testing.assert_array_equal(2 * x.squeeze(1).numpy(), y.numpy())
        return y // 2


class TestInOrder(LoaderContract):
    def make(self, rows):
        return adapt(DataLoader(Rows(rows), batch_size=4), FIT)


class TestShuffled(LoaderContract):
    recipe_bytes = None

    def make(self, rows):
        data = TensorDataset(torch.arange(rows)[:, None].float(), 2 * torch.arange(rows))
        return adapt(DataLoader(data, batch_size=4, shuffle=True), FIT)


class TestOwnGenerator(LoaderContract):
    recipe_bytes = 12_000

    def make(self, rows):
        generator = torch.Generator().manual_seed(3)
        return adapt(DataLoader(Rows(rows), 4, shuffle=True, generator=generator), FIT)


class TestOwnSampler(LoaderContract):
    def make(self, rows):
        return adapt(DataLoader(Rows(rows), 4, sampler=ByHand(rows)), FIT)


class TestOwnCollate(LoaderContract):
    def make(self, rows):
        return adapt(DataLoader(Rows(rows), 4, collate_fn=pairs), FIT)

    def ids(self, data):
        assert data["n"] == [str(2 * int(i)) for i in data["x"]]
        return data["x"].squeeze(1)


class TestListsAsSampler(LoaderContract):
    """Batches made by the dataset, from lists of rows."""

    def make(self, rows):
        data = TensorDataset(torch.arange(rows)[:, None].float(), 2 * torch.arange(rows))
        lists = BatchSampler(RandomSampler(data), 4, drop_last=False)
        return adapt(DataLoader(data, batch_size=None, sampler=lists), FIT)

    recipe_bytes = None


class TestStream(LoaderContract):
    starts_anywhere = False

    def make(self, rows):
        return adapt(DataLoader(Stream(rows), batch_size=4), FIT)


class TestShuffledStream(LoaderContract):
    starts_anywhere = False

    def make(self, rows):
        return adapt(DataLoader(ShuffledStream(rows), batch_size=4), FIT)


class TestLoaderOfTheirOwn(LoaderContract):
    starts_anywhere = False

    def make(self, rows):
        return adapt(TheirOwn(Rows(rows), batch_size=4, shuffle=True), FIT)


class Ready(Dataset):
    """Item i is a batch of four rows."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return -(-self.rows // 4)

    def __getitem__(self, i):
        if i >= len(self):
            raise IndexError(i)
        rows = torch.arange(4 * i, min(4 * i + 4, self.rows))
        return rows[:, None].float(), 2 * rows


class ReadyStream(IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(Ready(self.rows))


class TestReadyBatches(LoaderContract):
    starts_anywhere = False

    def make(self, rows):
        return adapt(DataLoader(Ready(rows), batch_size=None), FIT)


class TestReadyStream(LoaderContract):
    starts_anywhere = False

    def make(self, rows):
        return adapt(DataLoader(ReadyStream(rows), batch_size=None), FIT)


class TestDataset(ShardedContract):
    """A dataset is like arrays."""

    recipe_bytes = 1_000
    ids = LoaderContract.ids

    def make(self, rows):
        return adapt(Rows(rows), FIT)


class TestCreatorOfLoader(LoaderContract):
    recipe_bytes = 2_000

    def make(self, rows):
        return adapt(_Creator(rows, is_loader=True), Request(batch_size=4, shuffle=True))


class TestCreatorOfDataset(ShardedContract):
    recipe_bytes = 2_000
    ids = LoaderContract.ids

    def make(self, rows):
        return adapt(_Creator(rows, is_loader=False), FIT)


class _Creator:
    def __init__(self, rows, is_loader):
        self.rows, self.is_loader = rows, is_loader

    def __call__(self, config, batch_size):
        data = Rows(self.rows)
        return DataLoader(data, batch_size, shuffle=True) if self.is_loader else data


# --- as a plain loop --------------------------------------------------------------------------


def ids(sharded, world=1, **options):
    """Row numbers of each global batch."""
    found = []
    for rank in range(world):
        reader = sharded.open(rank, world)
        parts = [
            [int(i) // 2 for i in b.data[1]] if b.rows else []
            for b in reader.batches(1, **options)
        ]
        reader.close()
        found.append(parts)
    return [list(chain(*step)) for step in zip(*found, strict=True)]


def test_a_loaders_own_generator_gives_the_orders_of_a_plain_loop():
    def loader():
        return DataLoader(Rows(11), 3, shuffle=True, generator=torch.Generator().manual_seed(1))

    plain = loader()
    expected = [[(y // 2).tolist() for _, y in plain] for _ in range(4)]
    sharded = adapt(loader())
    for epoch in (0, 1, 2, 3, 1):
        assert ids(sharded, 2, epoch=epoch, seed=99) == expected[epoch]
    # also begun in the middle, by a new reader
    assert ids(adapt(loader()), 3, epoch=2, start=6) == expected[2][2:]


def test_each_row_is_read_by_one_rank_only():
    data = Rows(23)
    read = []
    for rank in range(3):
        data.read.clear()
        reader = adapt(DataLoader(data, 5, shuffle=True)).open(rank, 3)
        list(reader.batches(5, epoch=1, seed=0))
        read += data.read
    assert sorted(read) == list(range(23))


def test_going_on_reads_no_row_again():
    data = Rows(23)
    list(adapt(DataLoader(data, 5)).open(0, 1).batches(5, start=15))
    assert data.read == list(range(15, 23))


def test_drop_last_and_weights_are_the_loaders():
    dropped = adapt(DataLoader(Rows(23), 5, drop_last=True))
    assert dropped.rows == 20
    assert ids(dropped, 2) == [list(range(i, i + 5)) for i in range(0, 20, 5)]
    weights = torch.tensor([0.0] * 10 + [1.0] * 2)
    drawn = ids(adapt(DataLoader(Rows(12), 4, sampler=WeightedRandomSampler(weights, 30))), 2)
    assert set(chain(*drawn)) == {10, 11}
    assert len(list(chain(*drawn))) == 30


@pytest.mark.parametrize("make", [Rows, Stream])
def test_processes_of_the_loader(make):
    loader = DataLoader(make(11), 4, num_workers=2, multiprocessing_context="fork")
    expected = [(y // 2).tolist() for _, y in loader]
    sharded = adapt(loader)
    assert ids(sharded, 2) == expected
    reader = sharded.open(0, 2)
    running = reader.batches(4)
    next(running)
    processes = list(reader._parts._running._workers)
    reader.close()
    for process in processes:
        process.join(10)
        assert not process.is_alive()


def test_the_callers_random_streams_and_loader_stay():
    generator = torch.Generator().manual_seed(1)
    loader = DataLoader(Rows(9), 2, shuffle=True, generator=generator)
    before = generator.get_state(), random.getstate(), torch.get_rng_state()
    sampled = DataLoader(Rows(9), 2, sampler=ByHand(9))
    for one in (loader, sampled, DataLoader(ShuffledStream(9), 2)):
        ids(adapt(one), 2, epoch=2)
    assert torch.equal(generator.get_state(), before[0])
    assert random.getstate() == before[1]
    assert sampled.sampler.epoch == 0


def test_a_stream_goes_on_between_batches_only():
    with pytest.raises(DataError, match="row 6: this loader's batches begin at rows 4 and 8"):
        ids(adapt(DataLoader(Stream(11), 4)), start=6)


# --- predict ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shares", [1, 2, 4])
def test_predict_keeps_order_and_drops_labels(shares):
    for data in (DataLoader(Rows(11), 4), DataLoader(Stream(11), 4), Rows(11)):
        found = adapt(data, PREDICT).map_batches(lambda x: {"p": x * 3}, size=4, shares=shares)
        np.testing.assert_array_equal(found["p"][:, 0], 3.0 * np.arange(11))
        assert type(found["p"]) is np.ndarray
    alone = adapt(DataLoader(TensorDataset(torch.arange(5)), 2), PREDICT)
    assert alone.map_batches(lambda x: x + 1, shares=shares).tolist() == [1, 2, 3, 4, 5]


def test_predict_by_a_creator():
    sharded = adapt(_Creator(11, is_loader=False), Request(call="predict"))
    assert sharded.map_batches(lambda x: x, size=4, shares=2)[:, 0].tolist() == [*range(11)]


# --- misuse -----------------------------------------------------------------------------------


class Nameless(Dataset):
    def __getitem__(self, i):
        return i


LOADER = DataLoader(Rows(4))
MISUSE = [
    (LOADER, {"batch_size": 8}, ConfigError, "batch_size beside a DataLoader. The loader has its"),
    (LOADER, {"shuffle": True}, ConfigError, r"fit\(\) got shuffle beside a DataLoader"),
    (LOADER, {"shuffle": False, "batch_size": 2}, ConfigError, "got batch_size, shuffle beside"),
    (
        LOADER,
        {"feature_cols": ["x"]},
        ConfigError,
        "feature_cols beside a DataLoader. Only tables",
    ),
    (LOADER, {"transform": abs}, ConfigError, "transform beside a DataLoader.*collate_fn"),
    (Rows(4), {"label_cols": ["x"]}, ConfigError, "label_cols beside a Dataset"),
    (Rows(0), {}, DataError, "a Dataset without rows"),
    (DataLoader(Rows(3), 4, drop_last=True), {}, DataError, "a DataLoader without batches"),
    (Stream(4), {"shuffle": True}, ConfigError, "shuffle beside an IterableDataset"),
    (Nameless(), {}, DataError, "Nameless has no __len__"),
]


@pytest.mark.parametrize(("data", "asked", "kind", "text"), MISUSE)
def test_misuse(data, asked, kind, text):
    with pytest.raises(kind, match=text):
        adapt(data, Request(**asked))


def test_a_creator_that_makes_nothing():
    with pytest.raises(DataError, match="The data creator gave None; need a DataLoader"):
        adapt(lambda config, batch_size: None).open(0, 1)


def test_creators_get_config_and_batch_size():
    got = []

    def creator(config, batch_size):
        got.append((config, batch_size))
        return Rows(4)

    adapt(creator, Request(config={"a": 1}, batch_size=7)).open(0, 1)
    adapt(creator).open(0, 1)
    assert got == [({"a": 1}, 7), ({}, 32)]
    assert Counter(type(config) for config, _ in got) == {dict: 2}
