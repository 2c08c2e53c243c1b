"""The training's side of MLflow: calls that append to a file, and one thread that does the rest.

A store that is dead, slow or refusing costs one warning. Nothing is lost: what could not be sent
stays in the run folder, is tried again with growing pauses, and goes out when the store is back or
the run is resumed. Used on rank 0 alone.
"""

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from flows.errors import UserError
from trainer.tracking.environment import environment
from trainer.tracking.outbox import Outbox
from trainer.tracking.redact import (
    PARAM_LIMIT,
    TAG_LIMIT,
    cut,
    flatten,
    redact,
    redact_text,
    safe_name,
)
from trainer.tracking.store import Refused, Store, Unreachable, load_mlflow

Status = Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]

EVENTS_A_ROUND = 500
_SCHEMES = ("sqlite:", "postgresql", "mysql", "mssql", "http://", "https://", "databricks")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pace:
    """Seconds between rounds while all is well, before the first retry, and at most before any."""

    interval: float = 1.0
    first_retry: float = 1.0
    longest_retry: float = 30.0


def start(
    folder: Path,
    uri: str,
    experiment: str,
    run_name: str,
    warn: Callable[[str], None] = log.warning,
    pace: Pace | None = None,
    begin: bool = True,
) -> "Tracker":
    """Track the run in `folder`; one that was tracked there before goes on under the same run id.

    begin: MLflow is told that the run is running; else its status stays as it was

    Does not wait for the store. Raises UserError for an address that MLflow cannot serve.
    """
    check_address(uri)
    load_mlflow()
    outbox = Outbox(folder, uri)
    if begin:
        outbox.put({"kind": "status", "status": "RUNNING", "time": _now()})
    return Tracker(outbox, Store(uri, experiment, run_name), warn, pace or Pace())


def check_address(uri: str) -> None:
    """Raises UserError for an address that MLflow cannot serve; asks nobody."""
    if not uri.startswith(_SCHEMES):
        raise UserError(
            f"tracking.uri = {redact_text(uri)} is no store MLflow serves (plain folders are "
            "none any more); use sqlite:////path/mlflow.db or the http address of a server."
        )


def open_command(uri: str) -> str:
    """What a person types or opens to see the runs of a store."""
    if uri.startswith("http"):
        return redact_text(uri)
    program = Path(sys.executable).with_name("mlflow")
    return f"{program if program.exists() else 'mlflow'} ui --backend-store-uri {redact_text(uri)}"


class Silent:
    """The tracker of every other rank, and of recipes without tracking: it does nothing."""

    @property
    def run_id(self) -> str | None:
        """MLflow's id of this run; None until the store has answered for the first time."""
        return None

    def recipe(self, recipe: Mapping[str, Any]) -> None: ...

    def environment(self, world_size: int, device: torch.device) -> None: ...

    def metrics(self, step: int, values: Mapping[str, Any]) -> None: ...

    def artifact(self, path: Path, folder: str = "") -> None: ...

    def close(self, status: Status | None, timeout: float = 10.0) -> None: ...


class Tracker(Silent):
    """What the loop tells MLflow. No call waits for the store but `close`, for a bounded time."""

    def __init__(
        self, outbox: Outbox, store: Store, warn: Callable[[str], None], pace: Pace
    ) -> None:
        self._outbox, self._store, self._warn, self._pace = outbox, store, warn, pace
        self._warned = self._attached = False
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()

    @property
    def run_id(self) -> str | None:
        return self._outbox.state.run_id

    def recipe(self, recipe: Mapping[str, Any]) -> None:
        """The recipe as parameters, and whole as `recipe.yaml`; secrets are hidden in both."""
        clean = redact(recipe)
        values = {safe_name(n): cut(value, PARAM_LIMIT) for n, value in flatten(clean)}
        self._outbox.put({"kind": "params", "values": values})
        text = yaml.safe_dump(clean, sort_keys=False, allow_unicode=True)
        self._outbox.put({"kind": "text", "name": "recipe.yaml", "text": text})

    def environment(self, world_size: int, device: torch.device) -> None:
        """Versions, devices, commit and world size, as tags (a resume may change them)."""
        found = redact(environment(world_size, device))
        values = {safe_name(f"env.{n}"): cut(value, TAG_LIMIT) for n, value in found.items()}
        self._outbox.put({"kind": "tags", "values": values})

    def metrics(self, step: int, values: Mapping[str, Any]) -> None:
        """Numbers of one step, nested or in rows (`name/0`, `name/1`, ...); all else is left out.

        A step this run has already logged under the same name is not logged again: after a resume,
        the steps since the checkpoint come a second time.
        """
        flat = {
            safe_name(name.replace(".", "/")): float(value)
            for name, value in _numbers(values)
            if name != "step"
        }
        self._outbox.metrics(step, flat, _now())

    def artifact(self, path: Path, folder: str = "") -> None:
        """A file to copy into the run's artifacts, when the thread comes to it."""
        self._outbox.put({"kind": "artifact", "path": str(path.resolve()), "folder": folder})

    def close(self, status: Status | None, timeout: float = 10.0) -> None:
        """Send the rest and the end, within `timeout` seconds; what is left waits in the spool.

        status: how the run ended; None: as it is known already
        """
        if status is not None:
            self._outbox.put({"kind": "status", "status": status, "time": _now()})
        self._closing.set()
        self._thread.join(timeout)
        if not self._outbox.empty():
            self._warn_once("the rest could not be sent in time")
        if not self._thread.is_alive():
            self._outbox.close()

    def _work(self) -> None:
        """Send round after round until closed; after a failure the pauses grow."""
        failures = 0
        while True:
            last = self._closing.is_set()
            failures = 0 if self._round() else failures + 1
            if last:
                return
            retry = self._pace.first_retry * 2.0 ** (failures - 1)
            pause = min(retry, self._pace.longest_retry) if failures else self._pace.interval
            self._closing.wait(pause)

    def _round(self) -> bool:
        """Send everything there is; False if the store could not take it."""
        try:
            if not self._attached:
                self._attach()
            while not self._outbox.empty():
                part = self._outbox.next(EVENTS_A_ROUND)
                for refusal in self._store.send(part.events):
                    self._warn_once(f"it refused {refusal}")
                self._outbox.done(part)
        except (Unreachable, Refused, UserError, OSError) as error:
            self._warn_once(str(error))
            return False
        return True

    def _attach(self) -> None:
        state = self._outbox.state
        run_id = self._store.attach(state.run_id, state.key)
        if run_id != state.run_id:
            self._outbox.save(replace(state, run_id=run_id))
        self._attached = True

    def _warn_once(self, reason: str) -> None:
        if not self._warned:
            self._warned = True
            self._warn(
                f"MLflow does not take this run's records for now ({reason}); "
                f"they are kept in {self._outbox.path} and sent when it answers or on resume."
            )


def _numbers(values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in flatten(values):
        row = enumerate(value) if isinstance(value, (list, tuple)) else None
        named = [(f"{name}/{i}", v) for i, v in row] if row else [(name, value)]
        for pair in named:
            if isinstance(pair[1], (int, float)) and not isinstance(pair[1], bool):
                yield pair


def _now() -> int:
    """Milliseconds since 1970."""
    return time.time_ns() // 1_000_000
