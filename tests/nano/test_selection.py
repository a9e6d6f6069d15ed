"""Rows, reports, and the choice between them."""

from __future__ import annotations

import pytest

from bigdl._base.errors import AccuracyError, ArgumentError, ConfigError
from bigdl.nano.selection import Criterion, Report, Row


def ok(name, speedup, accuracy=0.9, ms=None):
    ms = 10.0 / speedup if ms is None else ms
    return Row(name, "ok", ms, ms * 1.1, 1e3 / ms, 1.0, accuracy, speedup=speedup)


def report(*rows, **kwargs):
    return Report((ok("original", 1.0), *rows), **kwargs)


def test_the_fastest_wins():
    assert report(ok("a", 1.5), ok("b", 2.5), ok("c", 2.0)).best().name == "b"


def test_less_than_five_per_cent_is_not_worth_it():
    assert report(ok("a", 1.04)).best().name == "original"
    assert report(ok("a", 1.051)).best().name == "a"


def test_a_diverged_model_is_never_chosen():
    assert report(ok("fast", 9.0, accuracy=0.1), ok("good", 2.0)).best().name == "good"
    assert report(ok("fast", 9.0, accuracy=None), ok("good", 2.0)).best().name == "good"
    assert report(ok("fast", 9.0, accuracy=float("nan"))).best().name == "original"


def test_lower_is_better_turns_the_criterion_round():
    found = Report(
        (ok("original", 1, 0.10), ok("worse", 3, 0.2), ok("better", 2, 0.05)),
        higher_is_better=False,
    )
    assert found.best().name == "better"
    assert found.best(Criterion(0.15, relative=False)).name == "worse"


@pytest.mark.parametrize(
    ("criterion", "best"),
    [
        (Criterion(0.02), "a"),
        (Criterion(0.12), "b"),
        (Criterion(0.012, relative=False), "a"),
        (Criterion(0.1, relative=False), "b"),
        (Criterion(0.0), "original"),
    ],
)
def test_a_criterion_is_kept(criterion, best):
    found = report(ok("a", 2, 0.888), ok("b", 4, 0.80))
    assert found.best(criterion).name == best


def test_equal_accuracy_keeps_a_zero_criterion():
    assert report(ok("a", 2, 0.9 - 1e-12)).best(Criterion(0.0)).name == "a"


def test_a_filter_takes_the_fastest_even_if_slower_than_the_original():
    found = report(ok("a", 0.5), ok("b", 0.8), ok("c", 3.0))
    assert found.best(among=lambda row: row.name in "ab").name == "b"


def test_a_filter_without_an_ok_row_is_an_error_that_says_why():
    found = report(Row("a", "refused", reason="no such instructions"))
    with pytest.raises(ConfigError, match="a: no such instructions"):
        found.best(among=lambda row: row.name == "a")


def test_a_filter_whose_rows_all_lose_too_much_is_an_accuracy_error():
    found = report(ok("a", 3, 0.5))
    with pytest.raises(AccuracyError, match=r"0\.01 relative of the original's 0\.9.*a 0\.5"):
        found.best(Criterion(0.01), among=lambda row: row.name == "a")


@pytest.mark.parametrize(
    ("given", "read"),
    [
        (None, None),
        (0.01, Criterion(0.01)),
        (0, Criterion(0.0)),
        ({"relative": 0.02}, Criterion(0.02)),
        ({"absolute": 3}, Criterion(3.0, relative=False)),
    ],
)
def test_forms_of_a_criterion(given, read):
    assert Criterion.of(given) == read


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        ("1%", ArgumentError, "not str"),
        (True, ArgumentError, "not bool"),
        ({"relative": "1%"}, ArgumentError, "not str"),
        (-0.1, ConfigError, "out of range"),
        (1.0, ConfigError, "out of range"),
        (float("nan"), ConfigError, "out of range"),
        ({"absolute": -1}, ConfigError, "out of range"),
        ({}, ConfigError, "is not one"),
        ({"relativ": 0.1}, ConfigError, "is not one"),
        ({"relative": 0.1, "absolute": 0.1}, ConfigError, "is not one"),
        ({"relative": 0.1, "higher_is_better": True}, ConfigError, "direction="),
    ],
)
def test_wrong_criteria(given, error, text):
    with pytest.raises(error, match=text):
        Criterion.of(given)


def test_rows_hold_what_their_status_needs():
    with pytest.raises(ConfigError, match="gives no reason"):
        Row("a", "failed")
    with pytest.raises(ConfigError, match="no latency"):
        Row("a", "ok")
    with pytest.raises(ConfigError, match="not one of"):
        Row("a", "fine", reason="x")


def test_the_table_has_every_row_and_the_verdict():
    text = str(
        report(ok("quick", 2.0, 0.8999), Row("odd", "timeout", reason="took longer than 3 s"))
    )
    assert "quick" in text
    assert "2.00x" in text
    assert "took longer than 3 s" in text
    assert text.endswith("Best: quick, 2.00 times as fast as your own, "
                         "accuracy 0.8999 against 0.9.")  # fmt: skip
    assert all(len(line) < 200 for line in text.splitlines())
    assert repr(report()) == str(report())


def test_keep_it_is_an_answer():
    assert str(report(ok("a", 1.02))).endswith("nothing that keeps its accuracy is 5 % faster.")


def test_html_is_a_table_and_safe():
    html = report(Row("a", "failed", reason="<script>"))._repr_html_()
    assert html.startswith("<table>")
    assert "&lt;script&gt;" in html


def test_json_round_trip():
    found = report(ok("a", 2), Row("b", "failed", reason="x"), metric="F1", threads=2, seconds=1.5)
    assert Report.from_json(found.to_json()) == found


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("{", "not a report in JSON"),
        ("[]", "schema_version"),
        ('{"schema_version": 2}', "schema_version"),
        ('{"schema_version": 1, "row": []}', "missing keys"),
        (
            '{"schema_version": 1, "rows": [{"nam": 1}], "metric": "m", "higher_is_better": true,'
            '"objective": "latency", "threads": 1, "seconds": 1}',
            "nam",
        ),
    ],
)
def test_other_json_is_refused(text, error):
    with pytest.raises(ConfigError, match=error):
        Report.from_json(text)


def test_an_unknown_row_is_answered():
    with pytest.raises(ConfigError, match="No row 'x'; have original, a"):
        report(ok("a", 2)).row("x")
