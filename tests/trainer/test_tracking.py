"""MLflow gets everything exactly once and no secret, and training never waits for it."""

import math
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient

from flows.errors import UserError
from trainer.tracking import Tracker, forget, start
from trainer.tracking.outbox import Outbox
from trainer.tracking.redact import flatten, redact, redact_text, safe_name
from trainer.tracking.tracker import Pace

QUICK = Pace(interval=0.05, first_retry=0.1, longest_retry=0.4)
PATIENT = 60.0  # a busy machine may need long to make the tables of a new database


@pytest.fixture(scope="module")
def sqlite(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"


def _start(folder: Path, uri: str, warnings: list[str] | None = None) -> Tracker:
    said: list[str] = [] if warnings is None else warnings
    return start(folder, uri, "law", folder.name, said.append, QUICK)


def _history(uri: str, run_id: str | None, name: str) -> list[tuple[int, float]]:
    assert run_id is not None
    found = MlflowClient(tracking_uri=uri).get_metric_history(run_id, name)
    return sorted((m.step, m.value) for m in found)


def test_a_run_arrives_whole(sqlite: str, tmp_path: Path) -> None:
    picture, manifest = tmp_path / "loss.png", tmp_path / "manifest.json"
    picture.write_bytes(b"\x89PNG")
    manifest.write_text('{"data": "s3://AKIA:se/cret@bucket/a.tar?sig=hush"}')
    warnings: list[str] = []
    tracker = _start(tmp_path, sqlite, warnings)
    tracker.recipe({"name": "law", "tracking": {"uri": "http://me:hush@host/?token=hush"}})
    tracker.environment(2, torch.device("cpu"))
    for step in range(1, 1501):
        tracker.metrics(step, {"step": step, "loss": 1 / step, "seconds": {"forward": 0.1}})
    tracker.metrics(1500, {"by_time": [0.5, None, 0.25], "resumed": True, "mfu": None})
    tracker.metrics(1501, {"loss": math.nan, "note": "text is no metric"})
    tracker.artifact(picture, "pictures")
    tracker.artifact(manifest)
    tracker.close("FINISHED", PATIENT)

    assert warnings == [], warnings
    client = MlflowClient(tracking_uri=sqlite)
    run = client.get_run(tracker.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params == {"name": "law", "tracking.uri": "http://host/?***"}
    assert run.data.tags["env.world_size"] == "2"
    assert run.data.tags["env.version.torch"] == torch.__version__
    losses = _history(sqlite, tracker.run_id, "loss")
    assert losses[:-1] == [(step, 1 / step) for step in range(1, 1501)]
    assert math.isnan(losses[-1][1])
    assert len(_history(sqlite, tracker.run_id, "seconds/forward")) == 1500
    assert _history(sqlite, tracker.run_id, "by_time/2") == [(1500, 0.25)]
    assert set(run.data.metrics) == {"loss", "seconds/forward", "by_time/0", "by_time/2"}
    names = {a.path for a in client.list_artifacts(tracker.run_id)}
    assert names == {"pictures", "manifest.json", "recipe.yaml"}
    for name in ("manifest.json", "recipe.yaml"):
        path = client.download_artifacts(tracker.run_id, name, str(tmp_path))
        assert "hush" not in Path(path).read_text()
        assert "AKIA" not in Path(path).read_text()
    assert (tmp_path / "mlflow-spool.jsonl").read_bytes() == b""


def test_a_resumed_run_goes_on_and_repeats_nothing(sqlite: str, tmp_path: Path) -> None:
    first = _start(tmp_path, sqlite)
    first.recipe({"steps": 10, "seed": 1})
    for step in range(1, 9):
        first.metrics(step, {"loss": 1.0})
    first.close("FAILED", PATIENT)

    second = _start(tmp_path, sqlite)
    second.recipe({"steps": 20, "seed": 1})
    for step in range(5, 21):
        second.metrics(step, {"loss": 2.0})
    second.close("FINISHED", PATIENT)

    assert second.run_id == first.run_id
    run = MlflowClient(tracking_uri=sqlite).get_run(second.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params == {"steps": "10", "seed": "1"}
    assert run.data.tags["resumed.steps"] == "20"
    expected = [(s, 1.0) for s in range(1, 9)] + [(s, 2.0) for s in range(9, 21)]
    assert _history(sqlite, second.run_id, "loss") == expected


def test_a_file_is_added_later_and_the_status_stays(sqlite: str, tmp_path: Path) -> None:
    first = _start(tmp_path, sqlite)
    first.close("KILLED", PATIENT)
    added = tmp_path / "final.png"
    added.write_bytes(b"picture")
    second = start(tmp_path, sqlite, "law", tmp_path.name, print, QUICK, begin=False)
    second.artifact(added, "samples")
    second.close(None, PATIENT)
    client = MlflowClient(tracking_uri=sqlite)
    assert client.get_run(second.run_id).info.status == "KILLED"
    assert [a.path for a in client.list_artifacts(second.run_id, "samples")] == [
        "samples/final.png"
    ]

    forget(tmp_path)
    third = _start(tmp_path, sqlite)
    third.close("FINISHED", PATIENT)
    assert third.run_id not in (None, first.run_id), "begun anew is another run"


KILLED = """
import os, signal, sys, time
from pathlib import Path
from trainer.tracking import start
from trainer.tracking.tracker import Pace
tracker = start(Path(sys.argv[1]), sys.argv[2], "law", "killed", print, Pace(0.02, 0.1, 0.1))
for step in range(1, 10**9):
    tracker.metrics(step, {"loss": float(step)})
    time.sleep(0.002)
    if step == 60:
        print("ready", flush=True)
"""


def test_a_killed_process_loses_and_repeats_nothing(sqlite: str, tmp_path: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path), sqlite], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    time.sleep(0.7)
    child.kill()
    child.wait()
    child.stdout.close()

    tracker = _start(tmp_path, sqlite)
    for step in range(40, 801):
        tracker.metrics(step, {"loss": float(step)})
    tracker.close("FINISHED", PATIENT)
    assert _history(sqlite, tracker.run_id, "loss") == [(s, float(s)) for s in range(1, 801)]


def test_what_was_sent_but_never_answered_is_not_doubled(sqlite: str, tmp_path: Path) -> None:
    """The run and its metrics are in the store, but the process died before it could note so."""
    outbox = Outbox(tmp_path, sqlite)
    for step in range(1, 21):
        outbox.metrics(step, {"loss": 1 / step}, time_ms=1000 + step)
    outbox.close()
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    first = _start(tmp_path, sqlite)
    first.close("FAILED", PATIENT)
    for path in tmp_path.glob("mlflow-*"):
        path.unlink()
    for path, content in before.items():
        path.write_bytes(content)

    second = _start(tmp_path, sqlite)
    second.metrics(21, {"loss": 1 / 21})
    second.close("FINISHED", PATIENT)
    assert second.run_id == first.run_id
    assert _history(sqlite, second.run_id, "loss") == [(s, 1 / s) for s in range(1, 22)]


def test_another_store_gets_a_run_of_its_own(sqlite: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    first = _start(folder, sqlite)
    first.metrics(1, {"loss": 1.0})
    first.close("FINISHED", PATIENT)
    other = f"sqlite:///{tmp_path}/other.db"
    second = _start(folder, other)
    second.metrics(1, {"loss": 1.0})
    second.close("FINISHED", PATIENT)
    assert second.run_id != first.run_id
    assert _history(other, second.run_id, "loss") == [(1, 1.0)]


class Server:
    """A real `mlflow server` in its own process group."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.folder, self.process = folder, None
        self.uri = f"http://127.0.0.1:{self.port}"

    def up(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--workers", "1",
             "--port", str(self.port), "--backend-store-uri", f"sqlite:///{self.folder}/server.db",
             "--artifacts-destination", str(self.folder / "artifacts")],
            env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip

    def wait(self) -> None:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            try:
                with urllib.request.urlopen(self.uri + "/health", timeout=1):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.1)
        raise TimeoutError("the MLflow server did not come up")

    def kill(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path)
    server.up()
    yield server
    server.kill()


@pytest.mark.alone
def test_a_server_killed_and_restarted_gets_everything_once(server: Server, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    picture = folder / "grid.png"
    picture.write_bytes(b"\x89PNG")
    warnings: list[str] = []
    waits: list[float] = []

    def train(tracker: Tracker, steps: range, until: Any = lambda: False) -> int:
        for step in steps:
            before = time.perf_counter()
            tracker.metrics(step, {"loss": 1 / step, "grad_norm": float(step)})
            waits.append(time.perf_counter() - before)
            time.sleep(0.002)
            if until():
                return step
        return steps[-1]

    # The server is still starting: a run may begin before its store answers.
    tracker = _start(folder, server.uri, warnings)
    step = train(tracker, range(1, 10**6), lambda: tracker.run_id is not None)
    step = train(tracker, range(step + 1, step + 101))
    server.kill()
    step = train(tracker, range(step + 1, step + 201))
    server.up()
    server.wait()
    step = train(tracker, range(step + 1, step + 101))
    tracker.artifact(picture, "samples")
    time.sleep(0.6)
    server.kill()
    step = train(tracker, range(step + 1, step + 51))
    began = time.monotonic()
    tracker.close("FINISHED")
    assert time.monotonic() - began < 10.5
    assert len(warnings) == 1, warnings
    assert "mlflow-spool.jsonl" in warnings[0]

    server.up()
    server.wait()
    resumed = _start(folder, server.uri, warnings)
    train(resumed, range(step - 10, step + 11))
    resumed.close("FINISHED", PATIENT)
    assert len(warnings) == 1, warnings
    # The calls that touched the network would take seconds; that an operating system with more to do
    # than cores takes the core away for a moment is nobody's fault.
    assert sorted(waits)[int(len(waits) * 0.99)] < 0.05
    assert max(waits) < 0.5
    client = MlflowClient(tracking_uri=server.uri)
    runs = client.search_runs([client.get_experiment_by_name("law").experiment_id])
    assert [(run.info.run_id, run.info.status) for run in runs] == [(resumed.run_id, "FINISHED")]
    steps = range(1, step + 11)
    assert _history(server.uri, resumed.run_id, "loss") == [(s, 1 / s) for s in steps]
    assert _history(server.uri, resumed.run_id, "grad_norm") == [(s, float(s)) for s in steps]
    assert [a.path for a in client.list_artifacts(resumed.run_id, "samples")] == [
        "samples/grid.png"
    ]


@pytest.mark.alone
def test_a_store_that_does_not_exist_costs_one_warning_and_no_time(tmp_path: Path) -> None:
    warnings: list[str] = []
    tracker = _start(tmp_path, "http://me:hush@127.0.0.1:9", warnings)
    began = time.monotonic()
    for step in range(1, 201):
        tracker.metrics(step, {"loss": 1.0})
    assert time.monotonic() - began < 1.0
    tracker.close("FINISHED")
    assert time.monotonic() - began < 11.0
    assert len(warnings) == 1
    assert "hush" not in warnings[0]


@pytest.mark.parametrize("uri", ["file:///tmp/mlruns", "./mlruns", "ftp://me:hush@host/x"])
def test_an_address_that_mlflow_cannot_serve_is_refused_at_once(uri: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tracking\.uri = .* use sqlite") as error:
        _start(tmp_path, uri)
    assert "hush" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("s3://bucket/{00..07}.tar", "s3://bucket/{00..07}.tar"),
        ("https://host:8080/a.tar", "https://host:8080/a.tar"),
        ("s3://bucket/a-0?.tar", "s3://bucket/a-0?.tar"),
        ("https://me:pw@host:1/a?X-Sig=1&b=2", "https://host:1/a?***"),
        ("simplecache::s3://AKIA:a/b+c@bucket/x", "simplecache::s3://bucket/x"),
        ("https://token@host/x", "https://host/x"),
        ("https://host/x@1.2/y", "https://host/x@1.2/y"),
        ("https://host/#access_token=1", "https://host/#***"),
        ("host=db password=hush user=me", "host=db password=*** user=me"),
        ("two http://a:b@c and http://d:e@f/g", "two http://c and http://f/g"),
    ],
)
def test_secrets_in_text_are_hidden_and_the_rest_is_left(text: str, clean: str) -> None:
    assert redact_text(text) == clean


def test_secrets_are_known_by_their_key_too() -> None:
    recipe = {"storage": {"secret_access_key": "x", "password": 1, "key": None}, "tokens": 49}
    hidden = {"storage": {"secret_access_key": "***", "password": "***", "key": None}, "tokens": 49}
    assert redact(recipe) == hidden
    assert redact({"urls": ["http://a:b@c/d"]}) == {"urls": ["http://c/d"]}


def test_names_and_values_fit_mlflows_limits(sqlite: str, tmp_path: Path) -> None:
    assert dict(flatten({"a": {"b": 1, "c": [1, 2]}})) == {"a.b": 1, "a.c": [1, 2]}
    assert len(safe_name("x" * 300)) == 250
    warnings: list[str] = []
    tracker = _start(tmp_path, sqlite, warnings)
    tracker.recipe({f"key{i}": "y" * 7000 for i in range(150)})
    tracker.metrics(1, {"loss (t=0.1)%": 1.0, "z" * 300: 1.0})
    tracker.close("FINISHED", PATIENT)
    assert warnings == [], warnings
    run = MlflowClient(tracking_uri=sqlite).get_run(tracker.run_id)
    assert {len(value) for value in run.data.params.values()} == {6000}
    assert len(run.data.params) == 150
    assert len(run.data.metrics) == 2
