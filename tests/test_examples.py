"""The example programs are tested too."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from bigdl.testing.standalone import standalone_cluster

pytest.importorskip("pytorch_lightning", reason="needs the [torch] extra")
pytest.importorskip("sklearn", reason="the pictures are bundled there")

pytestmark = pytest.mark.filterwarnings(  # Lightning's own
    "ignore:The 'train_dataloader' does not have many workers",
    "ignore:The number of training batches",
    "ignore:Found .* module.s. in eval mode",
    "ignore:`isinstance.treespec, LeafSpec.` is deprecated",
)

DEMO = Path(__file__).resolve().parents[1] / "examples" / "demo.py"


@pytest.fixture(scope="module")
def demo():
    spec = importlib.util.spec_from_file_location("demo", DEMO)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pictures_of_two_classes(demo, tmp_path, monkeypatch):
    from torchvision.datasets import ImageFolder

    monkeypatch.setattr(demo, "PICTURES", 6)
    demo.two_classes(tmp_path)
    found = ImageFolder(str(tmp_path))
    assert found.classes == ["china", "flower"]
    assert found.targets == [0, 0, 0, 1, 1, 1]
    pictures = [picture for picture, _ in found]
    assert {picture.size for picture in pictures} == {(500, 375)}
    assert len({picture.tobytes() for picture in pictures}) == 6  # each another part


def test_its_program_trains_the_last_layer_only(demo, tmp_path, monkeypatch):
    """The program as it is, with a small network and a few pictures."""
    import pytorch_lightning
    import torch
    import torchvision

    def small(weights):
        assert weights is None  # nothing is downloaded
        network = torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [1, 1, 1, 1])
        return network.requires_grad_(True)

    monkeypatch.setattr(demo, "PICTURES", 6)
    monkeypatch.setattr(demo, "BATCH", 2)
    monkeypatch.setattr(torchvision.models, "resnet50", small)
    demo.two_classes(tmp_path)
    started = []

    class Recorder(pytorch_lightning.Trainer):
        def fit(self, model, loader):
            started.append({name: value.clone() for name, value in model.state_dict().items()})
            super().fit(model, loader)

    vision = (torchvision.datasets, torchvision.transforms)
    model, _, _, watch = demo.program(Recorder, *vision, tmp_path, 3, 60.0)
    changed = {
        name
        for name, value in model.state_dict().items()
        if not torch.equal(value, started[0][name])
    }
    assert changed == {"head.weight", "head.bias"}
    assert watch.steps == 3
    assert 0 < watch.step_s <= watch.whole_s


def test_a_folder_that_is_not_there():
    done = subprocess.run(
        [sys.executable, DEMO, "/no/such/folder"],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "no such folder: /no/such/folder" in done.stderr


@pytest.mark.slow
def test_it_prints_both_tables():
    done = subprocess.run(
        [sys.executable, DEMO], capture_output=True, text=True, check=False, timeout=900
    )
    assert done.returncode == 0, done.stderr
    for words in (
        "What was tried in training",
        "frozen_trunk",
        "a step, pictures included",
        "What was tried for the trained network",
        "openvino_int8",
        "get_best_model(accuracy_criterion=0.02) gives:",
        "All of this took",
    ):
        assert words in done.stdout


# --- neural collaborative filtering --------------------------------------------------------------


@pytest.fixture(scope="module")
def ncf():
    pytest.importorskip("pandas", reason="needs the [orca] extra")
    pytest.importorskip("pyarrow", reason="needs the [orca] extra")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(DEMO.parent))  # workers find it there too
        yield importlib.import_module("ncf")
        del sys.modules["ncf"]


def test_the_two_measures_of_a_ranking(ncf):
    import numpy as np

    scores = np.zeros((3, 100))
    scores[:, 1:] = np.arange(99)
    scores[:, 0] = [1000, 97.5, 10]  # first, second, far behind
    found = ncf.ranked(scores)
    assert found["HR@10"] == pytest.approx(2 / 3)
    assert found["NDCG@10"] == pytest.approx((1 + 1 / np.log2(3)) / 3)


def test_what_is_kept_back_is_not_trained_on(ncf):
    ratings = ncf.generated(users=30, items=120, each=8)
    problem = ncf.problem_of(ratings)
    seen = problem.train[problem.train["label"] == 1]
    assert len(seen) == 30 * 7
    assert len(problem.train) == 30 * 7 * 5
    trained = set(zip(seen["user"], seen["item"], strict=True))
    assert not trained & set(enumerate(problem.candidates[:, 0]))
    other = problem.train[problem.train["label"] == 0]
    never = set(zip(other["user"], other["item"], strict=True))
    assert not never & trained


def test_it_learns_the_same_from_every_kind_of_data(ncf):
    from bigdl.orca import init_orca_context

    problem = ncf.problem_of(ncf.generated(users=300, items=300, each=30))
    with init_orca_context(cores=2):
        found = {kind: ncf.run(kind, problem, epochs=4) for kind in ncf.KINDS}
    assert found == dict.fromkeys(ncf.KINDS, found["arrays"])
    for measures in found.values():
        assert measures["HR@10"] > 0.3  # 0.1 by chance
        assert measures["NDCG@10"] > 0.15


@pytest.mark.parametrize(
    ("master", "arguments"),
    [
        (None, {"cores": 3}),
        ("local[4]", {"runtime": "spark", "cores": 4}),
        ("local[*]", {"runtime": "spark", "cores": "*"}),
        (
            "local-cluster[2,1,1024]",
            {"cluster_mode": "standalone", "master": "local-cluster[2,1,1024]"},
        ),
        ("spark://h:7077", {"cluster_mode": "standalone", "master": "spark://h:7077"}),
        ("yarn", {"cluster_mode": "yarn", "master": "yarn"}),
        ("k8s://https://h", {"cluster_mode": "k8s", "master": "k8s://https://h"}),
    ],
)
def test_where_it_runs(ncf, master, arguments):
    assert ncf.where(master, 3) == arguments


@pytest.mark.slow
@pytest.mark.parametrize("place", ["local[2]", "local-cluster[2,1,1024]", "standalone"])
def test_it_learns_the_same_on_spark(ncf, place, tmp_path):
    """One HR@10 and NDCG@10 for every kind of data, here and there."""
    pytest.importorskip("pyspark", reason="needs the [spark] extra")
    ratings = ncf.generated(users=300, items=300, each=30).assign(rating=5)
    names = ["user", "item", "rating", "time"]
    ratings[names].to_csv(tmp_path / "u.data", sep="\t", header=False, index=False)

    def measures(*options):
        done = subprocess.run(
            [sys.executable, str(DEMO.parent / "ncf.py"), "--ratings", str(tmp_path / "u.data"),
             "--epochs", "2", *options],
            capture_output=True, text=True, timeout=500, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        return [line.strip() for line in done.stdout.splitlines() if "HR@10" in line]

    [here] = measures("--data", "pandas")
    with contextlib.ExitStack() as cluster:
        if place == "standalone":
            place = cluster.enter_context(standalone_cluster(tmp_path))
        assert measures("--master", place) == [here] * len(ncf.ON_SPARK)
