"""Frozen trunks against the user's own modules: right in every case, or out of the way."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn

from bigdl.errors import ConfigError
from bigdl.nano.pytorch.frozen import FrozenTrunk
from bigdl.nano.pytorch.frozen import site as site_file
from bigdl.nano.pytorch.frozen.choose import Budget
from bigdl.nano.pytorch.frozen.watch import Watch
from bigdl.nano.pytorch.plan.candidates import Scene

pytestmark = pytest.mark.usefixtures("bf16")


@pytest.fixture(autouse=True)
def one_thread():
    """Two threads that wait for each other take ages on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Backbone(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            nn.Conv2d(8, 16, 3, stride=2),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.calls = 0

    def forward(self, x):
        Backbone.runs += 1
        return super().forward(x)


Backbone.runs = 0


class Net(nn.Module):
    def __init__(self, backbone=None):
        super().__init__()
        self.backbone = Backbone() if backbone is None else backbone
        self.head = nn.Linear(16, 3)
        self.backbone.requires_grad_(False)
        self.backbone.eval()

    def forward(self, x):
        return self.head(self.backbone(x))


@pytest.fixture
def net():
    torch.manual_seed(0)
    net = Net()
    with torch.no_grad():  # statistics as training leaves them
        for part in net.backbone:
            if isinstance(part, nn.BatchNorm2d):
                part.running_mean.normal_()
                part.running_var.uniform_(0.5, 2)
                part.weight.normal_(1, 0.1)
    return net


def images(rows=8, seed=0):
    return torch.randn(rows, 3, 12, 12, generator=torch.Generator().manual_seed(seed))


def scene_of(module, **other):
    facts = {
        "module": module,
        "optimizers": (),
        "batch": None,
        "steps_left": None,
        "epochs_left": None,
        "deterministic": False,
        "device": torch.device("cpu"),
    }
    return Scene(**{**facts, **other})


def pinned(form="fp32", place="backbone", **options):
    return FrozenTrunk(**options).pinned({"trunks": {place: form}})


def apply(module, candidate=None):
    return (candidate or pinned()).apply(module, (), scene_of(module))


def runs_of(call):
    before = Backbone.runs
    value = call()
    return Backbone.runs - before, value


class TestSameResults:
    @pytest.mark.parametrize(("form", "limit"), [("fp32", 1e-5), ("bf16", 3e-2)])
    def test_outputs_types_and_gradients(self, net, form, limit):
        own = copy.deepcopy(net)
        applied = apply(net, pinned(form))
        for seed in range(3):
            x = images(seed=seed)
            features = net.backbone(x)
            assert features.dtype == torch.float32
            assert not features.requires_grad
            torch.testing.assert_close(features, own.backbone(x), atol=limit, rtol=limit)
            net(x).square().sum().backward()
            own(x).square().sum().backward()
        torch.testing.assert_close(net.head.weight.grad, own.head.weight.grad, rtol=0.1, atol=0.1)
        assert applied.forms
        assert net.backbone[0].weight.grad is None

    def test_head_after_training(self, net):
        own = copy.deepcopy(net)
        apply(net)
        for module in (net, own):
            optimizer = torch.optim.SGD(module.head.parameters(), lr=0.1)
            for step in range(20):
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(
                    module(images(seed=step % 3)), torch.arange(8) % 3
                )
                loss.backward()
                optimizer.step()
        torch.testing.assert_close(net.head.weight, own.head.weight, atol=1e-4, rtol=1e-4)

    def test_the_form_really_runs(self, net):
        apply(net, pinned(cache_bytes=0))
        net(images())
        runs, _ = runs_of(lambda: net(images(seed=1)))
        assert runs == 0

    def test_under_autocast_the_type_is_what_eager_gives(self, net):
        own = copy.deepcopy(net)
        # ends in a layer that autocast runs in bf16
        for module in (net, own):
            module.backbone.append(nn.Linear(16, 16).requires_grad_(False).eval())
        own.load_state_dict(net.state_dict())
        apply(net)
        for enabled in (False, True, False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                for seed in range(3):
                    got, wanted = (m.backbone(images(seed=seed)) for m in (net, own))
                    assert got.dtype == wanted.dtype
                    torch.testing.assert_close(got, wanted, atol=3e-2, rtol=3e-2)

    def test_ragged_batches(self, net):
        own = copy.deepcopy(net)
        apply(net)
        for rows in (8, 3, 1, 8, 0):
            torch.testing.assert_close(net(images(rows)), own(images(rows)))

    def test_two_picture_sizes(self, net):
        own = copy.deepcopy(net)
        apply(net)
        for size in (12, 16, 12, 16, 20, 24, 28):
            x = torch.randn(4, 3, size, size)
            torch.testing.assert_close(net(x), own(x), atol=1e-5, rtol=1e-5)

    def test_channels_last_inputs(self, net):
        own = copy.deepcopy(net)
        apply(net)
        for seed in (0, 1, 0, 1):
            x = images(seed=seed).to(memory_format=torch.channels_last)
            torch.testing.assert_close(net(x), own(x))

    def test_input_is_never_written(self, net):
        apply(net)
        for _ in range(3):
            x = images()
            net(x)
            assert torch.equal(x, images())

    def test_float64_stays(self, net):
        net.double()
        applied = apply(net, pinned("bf16"))
        x = images().double()
        wanted = copy.deepcopy(net)(x)
        for _ in range(2):
            assert torch.equal(net(x), wanted)
        assert not applied.forms

    def test_integer_inputs(self):
        class Words(nn.Module):
            def __init__(self):
                super().__init__()
                self.embed = nn.Embedding(20, 16)
                self.mix = nn.Linear(16, 16)

            def forward(self, ids, mask=None):
                x = self.mix(self.embed(ids))
                return (x * mask[..., None]).mean(1) if mask is not None else x.mean(1)

        net = Net(Words())
        own = copy.deepcopy(net)
        apply(net)
        ids, mask = torch.randint(0, 20, (5, 7)), torch.rand(5, 7).round()
        for _ in range(3):
            torch.testing.assert_close(net.backbone(ids), own.backbone(ids))
            torch.testing.assert_close(net.backbone(ids, mask=mask), own.backbone(ids, mask=mask))

    def test_nested_outputs(self):
        class Levels(Backbone):
            def forward(self, x):
                first = self[0](x)
                return {"levels": (first, first.mean((2, 3))), "none": None, "last": [x.sum()]}

        net = Net(Levels())
        own = copy.deepcopy(net)
        applied = apply(net)
        for seed in (0, 1, 1):
            got, wanted = net.backbone(images(seed=seed)), own.backbone(images(seed=seed))
            assert list(got) == list(wanted)
            assert isinstance(got["levels"], tuple)
            torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
        assert applied.forms

    def test_several_calls_a_step_and_shared_modules(self, net):
        net.again = net.backbone
        own = copy.deepcopy(net)
        applied = apply(net)
        for seed in range(3):
            a, b = images(seed=seed), images(seed=seed + 10)
            got = net.head(net.backbone(a) - net.again(b))
            torch.testing.assert_close(got, own.head(own.backbone(a) - own.again(b)))
        assert len(applied.forms) == 1

    def test_two_trunks(self, net):
        net.other = Backbone().requires_grad_(False).eval()
        own = copy.deepcopy(net)
        candidate = FrozenTrunk().pinned({"trunks": {"backbone": "fp32", "other": "bf16"}})
        applied = apply(net, candidate)
        for seed in range(3):
            x = images(seed=seed)
            torch.testing.assert_close(net.backbone(x), own.backbone(x), atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(net.other(x), own.other(x), atol=3e-2, rtol=3e-2)
        assert [form.name for form in applied.forms] == ["fp32", "bf16"]


class TestValidation:
    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_without_gradients(self, net, mode):
        own = copy.deepcopy(net)
        apply(net)
        for seed in (0, 0, 1):
            x = images(seed=seed)
            net(x).sum().backward()  # training in between
            net.eval()
            with mode():
                torch.testing.assert_close(net(x), own(x))
                assert net(x).is_inference() == (mode is torch.inference_mode)
            net.train()
            net.backbone.eval()

    def test_first_call_in_inference_mode(self, net):
        own = copy.deepcopy(net)
        applied = apply(net)
        with torch.inference_mode():
            net(images())
        net(images()).sum().backward()
        torch.testing.assert_close(net(images(seed=4)), own(images(seed=4)))
        assert applied.forms


class TestNoticed:
    """The module is no longer what it was."""

    def both(self, net, change, form="fp32"):
        own = copy.deepcopy(net)
        applied = apply(net, pinned(form))
        for seed in range(3):
            net(images(seed=seed))
        for module in (net, own):
            torch.manual_seed(5)
            change(module)
        for seed in range(4):
            torch.testing.assert_close(
                net(images(seed=seed)), own(images(seed=seed)), atol=1e-5, rtol=1e-5
            )
        return own, applied

    def test_unfreezing(self, net):
        own, _ = self.both(net, lambda m: m.backbone.requires_grad_(True))
        for module in (net, own):
            optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
            for step in range(5):
                optimizer.zero_grad()
                module(images(seed=step)).square().mean().backward()
                optimizer.step()
        for one, other in zip(net.parameters(), own.parameters(), strict=True):
            assert torch.equal(one, other)

    def test_unfreezing_one_parameter(self, net):
        own, _ = self.both(net, lambda m: m.backbone[0].bias.requires_grad_(True))
        net(images()).sum().backward()
        own(images()).sum().backward()
        assert torch.equal(net.backbone[0].bias.grad, own.backbone[0].bias.grad)

    def test_frozen_again(self, net):
        def there_and_back(module):
            module.backbone.requires_grad_(True)
            module(images())
            module.backbone.requires_grad_(False)

        _, applied = self.both(net, there_and_back)
        assert applied.forms

    def test_load_state_dict(self, net):
        torch.manual_seed(9)
        other = Net().state_dict()
        self.both(net, lambda m: m.load_state_dict(other))

    def test_load_state_dict_of_the_same_keeps_the_form(self, net):
        state = copy.deepcopy(net.state_dict())
        _, applied = self.both(net, lambda m: m.load_state_dict(state))
        assert applied.forms

    def test_edits_in_place(self, net):
        def shrink(module):
            with torch.no_grad():
                module.backbone[0].weight.mul_(0.5)

        self.both(net, shrink)

    def test_statistics_in_place(self, net):
        self.both(net, lambda m: m.backbone[1].running_var.fill_(3.0))

    def test_data_replaced(self, net):
        def replace(module):
            module.backbone[3].weight.data = torch.randn_like(module.backbone[3].weight)

        self.both(net, replace)

    def test_parameter_replaced(self, net):
        def replace(module):
            module.backbone[3].weight = nn.Parameter(torch.randn(16, 8, 3, 3), False)

        self.both(net, replace)

    def test_buffer_replaced(self, net):
        def replace(module):
            module.backbone[1].running_mean = torch.randn(8)

        self.both(net, replace)

    def test_layer_replaced(self, net):
        def replace(module):
            module.backbone[3] = nn.Conv2d(8, 16, 5).requires_grad_(False)

        self.both(net, replace)

    def test_average_of_weights(self, net):
        own = copy.deepcopy(net)
        apply(net)
        for module in (net, own):
            torch.manual_seed(3)
            for step in range(6):
                module(images(seed=step))
                with torch.no_grad():
                    for weight in module.backbone.parameters():
                        weight.lerp_(torch.randn_like(weight), 0.1)
        torch.testing.assert_close(net(images()), own(images()), atol=1e-5, rtol=1e-5)

    def test_a_form_comes_back_when_weights_are_calm(self, net):
        applied = apply(net)
        net(images())
        with torch.no_grad():
            net.backbone[0].weight.mul_(0.5)
        for seed in range(10):
            net(images(seed=seed))
        assert applied.forms
        torch.testing.assert_close(net(images(seed=3)), copy.deepcopy(net)(images(seed=3)))

    def test_train_mode(self, net):
        own, _ = self.both(net, lambda m: m.backbone.train())
        assert torch.equal(net.backbone[1].running_mean, own.backbone[1].running_mean)

    def test_mode_goes_and_comes(self, net):
        own = copy.deepcopy(net)
        apply(net)
        for _ in range(3):
            for train in (False, True, False):
                for module in (net, own):
                    module.backbone.train(train)
                torch.testing.assert_close(net(images()), own(images()), atol=1e-5, rtol=1e-5)
        assert torch.equal(net.backbone[4].running_var, own.backbone[4].running_var)

    def test_hooks(self, net):
        seen = []
        apply(net)
        net(images())
        handle = net.backbone[3].register_forward_hook(lambda m, i, o: seen.append(o.shape))
        net(images())
        handle.remove()
        net(images())
        assert len(seen) == 1

    def test_hook_on_the_trunk_itself(self, net):
        apply(net)
        net(images())
        net.backbone.register_forward_hook(lambda m, i, o: o * 0)
        assert net.backbone(images()).abs().max() == 0

    def test_gradient_of_the_input(self, net):
        own = copy.deepcopy(net)
        apply(net)
        net(images())
        grads = []
        for module in (net, own):
            x = images().requires_grad_()
            module(x).square().sum().backward()
            grads.append(x.grad)
        assert torch.equal(*grads)

    def test_transforms_of_functions(self, net):
        own = copy.deepcopy(net)
        apply(net)
        net(images())
        x = images(4)
        got, wanted = (
            torch.func.vmap(lambda r, m=m: m.backbone(r[None])[0])(x) for m in (net, own)
        )
        torch.testing.assert_close(got, wanted)
        with warnings.catch_warnings(action="ignore"):  # torch's own
            got, wanted = (torch.func.jvp(m.backbone, (x,), (x,))[1] for m in (net, own))
        torch.testing.assert_close(got, wanted)

    def test_export_sees_the_users_module(self, net):
        apply(net)
        net(images())
        program = torch.export.export(net, (images(),))
        assert any("conv2d" in str(node.target) for node in program.graph.nodes)


class TestModesAndDraws:
    def test_batch_norm_in_train_mode_is_left_alone(self, net):
        net.backbone.train()
        own = copy.deepcopy(net)
        reason = FrozenTrunk().refuse(scene_of(net))
        assert reason is not None
        assert "self.backbone.eval()" in reason
        with pytest.raises(ConfigError, match="train mode"):
            FrozenTrunk().apply(net, (), scene_of(net))
        net.backbone.eval()
        applied = apply(net)
        net.backbone.train()  # only now
        for seed in range(3):
            assert torch.equal(net(images(seed=seed)), own(images(seed=seed)))
        for one, other in zip(net.buffers(), own.buffers(), strict=True):
            assert torch.equal(one, other)
        with pytest.raises(ConfigError, match="train mode"):
            applied.settle()

    def test_dropout_draws_what_it_drew(self):
        torch.manual_seed(0)
        net = Net(nn.Sequential(nn.Flatten(), nn.Linear(432, 16), nn.Dropout(0.5)))
        net.backbone.train()
        own = copy.deepcopy(net)
        apply(net)
        for module in (net, own):
            torch.manual_seed(1)
            module.out = [module(images(seed=s)) for s in range(4)]
            module.after = torch.rand(3)
        for got, wanted in zip(net.out, own.out, strict=True):
            torch.testing.assert_close(got, wanted)
        assert torch.equal(net.after, own.after)

    def test_hidden_noise_is_found(self, net):
        class Noisy(Backbone):
            def forward(self, x):
                return super().forward(x + torch.randn_like(x))

        net.backbone.__class__ = Noisy
        own = copy.deepcopy(net)
        applied = apply(net)
        for module in (net, own):
            torch.manual_seed(1)
            module.out = [module(images(seed=s)) for s in range(3)]
        assert all(torch.equal(a, b) for a, b in zip(net.out, own.out, strict=True))
        with pytest.raises(ConfigError, match="random"):
            applied.settle()

    def test_state_is_found(self, net):
        class Counting(Backbone):
            def forward(self, x):
                self.calls += 1
                return super().forward(x) * self.calls

        net.backbone.__class__ = Counting
        applied = apply(net)
        for _ in range(3):
            net(images())
        assert net.backbone.calls == 3
        with pytest.raises(ConfigError, match="state"):
            applied.settle()

    def test_building_draws_nothing(self, net):
        candidate = FrozenTrunk(forms=["fp32", "bf16"])
        candidate.apply(net, (), scene_of(net))
        torch.manual_seed(4)
        wanted = torch.rand(3)
        torch.manual_seed(4)
        net(images())
        assert torch.equal(torch.rand(3), wanted)

    def test_rows_that_depend_on_each_other_are_not_cached(self):
        class Across(nn.Module):
            def __init__(self):
                super().__init__()
                self.mix = nn.Linear(3 * 12 * 12, 16)

            def forward(self, x):
                x = self.mix(x.flatten(1))
                return x - x.mean(0)

        torch.manual_seed(0)
        net = Net(Across())
        own = copy.deepcopy(net)
        applied = apply(net)
        x = images()
        for part in (x, x[:4], x[2:], x.flip(0)):
            torch.testing.assert_close(net(part), own(part), atol=1e-5, rtol=1e-5)
        assert applied.forms
        assert not applied._sites[0].caches


class TestCache:
    def test_later_epochs_compute_nothing(self, net):
        own = copy.deepcopy(net)
        applied = apply(net)
        data = images(20)
        for epoch in range(4):
            applied.epoch_started()
            order = torch.randperm(20, generator=torch.Generator().manual_seed(epoch))
            for part in data[order].split(6):
                torch.testing.assert_close(net(part), own(part))
        cache = applied._sites[0].caches[0]
        assert cache.misses <= 20
        assert cache.hits >= 54

    def test_random_augmentation_ends_it(self, net):
        applied = apply(net)
        for epoch in range(4):
            applied.epoch_started()
            for step in range(4):
                net(images(seed=100 * epoch + step))
        cache = applied._sites[0].caches[0]
        assert cache.closed

    def test_random_training_beside_still_validation(self, net):
        own = copy.deepcopy(net)
        applied = apply(net)
        still = images(seed=3)
        for epoch in range(4):
            applied.epoch_started()
            for step in range(4):
                x = images(seed=100 * epoch + step)
                torch.testing.assert_close(net(x), own(x))
            with torch.no_grad():
                torch.testing.assert_close(net(still), own(still))
        training, validation = applied._sites[0].caches
        assert training.closed
        assert not validation.closed
        assert (validation.hits, len(validation)) == (24, 8)

    def test_none_in_a_probe(self, net):
        copied = copy.deepcopy(net)
        applied = pinned().apply(copied, (), scene_of(net))
        for _ in range(3):
            copied(images())
        assert applied.forms
        assert not applied._sites[0].caches

    def test_none_if_not_wanted(self, net):
        applied = apply(net, pinned(cache_bytes=0))
        for _ in range(3):
            net(images())
        assert not applied._sites[0].caches

    def test_gone_when_weights_change(self, net):
        own = copy.deepcopy(net)
        apply(net)
        for _ in range(2):
            net(images())
        for module in (net, own):
            with torch.no_grad():
                module.backbone[0].weight.neg_()
        for _ in range(4):
            torch.testing.assert_close(net(images()), own(images()), atol=1e-5, rtol=1e-5)

    def test_changed_features_do_not_come_back(self, net):
        own = copy.deepcopy(net)
        apply(net)
        for _ in range(3):
            net.backbone(images()).fill_(7)
        torch.testing.assert_close(net.backbone(images()), own.backbone(images()))


class TestUndo:
    def test_nothing_is_left(self, net):
        before = {name: set(vars(part)) for name, part in net.named_modules()}
        state = copy.deepcopy(net.state_dict())
        applied = apply(net)
        for _ in range(2):
            net(images())
        applied.undo()
        applied.undo()
        assert {name: set(vars(part)) for name, part in net.named_modules()} == before
        assert all(
            torch.equal(a, b)
            for a, b in zip(net.state_dict().values(), state.values(), strict=True)
        )
        assert runs_of(lambda: net(images()))[0] == 1

    def test_module_looks_the_same_meanwhile(self, net):
        kind, names = type(net.backbone), list(net.state_dict())
        apply(net)
        net(images())
        assert type(net.backbone) is kind
        assert list(net.state_dict()) == names
        assert [n for n, _ in net.named_modules()] == [n for n, _ in Net().named_modules()]

    def test_copies_and_pickles_are_the_users(self, net):
        apply(net)
        net(images())
        copied = copy.deepcopy(net)
        assert runs_of(lambda: copied(images()))[0] == 1
        again = pickle.loads(pickle.dumps(net))
        assert runs_of(lambda: again(images()))[0] == 1
        torch.save(net, io.BytesIO())

    def test_the_users_own_compiled_call_stays(self, net):
        net.backbone._compiled_call_impl = own = lambda x: net.backbone._call_impl(x)
        FrozenTrunk().apply(net, (), scene_of(net)).undo()
        with pytest.raises(ConfigError, match="compiled already"):
            apply(net)
        assert net.backbone._compiled_call_impl is own


class TestRefusals:
    @pytest.mark.parametrize(
        ("change", "text"),
        [
            (lambda m: m.requires_grad_(True), "no parameter is frozen"),
            (lambda m: m.requires_grad_(False), "nothing trains"),
        ],
    )
    def test_by_flags(self, net, change, text):
        change(net)
        assert text in FrozenTrunk().refuse(scene_of(net))
        with pytest.raises(ConfigError, match=text):
            FrozenTrunk().apply(net, (), scene_of(net))

    def test_nothing_was_called(self, net):
        applied = apply(net)
        with pytest.raises(ConfigError, match="not called"):
            applied.settle()

    def test_not_faster(self, net, monkeypatch):
        candidate = FrozenTrunk(forms=["fp32"])
        monkeypatch.setattr("bigdl.nano.pytorch.frozen.choose._in_turns", lambda a, b: (1.0, 0.99))
        applied = candidate.apply(net, (), scene_of(net))
        net(images())
        with pytest.raises(ConfigError, match="no faster"):
            applied.settle()
        assert runs_of(lambda: net(images()))[0] == 1

    def test_unknown_form(self):
        with pytest.raises(ConfigError, match="Did you mean 'openvino_int8'"):
            FrozenTrunk(forms=["openvino_int9"])

    @pytest.mark.parametrize("options", [{}, {"trunks": 3}, {"trunks": {"backbone": "nope"}}])
    def test_options_of_a_plan(self, options):
        with pytest.raises(ConfigError, match=r"frozen.trunk"):
            FrozenTrunk().pinned(options)

    def test_plan_of_another_model(self, net):
        with pytest.raises(ConfigError, match="'body'"):
            pinned(place="body").apply(net, (), scene_of(net))

    def test_torchscript(self, net):
        with pytest.warns(FutureWarning):
            net.backbone = torch.jit.trace(net.backbone, images()).eval()
        inner = Net(nn.Sequential(net.backbone))
        applied = apply(inner)
        inner(images())
        with pytest.raises(ConfigError, match="TorchScript"):
            applied.settle()
        applied = FrozenTrunk().apply(net, (), scene_of(net))
        net(images())
        with pytest.raises(ConfigError, match="TorchScript"):
            applied.settle()

    def test_user_errors_are_the_users(self, net):
        apply(net)
        net(images())
        for bad in (torch.randn(2, 5, 12, 12), torch.randn(12)):
            with pytest.raises(RuntimeError):
                net(bad)
        with pytest.raises(TypeError):
            net.backbone()
        net(images())


class TestPlans:
    def test_options_build_the_same(self, net):
        candidate = FrozenTrunk(forms=["fp32"])
        applied = candidate.apply(net, (), scene_of(net))
        applied._terms.budget = None  # whatever the clock says
        net(images())
        applied.settle()
        options = applied.options
        assert options == {"trunks": {"backbone": "fp32"}}
        assert "backbone" in applied.detail
        applied.undo()
        again = candidate.pinned(options).apply(net, (), scene_of(net))
        net(images())
        assert again.options == options

    def test_what_the_probe_built_serves_again(self, net, monkeypatch):
        candidate, built = pinned("bf16"), []
        choose = site_file.choose
        monkeypatch.setattr(site_file, "choose", lambda *a: built.append(1) or choose(*a))
        copied = copy.deepcopy(net)
        candidate.apply(copied, (), scene_of(net))
        copied(images())
        candidate.apply(net, (), scene_of(net))
        runs, _ = runs_of(lambda: net(images()))
        assert (built, runs) == ([1], 0)

    def test_gentler_goes_down_the_ladder(self, net):
        candidate = FrozenTrunk(forms=["openvino_int8", "bf16", "fp32"])
        assert candidate.gentler() is None  # not applied yet
        applied = candidate.apply(net, (), scene_of(net))
        applied._terms.budget = None
        net(images())
        names = [form.name for form in applied.forms]
        applied.undo()
        for _ in range(3):
            candidate = candidate.gentler()
            if candidate is None:
                break
            applied = candidate.apply(net, (), scene_of(net))
            applied._terms.budget = None
            net(images())
            names += [form.name for form in applied.forms]
            applied.undo()
        assert names == ["openvino_int8", "bf16", "fp32"]
        assert candidate is None

    def test_budget(self):
        assert Budget(steps=100, share=0.1).seconds(2.0) == 20.0
        assert Budget(steps=None, unknown_s=7.0).seconds(2.0) == 7.0

    def test_checked_again_on_later_data(self, net, monkeypatch):
        monkeypatch.setattr(site_file, "_CHECKED_AT", frozenset({3}))
        own = copy.deepcopy(net)
        applied = apply(net, pinned(cache_bytes=0))
        for seed in range(2):
            net(images(seed=seed))
        way = next(applied._sites[0]._ways())
        good = way.made.chosen.run
        object.__setattr__(way.made.chosen, "run", lambda inputs: (good(inputs)[0] * 0,))
        for seed in range(2, 8):
            net(images(seed=seed))
        torch.testing.assert_close(net(images()), own(images()))


def test_check_is_quick():
    torchvision = pytest.importorskip("torchvision")
    import time

    module = torchvision.models.resnet50().requires_grad_(False).eval()
    watch = Watch(module.modules(), module.modules())
    best = min(
        (lambda begun: (watch.same_form() and watch.same_values(), time.perf_counter() - begun))(
            time.perf_counter()
        )[1]
        for _ in range(200)
    )
    assert best < 200e-6  # some 60 µs on an idle core
