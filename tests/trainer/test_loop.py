"""What a whole run does besides training: stop when asked, skip what is not finite, tell, draw."""

import dataclasses
import signal
import socket
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flows.batch import Batch
from flows.errors import UserError
from flows.objectives.objective import Couple, Objective, Prepared
from flows.randomness import Draw
from parallel.processes import Ranks
from tests.distributed.harness import run_ranks
from tests.trainer import runs
from trainer import loop
from trainer.assembly import plan
from trainer.loop import Parts, checkpoint_tensors, one_step, stop_requested
from trainer.reporting import Quiet
from trainer.run_folder import RunFolder
from trainer.running import assemble

STEPS = ("train.steps=12", "checkpoint.every=5")


def trained(folder: Path, *changes: str) -> Path:
    assert runs.train_here(runs.recipe(folder, *STEPS, *changes)).finished
    return folder


@pytest.fixture(scope="module")
def quiet_run(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("quiet") / "run")


def same_run(ours: Path, theirs: Path) -> None:
    """Losses, norms and all that the last checkpoint holds are bit-equal."""
    for key in ("step", "loss", "grad_norm", "lr", "skipped"):
        assert torch.equal(runs.series(ours, key), runs.series(theirs, key)), key
    assert not runs.different(runs.tensors(ours), runs.tensors(theirs))


def test_a_run_writes_what_it_promises(quiet_run):
    lines = runs.lines(quiet_run)
    assert [line["step"] for line in lines] == list(range(1, 13))
    wanted = {"loss", "grad_norm", "samples_per_second", "lr", "seconds"}
    wanted |= {"data_wait_seconds", "queue_depth", "read_depth", "redecoded"}
    assert all(wanted <= line.keys() for line in lines)
    phases = {"forward", "backward", "gradient_norm", "optimizer", "average"}
    assert phases <= lines[-1]["seconds"].keys()
    assert "checkpoint" in lines[5]["seconds"], "the step after a checkpoint accounts for it"
    # Checkpoints at multiples of `every`, and at the end; the newest two are kept.
    assert list(runs.manifests(quiet_run)) == [10, 12]
    for name in ("recipe.yaml", "loss.png", "samples", "logs"):
        assert (quiet_run / name).exists()


def test_a_finished_run_started_again_changes_nothing(quiet_run):
    before = {path: path.read_bytes() for path in quiet_run.rglob("*.jsonl")}
    checkpoints = runs.manifests(quiet_run)
    trained(quiet_run)
    assert {path: path.read_bytes() for path in quiet_run.rglob("*.jsonl")} == before
    assert runs.manifests(quiet_run) == checkpoints


def test_more_steps_go_on_from_the_end(quiet_run, tmp_path):
    constant = "optimizer.schedule=constant"
    trained(tmp_path / "short", constant)
    outcome = runs.train_here(runs.recipe(tmp_path / "short", "train.steps=20", constant))
    assert (outcome.steps, outcome.finished) == (20, True)
    runs.train_here(runs.recipe(tmp_path / "long", "train.steps=20", constant))
    same_run(tmp_path / "short", tmp_path / "long")


def test_drawing_samples_leaves_the_training_as_it_was(quiet_run, tmp_path):
    drawn = trained(tmp_path / "run", "sample.every=5", "sample.count=7", "sample.steps=2")
    same_run(drawn, quiet_run)
    # At every fifth step and at the end: pictures, and the numbers they were made of.
    assert [p.stem for p in sorted((drawn / "samples").glob("step-*.png"))] == [
        f"step-{step:08d}" for step in (5, 10, 12)
    ]
    with np.load(drawn / "samples" / "step-00000012.npz") as file:
        assert file["images"].shape == (7, 1, 8, 8)
        assert file["labels"].tolist() == list(range(7))
    assert (drawn / "samples" / "training.png").exists()


def test_samples_torn_by_a_kill_cannot_be(quiet_run, tmp_path):
    """The file of numbers is replaced, not written over: who had the old one still has it whole."""
    drawn = ("sample.every=12", "sample.count=2", "sample.steps=1")
    folder = trained(tmp_path / "run", *drawn)
    first = folder / "samples" / "step-00000012.npz"
    (tmp_path / "held.npz").hardlink_to(first)
    before = first.read_bytes()
    runs.train_here(runs.recipe(folder, "train.steps=24", *drawn))
    assert (tmp_path / "held.npz").read_bytes() == before
    assert not list((folder / "samples").glob("*.partial"))


class Stopping(runs.Silence):
    """Somebody who sends signals to this process when a step is told."""

    def __init__(self, step: int, *signals: signal.Signals) -> None:
        super().__init__()
        self.step_to_stop, self.signals = step, signals

    def step(self, line: Mapping[str, Any]) -> None:
        if line["step"] == self.step_to_stop:
            for one in self.signals:
                signal.raise_signal(one)


@pytest.mark.parametrize(
    "signals",
    [
        (signal.SIGUSR1,),
        # The terminal and the parent both pass on what was one request.
        (signal.SIGINT, signal.SIGINT),
    ],
    ids=lambda signals: "+".join(one.name for one in signals),
)
def test_asked_to_stop_it_saves_and_the_same_command_goes_on(quiet_run, tmp_path, signals):
    made = runs.recipe(tmp_path / "run", *STEPS)
    handlers = [signal.getsignal(kind) for kind in loop.STOP_SIGNALS]
    who = Stopping(3, *signals)
    outcome = runs.train_here(made, who)
    assert not outcome.finished
    # Step 3 is told during step 4, and what step 5 says of the signal is read in step 6.
    assert list(runs.manifests(tmp_path / "run"))[-1] == outcome.steps == 6
    assert who.heard[-1].startswith("stopped after step 6 of 12; pictures are in ")
    assert [signal.getsignal(kind) for kind in loop.STOP_SIGNALS] == handlers
    trained(tmp_path / "run")
    same_run(tmp_path / "run", quiet_run)


def test_a_second_request_later_is_obeyed_at_once(monkeypatch):
    monkeypatch.setattr(loop, "SAME_REQUEST_SECONDS", -1.0)
    # A shell starts what it puts into the background with this signal ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with stop_requested() as stop:
            signal.raise_signal(signal.SIGINT)
            assert stop.is_set()
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_dead_tracking_server_costs_a_warning(quiet_run, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        closed = probe.getsockname()[1]
    who = runs.Silence()
    changes = ("tracking.mlflow=true", f"tracking.uri=http://127.0.0.1:{closed}")
    assert runs.train_here(runs.recipe(tmp_path / "run", *STEPS, *changes), who).finished
    warnings = [text for text in who.heard if "MLflow does not take" in text]
    assert len(warnings) == 1
    assert "they are kept in" in warnings[0]
    same_run(tmp_path / "run", quiet_run)


@pytest.mark.slow
def test_a_resumed_training_goes_on_in_the_same_mlflow_run(quiet_run, tmp_path):
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    made = runs.recipe(tmp_path / "run", *STEPS, "tracking.mlflow=true", f"tracking.uri={uri}")
    client = MlflowClient(tracking_uri=uri)
    client.search_experiments()  # makes the store, which may take longer than a run of 12 steps waits
    runs.train_here(made, Stopping(6, signal.SIGTERM))
    (experiment,) = client.search_experiments(filter_string="name = 'flowmill'")
    (stopped,) = client.search_runs([experiment.experiment_id])
    assert stopped.info.status == "KILLED"
    assert runs.train_here(made).finished
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_id, run.info.status) == (stopped.info.run_id, "FINISHED")
    told = sorted((m.step, m.value) for m in client.get_metric_history(run.info.run_id, "loss"))
    assert told == [(line["step"], line["loss"]) for line in runs.lines(tmp_path / "run")]
    manifests = client.list_artifacts(run.info.run_id, "checkpoints")
    assert "checkpoints/step-00000012" in {found.path for found in manifests}
    assert run.data.params["optimizer.lr"] == "0.001"
    same_run(tmp_path / "run", quiet_run)


def test_a_learning_rate_without_sense_ends_in_one_sentence(tmp_path):
    changes = ("optimizer.lr=1e+30", "optimizer.warmup=0", "train.max_skipped=3")
    made = runs.recipe(tmp_path / "run", *STEPS, *changes)
    with pytest.raises(UserError, match=r"the gradient was not finite 4 steps in a row; lower"):
        runs.train_here(made)
    skipped = runs.series(tmp_path / "run", "skipped").tolist()
    assert skipped == sorted(skipped)
    assert skipped[-1] == 3, "the step that was one too many is the sentence, not a line"


@dataclass(frozen=True)
class Poisoned:
    """An objective whose loss is infinite for some samples, named by their positions."""

    objective: Objective
    positions: tuple[int, ...]

    @property
    def couple(self) -> Couple | None:
        return self.objective.couple

    def prepare(self, batch: Batch, draw: Draw) -> Prepared:
        prepared = self.objective.prepare(batch, draw)
        bad = torch.isin(batch.position, torch.tensor(self.positions))
        weight = torch.where(bad, torch.inf, prepared.targets["weight"])
        return replace(prepared, targets=prepared.targets | {"weight": weight})

    def loss(self, outputs: torch.Tensor, targets: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.objective.loss(outputs, targets)


class Listening(Quiet):
    def __init__(self) -> None:
        self.lines: list[Mapping[str, Any]] = []

    def step(self, line: Mapping[str, Any]) -> None:
        self.lines.append(line)


def on_two_ranks(ranks: Ranks, folder: str) -> dict[str, Any]:
    """Steps 2 and 5 to 8 (from 0) hold one bad sample, which rank 1 alone reads."""
    bad = tuple(16 * step + 15 for step in (2, 5, 6, 7, 8))
    made = plan(runs.recipe(Path(folder), *STEPS, "train.max_skipped=2"), 2)
    heard = Listening()
    parts = assemble(made, RunFolder(Path(folder)), ranks, heard)
    parts = dataclasses.replace(parts, objective=Poisoned(parts.objective, bad))
    changed = [tensors_changed(parts, step) for step in range(5)]
    error = ""
    try:
        for step in range(5, 12):
            one_step(parts, step, False)
    except UserError as caught:
        error = str(caught)
    parts.loader.close()
    return {
        "changed": changed,
        "skipped": [line["skipped"] for line in heard.lines],
        "losses": [line["loss"] for line in heard.lines],
        "error": error,
        "at": step,
    }


def tensors_changed(parts: Parts, step: int) -> int:
    """How many tensors of a checkpoint another step has changed on this rank."""
    before = {name: _local(t).clone() for name, t in checkpoint_tensors(parts).items()}
    one_step(parts, step, False)
    after = checkpoint_tensors(parts)
    return sum(not torch.equal(_local(after[name]), before[name]) for name in before)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def test_a_sample_that_spoils_the_gradient_is_skipped_by_all_ranks_together(tmp_path):
    first, second = run_ranks(on_two_ranks, 2, folder=str(tmp_path / "run"))
    # The skipped step leaves weights, averages, moments and counts bit-equal; the others do not.
    for seen in (first, second):
        assert seen["changed"][2] == 0
        assert all(seen["changed"][step] > 0 for step in (0, 1, 3, 4))
    # Read one step late, the third bad step in a row is found in step 8, on both at once.
    assert first["error"] == second["error"]
    assert "step 8: the gradient was not finite 3 steps in a row" in first["error"]
    assert first["at"] == second["at"] == 8
    assert first["skipped"] == second["skipped"] == [0, 0, 1, 1, 1, 2, 3]
    assert np.isinf(first["losses"]).tolist() == [n in (2, 5, 6) for n in range(7)]
