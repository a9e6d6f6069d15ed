"""Partly frozen modules: the frozen beginning is cut off, the rest stays the user's own."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from bigdl.errors import ConfigError
from bigdl.nano.pytorch.frozen import FrozenTrunk
from bigdl.nano.pytorch.plan.candidates import Scene

torchvision = pytest.importorskip("torchvision")
models = torchvision.models


@pytest.fixture(autouse=True)
def one_thread():
    """Two threads that wait for each other take ages on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def apply(module, place="", form="fp32", **options):
    scene = Scene(
        module=module,
        optimizers=(),
        batch=None,
        steps_left=None,
        epochs_left=None,
        deterministic=False,
        device=torch.device("cpu"),
    )
    candidate = FrozenTrunk(**options)
    if place is not None:
        candidate = candidate.pinned({"trunks": {place: form}})
    return candidate.apply(module, (), scene)


def resnet():
    net = models.resnet18().requires_grad_(False).eval()
    net.fc = nn.Linear(512, 3)
    return net


def resnet_last_stage():
    net = resnet()
    net.layer4.requires_grad_(True).train()
    return net


def resnet_half_a_stage():
    net = resnet()
    net.layer3[1].requires_grad_(True)
    net.layer4.requires_grad_(True)
    return net


def squeezenet():
    net = models.squeezenet1_1().requires_grad_(False)
    net.classifier[1] = nn.Conv2d(512, 3, 1)
    return net


def squeezenet_last_fire():
    net = squeezenet()
    net.features[12].requires_grad_(True)
    return net


def mobilenet():
    net = models.mobilenet_v2(width_mult=0.5).requires_grad_(False).eval()
    net.classifier[1] = nn.Linear(1280, 3)
    net.classifier.train()
    return net


def vgg():
    net = models.VGG(
        nn.Sequential(nn.Conv2d(3, 8, 3, 4), nn.ReLU(inplace=True)), num_classes=3
    ).requires_grad_(False)
    net.avgpool = nn.AdaptiveAvgPool2d(2)
    net.classifier[0] = nn.Linear(32, 64).requires_grad_(False)
    net.classifier[3] = nn.Linear(64, 64).requires_grad_(False)
    net.classifier[6] = nn.Linear(64, 3)
    return net


def transformer():
    net = models.VisionTransformer(
        image_size=40, patch_size=8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64,
        num_classes=3,
    )  # fmt: skip
    net.requires_grad_(False)
    nn.init.normal_(net.heads.head.weight)
    net.heads.requires_grad_(True)
    return net


MODELS = [
    resnet, resnet_last_stage, resnet_half_a_stage, squeezenet, squeezenet_last_fire, mobilenet,
    vgg, transformer,
]  # fmt: skip


def step(net, x):
    torch.manual_seed(2)
    net.zero_grad()
    out = net(x)
    out.square().mean().backward()
    grads = {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}
    return out.detach(), grads, torch.rand(1)


@pytest.mark.parametrize("make", MODELS)
def test_step_is_the_users(make):
    torch.manual_seed(0)
    net = make()
    own = copy.deepcopy(net)
    applied = apply(net)
    for seed in (0, 1, 1, 2):
        x = torch.randn(4, 3, 40, 40, generator=torch.Generator().manual_seed(seed))
        (got, grads, drawn), (wanted, own_grads, own_drawn) = step(net, x), step(own, x)
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(grads, own_grads, atol=1e-4, rtol=1e-3)
        assert torch.equal(drawn, own_drawn)
    applied.settle()
    assert applied.options == {"trunks": {"": "fp32"}}
    for one, other in zip(net.buffers(), own.buffers(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    # evaluation in between
    for module in (net, own):
        module.eval()
    with torch.no_grad():
        torch.testing.assert_close(net(x), own(x), atol=1e-4, rtol=1e-4)


def test_the_trunk_is_as_long_as_it_can_be():
    net = resnet()
    applied = apply(net)
    net(torch.randn(2, 3, 40, 40))
    trunk = applied._sites[0]._cut.trunk
    assert trunk.live == (net.fc,)
    assert "flatten" in str(trunk.ahead.graph)


def test_hooks_on_the_part_that_trains_stay():
    net, seen = resnet(), []
    apply(net)
    net.fc.register_forward_hook(lambda m, i, o: seen.append(tuple(i[0].shape)))
    for _ in range(3):
        net(torch.randn(2, 3, 40, 40))
    assert seen == [(2, 512)] * 3


def test_new_head_in_mid_run():
    net = resnet()
    apply(net)
    x = torch.randn(2, 3, 40, 40)
    net(x)
    net.fc = nn.Linear(512, 7)
    assert net(x).shape == (2, 7)
    torch.testing.assert_close(net(x), copy.deepcopy(net)(x), atol=1e-5, rtol=1e-5)


def test_unfreezing_a_stage_in_mid_run():
    net = resnet()
    own = copy.deepcopy(net)
    apply(net)
    x = torch.randn(2, 3, 40, 40)
    for _ in range(2):
        net(x)
    for module in (net, own):
        module.layer4.requires_grad_(True)
    for _ in range(2):
        (got, grads, _), (wanted, own_grads, _) = step(net, x), step(own, x)
        torch.testing.assert_close(got, wanted)
        assert grads.keys() == own_grads.keys()
        torch.testing.assert_close(grads, own_grads)


def test_batch_norm_in_train_mode():
    net = resnet().train()
    with pytest.raises(ConfigError, match=r"train mode|eval\(\)"):
        apply(net, place=None)
    own = copy.deepcopy(net)
    applied = apply(net.eval())
    net.train()  # only now
    x = torch.randn(4, 3, 40, 40)
    for _ in range(2):
        got, wanted = step(net, x), step(own, x)
        assert torch.equal(got[0], wanted[0])
    assert torch.equal(net.layer4[1].bn2.running_var, own.layer4[1].bn2.running_var)
    with pytest.raises(ConfigError):
        applied.settle()


class Hostile(nn.Module):
    """Its forward cannot be followed: it looks at values."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten())
        self.second = nn.Sequential(nn.Linear(288, 16))
        self.requires_grad_(False)
        self.last = nn.Linear(16, 2)

    def forward(self, x):
        x = self.first(x)
        if x.mean() > 100:
            x = x / 2
        return self.last(self.second(x))


def test_hostile_forward_falls_back_to_its_parts():
    torch.manual_seed(0)
    net = Hostile()
    own = copy.deepcopy(net)
    candidate = FrozenTrunk().pinned({"trunks": {"first": "fp32", "second": "fp32"}})
    scene = Scene(
        module=net, optimizers=(), batch=None, steps_left=None, epochs_left=None,
        deterministic=False, device=torch.device("cpu"),
    )  # fmt: skip
    applied = candidate.apply(net, (), scene)
    for scale in (1, 1, 1e4, 1):
        x = torch.randn(4, 3, 8, 8) * scale
        torch.testing.assert_close(net(x), own(x), rtol=1e-4, atol=1e-4)
    assert len(applied.forms) == 2
    applied.undo()
    alone = apply(net)
    net(x)
    with pytest.raises(ConfigError, match="cannot be followed"):
        alone.settle()


def test_hostile_forward_without_pins(monkeypatch):
    monkeypatch.setattr("bigdl.nano.pytorch.frozen.choose._in_turns", lambda a, b: (2.0, 1.0))
    torch.manual_seed(0)
    net = Hostile()
    own = copy.deepcopy(net)
    applied = apply(net, place=None, forms=["fp32"])
    for _ in range(3):
        x = torch.randn(4, 3, 8, 8)
        torch.testing.assert_close(net(x), own(x), rtol=1e-4, atol=1e-4)
    assert set(applied.options["trunks"]) == {"first", "second"}


class Mixed(nn.Module):
    """A frozen module, arguments that decide, a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 8), False)
        self.body = nn.Linear(8, 8).requires_grad_(False)
        self.more = nn.Linear(8, 8).requires_grad_(False)
        self.head = nn.Linear(8, 2)

    def forward(self, x, mask=None, *, double=False):
        n = x.shape[0]
        x = self.more(torch.relu(self.body(x))) + self.token.expand(n, -1)
        if mask is not None:
            x = x * mask
        if double:
            x = x * 2
        return self.head(x).view(n, -1)


def test_arguments_that_decide():
    torch.manual_seed(0)
    net = Mixed()
    own = copy.deepcopy(net)
    applied = apply(net)
    mask = torch.rand(5, 8)
    for _ in range(3):
        x = torch.randn(5, 8)
        for args, kwargs in (
            ((x,), {}),
            ((x, mask), {}),
            ((x,), {"mask": mask}),
            ((x,), {"mask": None}),
            ((x,), {"double": True}),
            ((x,), {"double": 1}),
            ((x[:2],), {}),
        ):
            torch.testing.assert_close(net(*args, **kwargs), own(*args, **kwargs))
    assert applied.forms


def test_own_parameter_is_watched():
    net = Mixed()
    own = copy.deepcopy(net)
    apply(net)
    x = torch.randn(5, 8)
    for _ in range(2):
        net(x)
    for module in (net, own):
        with torch.no_grad():
            module.token.mul_(3)
    torch.testing.assert_close(net(x), own(x))
    net.token.requires_grad_(True)
    net(x).sum().backward()
    assert net.token.grad is not None


class Drawing(Mixed):
    def forward(self, x):
        x = self.more(self.body(x)) + torch.randn(8)
        return self.head(x)


class Stepping(Mixed):
    seen = 0

    def forward(self, x):
        self.seen += 1
        return self.head(self.more(self.body(x)) * self.seen)


class Warning_(Mixed):
    def forward(self, x):
        import warnings

        warnings.warn("logged nowhere", stacklevel=1)
        return self.head(self.more(self.body(x)))


@pytest.mark.parametrize("kind", [Drawing, Stepping])
def test_forwards_with_effects_stay_as_they_are(kind):
    torch.manual_seed(0)
    net = kind()
    own = copy.deepcopy(net)
    applied = apply(net)
    for module in (net, own):
        torch.manual_seed(3)
        module.out = [module(torch.ones(3, 8)) for _ in range(3)]
    for got, wanted in zip(net.out, own.out, strict=True):
        torch.testing.assert_close(got, wanted)
    with pytest.raises(ConfigError, match=r"random|state"):
        applied.settle()


def test_forward_that_warns_is_not_cut():
    net = Warning_()
    applied = apply(net)
    with pytest.warns(UserWarning, match="logged nowhere"):
        net(torch.ones(3, 8))
    with pytest.raises(ConfigError, match="followed"):
        applied.settle()


class InPlaceAfter(Mixed):
    """The part that trains reads what a frozen step writes to afterwards."""

    def forward(self, x):
        x = self.body(x)
        early = self.head(x)
        x = self.more(torch.relu_(x))
        return early + self.head(x)


def test_order_of_writes():
    torch.manual_seed(0)
    net = InPlaceAfter()
    own = copy.deepcopy(net)
    apply(net)
    for _ in range(3):
        x = torch.randn(5, 8)
        torch.testing.assert_close(net(x), own(x))


class TestLightning:
    pl = pytest.importorskip("pytorch_lightning")

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.backbone = models.squeezenet1_1().features.requires_grad_(False)
            self.head = nn.Sequential(nn.Dropout(0.2), nn.LazyLinear(3))

        def forward(self, x):
            return self.head(self.backbone(x).mean((2, 3)))

        def training_step(self, batch, batch_idx):
            x, y = batch
            return nn.functional.cross_entropy(self(x), y)

    def test_backbone_and_head(self):
        net = self.Module()
        x, y = torch.randn(4, 3, 40, 40), torch.tensor([0, 1, 2, 0])
        net(x)
        own = copy.deepcopy(net)
        applied = apply(net, "backbone")
        for _ in range(3):
            losses = []
            for module in (net, own):
                torch.manual_seed(1)
                losses.append(module.training_step((x, y), 0))
                losses[-1].backward()
            torch.testing.assert_close(*losses)
        assert applied.forms
        torch.testing.assert_close(net.head[1].weight.grad, own.head[1].weight.grad)

    def test_the_inner_place_is_taken(self, monkeypatch):
        monkeypatch.setattr("bigdl.nano.pytorch.frozen.choose._in_turns", lambda a, b: (2.0, 1.0))
        net = self.Module()
        x = torch.randn(4, 3, 40, 40)
        net(x)
        applied = apply(net, place=None, forms=["fp32"])
        for _ in range(2):
            net(x)
        assert applied.options == {"trunks": {"backbone": "fp32"}}

    def test_forward_that_logs_is_not_cut(self):
        logged = []

        class Logging(self.Module):
            def forward(self, x):
                self.log("mean", x.mean())
                return super().forward(x)

            def log(self, *args, **kwargs):
                logged.append(self is net)
                super().log(*args, **kwargs)

        net = Logging()
        x = torch.randn(4, 3, 40, 40)
        with pytest.warns(UserWarning, match="trainer"):
            net(x)
        applied = apply(net)
        for _ in range(3):
            with pytest.warns(UserWarning, match="trainer"):
                net(x)
        assert logged.count(True) == 4
        with pytest.raises(ConfigError):
            applied.settle()


@pytest.mark.usefixtures("bf16")
class TestRuntimes:
    """Forms that other runtimes run, on a network large enough to matter."""

    @pytest.fixture
    def net(self):
        torch.manual_seed(0)
        net = models.squeezenet1_1().requires_grad_(False)
        net.classifier[1] = nn.Conv2d(512, 3, 1)
        return net

    @pytest.mark.parametrize(
        "form",
        [
            "openvino_int8",
            pytest.param("openvino_bf16", marks=pytest.mark.slow),
            pytest.param("openvino_fp32", marks=pytest.mark.slow),
            pytest.param("compile_bf16", marks=pytest.mark.slow),
            "bf16",
        ],
    )
    def test_close_to_the_users(self, net, form):
        pytest.importorskip("openvino")
        own = copy.deepcopy(net)
        applied = apply(net, form=form)
        generator = torch.Generator().manual_seed(0)
        base = torch.rand(16, 3, 8, 8, generator=generator)
        x = nn.functional.interpolate(base, 96, mode="bicubic")
        for rows in (16, 16, 5, 1):
            with torch.no_grad():
                torch.manual_seed(0)
                got = net(x[:rows])
                torch.manual_seed(0)
                wanted = own(x[:rows])
            error = (got - wanted).norm() / wanted.norm()
            assert error < {"openvino_fp32": 1e-4}.get(form, 0.1)
        try:
            applied.settle()
        finally:
            applied.undo()

    def test_fastest_is_taken(self, net):
        pytest.importorskip("openvino")
        applied = apply(net, place=None, cache_bytes=0)
        x = nn.functional.interpolate(torch.rand(16, 3, 8, 8), 128, mode="bicubic")
        net(x)
        applied.settle()
        assert applied.forms[0].name != "fp32"
        applied.undo()
