"""The guard's arithmetic, against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from bigdl.errors import ArgumentError, ConfigError
from bigdl.nano.pytorch import Guard
from bigdl.nano.pytorch.guard import NOISE, Difference, Seen, compare, roughened, with_noise


def seen(loss, *vectors):
    return Seen(loss=loss, vectors=(tuple(vectors),))


def test_defaults_and_position():
    assert Guard() == Guard(0.01, 0.99)
    assert Guard(0, 1).is_exact
    assert not Guard(0, 0.999).is_exact


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"loss": "1"}, ArgumentError, "loss='1'.*str"),
        ({"cosine": None}, ArgumentError, "cosine=None"),
        ({"loss": True}, ArgumentError, "bool"),
        ({"loss": -0.1}, ConfigError, "loss=-0.1"),
        ({"loss": math.nan}, ConfigError, "loss=nan"),
        ({"cosine": 1.5}, ConfigError, r"cosine=1.5 \(need a number from -1 to 1\)"),
        ({"loss": -1, "cosine": 2}, ConfigError, "loss=-1.*cosine=2"),
    ],
)
def test_misuse(arguments, error, text):
    with pytest.raises(error, match=text):
        Guard(**arguments)


def test_known_cosine_move_and_ratio():
    own = seen(2.0, torch.tensor([1.0, 0.0]), torch.tensor([[0.0]]))
    other = seen(2.1, torch.tensor([1.0, 1.0]), torch.tensor([[0.0]]))
    difference = compare(own, other)
    assert difference.loss_change == pytest.approx(0.05)
    assert difference.cosine == pytest.approx(1 / math.sqrt(2))
    assert difference.norm_ratio == pytest.approx(math.sqrt(2))
    assert not difference.is_equal
    assert compare(own, own) == Difference()


def test_equal_zero_gradients_agree_and_a_vanished_one_does_not():
    zero, one = seen(1.0, torch.zeros(3)), seen(1.0, torch.ones(3))
    assert compare(zero, zero).cosine == 1
    assert compare(one, zero).cosine == 0
    assert Guard().judge(compare(one, zero)) is not None


@pytest.mark.parametrize(
    ("other", "text"),
    [
        (seen(math.nan, torch.ones(2)), "the loss is nan"),
        (seen(1.0, torch.tensor([1.0, math.inf])), "gradient is not finite"),
        (seen(1.0, None), "lost its gradient"),
        (seen(None, torch.ones(2)), "only one of the two steps gives a loss"),
        (Seen(loss=1.0, vectors=()), "step 0 times instead of 1"),
        (seen(1.0, torch.ones(2), torch.ones(2)), "another set of parameters"),
        (seen(1.0, torch.ones(2).to_sparse()), "became sparse"),
    ],
)
def test_what_no_limit_allows(other, text):
    difference = compare(seen(1.0, torch.ones(2)), other)
    assert text in difference.problem
    assert text in Guard(100, -1).judge(difference)


def test_sparse_gradients_are_compared_as_they_are():
    index = torch.tensor([[0, 2]])

    own = torch.sparse_coo_tensor(
        index, torch.tensor([[3.0], [4.0]]), (4, 1), check_invariants=True
    )
    other = torch.sparse_coo_tensor(
        index, torch.tensor([[3.0], [0.0]]), (4, 1), check_invariants=True
    )
    difference = compare(seen(1.0, own), seen(1.0, other))
    assert difference.cosine == pytest.approx(3 / 5)
    assert (
        "sparse gradient became dense"
        in compare(seen(1.0, own), seen(1.0, own.to_dense())).problem
    )


def test_limits_hold_where_there_is_no_noise():
    assert Guard().judge(Difference(loss_change=0.0099, cosine=0.9901)) is None
    assert "moves by 1.10%" in Guard().judge(Difference(loss_change=0.011))
    assert "cosine 0.9800, below 0.9900" in Guard().judge(Difference(cosine=0.98))
    assert "2.5 times as long" in Guard().judge(Difference(norm_ratio=2.5))


def test_a_chaotic_step_asks_no_more_than_of_itself():
    noise = Difference(loss_change=0.02, cosine=0.7, is_equal=False)
    # 0.7, less 0.02, less a quarter of the 0.3 that it lacks to 1
    assert Guard().judge(Difference(loss_change=0.059, cosine=0.606), noise) is None
    assert "more than 6.00%" in Guard().judge(Difference(loss_change=0.061, cosine=1), noise)
    assert "below 0.6050" in Guard().judge(Difference(cosine=0.604), noise)
    # never narrower than asked for
    calm = Difference(loss_change=0.0, cosine=1.0)
    assert Guard(0.01, 0.9).judge(Difference(loss_change=0.009, cosine=0.91), calm) is None


def test_a_gradient_without_a_direction_has_none_to_keep():
    noise = Difference(loss_change=0.02, cosine=0.49, is_equal=False)
    assert Guard().judge(Difference(loss_change=0.059, cosine=-0.3), noise) is None
    assert "more than 6.00%" in Guard().judge(Difference(loss_change=0.061, cosine=-0.3), noise)
    assert "times as long" in Guard().judge(Difference(cosine=-0.3, norm_ratio=2.5), noise)
    calmer = Difference(loss_change=0.02, cosine=0.5, is_equal=False)
    assert "turns" in Guard().judge(Difference(cosine=-0.3), calmer)


def test_the_exact_guard_is_never_widened():
    noise = Difference(loss_change=1.0, cosine=0.0, is_equal=False)
    assert "bit for bit" in Guard(0, 1).judge(Difference(is_equal=False), noise)
    assert Guard(0, 1).judge(Difference(), noise) is None


def test_noise_is_relative_and_reaches_floats_only():
    value, index, zero = torch.full((1000,), 8.0), torch.arange(5), torch.zeros(3)
    noisy, same, still_zero = with_noise([value, index, zero])
    relative = (noisy / value - 1).abs()
    assert 0.8 * NOISE < relative.max() <= NOISE
    assert torch.equal(same, index)
    assert torch.equal(still_zero, zero)
    assert torch.equal(with_noise([value])[0], noisy)  # no global stream in it


def test_the_worse_of_two_batches():
    total = Difference(loss_change=0.1, cosine=0.9, norm_ratio=0.5).worse(
        Difference(loss_change=0.2, cosine=0.95, norm_ratio=1.1, is_equal=False)
    )
    assert (total.loss_change, total.cosine, total.norm_ratio, total.is_equal) == (
        0.2, 0.9, 0.5, False,
    )  # fmt: skip


def test_rough_layers_round_forward_and_backward_and_are_smooth_again():
    net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(inplace=True))
    x = torch.rand(64, 4, requires_grad=True)

    def output_and_gradient():
        x.grad = None
        out = net(x)
        out.sum().backward()
        return out.detach(), x.grad

    own, own_gradient = output_and_gradient()
    with roughened(net):
        rough, rough_gradient = output_and_gradient()
    off = (rough / own - 1).abs()[own > 0.1]
    assert 0.5 * NOISE < off.max() <= 2.1 * NOISE  # two layers
    assert not torch.equal(own_gradient, rough_gradient)
    assert torch.allclose(own_gradient, rough_gradient, rtol=0, atol=0.02)
    assert torch.equal(output_and_gradient()[0], own)


def test_deep_fresh_networks_are_as_rough_by_themselves_as_in_bf16():
    resnet18 = pytest.importorskip("torchvision").models.resnet18
    torch.manual_seed(0)
    net = resnet18(num_classes=2)
    x, y = torch.randn(8, 3, 64, 64), torch.randint(0, 2, (8,))

    def look(inputs, dtype=torch.float32):
        net.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
            loss = torch.nn.functional.cross_entropy(net(inputs), y)
        loss.backward()
        return seen(loss.item(), *(p.grad.clone() for p in net.parameters()))

    own = look(x)
    bf16 = compare(own, look(x, torch.bfloat16))
    on_inputs = compare(own, look(with_noise([x])[0]))
    with roughened(net):
        noise = compare(own, look(with_noise([x])[0]))
    assert Guard().judge(bf16) is not None
    assert Guard().judge(bf16, on_inputs) is not None  # each layer rounds, not the first alone
    assert Guard().judge(bf16, noise) is None
