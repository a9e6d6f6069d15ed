"""Loops of one's own: the numbers of the plain loop, and what comes back."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

pytest.importorskip("pytorch_lightning", reason="needs Lightning")

from bigdl.errors import ArgumentError, ConfigError
from bigdl.nano.pytorch import TorchNano, nano


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 1)
        self.word = "mine"

    def forward(self, x):
        return self.layer(x)

    def doubled(self, x):
        return 2 * self(x)


@pytest.fixture
def parts():
    """Model, optimizer, loader, and the weights that a plain loop of 2 epochs ends with."""
    torch.manual_seed(0)
    model = Net().double()
    x = torch.randn(20, 3, dtype=torch.float64)
    loader = DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=8)
    plain = copy.deepcopy(model)
    loop(plain, torch.optim.SGD(plain.parameters(), 0.1, momentum=0.9), loader)
    assert not torch.equal(plain.layer.weight, model.layer.weight)
    return model, torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), loader, plain


def loop(model, optimizer, loader, backward=torch.Tensor.backward):
    for _ in range(2):
        for x, y in loader:
            optimizer.zero_grad()
            backward(nn.functional.mse_loss(model(x), y))
            optimizer.step()


class TestTorchNano:
    def test_the_numbers_of_the_plain_loop(self, parts):
        model, optimizer, loader, plain = parts
        weight = model.layer.weight

        class Mine(TorchNano):
            def train(self, model, optimizer, loader):
                loop(*self.setup(model, optimizer, loader), self.backward)
                return "done"

        assert Mine().train(model, optimizer, loader) == "done"
        assert model.layer.weight is weight
        assert torch.equal(weight, plain.layer.weight)
        assert optimizer.state[weight]["momentum_buffer"].abs().sum() > 0

    def test_setup_gives_the_same_kinds_back_in_order(self, parts):
        model, optimizer, loader, _ = parts
        other = torch.optim.Adam(model.parameters())
        ready, optimizers, first, second = TorchNano().setup(
            model, [optimizer, other], loader, DataLoader(range(5))
        )
        assert isinstance(optimizers, list)
        assert [type(one).__mro__[2] for one in optimizers] == [torch.optim.SGD, torch.optim.Adam]
        assert (len(first), len(second)) == (3, 5)
        assert list(ready.state_dict()) == list(model.state_dict())
        x = torch.ones(2, 3, dtype=torch.float64)
        assert ready.word == "mine"
        assert torch.equal(ready.doubled(x), 2 * model(x))

    @pytest.mark.parametrize(
        ("arguments", "kind", "word"),
        [
            ({"num_processes": 0}, ConfigError, "at least 1"),
            ({"num_processes": "2"}, ArgumentError, "whole number"),
            ({"distributed_backend": "horovod"}, ConfigError, "subprocess"),
            ({"num_process": 2}, ArgumentError, "num_processes"),
            ({"cpu_for_each_process": [[0]]}, ConfigError, "num_processes"),
        ],
    )
    @pytest.mark.parametrize("make", [TorchNano, nano])
    def test_misuse(self, make, arguments, kind, word):
        with pytest.raises(kind, match=word):
            make(**arguments)

    def test_other_misuse(self, parts):
        model, optimizer, loader, _ = parts
        with pytest.raises(ArgumentError, match="optimizer"):
            TorchNano().setup(model, loader)
        with pytest.raises(ArgumentError, match="loader"):
            TorchNano().setup(model, optimizer, model)
        with pytest.raises(ArgumentError, match="model"):
            TorchNano().setup(optimizer, model)
        with pytest.raises(NotImplementedError, match="train"):
            TorchNano().train()

    def test_two_processes_equal_one(self, parts):
        model, optimizer, loader, plain = parts
        nano(num_processes=2)(loop)(model, optimizer, loader)
        assert torch.allclose(model.layer.weight, plain.layer.weight, rtol=0, atol=1e-9)


class TestNano:
    def test_the_numbers_of_the_plain_loop(self, parts):
        model, optimizer, loader, plain = parts

        @nano()
        def train(model, others, *, criterion):
            optimizer, loader = others
            assert type(criterion) is nn.MSELoss
            loop(model, optimizer, loader)
            return model, optimizer, 3

        result = train(model, [optimizer, loader], criterion=nn.MSELoss())
        assert result[0] is model
        assert result[1:] == (optimizer, 3)
        assert torch.equal(model.layer.weight, plain.layer.weight)

    def test_bf16_keeps_backward(self):
        model = Net()
        seen = []

        @nano(precision="bf16-mixed", accelerator="cpu")
        def train(model, optimizer):
            model.layer.register_forward_hook(lambda *found: seen.append(found[-1].dtype))
            loss = model(torch.ones(2, 3)).sum()
            loss.backward()
            optimizer.step()
            return loss.dtype

        before = model.layer.bias.clone()
        assert train(model, torch.optim.SGD(model.parameters(), 0.5)) == torch.float32
        assert seen == [torch.bfloat16]
        assert torch.equal(model.layer.bias, before - 1)  # two rows at rate 0.5

    def test_misuse(self):
        with pytest.raises(ArgumentError, match="parentheses"):
            nano(loop)
        with pytest.raises(ConfigError, match="bf16-mixed"):
            nano(precision="16-mixed")
