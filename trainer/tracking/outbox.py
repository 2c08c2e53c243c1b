"""What waits to be sent to MLflow lies in a file of the run folder, never in memory alone.

`mlflow-spool.jsonl` holds one numbered event a line; `mlflow-state.json` remembers the number of
the last one sent and the last step of every metric. The training appends, one thread reads and
sends; when all is sent the spool is emptied. Whatever dies in between, the next process finds the
unsent lines with the times they were made at: a store keeps one copy of a metric with the same
name, step, time and value, so that a line sent twice counts once.
"""

import hashlib
import json
import os
import threading
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from flows.errors import UserError
from trainer import metrics_log

Event = dict[str, Any]


SPOOL, STATE = "mlflow-spool.jsonl", "mlflow-state.json"


def forget(folder: Path) -> None:
    """What is begun anew in `folder` is another run of MLflow's; what the old one did not send is lost."""
    for name in (SPOOL, STATE):
        (folder / name).unlink(missing_ok=True)


@dataclass(frozen=True)
class State:
    """What survives the process.

    store: fingerprint of the tracking address; a run id means nothing to another store
    key: our own mark on the run, by which it is found if its creation was never answered
    sent: number of the last event the store has
    steps: last step of every metric that is in the spool or sent
    """

    store: str
    key: str
    run_id: str | None = None
    sent: int = 0
    steps: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Part:
    """Events to send next, and where in the spool they end."""

    events: list[Event]
    end: int


class Outbox:
    """The spool of one run: the training calls `put` and `metrics`, the sender all the rest."""

    def __init__(self, folder: Path, uri: str) -> None:
        """Open the spool in `folder`, with whatever an earlier process left in it.

        Raises UserError if one of the two files is damaged.
        """
        self.path = folder / SPOOL
        self._state_path = folder / STATE
        # Kept before a run is created under its key, so that even a creation whose answer was lost
        # is found again.
        self.save(self._load(hashlib.sha256(uri.encode()).hexdigest()[:16]))
        metrics_log.cut_torn_tail(self.path)
        self._lock = threading.Lock()
        self._read = 0
        self._number = self._state.sent
        self._steps = dict(self._state.steps)
        for event in self._events(self.path.read_bytes() if self.path.exists() else b""):
            self._number = max(self._number, int(event["n"]))
            self._note_steps(self._steps, event)
        self._file = self.path.open("ab", buffering=0)

    @property
    def state(self) -> State:
        return self._state

    def put(self, event: Mapping[str, Any]) -> None:
        """Append an event: one small write to the page cache, whatever the store does."""
        with self._lock:
            self._number += 1
            line = metrics_log.encode({"n": self._number, **event})
            self._file.write(line.encode() + b"\n")

    def metrics(self, step: int, values: Mapping[str, float], time_ms: int) -> None:
        """Append the values of a step, without those that an earlier process appended already."""
        new = {name: v for name, v in values.items() if step > self._steps.get(name, -1)}
        if new:
            self._steps.update(dict.fromkeys(new, step))
            self.put({"kind": "metrics", "step": step, "time": time_ms, "values": new})

    def empty(self) -> bool:
        """Nothing is left to send."""
        with self._lock:
            return os.path.getsize(self.path) <= self._read  # noqa: PTH202

    def next(self, limit: int) -> Part:
        """The oldest events that are not sent yet, at most `limit` of them."""
        with self.path.open("rb") as file:
            file.seek(self._read)
            lines: list[bytes] = []
            for line in file:
                if len(lines) == limit or not line.endswith(b"\n"):
                    break
                lines.append(line)
        content = b"".join(lines)
        events = [e for e in self._events(content) if int(e["n"]) > self._state.sent]
        return Part(events, self._read + len(content))

    def done(self, part: Part) -> None:
        """The store has `part`: remember it, and empty the spool if it was the last."""
        steps = dict(self._state.steps)
        for event in part.events:
            self._note_steps(steps, event)
        if part.events:
            self.save(replace(self._state, sent=int(part.events[-1]["n"]), steps=steps))
        self._read = part.end
        with self._lock:
            if self._read and os.path.getsize(self.path) == self._read:  # noqa: PTH202
                os.truncate(self.path, 0)
                self._read = 0

    def close(self) -> None:
        self._file.close()

    def save(self, state: State) -> None:
        """Make `state` the one the next process finds."""
        self._state = state
        metrics_log.replace(self._state_path, json.dumps(asdict(state)))

    def _load(self, store: str) -> State:
        fresh = State(store=store, key=uuid.uuid4().hex)
        if not self._state_path.exists():
            return fresh
        try:
            found = State(**json.loads(self._state_path.read_text(encoding="utf-8")))
        except (ValueError, TypeError):
            raise UserError(
                f"{self._state_path} is damaged; remove it to go on in a new MLflow run."
            ) from None
        return found if found.store == store else replace(fresh, sent=found.sent)

    def _events(self, content: bytes) -> list[Event]:
        try:
            return [metrics_log.decode(line.decode()) for line in content.split(b"\n") if line]
        except ValueError:
            raise UserError(
                f"{self.path} is damaged; remove it to give up what was not sent to MLflow."
            ) from None

    @staticmethod
    def _note_steps(steps: dict[str, int], event: Event) -> None:
        if event["kind"] == "metrics":
            steps.update(dict.fromkeys(event["values"], int(event["step"])))
