"""Epochs' records as metrics of an MLflow run."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Any

from bigdl._base.calls import shown
from bigdl._base.errors import ArgumentError
from bigdl._base.optional import need
from bigdl.orca.learn.callbacks.base import Callback
from bigdl.orca.learn.callbacks.numbers import numbers_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from bigdl.orca.learn.callbacks.base import TrainingState

__all__ = ["MLflow"]

#: Finds the run again: for another call of fit, and after a lost worker.
_TAG = "bigdl.callback"


class MLflow(Callback):
    """Logs each epoch's record to one run of MLflow: a metric a key, a point an epoch.

    One object is one run, through any number of calls of ``fit`` and restarts.

    Args:
        tracking_uri: Where MLflow keeps runs; None = as MLflow is set up.
        experiment: Name of the experiment, made if it is new.
        run_name: Name of the run; None = MLflow's own.
        params: The run's parameters.

    Attributes:
        run_id: Of the run, once there is one.

    Raises:
        ArgumentError: ``params`` is no mapping, or a name is no text.
        MissingDependencyError: MLflow is not installed.
    """

    def __init__(
        self,
        tracking_uri: str | None = None,
        *,
        experiment: str = "Default",
        run_name: str | None = None,
        params: Mapping[str, Any] | None = None,
    ) -> None:
        texts = {"tracking_uri": tracking_uri, "experiment": experiment, "run_name": run_name}
        for name, value in texts.items():
            if not isinstance(value, str) and (value is not None or name == "experiment"):
                raise ArgumentError(f"MLflow({name}={shown(value)}): need a str.")
        if params is not None and not hasattr(params, "items"):
            raise ArgumentError(f"MLflow(params={shown(params)}): need a dict.")
        _need("mlflow")
        self.tracking_uri, self.experiment, self.run_name = tracking_uri, experiment, run_name
        self.params = dict(params or {})
        self.run_id: str | None = None
        self._mark = secrets.token_hex(16)

    def on_fit_start(self, state: TrainingState) -> None:
        """Find this object's run, or begin it."""
        client = self._client()
        found = client.get_experiment_by_name(self.experiment)
        place = client.create_experiment(self.experiment) if found is None else found.experiment_id
        self.run_id = self._found(client, place)
        if self.run_id is not None:
            client.update_run(self.run_id, status="RUNNING")
            return
        run = client.create_run(place, run_name=self.run_name, tags={_TAG: self._mark})
        self.run_id = run.info.run_id
        for key, value in self.params.items():
            client.log_param(self.run_id, key, value)

    def on_epoch_end(self, state: TrainingState) -> None:
        """A point for each number of the record."""
        client = self._client()
        for key, value in numbers_of(state.row).items():
            client.log_metric(self.run_id, key, value, step=state.epoch)

    def on_fit_end(self, state: TrainingState) -> None:
        """Mark the run as finished."""
        self._client().set_terminated(self.run_id)

    def on_exception(self, error: BaseException) -> None:
        """Mark the run as failed, or as killed where the user broke it off."""
        client = self._client()
        experiment = client.get_experiment_by_name(self.experiment)
        run_id = None if experiment is None else self._found(client, experiment.experiment_id)
        if run_id is not None:
            broken_off = isinstance(error, KeyboardInterrupt)
            client.set_terminated(run_id, "KILLED" if broken_off else "FAILED")

    def _found(self, client: Any, place: str) -> str | None:
        """This object's run: a worker may have begun it and not come back."""
        runs = client.search_runs([place], f"tags.`{_TAG}` = '{self._mark}'", max_results=1)
        return runs[0].info.run_id if runs else None

    def _client(self) -> Any:
        return _need("mlflow.tracking").MlflowClient(tracking_uri=self.tracking_uri)


def _need(module: str) -> Any:
    return need(module, extra="tracking", purpose="MLflow(…)")
