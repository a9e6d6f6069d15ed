"""Plans as data, and a plan in force on a module of a hand-written loop."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from bigdl.errors import ArgumentError, ConfigError
from bigdl.nano.pytorch import Plan
from bigdl.nano.pytorch.plan.candidates import NAMES
from bigdl.nano.pytorch.plan.plan import Row


@pytest.fixture
def plan():
    return Plan(
        (
            Row(name="original", status="slower", step_ms=10.0, speedup=1.0, reason="2 times"),
            Row(name="channels_last", status="refused", reason="no convolution"),
            Row(name="threads", status="chosen", step_ms=5.0, speedup=2.0, loss_change=0.0,
                cosine=1.0, reason="1 instead of 2"),
            Row(name="compile", status="skipped", reason="too short"),
        ),
        {"threads": {"threads": 1}},
    )  # fmt: skip


def test_names_are_those_promised():
    assert set(NAMES) == {
        "channels_last", "bf16", "fused_optimizer", "compile", "frozen_trunk", "allocator",
        "threads", "processes", "prefetch",
    }  # fmt: skip


def test_json_round_trip(plan):
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert again.chosen == ("threads",)
    assert again.options == {"threads": {"threads": 1}}


def test_table_and_words(plan):
    lines = str(plan).splitlines()
    assert lines[0].split()[:2] == ["name", "status"]
    assert len(lines) == 5
    assert "2.00×" in lines[3]  # noqa: RUF001
    assert "1 instead of 2" in lines[3]
    text = plan.explain()
    assert "In force: threads: a step is 2.00 times as fast." in text
    assert "compile (skipped): too short." in text
    assert "off" in str(Plan())
    assert Plan().chosen == ()


def test_refusing_the_last_one_keeps_your_own(plan):
    left = plan.without({"threads": "broke"})
    assert left.chosen == ()
    assert left.row("original").status == "chosen"
    assert left.row("threads").reason == "broke"
    assert left.options == {}


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        (3, ArgumentError, "takes a string, not int"),
        ("nonsense", ConfigError, "not JSON"),
        ("[]", ConfigError, "no plan"),
        ('{"schema_version": 1}', ConfigError, "need exactly"),
        ('{"schema_version": 9, "rows": [], "options": {}}', ConfigError, "schema_version is 9"),
        ('{"schema_version": 1, "rows": {}, "options": {}}', ConfigError, "not a list"),
        ('{"schema_version": 1, "rows": [{"name": "bf16"}], "options": {}}', ConfigError, "rows"),
        ('{"schema_version": 1, "rows": [{"name": "bf61", "status": "chosen"}], "options": {}}',
         ConfigError, "Did you mean 'bf16'"),
        ('{"schema_version": 1, "rows": [{"name": "bf16", "status": "choosen"}], "options": {}}',
         ConfigError, "status='choosen'"),
        ('{"schema_version": 1, "rows": [{"name": "bf16", "status": "chosen", "step_ms": "1"}], '
         '"options": {}}', ConfigError, "step_ms='1'"),
        ('{"schema_version": 1, "rows": [], "options": {"x": {}}}', ConfigError, "x: not known"),
        ('{"schema_version": 1, "rows": [], "options": {"bf16": 3}}', ConfigError, "table"),
    ],
)  # fmt: skip
def test_misuse_of_from_json(text, error, words):
    with pytest.raises(error, match=words):
        Plan.from_json(text)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: Plan("bf16"), ArgumentError, "sequence of Row, not str"),
        (lambda: Plan(("bf16",)), ArgumentError, "takes Rows, not str"),
        (lambda: Plan.of("bf61"), ConfigError, "Did you mean 'bf16'"),
        (lambda: Plan((Row(name="bf16", status="chosen"),) * 2), ConfigError, "two rows for bf16"),
        (lambda: Plan().row("bf16"), ConfigError, "no row 'bf16'"),
        (lambda: Plan.of("bf16").apply("model"), ArgumentError, "torch.nn.Module, not str"),
        (lambda: Plan.of("bf16").apply(nn.Linear(1, 1), 3), ArgumentError, "not int"),
        (lambda: Plan.of("bf16").apply(nn.Linear(1, 1), ["sgd"]), ArgumentError, "not str"),
        (lambda: Plan.of("channels_last").apply(nn.Linear(1, 1)), ConfigError, "no 2-D or 3-D"),
        (lambda: Plan.of("bf16").apply(nn.Linear(1, 1).double()), ConfigError, "float64"),
        (lambda: Plan.of("fused_optimizer").apply(nn.Linear(1, 1)), ConfigError, "no optimizer"),
        (lambda: Plan.of("processes").apply(nn.Linear(1, 1)), ConfigError, "one process"),
    ],
)
def test_misuse(call, error, words):
    with pytest.raises(error, match=words):
        call()


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 2),
    )  # fmt: skip


@pytest.mark.usefixtures("bf16")
def test_in_force_on_a_loop_of_ones_own_and_undone():
    model = network()
    optimizer = torch.optim.Adam(model.parameters())
    identities = [id(p) for p in model.parameters()]
    flags = [group["fused"] for group in optimizer.param_groups]
    attributes = set(vars(model))
    x, y = torch.randn(4, 3, 9, 9), torch.tensor([0, 1, 0, 1])

    with Plan.of("channels_last", "bf16", "fused_optimizer").apply(model, optimizer) as force:
        assert all(group["fused"] for group in optimizer.param_groups)
        for _ in range(2):
            with force.step():
                inputs, target = force.batch((x, y))
                assert inputs.is_contiguous(memory_format=torch.channels_last)
                output = model(inputs)
                loss = nn.functional.cross_entropy(output, target)
            assert output.dtype is torch.bfloat16
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    assert [id(p) for p in model.parameters()] == identities
    assert [group["fused"] for group in optimizer.param_groups] == flags
    assert set(vars(model)) == attributes
    assert all(p.dtype is torch.float32 and p.is_contiguous() for p in model.parameters())
    assert model(x).dtype is torch.float32
    force.undo()  # once more does no harm


def test_a_failure_on_the_way_undoes_what_was_applied():
    model = network()
    optimizer = torch.optim.Adam(model.parameters())
    with pytest.raises(ConfigError, match="processes"):
        Plan.of("fused_optimizer", "processes").apply(model, optimizer)
    assert not optimizer.param_groups[0]["fused"]


def test_compile_keeps_class_attributes_and_state(compile_allowed):
    model = network()
    keys, kind = list(model.state_dict()), type(model)
    before = set(vars(model))
    x = torch.randn(4, 3, 9, 9)
    expected = model.eval()(x)
    with Plan.of("compile").apply(model) as force, force.step():
        assert model._compiled_call_impl is not None
        output = model(x)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    assert list(model.state_dict()) == keys
    assert type(model) is kind
    assert set(vars(model)) == before
    assert model._compiled_call_impl is None


@pytest.fixture
def compile_allowed(monkeypatch):
    """The compiled form without the compiler's minutes: dynamo with its eager backend."""
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda fn, options=None: real(fn, backend="eager"))


def test_threads_are_scoped_to_the_step():
    before = torch.get_num_threads()
    plan = Plan.from_json(
        json.dumps(
            {
                "schema_version": 1,
                "rows": [{"name": "threads", "status": "chosen"}],
                "options": {"threads": {"threads": 1}},
            }
        )
    )
    with plan.apply(nn.Linear(2, 2)) as force:
        assert torch.get_num_threads() == before
        with force.whole():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == before
        assert force.options == {"threads": {"threads": 1}}
    with pytest.raises(ConfigError, match="whole number"):
        Plan(plan.rows, {"threads": {"threads": "two"}}).apply(nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="1000 threads on"):
        Plan(plan.rows, {"threads": {"threads": 1000}}).apply(nn.Linear(2, 2))
