"""What every estimator can do, whatever the framework: fit, evaluate, predict, checkpoints.

A face (``bigdl.orca.learn.pytorch``, …) makes the program and puts its words around it.
"""

from __future__ import annotations

import contextlib
import logging
from copy import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, Self

from bigdl._base.live import LiveLine
from bigdl.orca.context import current_engine
from bigdl.orca.data.adapters import adapt
from bigdl.orca.data.contract import DEFAULT_BATCH_SIZE, Request, held_by
from bigdl.orca.learn.callbacks import Progress
from bigdl.orca.learn.checks import check_fit, checked_workers
from bigdl.orca.learn.explain import Explanation, explain
from bigdl.orca.learn.fit import Fitted, Job, evaluate, fit
from bigdl.orca.learn.kept import Kept
from bigdl.orca.learn.predict import predict
from bigdl.orca.learn.program import Options
from bigdl.orca.learn.progress import ProgressLine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from bigdl.orca.data.contract import Sharded
    from bigdl.orca.engines.base import Engine
    from bigdl.orca.learn.callbacks import Callback
    from bigdl.orca.learn.program import Program

__all__ = ["BaseEstimator"]

logger = logging.getLogger(__name__)


class BaseEstimator(Kept):
    """A program, and how far its training is.

    Args:
        program: What is trained.
        workers: How many train: a number, the fewest and the most, or None for one a node with
            all its cores.
    """

    def __init__(self, program: Program, workers: int | tuple[int, int] | None = None) -> None:
        super().__init__(program)
        self._workers = checked_workers(workers)
        #: What made the last fit's steps faster, in the program's words; None = nothing was asked.
        self._settled: str | None = None
        #: Workers that predict at the same time; None = as many as there are slots.
        self._at_once: int | None = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}(epoch={self.epoch}, step={self.step})"

    # --- fit ---

    def fit(
        self,
        data: Any,
        epochs: int = 1,
        batch_size: int | None = None,
        *,
        feature_cols: str | Sequence[str] | None = None,
        label_cols: str | Sequence[str] | None = None,
        validation_data: Any = None,
        callbacks: Sequence[Callback] | None = None,
        shuffle: bool | None = None,
        seed: int = 0,
        max_steps: int | None = None,
        validate_every: int = 1,
        validate_every_steps: int | None = None,
        clip_norm: float | None = None,
        clip_value: float | None = None,
        accumulation_steps: int = 1,
        precision: Literal["fp32", "bf16"] = "fp32",
        sync: Literal["allreduce", "sharded"] = "allreduce",
        acceleration: Any = "off",
        max_failures: int = 0,
        hang_timeout_s: float | Literal["auto"] | None = "auto",
        fill: Any = None,
        transform: Callable[[Any], Any] | None = None,
        target_transform: Callable[[Any], Any] | None = None,
    ) -> list[dict[str, Any]]:
        """Train for further epochs; the caller's model holds the trained weights afterwards.

        Args:
            data: ``(features, labels)`` as arrays, a table (pandas, Arrow, Spark), Parquet files,
                shards, a DataLoader, a Dataset, or a function ``(config, batch_size)`` that
                makes a loader.
            epochs: Further epochs; the rest of a broken one counts as one.
            batch_size: Rows of a global batch, which the workers share; None = 32.
            feature_cols: Columns of a table, in the order of the model's inputs.
            label_cols: Columns of a table that are the labels.
            validation_data: Of any kind; scored after epochs.
            callbacks: Of ``bigdl.orca.learn.callbacks``, or the user's own.
            shuffle: Another order of rows each epoch; None = True where data has no order of
                its own making.
            seed: Of the order, and of the workers' random streams.
            max_steps: Updates after which this call ends.
            validate_every: Epochs between validations.
            validate_every_steps: Updates between further ones.
            clip_norm: Largest norm of the global gradient.
            clip_value: Largest absolute value in it.
            accumulation_steps: Global batches in an update.
            precision: "bf16" is autocast over float32 weights.
            sync: Whether each worker has the whole optimizer's state, or its slice.
            acceleration: "auto" measures in the first epoch what makes steps faster, within the
                guard's limits, and keeps that; or a plan made elsewhere. ``plan`` says what was
                found.
            max_failures: How many times a lost worker starts training again from the last
                checkpoint; needs a ``ModelCheckpoint``.
            hang_timeout_s: Seconds without a step that mean a worker hangs.
            fill: In place of nulls in tables.
            transform: From the features of one batch to those that the model gets.
            target_transform: The same for labels.

        Returns:
            A dict an epoch begun: ``epoch`` (from 1), ``loss``, ``rows``, ``steps``,
            ``seconds``, metrics, ``val_…``.

        Raises:
            ConfigError: A value is not allowed; before any work.
            DataError: The data cannot be used as asked.
            WorkerLostError: More workers were lost than ``max_failures``.
        """
        engine = self._engine()
        hung = callbacks or ()
        check_fit(
            epochs,
            seed,
            max_steps,
            validate_every,
            validate_every_steps,
            max_failures,
            hang_timeout_s,
            hung,
        )
        self._program.check_training()
        faster = self._program.check_acceleration(acceleration)
        request = Request(
            call="fit",
            feature_cols=feature_cols,
            label_cols=label_cols,
            fill=fill,
            transform=transform,
            target_transform=target_transform,
            batch_size=batch_size,
            shuffle=shuffle,
            config=getattr(self._program, "config", None),
        )
        with contextlib.ExitStack() as held:
            job = Job(
                program=self._program,
                data=held_by(held, adapt(data, request)),
                validation=self._against(held, validation_data, request),
                options=Options(
                    accumulation_steps=accumulation_steps,
                    clip_norm=clip_norm,
                    clip_value=clip_value,
                    precision=precision,
                    sync=sync,
                    max_steps=max_steps,
                    acceleration=faster,
                ),
                epochs=epochs,
                size=batch_size or DEFAULT_BATCH_SIZE,
                seed=None if shuffle is False else seed,
                streams_seed=seed,
                start=self._cursor,
                state=self._present(),
                validate_every=validate_every,
                validate_every_steps=validate_every_steps,
                callbacks=tuple(hung),
            )
            line = ProgressLine(
                epochs=epochs,
                first=self.epoch + 1,
                rows=job.data.rows,
                is_asked=any(isinstance(one, Progress) for one in hung),
            )
            self._settled = None

            def heard(rank: int, event: Any) -> None:
                if event[0] == "settled":
                    self._settled = event[1]
                progress.heard(rank, event)

            with line as progress, _told_of_failure(hung):
                fitted = fit(
                    engine,
                    job,
                    workers=lambda: self._number(engine),
                    max_failures=max_failures,
                    hang_timeout_s=hang_timeout_s,
                    on_event=heard,
                )
        self._take(fitted, hung)
        return fitted.rows

    def _against(self, held: contextlib.ExitStack, data: Any, request: Request) -> Sharded | None:
        if data is None:
            return None
        request = replace(request, call="evaluate", shuffle=None, batch_size=None)
        return held_by(held, adapt(data, request))

    def _take(self, fitted: Fitted, callbacks: Sequence[Callback]) -> None:
        self._program.take(fitted.state)
        self._state, self._cursor = fitted.state, fitted.cursor
        for one, attributes in zip(callbacks, fitted.attributes, strict=True):
            vars(one).update(attributes)

    # --- evaluate and predict ---

    def evaluate(
        self,
        data: Any,
        batch_size: int | None = None,
        *,
        feature_cols: str | Sequence[str] | None = None,
        label_cols: str | Sequence[str] | None = None,
        precision: Literal["fp32", "bf16"] = "fp32",
        fill: Any = None,
        transform: Callable[[Any], Any] | None = None,
        target_transform: Callable[[Any], Any] | None = None,
    ) -> dict[str, Any]:
        """Score every row once.

        Returns:
            ``loss`` (if there is one), ``rows``, and the metrics; those of all rows, not a mean
            of the workers' values.

        Raises:
            DataError: The data cannot be used as asked.
        """
        engine = self._engine()
        request = Request(
            call="evaluate",
            feature_cols=feature_cols,
            label_cols=label_cols,
            fill=fill,
            transform=transform,
            target_transform=target_transform,
            batch_size=batch_size,
            config=getattr(self._program, "config", None),
        )
        with contextlib.ExitStack() as held:
            return evaluate(
                engine,
                self._program,
                held_by(held, adapt(data, request)),
                workers=self._number(engine),
                size=batch_size or DEFAULT_BATCH_SIZE,
                options=Options(precision=precision),
                state=self._present(),
            )

    def predict(
        self,
        data: Any,
        batch_size: int | None = None,
        *,
        feature_cols: str | Sequence[str] | None = None,
        output_cols: str | Sequence[str] = "prediction",
        accelerator: str | None = None,
        precision: Literal["fp32", "bf16"] = "fp32",
        fill: Any = None,
        transform: Callable[[Any], Any] | None = None,
    ) -> Any:
        """Outputs for every row, in the caller's kind of data and order.

        Args:
            data: Features, of any kind that ``fit`` takes.
            batch_size: Most rows in a call of the model; None = 32.
            feature_cols: Columns of a table, in the order of the model's inputs.
            output_cols: Of the column, or columns, that tables get.
            accelerator: One of Nano's: "compile", "onnxruntime", "openvino", …; None = the
                framework itself.
            precision: "bf16" is for the arithmetic only.
            fill: In place of nulls in tables.
            transform: From the features of one batch to those that the model gets.

        Returns:
            NumPy arrays in the outputs' structure for arrays and loaders; for tables the
            caller's rows and columns, then ``output_cols``.

        Raises:
            ConfigError: A value is not allowed, or the accelerator cannot run this model.
            DataError: The data cannot be used as asked.
        """
        engine = self._engine()
        options = Options(precision=precision, accelerator=accelerator)
        if accelerator is not None:
            self._program.check_accelerator()
        request = Request(
            call="predict",
            feature_cols=feature_cols,
            fill=fill,
            transform=transform,
            batch_size=batch_size,
            config=getattr(self._program, "config", None),
        )
        return predict(
            engine,
            self._program,
            adapt(data, request),
            size=batch_size or DEFAULT_BATCH_SIZE,
            names=output_cols,
            options=options,
            state=self._present(),
            workers=self._at_once,
        )

    # --- what it costs ---

    def explain(
        self,
        data: Any,
        batch_size: int | None = None,
        *,
        feature_cols: str | Sequence[str] | None = None,
        label_cols: str | Sequence[str] | None = None,
        shuffle: bool | None = None,
        seed: int = 0,
        accumulation_steps: int = 1,
        precision: Literal["fp32", "bf16"] = "fp32",
        fill: Any = None,
        transform: Callable[[Any], Any] | None = None,
        target_transform: Callable[[Any], Any] | None = None,
    ) -> Explanation:
        """What ``fit`` with these arguments costs, before it runs; trains nothing of the caller's.

        Copies are trained for a few seconds, by one worker and by two; more workers of this
        machine are estimated, and machines like it simulated.

        Returns:
            An object whose ``str`` is the table: bytes of a row, memory of a worker,
            milliseconds of a step and rows/s by number of workers, and from how many on
            several are faster than one.

        Raises:
            ConfigError: A value is not allowed; before any work.
            DataError: The data cannot be used as asked.
            NotReadyError: There is no optimizer or no loss.
        """
        engine = self._engine()
        request = Request(
            call="fit",
            feature_cols=feature_cols,
            label_cols=label_cols,
            fill=fill,
            transform=transform,
            target_transform=target_transform,
            batch_size=batch_size,
            shuffle=shuffle,
            config=getattr(self._program, "config", None),
        )
        with contextlib.ExitStack() as held:
            job = Job(
                program=self._program,
                data=held_by(held, adapt(data, request)),
                options=Options(accumulation_steps=accumulation_steps, precision=precision),
                size=batch_size or DEFAULT_BATCH_SIZE,
                seed=None if shuffle is False else seed,
                streams_seed=seed,
                state=self._present(),
            )
            with LiveLine() as line:
                return explain(engine, job, say=lambda what: line.show(f"explain: {what} …"))

    # --- inside ---

    def _predicting(self, workers: int | None) -> Self:
        """The same estimator as it is now, of which so many workers predict at a time."""
        view = copy(self)
        view._at_once = workers
        return view

    def _engine(self) -> Engine:
        self._open()
        return current_engine()

    def _number(self, engine: Engine) -> int:
        if self._workers is None:  # one a node
            return max(1, engine.slots() // engine.node_slots())
        if isinstance(self._workers, int):
            return self._workers
        least, most = self._workers
        return max(least, min(most, engine.slots()))


@contextlib.contextmanager
def _told_of_failure(callbacks: Sequence[Callback]) -> Iterator[None]:
    """Callbacks hear of an error that ends the block."""
    try:
        yield
    except BaseException as exc:
        for one in callbacks:
            try:
                one.on_exception(exc)
            except Exception:
                logger.warning("%s.on_exception failed.", type(one).__name__, exc_info=True)
        raise
