"""Loops of one's own in two processes: the numbers of one, and what comes back."""

from __future__ import annotations

import copy
import os
import signal

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

pytest.importorskip("pytorch_lightning", reason="needs Lightning")

from bigdl.errors import ConfigError, DataError, WorkerLostError
from bigdl.nano.pytorch import TorchNano, nano


def rows(count, seed=0):
    x = torch.randn(count, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, x.sum(1, keepdim=True))


def known_answer(model, optimizer, loader):
    for _ in range(2):
        for x, y in loader:
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
    return model.weight.item()


def test_the_known_answer():
    """Linear, w = 1, y = 0, no shuffle, rate 0.25, batches of 2, 2 epochs: 0.25 exactly."""
    data = TensorDataset(torch.tensor([[0.0], [0.0], [1.0], [1.0]]), torch.zeros(4, 1))
    for processes in (1, 2):
        model = nn.Linear(1, 1, bias=False)
        nn.init.ones_(model.weight)
        optimizer = torch.optim.SGD(model.parameters(), 0.25)
        run = nano(num_processes=processes)(known_answer)
        assert run(model, optimizer, DataLoader(data, batch_size=2)) == 0.25
        assert model.weight.item() == 0.25


class Everything(TorchNano):
    """Accumulates over batches of several sizes, clips, unfreezes, validates, stops early."""

    def train(self, net, loader, validation, epochs):
        optimizer = torch.optim.Adam(net.parameters(), 0.01)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        net[0].bias.requires_grad_(False)
        model, ready, train, valid = self.setup(net, optimizer, loader, validation)
        self.losses = []
        for epoch in range(epochs):
            if epoch == 1:
                net[0].bias.requires_grad_(True)
            model.train()
            for number, (x, y) in enumerate(train):
                loss = nn.functional.mse_loss(model(x), y) / 2
                self.backward(loss)
                if number % 2:
                    nn.utils.clip_grad_norm_(net.parameters(), 0.5)
                    ready.step()
                    ready.zero_grad()
            schedule.step()
            model.eval()
            with torch.no_grad():
                found = [nn.functional.mse_loss(model(x), y, reduction="sum") for x, y in valid]
            self.losses.append(float(sum(found)))
        self.rates = schedule.get_last_lr()
        return self.world_size, float(self.all_reduce(torch.tensor(1.0 + self.global_rank)))


def test_all_that_a_loop_does():
    ended = {}
    for processes in (1, 2):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)).double()
        weight = net[0].weight
        loader = DataLoader(rows(51), batch_size=7, shuffle=True)
        mine = Everything(num_processes=processes)
        mine.name = "mine"
        torch.manual_seed(1)
        result = mine.train(net, loader, validation=DataLoader(rows(9, 1), 4), epochs=3)
        assert result == ((1, 1.0) if processes == 1 else (2, 1.5))
        assert net[0].weight is weight
        assert net[0].bias.requires_grad
        assert not net[0]._forward_pre_hooks
        assert not net._forward_pre_hooks
        assert mine.name == "mine"
        assert mine.rates == [0.005]
        ended[processes] = copy.deepcopy(net.state_dict()), mine.losses, torch.get_rng_state()
    for name, value in ended[1][0].items():
        torch.testing.assert_close(ended[2][0][name], value, rtol=0, atol=1e-9)
    assert ended[2][1] == pytest.approx(ended[1][1], rel=1e-9)
    assert torch.equal(ended[1][2], ended[2][2])


def test_optimizers_come_back_whole():
    states = {}
    for processes in (1, 2):
        torch.manual_seed(0)
        first, second = nn.Linear(3, 1).double(), nn.Linear(3, 1).double()
        optimizers = [
            torch.optim.Adam(first.parameters(), 0.1),
            torch.optim.SGD(second.parameters(), 0.1, momentum=0.9),
        ]

        @nano(num_processes=processes)
        def against(models, optimizers, *, loader):
            for number, (x, y) in enumerate(loader):
                which = number % 2  # only one of them has gradients
                optimizers[which].zero_grad()
                (models[which](x) - y).square().mean().backward()
                optimizers[which].step()
            return optimizers[0]

        loader = DataLoader(rows(22), batch_size=5)
        found = against([first, second], optimizers, loader=loader)
        assert found is optimizers[0]
        moments = optimizers[0].state[first.weight]
        assert moments["step"] == 3
        states[processes] = moments["exp_avg"], optimizers[1].state[second.bias]["momentum_buffer"]
    torch.testing.assert_close(states[2], states[1], rtol=0, atol=1e-9)


def with_an_optimizer_of_its_own(model, loader):
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for x, y in loader:
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()


def test_an_optimizer_that_the_loop_makes():
    ended = []
    for processes in (1, 2):
        torch.manual_seed(0)
        model = nn.Linear(3, 1).double()
        nano(num_processes=processes)(with_an_optimizer_of_its_own)(model, DataLoader(rows(9), 3))
        ended.append(model.weight.detach())
    torch.testing.assert_close(ended[1], ended[0], rtol=0, atol=1e-9)


class Wrong(Exception):
    pass


def raising(model, optimizer, loader):
    for _ in loader:
        raise Wrong("no such thing")


def dying(model, optimizer, loader):
    for _ in loader:
        os.kill(os.getpid(), signal.SIGKILL)


def backward_once(model, optimizer, loader):
    for x, y in loader:
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()


def moving_a_free_parameter(model, optimizer, loader):
    scale = nn.Parameter(torch.ones((), dtype=torch.float64))
    for x, y in loader:
        nn.functional.mse_loss(scale * model(x), y).backward()
        torch.optim.SGD([scale], 0.1).step()


def keeping_a_lock(model, optimizer, loader):
    import threading

    return threading.Lock()


@pytest.mark.parametrize(
    ("loop", "kind", "says"),
    [
        (raising, Wrong, "no such thing"),
        (dying, WorkerLostError, "SIGKILL"),
        (backward_once, DataError, "A batch of 1 row has none for some of 2"),
        (moving_a_free_parameter, ConfigError, "in no module or optimizer that was set up"),
        (keeping_a_lock, ConfigError, "cannot be sent.*lock"),
    ],
)
def test_what_goes_wrong(loop, kind, says):
    model = nn.Linear(3, 1).double()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(kind, match=says):
        nano(num_processes=2)(loop)(model, optimizer, DataLoader(rows(5), batch_size=4))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("more", [{"accelerator": "gpu"}, {"strategy": "ddp"}])
def test_what_several_processes_cannot_go_with(more):
    with pytest.raises(ConfigError, match="cannot go with"):
        TorchNano(num_processes=2, **more)
