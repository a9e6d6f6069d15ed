"""Accuracy on the whole set: the forms of a metric, and the number each gives."""

from __future__ import annotations

import math

import pytest
import torch

from bigdl._base.errors import ArgumentError, ConfigError, DataError
from bigdl.nano.pytorch.inference.metrics import Agreement, read_metric

# ragged batches, so that a mean over batches gives another number
PREDICTIONS = [
    torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]]),
    torch.tensor([[0.3, 0.7]]),
]
LABELS = [torch.tensor([0, 1, 1]), torch.tensor([1])]


def pairs(predictions=PREDICTIONS, labels=LABELS):
    return lambda: zip(predictions, labels, strict=True)


def measure(metric, predictions=PREDICTIONS, labels=LABELS, direction="maximize"):
    return read_metric(metric, direction).measure(None, pairs(predictions, labels), None)


def accuracy(pred, target):
    return (pred.argmax(1) == target).float().mean()


def test_a_function_sees_the_whole_set_once():
    calls = []

    def metric(pred, target):
        calls.append(pred.shape)
        return accuracy(pred, target)

    assert measure(metric) == 0.75
    assert calls == [(4, 2)]


def test_a_torchmetric_keeps_its_state_and_the_users_object_is_untouched():
    torchmetrics = pytest.importorskip("torchmetrics")
    metric = torchmetrics.classification.MulticlassF1Score(2, average="macro")
    whole = metric.clone()
    whole.update(torch.cat(PREDICTIONS), torch.cat(LABELS))
    expected = float(whole.compute())
    assert measure(metric) == pytest.approx(expected, abs=1e-7)
    parts = [float(metric.clone()(p, t)) for p, t in zip(PREDICTIONS, LABELS, strict=True)]
    assert abs(sum(parts) / 2 - expected) > 0.01  # the mean over batches is another number
    assert metric._update_count == 0


def test_a_function_of_the_model_gets_the_model_and_the_data():
    def metric(model, loader):
        return model + len(loader)

    assert read_metric(metric).measure(5, None, [1, 2]) == 7


@pytest.mark.parametrize(
    "metric",
    [
        lambda pred, target: 0.5,
        lambda pred, target: torch.tensor(0.5),
        lambda pred, target: torch.tensor([0.5]).numpy()[0],
        torch.nn.CrossEntropyLoss(),
    ],
)
def test_forms_of_a_number(metric):
    assert isinstance(measure(metric), float)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (float("nan"), "not a finite number"),
        (math.inf, "not a finite number"),
        (torch.ones(2), "gave 2 numbers"),
        ("good", "gave str"),
        (True, "gave bool"),
        (None, "gave NoneType"),
    ],
)
def test_other_values_are_an_error(value, text):
    with pytest.raises(DataError, match=text):
        measure(lambda pred, target: value)


def test_missing_labels_are_an_error():
    with pytest.raises(DataError, match="accuracy needs labels"):
        measure(accuracy, labels=[None, None])


def test_outputs_that_do_not_fit_together_are_an_error():
    ragged = [torch.ones(2, 3), torch.ones(2, 4)]
    with pytest.raises(DataError, match=r"rows of shape \(3,\) and of shape \(4,\)"):
        measure(accuracy, predictions=ragged)


def test_nested_outputs_and_labels_are_joined_part_by_part():
    def metric(pred, target):
        assert pred["a"].shape == (4, 2)
        return (pred["a"].argmax(1) == target[1]).float().mean()

    nested = [{"a": p} for p in PREDICTIONS]
    labels = [(torch.zeros(len(label)), label) for label in LABELS]
    assert measure(metric, nested, labels) == 0.75


@pytest.mark.parametrize(
    ("metric", "direction", "error", "text"),
    [
        ("accuracy", "maximize", ArgumentError, "not 'accuracy'"),
        (3, "maximize", ArgumentError, "not 3"),
        (torch.nn.MSELoss, "maximize", ArgumentError, r"Did you mean MSELoss\("),
        (accuracy, "max", ConfigError, "Did you mean 'maximize'"),
        (accuracy, "up", ConfigError, "'maximize' or 'minimize'"),
        (accuracy, True, ArgumentError, "not bool"),
        (None, "minimize", ConfigError, "needs a metric"),
    ],
)
def test_wrong_arguments(metric, direction, error, text):
    with pytest.raises(error, match=text):
        read_metric(metric, direction)


def test_a_direction_that_the_metric_contradicts():
    torchmetrics = pytest.importorskip("torchmetrics")
    with pytest.raises(ConfigError, match="direction='minimize'"):
        read_metric(torchmetrics.MeanSquaredError())
    assert read_metric(torchmetrics.MeanSquaredError(), "minimize").higher_is_better is False


# --- agreement --------------------------------------------------------------------------------


def agreement(original, other, labels=None):
    labels = [None] * len(original) if labels is None else labels
    metric = Agreement()
    assert metric.measure(None, pairs(original, labels), None) == 1.0
    return Agreement(metric.reference).measure(None, pairs(other, labels), None)


def test_the_share_of_equal_top_classes():
    other = [PREDICTIONS[0].flip(1), PREDICTIONS[1]]
    assert agreement(PREDICTIONS, other, LABELS) == 0.25
    assert agreement(PREDICTIONS, other) == 0.25  # (rows, classes) without labels too


def test_classes_of_every_place():
    logits = torch.zeros(2, 5, 4, 4)  # (rows, classes, height, width)
    logits[:, 1] = 1.0
    other = logits.clone()
    other[0, 3, 2, 2] = 9.0
    labels = torch.zeros(2, 4, 4, dtype=torch.long)
    assert agreement([logits], [other], [labels]) == 1 - 1 / 32
    last = [part.movedim(1, -1) for part in (logits, other)]  # (rows, height, width, classes)
    assert agreement([last[0]], [last[1]], [labels]) == 1 - 1 / 32


def test_without_classes_it_is_the_relative_error():
    original = torch.tensor([[3.0], [4.0]])
    target = [torch.zeros(2, 1)]
    assert agreement([original], [original * 1.1], target) == pytest.approx(0.9)


def test_a_diverged_output_agrees_with_nothing():
    broken = [torch.full_like(part, float("nan")) for part in PREDICTIONS]
    assert agreement(PREDICTIONS, broken, LABELS) == 0.0
    with pytest.raises(DataError, match="not a finite number"):
        agreement([torch.ones(2, 1)], [torch.full((2, 1), float("nan"))])


def test_an_original_that_is_not_finite_is_an_error():
    with pytest.raises(DataError, match="not all finite"):
        Agreement().measure(None, pairs([torch.full((2, 3), float("nan"))], [None]), None)


def test_other_batches_or_shapes_are_an_error():
    metric = Agreement()
    metric.measure(None, pairs(), None)
    with pytest.raises(DataError, match="2 batches for the original and 1"):
        metric.measure(None, pairs(PREDICTIONS[:1], LABELS[:1]), None)
    with pytest.raises(DataError, match=r"shape \(2, 3\); the original's is \(2, 1\)"):
        agreement([torch.ones(2, 1)], [torch.ones(2, 3)], [torch.zeros(2, 1)])
