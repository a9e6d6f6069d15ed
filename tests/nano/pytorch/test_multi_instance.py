"""A model in several processes: the same outputs, its weights once, and nothing left behind."""

from __future__ import annotations

import os
import signal
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from bigdl._base.machine import core_ids
from bigdl.errors import ArgumentError, ConfigError, DataError, NotReadyError, WorkerLostError
from bigdl.nano import Pipeline
from bigdl.nano.pytorch import InferenceOptimizer

pytestmark = pytest.mark.skipif(os.name != "posix", reason="processes are made the POSIX way")

to_multi_instance = InferenceOptimizer.to_multi_instance
BATCHES = list(torch.randn(6, 5, 8, generator=torch.Generator().manual_seed(3)))


class Net(nn.Module):
    """Of a module that a worker cannot import by name; tied weights, and two kinds of output."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)
        self.second = nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x, scale=1.0):
        if bool((x > 1e6).any()):
            raise OwnError("an outlier")
        self.calls += 1
        out = self.second(self.norm(self.first(x)).relu()) * scale
        return {"out": out, "same": self.first.weight is self.second.weight}


class OwnError(Exception):
    """Of the user's."""


@pytest.fixture(autouse=True)
def nothing_left(tmp_path, monkeypatch):
    """Descriptors, temporary files and shared memory are as before each test."""

    def found():
        return (
            set(os.listdir("/proc/self/fd")),
            set(os.listdir(tempfile.gettempdir())),
            set(os.listdir("/dev/shm")),
        )

    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    before = found()
    yield
    assert found() == before


def plain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3)).eval()


def expected(model, batches=BATCHES):
    with torch.no_grad():
        return [model(batch) for batch in batches]


# --- what comes out ---------------------------------------------------------------------------


def test_a_plain_module():
    torch.manual_seed(0)
    model = Net().train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with to_multi_instance(model, num_processes=2) as many:
        out = many(BATCHES)
        by_position = many([(batch, 2.0) for batch in BATCHES])  # forward needs one: a label
        by_keyword = many([{"x": batch, "scale": torch.tensor(2.0)} for batch in BATCHES])
        pids = {facts.pid for facts in many.processes()}
    assert model.training  # it is as it was
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    wanted = expected(model.eval())
    for got, label, keyword, want in zip(out, by_position, by_keyword, wanted, strict=True):
        assert got["same"] is True
        assert not got["out"].requires_grad
        torch.testing.assert_close(got["out"], want["out"], rtol=0, atol=0)
        torch.testing.assert_close(label["out"], want["out"], rtol=0, atol=0)
        torch.testing.assert_close(keyword["out"], want["out"] * 2, rtol=0, atol=0)
    assert len(pids) == 2
    assert os.getpid() not in pids


@pytest.fixture(scope="module")
def accelerated():
    """Made once, and before anything is counted: exporters and compilers leave files open."""
    made = {
        accelerator: InferenceOptimizer.trace(plain(), BATCHES[0], accelerator=accelerator)
        for accelerator in ("compile", "onnxruntime", "openvino")
    }
    yield made
    for model in made.values():
        model.close()


@pytest.mark.parametrize(
    ("accelerator", "processes"), [("compile", 1), ("onnxruntime", 2), ("openvino", 2)]
)
def test_an_accelerated_model(accelerated, accelerator, processes):
    with to_multi_instance(accelerated[accelerator], processes) as many:
        out = many(BATCHES)
        assert len(many.processes()) == processes
    for got, want in zip(out, expected(plain()), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("bf16")
@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_a_quantized_model(precision):
    fast = InferenceOptimizer.quantize(plain(), precision, calib_data=BATCHES)
    wanted = expected(fast)
    with to_multi_instance(fast, 1) as many:
        out = many(BATCHES)
    for got, want in zip(out, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
@pytest.mark.parametrize("form", ["script", "export"])
def test_a_compiled_program(form):
    model = plain()
    if form == "script":
        program = torch.jit.trace(model, BATCHES[0])
    else:
        program = torch.export.export(model, (BATCHES[0],))
    with to_multi_instance(program, 1) as many:
        for got, want in zip(many(BATCHES), expected(model), strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_a_pipeline_s_workers_load_a_model_each(accelerated, tmp_path):
    """As docs/inference.md shows it; the model itself belongs to this process."""
    fast, folder = accelerated["onnxruntime"], str(tmp_path / "model")
    InferenceOptimizer.save(fast, folder)

    class Infer:
        fast = None

        def __call__(self, x):
            self.fast = self.fast or InferenceOptimizer.load(folder)
            return self.fast(x)

    with Pipeline([("shift", lambda x: x + 1), ("infer", Infer(), {"worker_num": 2})]) as pipeline:
        out = pipeline.run(BATCHES)
    for got, want in zip(out, expected(plain(), [x + 1 for x in BATCHES]), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    with pytest.raises(ArgumentError, match=r"stage 'infer' .*InferenceOptimizer\.save"):
        Pipeline([("infer", fast)])


def test_loaders_and_streams_of_batches():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(BATCHES)

    model = plain()
    rows = torch.cat(BATCHES)
    labels = torch.arange(len(rows))
    loader = DataLoader(TensorDataset(rows, labels), batch_size=7)
    with to_multi_instance(model, 2) as many:
        whole = torch.cat(many(loader))
        assert [len(out) for out in many(Stream())] == [5] * 6
        assert [len(out) for out in many(batch for batch in BATCHES)] == [5] * 6
        assert many([]) == []
    torch.testing.assert_close(whole, model(rows).detach())


def test_changes_of_the_model_do_not_reach_the_copies():
    model = plain()
    before = expected(model)
    with to_multi_instance(model, 1) as many:
        with torch.no_grad():
            model[0].weight.zero_()
        (out,) = many(BATCHES[:1])
    torch.testing.assert_close(out, before[0], rtol=0, atol=0)


def test_outputs_have_memory_of_their_own():
    with to_multi_instance(nn.Identity(), 1) as many:
        first, second = many(BATCHES[:2])
        first.zero_()
        torch.testing.assert_close(second, BATCHES[1], rtol=0, atol=0)
        torch.testing.assert_close(many(BATCHES[:1])[0], BATCHES[0], rtol=0, atol=0)


def test_kinds_of_tensors_arrive_as_they_are():
    odd = [
        torch.arange(6.0).reshape(2, 3).t(),
        torch.zeros(0, 4),
        torch.tensor(3),
        torch.tensor([True, False]),
        torch.ones(2, 3).bfloat16(),
        torch.ones(4, 4).to_sparse(),
        torch.ones(2, 3, 4, 4).contiguous(memory_format=torch.channels_last),
        torch.ones(1, 3).expand(5, 3),
        torch.tensor([1 + 2j]).conj(),
        torch.ones(3, requires_grad=True),
    ]
    with to_multi_instance(nn.Identity(), 1) as many:
        for got, want in zip(many(odd), odd, strict=True):
            assert got.dtype is want.dtype
            assert got.layout is want.layout
            torch.testing.assert_close(got.to_dense(), want.detach().to_dense(), rtol=0, atol=0)


# --- memory and cores -------------------------------------------------------------------------


def test_weights_lie_in_memory_once():
    model = nn.Sequential(nn.Linear(2000, 2000), nn.ReLU(), nn.Linear(2000, 500)).eval()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    x = torch.randn(3, 2000)
    with to_multi_instance(model, 2) as many:
        for got in many([x] * 8):
            torch.testing.assert_close(got, model(x).detach(), rtol=1e-5, atol=1e-5)
        for facts in many.processes():
            shared, private = _shared_and_private(facts.pid)
            assert shared + private >= weights * 0.99  # it was all read
            assert private == 0  # none of it has become the process's own


def _shared_and_private(pid: int) -> tuple[int, int]:
    """Bytes of the model's memory that a process shares, and has copied for itself."""
    shared = private = 0
    inside = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        word, _, rest = line.partition(" ")
        if not word.endswith(":"):
            inside = "memfd:bigdl-model" in rest
        elif inside and word in ("Shared_Clean:", "Shared_Dirty:", "Private_Clean:"):
            shared += int(rest.split()[0]) * 1024
        elif inside and word in ("Private_Dirty:", "Anonymous:"):
            private += int(rest.split()[0]) * 1024
    return shared, private


def test_a_copy_that_writes_to_its_buffers_writes_to_its_own():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(4, dtype=torch.int64))

        def forward(self, x):
            self.calls += 1
            return self.calls.clone()

    model = Counting()
    with to_multi_instance(model, 2) as many:
        counts = [int(out[0]) for out in many(BATCHES)]
    # two copies that each count their own calls
    assert max(counts) < len(BATCHES)
    assert sorted(counts)[:2] == [1, 1]
    assert model.calls.sum() == 0


def test_each_process_has_cores_of_its_own_and_as_many_threads():
    class Facts(nn.Module):
        def forward(self, x):
            return sorted(os.sched_getaffinity(0)), torch.get_num_threads()

    usable = core_ids()
    if len(usable) < 2:
        pytest.skip("needs two cores")
    with to_multi_instance(Facts(), 2, cores_per_process=1) as many:
        found = many(BATCHES)
        cores = [facts.cores for facts in many.processes()]
    assert all(threads == 1 for _, threads in found)
    assert len({tuple(own) for own, _ in found}) == 2
    assert len({core for own in cores for core in own}) == 2
    listed = [[usable[1]], [usable[1], usable[0]]]
    with to_multi_instance(Facts(), 2, cpu_for_each_process=listed) as many:
        assert [facts.threads for facts in many.processes()] == [1, 2]
        assert {(tuple(own), n) for own, n in many(BATCHES * 4)} == {
            ((usable[1],), 1),
            (tuple(sorted(usable[:2])), 2),
        }


# --- failures, the end ------------------------------------------------------------------------


def test_an_exception_of_the_model_s_names_the_batch_and_it_goes_on():
    with to_multi_instance(Net(), 2) as many:
        bad = [*BATCHES[:3], BATCHES[0] + 1e7, *BATCHES]
        with pytest.raises(OwnError, match="an outlier") as caught:
            many(bad)
        assert "the model, for input 3" in str(caught.value.__cause__)
        with pytest.raises(RuntimeError, match="mat1 and mat2"):
            many([torch.ones(2, 3)])
        assert len(many(BATCHES)) == 6


def test_a_killed_process_is_an_error_within_seconds_and_replaced():
    class Slow(nn.Module):
        def forward(self, x):
            time.sleep(float(x[0]))
            return x

    with to_multi_instance(Slow(), 2) as many:
        pids = [facts.pid for facts in many.processes()]
        timers = [threading.Timer(0.3, os.kill, (pid, signal.SIGKILL)) for pid in pids]
        started = time.monotonic()
        for timer in timers:
            timer.start()
        with pytest.raises(WorkerLostError, match=r"SIGKILL .*called again"):
            many([torch.tensor([20.0])] * 2)
        assert time.monotonic() - started < 8
        for timer in timers:
            timer.join()
        assert [float(out) for out in many([torch.zeros(1)] * 4)] == [0.0] * 4
        assert not set(pids) & {facts.pid for facts in many.processes()}


def test_closed():
    many = to_multi_instance(plain(), 1)
    assert repr(many) == "MultiInstance('Sequential', num_processes=1)"
    (facts,) = many.processes()
    many.close()
    many.close()
    assert not Path(f"/proc/{facts.pid}").exists()
    assert "closed" in repr(many)
    with pytest.raises(NotReadyError, match="multi-instance model was closed"):
        many(BATCHES)


# --- misuse -----------------------------------------------------------------------------------

MISUSE = {
    "no module": (lambda: to_multi_instance(BATCHES), ArgumentError, "model is a list"),
    "a class": (lambda: to_multi_instance(Net), ArgumentError, r"give Net\("),
    "no process": (lambda: to_multi_instance(Net(), 0), ConfigError, "num_processes=0"),
    "half a process": (lambda: to_multi_instance(Net(), 1.5), ArgumentError, "whole number"),
    "too many cores": (
        lambda: to_multi_instance(Net(), 2, cores_per_process=999),
        ConfigError,
        "needs 1998 cores",
    ),
    "cores twice": (
        lambda: to_multi_instance(Net(), 1, 1, [[0]]),
        ConfigError,
        "contradict",
    ),
    "one list for two": (
        lambda: to_multi_instance(Net(), 2, cpu_for_each_process=[[core_ids()[0]]]),
        ConfigError,
        "1 lists of cores",
    ),
    "a core that is not here": (
        lambda: to_multi_instance(Net(), 1, cpu_for_each_process=[[4096]]),
        ConfigError,
        r"no core \[4096\]",
    ),
    "an unknown argument": (
        lambda: to_multi_instance(Net(), num_proceses=2),
        ArgumentError,
        "num_processes",
    ),
}


@pytest.mark.parametrize("case", MISUSE)
def test_misuse(case):
    call, kind, words = MISUSE[case]
    with pytest.raises(kind, match=words):
        call()


def test_a_model_that_cannot_be_sent():
    model = plain()
    model.lock = threading.Lock()
    with pytest.raises(ArgumentError, match="Sequential, cannot be sent"):
        to_multi_instance(model)


def test_wrong_batches():
    with to_multi_instance(plain(), 1) as many:
        for wrong, words in [
            (BATCHES[0], r"give \[batch\]"),
            ({"input": BATCHES[0]}, r"give \[batch\]"),
            (TensorDataset(BATCHES[0]), "DataLoader"),
            (3, "not a int"),
            ([np.zeros((5, 8))], "A batch is a ndarray"),
        ]:
            with pytest.raises(ArgumentError, match=words):
                many(wrong)
        with pytest.raises(DataError, match="has 0 items"):
            many([()])
        assert len(many(BATCHES)) == 6
