"""Each candidate: when it refuses, what it changes, and that it takes everything back."""

from __future__ import annotations

import platform
import re
import resource
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from bigdl._base import machine
from bigdl._base.workers import run_in_child
from bigdl.nano.pytorch import Plan
from bigdl.nano.pytorch.plan import process
from bigdl.nano.pytorch.plan.candidates import Scene, candidate
from bigdl.nano.pytorch.plan.plan import device_of

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="counts page faults")


def scene(module, *optimizers, batch=None, **more):
    facts = {
        "steps_left": None, "epochs_left": None, "deterministic": False,
        "device": device_of(module),
    }  # fmt: skip
    return Scene(module=module, optimizers=optimizers, batch=batch, **(facts | more))


def convolution():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2))


PICTURES = torch.zeros(2, 3, 5, 5)


@pytest.mark.parametrize(
    ("name", "where", "words"),
    [
        ("channels_last", scene(nn.Linear(1, 1)), "no 2-D or 3-D convolution"),
        ("channels_last", scene(convolution(), batch=torch.zeros(3)), "four or five axes"),
        ("channels_last", scene(convolution(), batch={"a": [PICTURES.contiguous(
            memory_format=torch.channels_last)]}), "already"),
        ("bf16", scene(convolution().double()), "float64.*never lowered"),
        ("bf16", scene(convolution().bfloat16()), "bfloat16"),
        ("bf16", scene(convolution(), precision="bf16-mixed"), "bf16-mixed already"),
        ("bf16", scene(nn.ReLU()), "no floating-point parameters"),
        ("fused_optimizer", scene(nn.Linear(1, 1)), "no optimizer"),
        ("compile", scene(nn.ReLU()), "no module with parameters"),
        ("compile", scene(nn.LSTM(2, 2)), "recurrent"),
        ("processes", scene(nn.Linear(1, 1)), "one process"),
    ],
)  # fmt: skip
def test_refusals(name, where, words):
    assert re.search(words, candidate(name).refuse(where))


def test_channels_last_follows_nests_and_leaves_the_rest():
    force = Plan.of("channels_last").apply(convolution())
    volume, words = torch.zeros(2, 3, 5, 5, 5), ["a"]
    given = {"x": PICTURES, "more": (volume, torch.zeros(4), words)}
    got = force.batch(given)
    assert got["x"].is_contiguous(memory_format=torch.channels_last)
    assert got["more"][0].is_contiguous(memory_format=torch.channels_last_3d)
    assert got["more"][1] is given["more"][1]
    assert got["more"][2] == words
    assert PICTURES.is_contiguous()  # the caller's own is not touched
    back = force.output({"loss": torch.tensor(1.0), "y": got["x"]})
    assert back["y"].is_contiguous()


def test_bf16_needs_instructions_for_it(monkeypatch):
    monkeypatch.setattr(machine, "isa", lambda: frozenset({"avx2"}))
    assert "no bf16 instructions" in candidate("bf16").refuse(scene(convolution()))


@pytest.mark.usefixtures("bf16")
def test_bf16_gives_outputs_back_in_float():
    force = Plan.of("bf16").apply(nn.Linear(2, 2))
    made = force.output({"y": torch.zeros(2, dtype=torch.bfloat16), "n": torch.arange(2)})
    assert made["y"].dtype is torch.float32
    assert made["n"].dtype is torch.int64


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.Adam(p, 1e-2),
        lambda p: torch.optim.AdamW(p, 1e-2, amsgrad=True),
        lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9, nesterov=True),
        lambda p: torch.optim.Adagrad(p, 1e-2),
        lambda p: torch.optim.Adam(p, 1e-2, foreach=True),
    ],
)
def test_fused_optimizers_do_the_same_and_forget(make):
    """Steps stock, fused, stock equal stock steps up to rounding; flags come back."""
    results = []
    for fuses in (False, True):
        torch.manual_seed(0)
        module = nn.Linear(5, 3)
        optimizer = make(module.parameters())
        users = [dict(group) for group in optimizer.param_groups]
        for step in range(6):
            force = Plan.of("fused_optimizer").apply(module, optimizer) if fuses else None
            if step not in (2, 3) and force is not None:
                force.undo()
            optimizer.zero_grad()
            module(torch.ones(2, 5) * step).square().sum().backward()
            optimizer.step()
            if force is not None:
                force.undo()
        assert [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups] == [
            {k: v for k, v in g.items() if k != "params"} for g in users
        ]
        results.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


class Own(torch.optim.Adam):
    def step(self, closure=None):
        return super().step(closure)


def adam_over_sparse():
    table = nn.Embedding(4, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    return table, torch.optim.SGD(table.parameters(), 0.1)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda m: torch.optim.RMSprop(m.parameters()), "RMSprop has no fused form"),
        (lambda m: torch.optim.LBFGS(m.parameters()), "LBFGS has no fused form"),
        (lambda m: torch.optim.Adam(m.parameters(), fused=True), "fused already"),
        (lambda m: Own(m.parameters()), "Own has no fused form"),
        (lambda m: torch.optim.Adam(m.parameters(), differentiable=True), "differentiable"),
    ],
)
def test_optimizers_without_a_fused_form(make, words):
    module = nn.Linear(1, 1)
    assert words in candidate("fused_optimizer").refuse(scene(module, make(module)))


def test_sparse_gradients_are_not_fused():
    table, optimizer = adam_over_sparse()
    assert "sparse" in candidate("fused_optimizer").refuse(scene(table, optimizer))


def test_checkpoints_have_the_users_flags():
    module = nn.Linear(2, 2)
    adam, other = torch.optim.Adam(module.parameters()), torch.optim.RMSprop(module.parameters())
    force = Plan.of("fused_optimizer").apply(module, [other, adam])
    checkpoint = {"optimizer_states": [other.state_dict(), adam.state_dict()]}
    assert checkpoint["optimizer_states"][1]["param_groups"][0]["fused"] is True
    force.as_users(checkpoint)
    assert checkpoint["optimizer_states"][1]["param_groups"][0]["fused"] is None
    force.as_users({})  # weights only


def test_compile_is_refused_where_it_would_end_the_process(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", object())
    monkeypatch.delitem(sys.modules, "triton", raising=False)
    assert "ends the process" in candidate("compile").refuse(scene(nn.Linear(1, 1)))


def test_compile_is_refused_without_a_compiler(monkeypatch):
    import shutil

    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "no C++ compiler" in candidate("compile").refuse(scene(nn.Linear(1, 1)))


def test_threads_are_refused_where_one_is_all_there_is(monkeypatch):
    monkeypatch.setattr(machine, "physical_cores", lambda: 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert "1 thread is what" in candidate("threads").refuse(scene(nn.Linear(1, 1)))


@pytest.mark.skipif(
    sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="about glibc"
)
def test_the_allocator_keeps_pages_and_gives_them_back():
    """Page faults of a step that allocates 64 MB: next to none in force; undone, the pages go.

    In a process of its own: what other tests have freed would serve this one's allocations.
    """
    own, kept, given_back = run_in_child(_faults_and_pages_given_back, timeout_s=120)
    assert kept < own / 10
    assert given_back > 48 << 20


def _faults_and_pages_given_back():
    def faults(times=5):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(times):
            torch.empty(16 << 20, dtype=torch.float32).fill_(1.0)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    def resident():
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize()

    faults(2)
    own = faults()
    force = Plan.of("allocator").apply(nn.Linear(1, 1))
    try:
        faults(10)  # the heap grows until the block fits between what else lies in it
        kept = faults()
        held = resident()
    finally:
        force.undo()
    assert force.names == ()
    return own, kept, held - resident()


@pytest.mark.parametrize(
    ("pages", "step_s", "huge", "reason"),
    [
        (1.0, 1e-3, "always [madvise] never", "new pages take 0.5% of a step's time"),
        (3.0, 1e-3, "always [madvise] never", None),
        (1.0, 1e-3, "[always] madvise never", None),  # that one may have been of 2 MB
        (1.0, 1e-3, None, "new pages take 0.5%"),
        (None, 1e-3, None, None),
        (1.0, None, None, None),
    ],
)
def test_the_allocator_is_not_tried_where_steps_get_no_memory(
    pages, step_s, huge, reason, monkeypatch, tmp_path
):
    if huge is not None:
        folder = tmp_path / "sys/kernel/mm/transparent_hugepage"
        folder.mkdir(parents=True)
        (folder / "enabled").write_text(huge)
    has_huge_pages = process._has_huge_pages
    monkeypatch.setattr(process, "_has_huge_pages", lambda: has_huge_pages(tmp_path))
    told = candidate("allocator").refuse(scene(nn.Linear(1, 1), page_faults=pages, step_s=step_s))
    assert told is None if reason is None else reason in told


def test_the_allocator_is_refused_beside_another(monkeypatch):

    monkeypatch.setattr(process, "allocator_in_use", lambda: "jemalloc")
    assert "jemalloc" in candidate("allocator").refuse(scene(nn.Linear(1, 1)))
