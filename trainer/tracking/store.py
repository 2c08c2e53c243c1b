"""One MLflow run: found or created, then fed with events. Every call here may block or fail."""

import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.tracking.outbox import Event
from trainer.tracking.redact import redact_text

if TYPE_CHECKING:
    from mlflow import MlflowClient

METRICS_A_CALL = 1000
PAIRS_A_CALL = 100

# MLflow's own defaults keep trying one call for minutes; the spool makes that needless. What the
# user has set in the environment stands.
_SETTINGS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_ARTIFACT_UPLOAD_DOWNLOAD_TIMEOUT": "30",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
_NOISY = ("alembic", "mlflow.store.db.utils", "mlflow.tracking.client", "urllib3.connectionpool")
_TEXT = {".json", ".jsonl", ".yaml", ".yml", ".txt", ".md", ".csv"}
_REFUSALS = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "INVALID_STATE", "RESOURCE_DOES_NOT_EXIST"}


class Refused(Exception):
    """The store understood and will never accept this: sending it again is of no use."""


class Unreachable(Exception):
    """The store did not answer, or not in time: the same call may succeed later."""


def load_mlflow() -> None:
    """Import MLflow with short timeouts, without telemetry and without its chatter."""
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    import mlflow

    del mlflow


class Store:
    """A run of MLflow's behind `attach` and `send`; both raise Refused or Unreachable alone."""

    def __init__(self, uri: str, experiment: str, run_name: str) -> None:
        self._uri, self._experiment, self._run_name = uri, experiment, run_name
        self._client: MlflowClient | None = None
        self._run_id: str | None = None
        self._params: dict[str, str] = {}

    def attach(self, run_id: str | None, key: str) -> str:
        """The id of the run: the one named, else the one that bears `key`, else a new one."""
        return str(_answered(self._attach, run_id, key))

    def send(self, events: Sequence[Event]) -> list[str]:
        """Deliver events in order; what was refused, in words."""
        refused = []
        for kind, group in _groups(events):
            try:
                _answered(getattr(self, f"_send_{kind}"), group)
            except Refused as error:
                refused.append(f"{kind}: {error}")
        return refused

    def _attach(self, run_id: str | None, key: str) -> str:
        from mlflow import MlflowClient

        self._client = client = MlflowClient(tracking_uri=self._uri)
        run = self._find(client, run_id)
        if run is None:
            experiment = self._experiment_id(client)
            named = client.search_runs(
                [experiment], f"tags.`flowmill.run` = '{key}'", max_results=1
            )
            tags = {"flowmill.run": key}
            run = (
                named[0]
                if named
                else client.create_run(experiment, tags=tags, run_name=self._run_name)
            )
        self._params = dict(run.data.params)
        self._run_id = str(run.info.run_id)
        return self._run_id

    def _find(self, client: "MlflowClient", run_id: str | None) -> Any:
        """The run of that id, None if there is none or somebody deleted it."""
        from mlflow.exceptions import MlflowException

        if run_id is None:
            return None
        try:
            run = client.get_run(run_id)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise
        return run if run.info.lifecycle_stage == "active" else None

    def _experiment_id(self, client: "MlflowClient") -> str:
        found = client.get_experiment_by_name(self._experiment)
        if found is not None:
            return str(found.experiment_id)
        place = None
        if self._uri.startswith("sqlite:///"):
            # MLflow's own choice would be a folder wherever this process happens to run.
            database = Path(self._uri.removeprefix("sqlite:///")).resolve()
            place = (database.parent / "mlflow-artifacts").as_uri()
        return str(client.create_experiment(self._experiment, artifact_location=place))

    def _send_metrics(self, events: Sequence[Event]) -> None:
        from mlflow.entities import Metric

        metrics = [
            Metric(name, float(value), int(event["time"]), int(event["step"]))
            for event in events
            for name, value in event["values"].items()
        ]
        for part in _chunks(metrics, METRICS_A_CALL):
            self._ready().log_batch(self._run_id, metrics=part)

    def _send_params(self, events: Sequence[Event]) -> None:
        """Parameters are written once in MLflow; one that a resume changed becomes a tag."""
        from mlflow.entities import Param, RunTag

        wanted = {name: value for event in events for name, value in event["values"].items()}
        new = {name: value for name, value in wanted.items() if name not in self._params}
        changed = {n: v for n, v in wanted.items() if self._params.get(n, v) != v}
        for params in _chunks([Param(*pair) for pair in new.items()], PAIRS_A_CALL):
            self._ready().log_batch(self._run_id, params=params)
        self._params |= new
        tags = [RunTag(f"resumed.{name}"[:250], value) for name, value in changed.items()]
        for part in _chunks(tags, PAIRS_A_CALL):
            self._ready().log_batch(self._run_id, tags=part)

    def _send_tags(self, events: Sequence[Event]) -> None:
        from mlflow.entities import RunTag

        tags = {name: value for event in events for name, value in event["values"].items()}
        for part in _chunks([RunTag(*pair) for pair in tags.items()], PAIRS_A_CALL):
            self._ready().log_batch(self._run_id, tags=part)

    def _send_artifact(self, events: Sequence[Event]) -> None:
        for event in events:
            path, folder = Path(event["path"]), event["folder"]
            if not path.is_file():
                raise Refused(f"{path} is no longer there")
            if path.suffix in _TEXT:
                name = f"{folder}/{path.name}" if folder else path.name
                text = redact_text(path.read_text(encoding="utf-8"))
                self._ready().log_text(self._run_id, text, name)
            else:
                self._ready().log_artifact(self._run_id, str(path), folder or None)

    def _send_text(self, events: Sequence[Event]) -> None:
        for event in events:
            self._ready().log_text(self._run_id, event["text"], event["name"])

    def _send_status(self, events: Sequence[Event]) -> None:
        last = events[-1]
        if last["status"] == "RUNNING":
            self._ready().update_run(self._run_id, status="RUNNING")
        else:
            self._ready().set_terminated(self._run_id, last["status"], int(last["time"]))

    def _ready(self) -> "MlflowClient":
        if self._client is None:
            raise RuntimeError("attach comes before send")
        return self._client


def _answered(call: Any, *arguments: Any) -> Any:
    """`call(*arguments)`, with every way in which a store can fail turned into one of two."""
    from mlflow.exceptions import MlflowException
    from requests import RequestException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        return call(*arguments)
    except MlflowException as error:
        kind = Refused if error.error_code in _REFUSALS else Unreachable
        raise kind(_sentence(error)) from error
    except (RequestException, SQLAlchemyError, OSError) as error:
        raise Unreachable(_sentence(error)) from error


def _sentence(error: Exception) -> str:
    return redact_text(str(error)).split("\n", 1)[0][:300]


def _groups(events: Sequence[Event]) -> Iterator[tuple[str, list[Event]]]:
    """Neighbours of one kind together; artifacts alone, so that one refused loses no other."""
    group: list[Event] = []
    for event in events:
        if group and (event["kind"] != group[0]["kind"] or event["kind"] == "artifact"):
            yield group[0]["kind"], group
            group = []
        group.append(event)
    if group:
        yield group[0]["kind"], group


def _chunks(items: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
