"""Neural collaborative filtering on MovieLens: the same program on any kind of data.

    python examples/ncf.py                        ratings like MovieLens', generated
    python examples/ncf.py --ratings u.data.gz    MovieLens 100k; or ratings.parquet of 1M
    python examples/ncf.py --data parquet --workers 2
    python examples/ncf.py --master local[2]      the same on Spark, and from its DataFrames too
    python examples/ncf.py --master spark://host:7077

Trains a network that says how much a user will like a film, breaks off half-way, goes on from
the checkpoint with another estimator, and prints how good the ten best of a hundred films are,
as X. He et al., "Neural Collaborative Filtering", WWW 2017, measure it: each user's last film is
kept back, and ranked among 99 that the user has not seen. HR@10 is the share of users whose film
is among the first ten; NDCG@10 counts it less the later it comes. Rows are put in order once,
before training, so that every kind of data is met in the same order: both measures are the same.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from bigdl.orca import OrcaContext, init_orca_context
from bigdl.orca.data import XShards
from bigdl.orca.learn.callbacks import ModelCheckpoint
from bigdl.orca.learn.pytorch import Estimator

INPUTS, LABEL = ["user", "item"], "label"
UNSEEN = 4  # films that a user has not seen, beside each that was
OTHERS = 99  # that the one kept back is ranked among
BEST = 10
BATCH = 1024


class NeuMF(nn.Module):
    """A product of two embeddings beside a perceptron on two more; its output is a logit."""

    def __init__(self, users: int, items: int, width: int = 16) -> None:
        super().__init__()
        self.user_gmf, self.item_gmf = nn.Embedding(users, width), nn.Embedding(items, width)
        self.user_mlp, self.item_mlp = nn.Embedding(users, width), nn.Embedding(items, width)
        self.mlp = nn.Sequential(
            nn.Linear(2 * width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width), nn.ReLU()
        )
        self.last = nn.Linear(2 * width, 1)
        for table in (self.user_gmf, self.item_gmf, self.user_mlp, self.item_mlp):
            nn.init.normal_(table.weight, std=0.05)

    def forward(self, user: torch.Tensor, item: torch.Tensor) -> torch.Tensor:
        product = self.user_gmf(user) * self.item_gmf(item)
        joined = self.mlp(torch.cat([self.user_mlp(user), self.item_mlp(item)], 1))
        return self.last(torch.cat([product, joined], 1)).squeeze(1)


# --- the same rows, in every form that an estimator takes: this is the one line to change -------

# of whatever is not a loader, which has its own
BATCHES = {"batch_size": BATCH, "shuffle": False}
NAMED = {"feature_cols": INPUTS, "label_cols": LABEL}


def as_arrays(table: pd.DataFrame, folder: Path):
    features = tuple(table[name].to_numpy() for name in INPUTS)
    return {"data": (features, table[LABEL].to_numpy()), **BATCHES}


def as_pandas(table: pd.DataFrame, folder: Path):
    return {"data": table, **BATCHES, **NAMED}


def as_parquet(table: pd.DataFrame, folder: Path):
    path = folder / "train.parquet"
    table.to_parquet(path, row_group_size=50_000)
    return {"data": str(path), **BATCHES, **NAMED}


def as_loader(table: pd.DataFrame, folder: Path):
    columns = [torch.from_numpy(table[name].to_numpy()) for name in (*INPUTS, LABEL)]
    loader = DataLoader(TensorDataset(*columns), batch_size=BATCH, collate_fn=with_two_inputs)
    return {"data": loader}


def with_two_inputs(rows):
    """A loader's batch is (features, labels); the features are two tensors here."""
    user, item, label = (torch.stack(column) for column in zip(*rows, strict=True))
    return (user, item), label


def as_shards(table: pd.DataFrame, folder: Path):
    shards = XShards.partition({name: table[name].to_numpy() for name in (*INPUTS, LABEL)})
    shards = shards.transform_shard(with_labels)
    return {"data": shards, **BATCHES}


def with_labels(columns):
    """The form in which shards hold features and labels."""
    return {"x": tuple(columns[name] for name in INPUTS), "y": columns[LABEL]}


def as_spark(table: pd.DataFrame, folder: Path):
    frame = OrcaContext.get_spark_session().createDataFrame(table)
    return {"data": frame, **BATCHES, **NAMED}


KINDS = {
    "arrays": as_arrays,
    "pandas": as_pandas,
    "parquet": as_parquet,
    "loader": as_loader,
    "shards": as_shards,
}
ON_SPARK = {**KINDS, "spark": as_spark}  # where there is a Spark session


# --- ratings ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """What is learnt from, and what it is judged by.

    Args:
        train: user, item and label (1 = seen) of each row.
        candidates: (users, 1 + OTHERS) films; the first is the one that was kept back.
        users: How many.
        items: How many.
    """

    train: pd.DataFrame
    candidates: np.ndarray
    users: int
    items: int


def generated(users: int = 900, items: int = 1200, each: int = 60, seed: int = 0) -> pd.DataFrame:
    """Ratings like MovieLens': users with tastes, films of which some are famous."""
    draw = np.random.default_rng(seed)
    taste = draw.standard_normal((users, 6))
    kind = draw.standard_normal((items, 6))
    fame = 1.2 * draw.standard_normal(items)
    liking = taste @ kind.T + fame + draw.gumbel(size=(users, items))
    seen = np.argsort(-liking, axis=1)[:, :each]
    order = draw.permuted(seen, axis=1)
    user = np.repeat(np.arange(users), each)
    time = np.tile(np.arange(each), users)
    return pd.DataFrame({"user": user, "item": order.reshape(-1), "time": time})


def read_ratings(path: Path) -> pd.DataFrame:
    """The columns user, item, time of a file of MovieLens."""
    if path.suffix == ".parquet":
        table = pd.read_parquet(path).rename(
            columns={"user_id": "user", "movie_id": "item", "timestamp": "time"}
        )
    else:
        names = ["user", "item", "rating", "time"]
        table = pd.read_csv(path, sep="\t", names=names)
    return table[["user", "item", "time"]]


def problem_of(ratings: pd.DataFrame, seed: int = 0) -> Problem:
    """Keep each user's last film back, and draw films that were not seen."""
    draw = np.random.default_rng(seed)
    user, _ = pd.factorize(ratings["user"], sort=True)
    item, _ = pd.factorize(ratings["item"], sort=True)
    users, items = int(user.max()) + 1, int(item.max()) + 1
    seen = np.zeros((users, items), bool)
    seen[user, item] = True
    order = np.lexsort((ratings["time"].to_numpy(), user))
    user, item = user[order], item[order]
    is_last = np.append(user[1:] != user[:-1], True)
    held = item[is_last]  # by user
    user, item = user[~is_last], item[~is_last]
    others = np.repeat(user, UNSEEN)
    train = pd.DataFrame(
        {
            "user": np.concatenate([user, others]),
            "item": np.concatenate([item, _unseen(seen, others, draw)]),
            "label": np.repeat(np.float32([1, 0]), [len(user), len(others)]),
        }
    )
    whom = np.repeat(np.arange(users), OTHERS)
    candidates = np.column_stack([held, _unseen(seen, whom, draw).reshape(users, OTHERS)])
    shuffled = train.iloc[draw.permutation(len(train))].reset_index(drop=True)
    return Problem(shuffled, candidates, users, items)


def _unseen(seen: np.ndarray, users: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """A film for each of ``users`` that the user has not seen."""
    items = draw.integers(seen.shape[1], size=len(users))
    while (again := seen[users, items]).any():
        items[again] = draw.integers(seen.shape[1], size=int(again.sum()))
    return items


def ranked(scores: np.ndarray) -> dict[str, float]:
    """HR@10 and NDCG@10 of (users, films) scores; the first film is the one to be found."""
    ahead = (scores[:, 1:] >= scores[:, :1]).sum(1)
    hit = ahead < BEST
    gain = np.where(hit, 1 / np.log2(ahead + 2), 0.0)
    return {"HR@10": float(hit.mean()), "NDCG@10": float(gain.mean())}


# --- the program --------------------------------------------------------------------------------


def estimator(problem: Problem, workers: int) -> Estimator:
    torch.manual_seed(0)
    model = NeuMF(problem.users, problem.items)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    return Estimator.from_torch(model, optimizer, nn.BCEWithLogitsLoss(), workers=workers)


def run(kind: str, problem: Problem, *, workers: int = 2, epochs: int = 4) -> dict[str, float]:
    """Train, break off, go on, predict; the two measures."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = ON_SPARK[kind](problem.train, folder)
        first = epochs // 2
        saver = ModelCheckpoint(str(folder / "run"))
        estimator(problem, workers).fit(**data, epochs=first, callbacks=[saver])

        est = estimator(problem, workers)  # another process, another day
        est.load_checkpoint(folder / "run")
        for row in est.fit(**data, epochs=epochs - first):
            print(f"  epoch {row['epoch']}: loss {row['loss']:.4f}, {row['rows']:,} rows")

        user = np.repeat(np.arange(problem.users), 1 + OTHERS)
        scores = est.predict((user, problem.candidates.reshape(-1)), batch_size=8192)
    return ranked(scores.reshape(problem.users, 1 + OTHERS))


def where(master: str | None, cores: int) -> dict[str, object]:
    """Arguments of ``init_orca_context``: processes of this machine, or a master of Spark's."""
    if master is None:
        return {"cores": cores}
    if here := re.fullmatch(r"local\[(\d+|\*)\]", master):
        return {"runtime": "spark", "cores": "*" if here[1] == "*" else int(here[1])}
    mode = {"yarn": "yarn", "k8s": "k8s"}.get(master.partition(":")[0], "standalone")
    return {"cluster_mode": mode, "master": master}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ratings", type=Path, help="a file of MovieLens; else generated")
    parser.add_argument("--data", choices=[*ON_SPARK, "all"], default="all")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--master", help="Spark's, as local[2]; else processes of this machine")
    asked = parser.parse_args()
    problem = problem_of(generated() if asked.ratings is None else read_ratings(asked.ratings))
    print(f"{problem.users:,} users, {problem.items:,} films, {len(problem.train):,} rows")
    kinds = KINDS if asked.master is None else ON_SPARK
    with init_orca_context(**where(asked.master, max(2, asked.workers))):
        for kind in kinds if asked.data == "all" else [asked.data]:
            print(kind)
            found = run(kind, problem, workers=asked.workers, epochs=asked.epochs)
            print("  " + ", ".join(f"{name} {value:.4f}" for name, value in found.items()))


if __name__ == "__main__":
    main()
