"""optimize, and what is chosen and built from its report."""

from __future__ import annotations

import copy
import os
import pickle
import random
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from bigdl._base.errors import (
    AccuracyError,
    ConfigError,
    DataError,
    NotReadyError,
    WorkerError,
    WorkerLostError,
)
from bigdl._base.workers import Workers
from bigdl.nano.pytorch import InferenceOptimizer
from bigdl.nano.pytorch.inference.batches import as_batches
from bigdl.nano.pytorch.inference.methods import METHODS, in_order, select
from bigdl.nano.pytorch.inference.optimizing import preload
from bigdl.nano.pytorch.inference.trial import Shipped
from bigdl.nano.selection import Report

FAST = ["channels_last", "openvino_fp32"]


class Net(nn.Module):
    """A small convolution net with batch statistics and dropout."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(), nn.Conv2d(8, 8, 3)
        )
        self.head = nn.Linear(8, 4)
        self.classes = ["a", "b", "c", "d"]

    def forward(self, x):
        return self.head(self.body(x).amax((2, 3)))

    def names(self):
        return self.classes


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    model = Net()
    model(torch.randn(64, 3, 12, 12))  # batch statistics of its own
    return model


@pytest.fixture(scope="module")
def data(net):
    x = torch.randn(22, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        y = copy.deepcopy(net).eval()(x).argmax(1)
    set_ = torch.utils.data.TensorDataset(x, y)
    return torch.utils.data.DataLoader(set_, batch_size=8, shuffle=True)


@pytest.fixture(scope="module")
def optimized(net, data):
    """One run that several tests look at."""
    opt = InferenceOptimizer()
    opt.optimize(net, data, metric=accuracy, includes=[*FAST, "openvino_int8", "bf16"])
    return opt


def accuracy(pred, target):
    return (pred.argmax(1) == target).float().mean()


def state(model):
    return (
        {k: v.clone() for k, v in model.state_dict().items()},
        [m.training for m in model.modules()],
        [p.requires_grad for p in model.parameters()],
        set(vars(model)),
    )


def same_state(one, other):
    return all(torch.equal(v, other[0][k]) for k, v in one[0].items()) and one[1:] == other[1:]


# --- what comes out ---------------------------------------------------------------------------


def test_every_row_has_its_numbers_or_its_reason(optimized):
    report = optimized.last_report
    assert isinstance(report, Report)
    assert report.metric == "accuracy"
    assert [row.name for row in report.rows] == in_order(
        ["original", *FAST, "openvino_int8", "bf16"]
    )
    for row in report.rows:
        if row.status == "ok":
            assert row.latency_ms > 0
            assert row.p90_ms >= row.latency_ms * 0.99
            assert row.throughput == pytest.approx(8e3 / row.latency_ms)
            assert row.size_mb > 0
            assert row.speedup > 0
        else:
            assert row.reason


def test_accuracy_is_of_the_whole_set(optimized):
    # 22 rows in batches of 8, 8, 6: a mean over batches could not give 1 - k/22
    original = optimized.last_report.row("original")
    assert original.accuracy == 1.0  # its own labels, dropout off, all 22 rows
    for row in optimized.last_report.rows:
        if row.status == "ok":
            assert row.accuracy * 22 == pytest.approx(round(row.accuracy * 22), abs=1e-4)


def test_each_ok_row_can_be_had(optimized, net):
    x = torch.randn(5, 3, 12, 12)
    with torch.no_grad():
        expected = copy.deepcopy(net).eval()(x)
    assert optimized.get_model("original") is net
    for row in optimized.last_report.rows:
        if row.status != "ok" or row.name == "original":
            continue
        model = optimized.get_model(row.name)
        assert (model.name, model.precision) == (row.name, METHODS[row.name].precision)
        assert model.names() == ["a", "b", "c", "d"]  # the original's own methods
        scale = {"fp32": 1e-4, "bf16": 0.05, "int8": 0.2}[model.precision]
        assert (model(x) - expected).abs().max() <= scale * expected.abs().max()


def test_a_saved_one_loads_in_a_fresh_process_without_the_class(optimized, tmp_path):
    InferenceOptimizer.save(optimized.get_model("openvino_fp32"), tmp_path / "kept")
    x = torch.randn(3, 3, 12, 12)
    torch.save(x, tmp_path / "x.pt")
    code = textwrap.dedent(f"""
        import torch
        from bigdl.nano.pytorch import InferenceOptimizer
        model = InferenceOptimizer.load({str(tmp_path / "kept")!r})
        torch.save(model(torch.load({str(tmp_path / "x.pt")!r})), {str(tmp_path / "y.pt")!r})
    """)
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, cwd=tmp_path)
    expected = optimized.get_model("openvino_fp32")(x)
    assert torch.allclose(torch.load(tmp_path / "y.pt"), expected, atol=1e-5)


def test_best_is_as_the_report_says(optimized, net):
    model, name = optimized.get_best_model()
    assert name == optimized.last_report.best().name
    assert (model is net) == (name == "original")


def test_a_filter_chooses_among_its_own(optimized):
    model, name = optimized.get_best_model(accelerator="openvino", precision="fp32")
    assert (name, model.accelerator) == ("openvino_fp32", "openvino")
    with pytest.raises(ConfigError, match="No method that fits"):
        optimized.get_best_model(accelerator="onnxruntime")


def test_a_name_of_another_library_version_works(optimized):
    assert optimized.get_model(method_name="channels_last").name == "channels_last"
    assert optimized.get_model("fp32_channels_last").name == "channels_last"


def test_summary_prints_the_table(optimized, capsys):
    optimized.summary()
    out, err = capsys.readouterr()
    assert out == f"{optimized.last_report}\n"
    assert err == ""


def test_before_optimize_nothing_is_ready():
    opt = InferenceOptimizer()
    assert opt.last_report is None
    for call in (opt.get_best_model, opt.summary, lambda: opt.get_model("bf16")):
        with pytest.raises(NotReadyError, match=r"call optimize\("):
            call()


# --- what stays as it was ---------------------------------------------------------------------


def test_the_callers_world_is_untouched(net, data, capfd, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    net.train()
    net.body[1].eval()  # a mixed mode
    generator = torch.Generator().manual_seed(5)
    loader = torch.utils.data.DataLoader(
        data.dataset, batch_size=8, shuffle=True, generator=generator
    )
    before = state(net)
    streams = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].copy()
    drawn = generator.get_state()
    world = dict(os.environ), list(sys.path), os.getcwd(), torch.get_num_threads()

    opt = InferenceOptimizer()
    opt.optimize(net, loader, metric=accuracy, includes=["channels_last"])
    del opt

    assert same_state(before, state(net))
    assert net.training
    assert not net.body[1].training
    assert random.getstate() == streams[0]
    assert torch.equal(torch.get_rng_state(), streams[1])
    assert (np.random.get_state()[1] == streams[2]).all()
    assert torch.equal(generator.get_state(), drawn)
    assert world == (dict(os.environ), list(sys.path), os.getcwd(), torch.get_num_threads())
    assert os.listdir(tmp_path) == []
    out, err = capfd.readouterr()
    assert out == ""
    assert "[2/2] channels_last" in err
    net.train()


def test_threads_are_the_callers_own(net, data):
    def threads(model, loader):
        return float(torch.get_num_threads())

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        report = InferenceOptimizer().optimize(net, data, metric=threads, includes=["original"])
    finally:
        torch.set_num_threads(before)
    assert report.threads == 1
    assert {row.accuracy for row in report.rows} == {1.0}


def test_nothing_better_is_an_answer(optimized, net, monkeypatch):
    rows = [
        row if row.speedup is None else replace(row, speedup=min(row.speedup, 1.04))
        for row in optimized.last_report.rows
    ]
    monkeypatch.setattr(optimized, "last_report", replace(optimized.last_report, rows=tuple(rows)))
    assert optimized.get_best_model() == (net, "original")
    assert "Keep your model" in str(optimized.last_report)


# --- forms of models and data -----------------------------------------------------------------


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, a, b, scale: float = 2.0):
        return {"sum": self.linear(a + b), "scaled": (a * scale,)}


class Odd:
    """Gives batches, and cannot be pickled."""

    def __init__(self, batches):
        self.lock, self.batches = threading.Lock(), batches

    def __iter__(self):
        return iter(self.batches)


def test_several_inputs_nested_outputs_and_data_that_cannot_be_pickled():
    data = Odd([(torch.ones(4, 3), torch.zeros(4, 3)), (torch.zeros(2, 3), torch.ones(2, 3))])
    opt = InferenceOptimizer()
    report = opt.optimize(TwoInputs(), data, includes=["openvino_fp32"])
    assert report.row("openvino_fp32").status == "ok", report
    assert report.row("openvino_fp32").accuracy > 0.999
    out = opt.get_model("openvino_fp32")(torch.ones(4, 3), torch.ones(4, 3))
    assert list(out) == ["sum", "scaled"]
    assert torch.equal(out["scaled"][0], torch.full((4, 3), 2.0))


ONE = (torch.ones(4, 3), torch.zeros(4, 3))


@pytest.mark.parametrize(
    ("data", "count"),
    [
        (torch.ones(4, 3), 1),
        (ONE, 1),
        ({"a": ONE[0], "b": ONE[1]}, 1),
        ([ONE, ONE], 2),
        ((batch for batch in [ONE, ONE, ONE]), 3),
        (torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*ONE), batch_size=3), 2),
    ],
    ids=["tensor", "tuple", "dict", "list", "generator", "loader"],
)
def test_forms_of_data(data, count):
    batches = as_batches(data, "data")
    assert [len(list(batches)) for _ in range(2)] == [count, count]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("how", ["export", "script", "plain"])
def test_compiled_programs_travel_in_their_own_form(how):
    x = torch.randn(2, 3)
    model = nn.Linear(3, 3).eval()
    made = {
        "export": lambda: torch.export.export(model, (x,)),
        "script": lambda: torch.jit.script(model),
        "plain": lambda: model,
    }[how]()
    shipped = pickle.loads(pickle.dumps(Shipped.of(made)))
    arrived = shipped.open() if isinstance(shipped, Shipped) else shipped
    assert torch.equal(arrived(x), model(x))


def test_throughput_is_taken_on_the_data_and_latency_on_the_sample(net, data):
    report = InferenceOptimizer().optimize(
        net,
        data,
        input_sample=torch.randn(1, 3, 12, 12),
        objective="throughput",
        includes=["original"],
    )
    original = report.row("original")
    assert report.objective == "throughput"
    assert (report.metric, original.accuracy) == ("agreement", 1.0)
    # eight rows cost less than eight calls of one row
    assert original.throughput > 1.5e3 / original.latency_ms


# --- what goes wrong in a child ---------------------------------------------------------------


class OnlyInChild(Exception):
    pass


def test_a_metric_that_raises_is_the_users_own_error(net, data):
    def broken(pred, target):
        raise OnlyInChild("no such class")

    opt = InferenceOptimizer()
    with pytest.raises(OnlyInChild, match="no such class") as caught:
        opt.optimize(net, data, metric=broken, includes=["channels_last"])
    assert isinstance(caught.value.__cause__, WorkerError)
    assert opt.last_report is None


def test_a_metric_that_fails_for_one_method_costs_its_row(net, data):
    def picky(model, loader):
        if type(model).__name__ == "AcceleratedModule":
            raise OnlyInChild("not this one")
        return 1.0

    report = InferenceOptimizer().optimize(net, data, metric=picky, includes=["channels_last"])
    row = report.row("channels_last")
    assert row.status == "failed"
    assert "OnlyInChild: not this one (while measuring its accuracy)" in row.reason


class Evil(nn.Module):
    """Behaves while it is the original, and not when it is copied for a candidate."""

    def __init__(self, how):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.how = how

    def forward(self, x):
        return self.linear(x)

    def __deepcopy__(self, memo):
        if self.how == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        time.sleep(300)


def test_a_crash_costs_a_row():
    report = InferenceOptimizer().optimize(
        Evil("crash"), torch.ones(2, 3), includes=["channels_last"]
    )
    row = report.row("channels_last")
    assert row.status == "failed"
    assert "SIGSEGV" in row.reason
    assert "while building it" in row.reason


@pytest.mark.slow
def test_a_hang_costs_its_time_limit_and_a_row():
    started = time.monotonic()
    report = InferenceOptimizer().optimize(
        Evil("hang"), torch.ones(2, 3), includes=["channels_last"], method_timeout_s=20
    )
    row = report.row("channels_last")
    assert row.status == "timeout"
    assert "longer than 20 s, while" in row.reason
    assert time.monotonic() - started < 90


def test_the_budget_leaves_rows_that_say_so():
    report = InferenceOptimizer().optimize(
        Evil("hang"), torch.ones(2, 3), includes=["channels_last", "bf16"], budget_s=10
    )
    assert report.seconds < 60
    rows = {row.name: row for row in report.rows}
    assert rows["original"].status == "ok"
    assert {rows["channels_last"].status, rows["bf16"].status} == {"skipped"}
    assert all("budget of 10 s" in rows[name].reason for name in ("channels_last", "bf16"))


class Crashing(nn.Module):
    def forward(self, x):
        os.kill(os.getpid(), signal.SIGSEGV)


def test_an_original_that_crashes_is_an_error_here_not_a_crash():
    with pytest.raises(WorkerLostError, match="SIGSEGV"):
        InferenceOptimizer().optimize(Crashing(), torch.ones(2, 3), includes=["original"])


class Diverging(nn.Module):
    """Exact in float32; in bf16 the small difference of large numbers is lost."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4, bias=False)
        with torch.no_grad():
            self.linear.weight.copy_(1001 * torch.eye(4))

    def forward(self, x):
        return self.linear(x) - 1000 * x


def test_a_diverging_method_is_measured_and_never_chosen():
    x = torch.linspace(-1, 1, 64).reshape(16, 4)
    opt = InferenceOptimizer()
    row = opt.optimize(Diverging(), x, includes=["bf16"]).row("bf16")
    if row.status == "refused":  # no such instructions here
        assert "bf16" in row.reason
        return
    assert row.status == "ok"
    assert row.accuracy < 0.9
    assert opt.get_best_model()[1] == "original"
    with pytest.raises(AccuracyError, match="keeps agreement within"):
        opt.get_best_model(precision="bf16")


def test_labels_that_are_missing_are_an_error(net):
    with pytest.raises(DataError, match="accuracy needs labels"):
        InferenceOptimizer().optimize(
            net, torch.ones(2, 3, 12, 12), metric=accuracy, includes=["original"]
        )


def test_a_model_that_cannot_be_sent_is_an_error():
    model = nn.Linear(3, 3)
    model.lock = threading.Lock()
    with pytest.raises(ConfigError, match="model cannot be sent to another process"):
        InferenceOptimizer().optimize(model, torch.ones(2, 3), includes=["bf16"])


def test_a_second_call_starts_anew(net, data):
    opt = InferenceOptimizer()
    opt.optimize(net, data, includes=["original"])
    with pytest.raises(ConfigError):
        opt.optimize(net, data, includes=["nothing"])
    assert len(opt.last_report.rows) == 1  # a wrong call changes nothing
    report = opt.optimize(net, data, includes=["inc_int8"])
    assert [row.name for row in report.rows] == ["original", "inc_int8"]
    assert report.row("inc_int8").status == "refused"


CTRL_C = textwrap.dedent("""
    import time, torch
    from torch import nn
    from bigdl.nano.pytorch import InferenceOptimizer

    class Slow(nn.Module):
        def forward(self, x):
            return x * 2
        def __deepcopy__(self, memo):
            time.sleep(300)

    opt = InferenceOptimizer()
    try:
        opt.optimize(Slow(), torch.ones(2, 3), includes=["channels_last"])
    except KeyboardInterrupt:
        print([row.name for row in opt.last_report.rows])
""")


def test_ctrl_c_ends_it_and_keeps_the_rows(tmp_path):
    program = subprocess.Popen(
        [sys.executable, "-"],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    program.stdin.write(CTRL_C)
    program.stdin.close()
    program.stdin = None
    assert "original" in program.stderr.readline()
    time.sleep(1)
    os.killpg(program.pid, signal.SIGINT)
    out, err = program.communicate(timeout=30)
    assert out == "['original']\n", err
    assert os.listdir(tmp_path) == []
    assert _children_of(program.pid) == []


def _children_of(group: int) -> list[str]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            command = (folder / "cmdline").read_text()
        except OSError:
            continue
        if int(fields[2]) == group or ("nursery" in command and int(fields[1]) == group):
            found.append(command)
    return found


# --- the order, the selection -----------------------------------------------------------------


def test_the_best_known_comes_first_for_each_kind_of_cpu():
    assert in_order(METHODS, {"avx512_vnni"})[:2] == ["original", "openvino_int8"]
    assert in_order(METHODS, {"avx2"})[:2] == ["original", "openvino_fp32"]
    assert sorted(in_order(METHODS, set())) == sorted(METHODS)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, set(METHODS)),
        ({"includes": ["bf16"]}, {"original", "bf16"}),
        ({"includes": ["jit_fp32"]}, {"original", "compile"}),
        ({"includes": ["original"]}, {"original"}),
        ({"accelerator": "openvino"}, {"original", "openvino_fp32", "openvino_bf16",
                                       "openvino_int8"}),
        ({"accelerator": ["openvino", "onnxruntime"], "precision": "fp32"},
         {"original", "openvino_fp32", "onnxruntime_fp32"}),
        ({"precision": "bf16", "excludes": ["ipex_bf16", "compile_bf16"]},
         {"original", "bf16", "bf16_channels_last", "openvino_bf16"}),
    ],
)  # fmt: skip
def test_filters(arguments, expected):
    names = select(**arguments)
    assert set(names) == expected
    assert names[0] == "original"


def test_preloading_starts_no_thread():
    modules = preload(list(METHODS))

    def look():
        return [name in sys.modules for name in modules]

    with Workers(preload=modules) as workers:
        # a nursery with threads would start an interpreter that has none of them
        assert workers.start(look).result() == [True] * len(modules)
