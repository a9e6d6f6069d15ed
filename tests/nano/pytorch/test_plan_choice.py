"""The choice without Lightning: a hand-written step, made-up candidates, a false clock."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from bigdl.errors import ConfigError
from bigdl.nano.pytorch import Guard
from bigdl.nano.pytorch.plan.best_known import best_known, kind_of
from bigdl.nano.pytorch.plan.candidates import NAMES, Applied, Candidate, Scene
from bigdl.nano.pytorch.plan.choice import Choice
from bigdl.nano.pytorch.plan.rehearsal import PlainRehearsal, Stage
from bigdl.nano.pytorch.plan.timing import time_in_turns

pytestmark = pytest.mark.usefixtures("one_thread")


def rehearsal(batches=None, **facts):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1), nn.Linear(8, 1))
    optimizer = torch.optim.Adam(module.parameters(), 1e-2)
    batches = batches or [(torch.randn(6, 4), torch.randn(6, 1)) for _ in range(2)]
    scene = Scene(
        module=module, optimizers=(optimizer,), batch=batches[0],
        **({"steps_left": 10_000, "epochs_left": 3, "deterministic": False,
            "device": torch.device("cpu")} | facts),
    )  # fmt: skip
    return PlainRehearsal(
        lambda module, batch: nn.functional.mse_loss(module(batch[0]), batch[1]), batches, scene
    )


class Does(Applied):
    """Multiplies the step's inputs; takes part of a true candidate's place."""

    def __init__(self, log, factor=1.0, fails=None, settles=None):
        self.log, self.factor, self.fails, self.settles = log, factor, fails, settles
        log.append("apply")

    def batch(self, batch):
        if self.fails:
            raise self.fails
        return batch[0] * self.factor, batch[1]

    def settle(self):
        if self.settles:
            raise ConfigError(self.settles)

    def undo(self):
        self.log.append("undo")


def made(name, *, speed=1.0, refuses=None, gentle=None, cannot=None, setup=0.0, **does):
    class Made(Candidate):
        hope = 2.0

        def __init__(self):
            self.log = []

        def refuse(self, scene):
            return refuses

        def apply(self, module, optimizers, scene):
            if cannot:
                raise ConfigError(cannot)
            return Does(self.log, **does)

        def gentler(self):
            return gentle

        def setup_s(self, scene):
            return setup

    Made.name = name
    one = Made()
    one.speed = speed
    return one


@pytest.fixture
def choose(monkeypatch):
    """Run a choice to its end; ``speed`` of each candidate divides the step's time."""

    def seconds(self, batches):
        self._perform(batches[0])
        speed = math.prod(one.speed for one in self.force._applied)
        return 0.01 / speed

    monkeypatch.setattr(Stage, "seconds", seconds)

    def run(*candidates, guard=Guard(), steps=10_000, own_s=0.01, source=None):  # noqa: B008
        found = Choice(
            source or rehearsal(), guard, own_step_s=own_s, steps_left=steps, candidates=candidates
        )
        while not found.is_done:
            found.trial()
        found.close()
        for one in candidates:
            assert one.log.count("apply") == one.log.count("undo"), one.name
        return found.plan()

    return run


def test_greedy_on_top_of_what_was_chosen(choose):
    plan = choose(
        made("bf16", speed=2.0), made("threads", speed=0.5), made("allocator", speed=1.5)
    )
    assert plan.chosen == ("bf16", "allocator")
    assert [row.name for row in plan.rows] == ["original", "bf16", "threads", "allocator"]
    assert plan.row("bf16").speedup == pytest.approx(2)
    assert plan.row("threads").speedup == pytest.approx(1)  # with bf16 above it
    assert plan.row("allocator").speedup == pytest.approx(3)
    assert plan.row("allocator").step_ms == pytest.approx(10 / 3)
    assert "100.0% slower" in plan.row("threads").reason
    assert plan.row("original").step_ms == pytest.approx(10)


def test_all_together_must_gain_five_percent(choose):
    assert choose(made("bf16", speed=1.04)).chosen == ()
    assert choose(made("bf16", speed=1.06)).chosen == ("bf16",)
    # two small ones that are worth it only together
    assert choose(made("bf16", speed=1.03), made("threads", speed=1.03)).chosen == (
        "bf16", "threads",
    )  # fmt: skip


def test_what_refuses_cannot_or_fails_is_a_row(choose):
    plan = choose(
        made("compile", refuses="no compiler"),
        made("bf16", speed=9, cannot="not this model"),
        made("threads", speed=9, fails=RuntimeError("view size is not compatible")),
        made("allocator", speed=9, settles="it did not take"),
        made("prefetch", speed=1.2),
    )
    assert plan.chosen == ("prefetch",)
    assert plan.row("compile").reason == "no compiler"
    assert plan.row("bf16").reason == "not this model"
    assert "RuntimeError: view size" in plan.row("threads").reason
    assert plan.row("allocator").reason == "it did not take"
    statuses = {plan.row(n).status for n in ("compile", "bf16", "threads", "allocator")}
    assert statuses == {"refused"}


def test_the_guard_refuses_and_a_gentler_form_may_pass(choose):
    gentle = made("bf16", speed=2, factor=1.0)
    plan = choose(made("bf16", speed=4, factor=3.0, gentle=gentle))
    assert plan.chosen == ("bf16",)
    assert plan.row("bf16").speedup == pytest.approx(2)
    plan = choose(made("bf16", speed=4, factor=3.0))
    assert plan.row("bf16").status == "refused"
    assert plan.row("bf16").loss_change > 0.01


def test_small_differences_do_not_add_up_unseen(choose):
    """Each moves the loss by under 1 %, all together by more: the last is refused."""
    source = rehearsal()
    small = [made(name, speed=2, factor=1.004) for name in ("bf16", "threads", "compile")]
    plan = choose(*small, source=source, guard=Guard(0.003, 0.5))
    changes = [plan.row(one.name).loss_change for one in small]
    assert changes == sorted(changes)


def test_deterministic_and_exact(choose):
    changing, keeping = made("bf16", speed=3, factor=1.0), made("allocator", speed=2)
    type(keeping).changes_numbers = False
    plan = choose(changing, keeping, source=rehearsal(deterministic=True))
    assert plan.chosen == ("allocator",)
    assert "deterministic" in plan.row("bf16").reason
    assert choose(made("bf16", speed=3), guard=Guard(0, 1)).chosen == ("bf16",)
    assert choose(made("bf16", speed=3, factor=1 + 1e-6), guard=Guard(0, 1)).chosen == ()


def test_a_short_run_cannot_repay(choose):
    plan = choose(made("compile", speed=9, setup=60.0), made("bf16", speed=2), steps=1000)
    assert plan.row("compile").status == "skipped"
    assert "cannot repay" in plan.row("compile").reason
    assert plan.chosen == ("bf16",)
    assert choose(made("bf16", speed=2), steps=3).row("bf16").status == "skipped"


def test_the_run_is_left_as_it_was(choose):
    source = rehearsal()
    module, (optimizer,) = source.scene.module, source.scene.optimizers
    module(torch.ones(1, 4)).sum().backward()
    weights = [p.detach().clone() for p in module.parameters()]
    gradients = [p.grad for p in module.parameters()]
    state = torch.get_rng_state()
    choose(made("bf16", speed=2), made("threads", speed=2, factor=9.0), source=source)
    assert all(map(torch.equal, weights, module.parameters()))
    assert all(a is b.grad for a, b in zip(gradients, module.parameters(), strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert not optimizer.state


def test_a_step_that_cannot_be_copied_skips_everything(choose):
    source = rehearsal()
    source.scene.module.held = (i for i in range(3))
    plan = choose(made("bf16", speed=2), made("threads", speed=2), source=source)
    assert plan.chosen == ()
    assert {plan.row(n).status for n in ("bf16", "threads")} == {"skipped"}
    assert "cannot be copied" in plan.row("threads").reason


def test_types_must_stay(choose):
    class Keeps(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(4, 1)
            self.last = [torch.zeros(1)]

        def forward(self, x):
            self.last = [self.net(x).detach()]
            return self.net(x.float())

    class Lowers(Applied):
        def step(self):
            return torch.autocast("cpu", torch.bfloat16)

    one = made("bf16", speed=2)
    one.apply = lambda module, optimizers, scene: Lowers()
    module = Keeps()
    batch = (torch.randn(6, 4), torch.randn(6, 1))
    scene = Scene(
        module=module, optimizers=(torch.optim.SGD(module.parameters(), 0.1),), batch=batch,
        steps_left=10_000, epochs_left=None, deterministic=False, device=torch.device("cpu"),
    )  # fmt: skip
    source = PlainRehearsal(
        lambda m, b: nn.functional.mse_loss(m(b[0]).float(), b[1]), [batch], scene
    )
    plan = choose(one, source=source)
    assert "last[0] would become bfloat16" in plan.row("bf16").reason


# --- the clock --------------------------------------------------------------------------------


def test_long_steps_beside_something_else_are_timed_again():
    others = iter([0.5, 1.6, 0.5, 0.5])
    timing = time_in_turns(lambda steps: 1.0, lambda steps: next(others), limit_s=1)
    assert timing.speedup == pytest.approx(2)
    assert timing.is_faster
    assert next(others, None) is None


def test_long_steps_that_never_agree_are_let_be():
    others = iter([0.1, 3.0, 0.1, 3.0, 0.1, 0.2])
    timing = time_in_turns(lambda steps: 1.0, lambda steps: next(others), limit_s=1)
    assert not timing.is_faster
    assert next(others, None) is None


def test_long_steps_are_timed_twice_and_short_ones_until_clear():
    calls = []

    def slow(steps):
        calls.append(steps)
        return 0.5

    timing = time_in_turns(slow, lambda steps: 0.25, limit_s=1)
    assert calls == [1, 1]
    assert timing.speedup == pytest.approx(2)
    assert timing.is_faster

    turns = []
    timing = time_in_turns(
        lambda steps: turns.append(steps) or 0.001, lambda steps: 0.00099, limit_s=9
    )
    assert 6 <= len(turns) - 1 < 10
    assert turns[1] == 10  # blocks of some 10 ms
    assert timing.speedup == pytest.approx(1 / 0.99)


def test_noise_is_no_gain():
    noise = iter([1.0, 1.3, 0.8, 1.1, 0.9, 1.2, 0.7, 1.0] * 40)
    timing = time_in_turns(
        lambda steps: 0.001 * next(noise), lambda steps: 0.00098 * next(noise), limit_s=0.2
    )
    assert not timing.is_faster
    assert timing.doubt > 0.02


# --- best known -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        (nn.Sequential(nn.Conv2d(1, 1, 1)), "convolution"),
        (nn.TransformerEncoderLayer(4, 2), "attention"),
        (nn.LSTM(2, 2), "recurrent"),
        (nn.Linear(2, 2), "dense"),
    ],
)
def test_kinds(module, kind):
    assert kind_of(module) == kind
    assert set(best_known(module).order) == set(NAMES)
    assert len(best_known(module).order) == len(NAMES)


def test_little_is_spent_on_small_tables():
    assert best_known(nn.Linear(10, 10)).share <= 0.01
    assert best_known(nn.Conv2d(3, 3, 3)).share == 0.1
    assert best_known(nn.Linear(3000, 3000)).share > 0.01
