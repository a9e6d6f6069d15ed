"""What LightningModules configure and hook into, and what is refused of them."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from bigdl.errors import BigDLError, ConfigError, NotReadyError
from bigdl.orca import init_orca_context, stop_orca_context

torch = pytest.importorskip("torch", reason="needs the [torch] extra")
pl = pytest.importorskip("pytorch_lightning", reason="needs the [torch] extra")

from bigdl.orca.learn.pytorch import Estimator  # noqa: E402

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="worker processes")
nn, functional = torch.nn, torch.nn.functional


@pytest.fixture(scope="module", autouse=True)
def context():
    yield init_orca_context(cores=1)
    stop_orca_context()


class Small(pl.LightningModule):
    """One weight; how it is optimized is given."""

    def __init__(self, configure, step=None):
        super().__init__()
        self.net = nn.Linear(1, 1, bias=False)
        nn.init.ones_(self.net.weight)
        self.configure, self.step = configure, step

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch):
        if self.step is not None:
            return self.step(self, batch)
        x, y = batch
        return {"loss": functional.mse_loss(self(x), y), "more": 1}

    def configure_optimizers(self):
        return self.configure(self)


def sgd(module, lr=0.25):
    return torch.optim.SGD(module.parameters(), lr=lr)


def step_lr(optimizer):
    return torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)


def plateau(optimizer):
    return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)


def with_schedule(form):
    def configure(module):
        optimizer = sgd(module)
        return form(optimizer)

    return configure


X01, Y0 = np.array([[0], [0], [1], [1]], np.float32), np.zeros((4, 1), np.float32)
FORMS = {
    "one": (sgd, 0.25),
    "a list of one": (lambda module: [sgd(module)], 0.25),
    "a dict": (lambda module: {"optimizer": sgd(module)}, 0.25),
    "two lists": (with_schedule(lambda o: ([o], [step_lr(o)])), 0.375),
    "a list and one": (with_schedule(lambda o: ([o], step_lr(o))), 0.375),
    "a scheduler": (with_schedule(lambda o: {"optimizer": o, "lr_scheduler": step_lr(o)}), 0.375),
    "by steps": (
        with_schedule(
            lambda o: {
                "optimizer": o,
                "lr_scheduler": {"scheduler": step_lr(o), "interval": "step", "frequency": 2},
            }
        ),
        0.375,
    ),
    "a list of dicts": (
        with_schedule(lambda o: [{"optimizer": o, "lr_scheduler": {"scheduler": step_lr(o)}}]),
        0.375,
    ),
    "a plateau": (
        with_schedule(lambda o: {"optimizer": o, "lr_scheduler": plateau(o), "monitor": "loss"}),
        0.25,
    ),
}


def trained_here(module, epochs=2, **options):
    """As one worker would, in this process."""
    from bigdl._base.collective.alone import Alone
    from bigdl.orca.learn.program import Cursor, Options, ReplicaContext
    from bigdl.orca.learn.pytorch.program import TorchProgram
    from tests.orca.learn import learning

    ctx = ReplicaContext(collective=Alone(), options=Options(**options))
    program = TorchProgram(model=module)
    program.check_training()
    replica = program.build(ctx)
    return replica, replica.train(epochs, Cursor(), learning.FromArrays(ctx, (X01, Y0), 2))


@pytest.mark.parametrize("name", FORMS)
def test_forms_of_configure_optimizers(name):
    """Steps with x = 0 change nothing; each with x = 1 makes w smaller by 2 · rate · w."""
    configure, expected = FORMS[name]
    module = Small(configure)
    trained_here(module)
    assert module.net.weight.item() == expected
    assert module._trainer is None


def test_none_leaves_a_batch_out_and_moments_come_in_order():
    heard = []

    class Heard(Small):
        def on_train_epoch_start(self):
            heard.append(("epoch", self.current_epoch, self.trainer.training))

        def on_train_batch_start(self, batch, batch_idx):
            heard.append(("batch", batch_idx))

        def on_after_backward(self):
            heard.append(("backward", self.net.weight.grad is not None))

        def on_before_optimizer_step(self, optimizer):
            heard.append(("step", optimizer is self.optimizers()))

        def on_train_batch_end(self, outputs, batch, batch_idx):
            heard.append(("end", batch_idx, self.global_step))

        def on_train_end(self):
            heard.append("over")

    def step(self, batch):
        x, y = batch
        return None if x.sum() == 0 else functional.mse_loss(self(x), y)

    module = Heard(sgd, step)
    _, rows = trained_here(module, epochs=1)
    assert module.net.weight.item() == 0.5
    assert rows[0]["loss"] == 1.0
    assert heard == [
        ("epoch", 0, True),
        ("batch", 0),
        ("step", True),
        ("end", 0, 1),
        ("batch", 1),
        ("backward", True),
        ("step", True),
        ("end", 1, 2),
        "over",
    ]


# --- misuse -----------------------------------------------------------------------------------


class ByHand(Small):
    def __init__(self):
        super().__init__(sgd)
        self.automatic_optimization = False


class OwnStep(Small):
    def optimizer_step(self, *arguments):
        """The user's own."""


class Unfinished(pl.LightningModule):
    def training_step(self, batch):
        return None


class Asking(Small):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1 / self.trainer.estimated_stepping_batches)


class OwnPrediction(Small):
    def predict_step(self, batch):
        return self(batch) + 1


def two(module):
    return [sgd(module), sgd(module)]


def fit(model, **parts):
    return Estimator.from_torch(model, **parts).fit((X01, Y0))


def strange_metric(module, batch):
    module.log("a", 1.0, reduce_fx="median")
    return functional.mse_loss(module(batch[0]), batch[1])


def text(module, batch):
    return "loss"


MISUSE = {
    "by hand": (lambda: fit(ByHand()), ConfigError, "automatic_optimization = False"),
    "a loss": (lambda: fit(Small(sgd), loss=nn.MSELoss()), ConfigError, "loss= beside"),
    "metrics": (lambda: fit(Small(sgd), metrics=[print]), ConfigError, "metrics= beside"),
    "own step": (lambda: fit(OwnStep(sgd)), ConfigError, r"optimizer_step\(\)"),
    "no optimizer": (lambda: fit(Unfinished()), NotReadyError, "configure_optimizers"),
    "two": (lambda: trained_here(Small(two)), ConfigError, "gave 2 optimizers"),
    "nothing": (lambda: trained_here(Small(lambda m: None)), ConfigError, "gave None"),
    "a word": (lambda: trained_here(Small(lambda m: "sgd")), ConfigError, "gave 'sgd'"),
    "a key": (
        lambda: trained_here(Small(lambda m: {"optimizer": sgd(m), "scheduler": 1})),
        ConfigError,
        "'scheduler'",
    ),
    "no monitor": (
        lambda: trained_here(Small(with_schedule(lambda o: ([o], [plateau(o)])))),
        ConfigError,
        "monitor",
    ),
    "a wrong monitor": (
        lambda: trained_here(
            Small(
                with_schedule(
                    lambda o: {"optimizer": o, "lr_scheduler": plateau(o), "monitor": "los"}
                )
            )
        ),
        ConfigError,
        "Did you mean 'loss'",
    ),
    "interval": (
        lambda: trained_here(
            Small(with_schedule(lambda o: ([o], [{"scheduler": step_lr(o), "interval": "batch"}])))
        ),
        ConfigError,
        "interval='batch'",
    ),
    "two schedulers": (
        lambda: trained_here(Small(with_schedule(lambda o: ([o], [step_lr(o), step_lr(o)])))),
        ConfigError,
        "SequentialLR",
    ),
    "the trainer": (lambda: trained_here(Asking(sgd)), AttributeError, "Lightning's Trainer"),
    "a reduction": (
        lambda: trained_here(Small(sgd, strange_metric)),
        ConfigError,
        "'median'",
    ),
    "a loss's kind": (lambda: trained_here(Small(sgd, text)), ConfigError, "gave 'loss'"),
    "an accelerator": (
        lambda: Estimator.from_torch(OwnPrediction(sgd)).predict(X01, accelerator="openvino"),
        ConfigError,
        r"predict_step\(\)",
    ),
    "no scores": (
        lambda: Estimator.from_torch(Small(sgd)).evaluate((X01, Y0)),
        NotReadyError,
        "validation_step",
    ),
}


@pytest.mark.parametrize("name", MISUSE)
def test_misuse(name):
    call, kind, words = MISUSE[name]
    with pytest.raises(kind, match=words) as caught:
        call()
    assert isinstance(caught.value, (BigDLError, AttributeError))
