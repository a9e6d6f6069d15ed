"""From measured ways to run a model to a report and a choice. Knows no framework.

A report is plain data: rows, what was measured, and by which rule the best row is found. What
the best row is built from is the caller's business.
"""

from __future__ import annotations

import html
import json
import math
import sys
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, get_args

from bigdl._base.errors import AccuracyError, ArgumentError, ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["ORIGINAL", "Criterion", "Report", "Row"]

#: The name of the row that holds the caller's own model, unchanged.
ORIGINAL = "original"
#: "Faster" means at least so many times as fast; what is less is not worth another model.
WORTH = 1.05

Status = Literal["ok", "refused", "failed", "timeout", "skipped"]
Objective = Literal["latency", "throughput"]


@dataclass(frozen=True)
class Criterion:
    """How much accuracy may be lost against the original.

    Args:
        limit: The largest loss, at least 0.
        relative: ``limit`` is a share of the original's accuracy, not a difference.
    """

    limit: float
    relative: bool = True

    @classmethod
    def of(cls, value: Any, *, name: str = "accuracy_criterion") -> Criterion | None:
        """Read one of the forms that a user may write; None stays None.

        Raises:
            ArgumentError: Not a number, nor a dict.
            ConfigError: A dict with other keys, or a number out of range.
        """
        if value is None or isinstance(value, Criterion):
            return value
        if isinstance(value, dict):
            if len(value) != 1 or not {"relative", "absolute"}.issuperset(value):
                hint = (
                    " Which direction is better is the argument direction=."
                    if "higher_is_better" in value
                    else ""
                )
                raise ConfigError(
                    f"{name}={value!r} is not one: write {{'relative': 0.01}}, "
                    f"{{'absolute': 0.01}}, or a number, which is relative.{hint}"
                )
            ((kind, limit),) = value.items()
        else:
            kind, limit = "relative", value
        if isinstance(limit, bool) or not isinstance(limit, (int, float)):
            raise ArgumentError(
                f"{name} takes a number, {{'relative': number}} or {{'absolute': number}}, "
                f"not {type(limit).__name__}."
            )
        if not 0 <= limit < (1 if kind == "relative" else math.inf):
            allowed = "0 <= r < 1" if kind == "relative" else "0 <= a"
            raise ConfigError(f"{name}={value!r} is out of range: need {allowed}.")
        return cls(float(limit), relative=kind == "relative")

    def bound(self, original: float, *, higher_is_better: bool) -> float:
        """The worst value that is still allowed."""
        loss = self.limit * abs(original) if self.relative else self.limit
        return original - loss if higher_is_better else original + loss

    def keeps(self, value: float, original: float, *, higher_is_better: bool) -> bool:
        """Whether ``value`` is good enough; what is not a number never is."""
        bound = self.bound(original, higher_is_better=higher_is_better)
        slack = 1e-9 * max(1.0, abs(original))  # the sum of a mean in another order
        return value >= bound - slack if higher_is_better else value <= bound + slack

    def __str__(self) -> str:
        return f"{self.limit:.3g} {'relative' if self.relative else 'absolute'}"


#: What a choice keeps when the user states no criterion: no diverged model is ever chosen.
DEFAULT_CRITERION = Criterion(0.05)


@dataclass(frozen=True)
class Row:
    """One way to run the model; numbers are None unless ``status`` is "ok".

    Args:
        name: The method.
        status: "ok", "refused" (it cannot run here), "failed", "timeout", or "skipped".
        latency_ms: Median milliseconds of a call on the sample.
        p90_ms: The same, 90th percentile.
        throughput: Rows a second on a batch of the data.
        size_mb: Megabytes of weights, or of the files that hold them.
        accuracy: The metric on the whole validation set.
        reason: Why there are no numbers; "" when there are.
        speedup: Times as fast as the original, both timed in turns in one process.
    """

    name: str
    status: Status
    latency_ms: float | None = None
    p90_ms: float | None = None
    throughput: float | None = None
    size_mb: float | None = None
    accuracy: float | None = None
    reason: str = ""
    speedup: float | None = None

    def __post_init__(self) -> None:
        if self.status not in get_args(Status):
            raise ConfigError(f"Row status {self.status!r} is not one of {get_args(Status)}.")
        if self.status == "ok" and None in (self.latency_ms, self.speedup):
            raise ConfigError(f"Row {self.name!r} is ok but has no latency and speedup.")
        if self.status != "ok" and not self.reason:
            raise ConfigError(f"Row {self.name!r} is {self.status} but gives no reason.")


@dataclass(frozen=True)
class Report:
    """What was tried and what came of it; ``print`` shows it as a table.

    Args:
        rows: One row a method, in the order in which they were tried.
        metric: What the accuracy column holds.
        higher_is_better: Its direction.
        objective: What a row is chosen for.
        threads: Threads that every row was timed with.
        seconds: How long it all took.
    """

    rows: tuple[Row, ...]
    metric: str = "accuracy"
    higher_is_better: bool = True
    objective: Objective = "latency"
    threads: int = 1
    seconds: float = 0.0

    def row(self, name: str) -> Row:
        """The row of method ``name``.

        Raises:
            ConfigError: There is none.
        """
        for row in self.rows:
            if row.name == name:
                return row
        raise ConfigError(f"No row {name!r}; have {', '.join(row.name for row in self.rows)}.")

    def best(
        self, criterion: Criterion | None = None, *, among: Callable[[Row], bool] | None = None
    ) -> Row:
        """The fastest row that keeps ``criterion``.

        Without ``among`` it must also be 5 % faster than the original, else the original is
        the answer. Without a criterion a row may lose 5 % of the original's accuracy.

        Args:
            criterion: Limit of the loss against the original.
            among: Which rows to look at (a filter that the user has set).

        Raises:
            ConfigError: No ok row passes ``among``.
            AccuracyError: Rows pass, but none of them keeps the criterion.
        """
        original = self.row(ORIGINAL)
        rows = [row for row in self.rows if row.status == "ok" and (among is None or among(row))]
        if not rows:
            raise ConfigError(
                "No method that fits the filter ran here. "
                + " ".join(
                    f"{row.name}: {row.reason}" for row in self.rows if not among or among(row)
                )
            )
        limit = criterion or DEFAULT_CRITERION
        good = [row for row in rows if row is original or self._keeps(row, original, limit)]
        if not good:
            raise AccuracyError(
                f"No method that fits the filter keeps {self.metric} within {limit} of the "
                f"original's {original.accuracy:.4g}: "
                + ", ".join(f"{row.name} {row.accuracy:.4g}" for row in rows)
            )
        best = max(good, key=lambda row: row.speedup or 0.0)
        if among is None and (best.speedup or 0.0) < WORTH:
            return original
        return best

    def _keeps(self, row: Row, original: Row, criterion: Criterion) -> bool:
        if original.accuracy is None:
            return True
        return row.accuracy is not None and criterion.keeps(
            row.accuracy, original.accuracy, higher_is_better=self.higher_is_better
        )

    # --- as data ---

    def to_json(self) -> str:
        """The report as JSON text; ``from_json`` reads it again."""
        return json.dumps({"schema_version": 1, **asdict(self)}, indent=2)

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Read what ``to_json`` wrote.

        Raises:
            ConfigError: It is something else; the text says what is wrong.
        """
        try:
            data = json.loads(text)
        except ValueError as exc:
            raise ConfigError(f"This is not a report in JSON: {exc}.") from exc
        known = {field.name for field in fields(cls)}
        if not isinstance(data, dict) or data.pop("schema_version", None) != 1:
            raise ConfigError("This is not a report: it lacks schema_version 1.")
        if set(data) != known:
            wrong = ", ".join(sorted(set(data) ^ known))
            raise ConfigError(f"This is not a report: unknown or missing keys {wrong}.")
        try:
            data["rows"] = tuple(Row(**row) for row in data["rows"])
        except TypeError as exc:
            raise ConfigError(f"This is not a report: {exc}.") from exc
        return cls(**data)

    # --- as text ---

    def __str__(self) -> str:
        header, *lines = self._cells()
        widths = [max(len(line[i]) for line in (header, *lines)) for i in range(len(header))]

        def text(cells: list[str]) -> str:
            numbers = (c.rjust(w) for c, w in zip(cells[2:-1], widths[2:-1], strict=True))
            first = (c.ljust(w) for c, w in zip(cells[:2], widths[:2], strict=True))
            return "  ".join([*first, *numbers, cells[-1]]).rstrip()

        rule = "  ".join("-" * width for width in widths[:-1])
        return "\n".join([text(header), rule, *(text(line) for line in lines), "", self.verdict()])

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        header, *lines = self._cells()

        def line(cells: list[str], tag: str) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

        body = "".join(line(cells, "td") for cells in lines)
        return (
            f"<table><thead>{line(header, 'th')}</thead><tbody>{body}</tbody></table>"
            f"<p>{html.escape(self.verdict())}</p>"
        )

    def verdict(self) -> str:
        """One sentence: what to use, and by how much it is faster."""
        original = self.row(ORIGINAL)
        if original.status != "ok":
            return f"Your own model could not be measured: {original.reason}"
        best = self.best()
        if best is original:
            return "Keep your model as it is: nothing that keeps its accuracy is 5 % faster."
        loss = ""
        if best.accuracy is not None and original.accuracy is not None:
            loss = f", {self.metric} {best.accuracy:.4g} against {original.accuracy:.4g}"
        return f"Best: {best.name}, {best.speedup:.2f} times as fast as your own{loss}."

    def _cells(self) -> list[list[str]]:
        header = ["method", "status", "latency ms", "p90 ms", "rows/s", "size MB"]
        table = [[*header, self.metric, "speedup", "reason"]]
        for row in self.rows:
            table.append(
                [
                    row.name,
                    row.status,
                    _number(row.latency_ms),
                    _number(row.p90_ms),
                    _number(row.throughput),
                    _number(row.size_mb),
                    _number(row.accuracy),
                    "-" if row.speedup is None else f"{row.speedup:.2f}x",
                    row.reason,
                ]
            )
        return table


def _number(value: float | None) -> str:
    """Four significant digits, never in powers of ten."""
    if value is None:
        return "-"
    if not math.isfinite(value):
        return str(value)
    if value == 0 or abs(value) >= 1000:
        return f"{value:.0f}"
    digits = max(0, 3 - math.floor(math.log10(max(abs(value), sys.float_info.min))))
    return f"{value:.{min(digits, 6)}f}"
