"""What a run tells the world. Rank 0 speaks: to the run folder, to MLflow, to the person watching."""

import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from flows.errors import UserError
from trainer import metrics_log, pictures, tracking
from trainer.asked import asked_names
from trainer.drawing import broken_rows
from trainer.metrics_log import MetricsLog
from trainer.recipe import Recipe
from trainer.run_folder import RunFolder, lock_if_free
from trainer.telemetry import TRACE
from trainer.tracking import Silent

GRID_COLUMNS = 10  # samples of a class in a grid
GRID_ROWS = 12  # steps in the grid over training, evenly spread
CURVE_POINTS = 4000


class Progress(Protocol):
    """Whoever watches: a terminal, a log, or nobody."""

    def note(self, text: str) -> None: ...

    def step(self, line: Mapping[str, Any]) -> None: ...


class Quiet:
    """The report of every rank but the first."""

    def note(self, text: str) -> None: ...

    def resume(self, step: int) -> None: ...

    def step(self, line: Mapping[str, Any]) -> None: ...

    def checkpoint(self, step: int) -> None: ...

    def experts(self, load: Tensor) -> None: ...

    def end(self, step: int, steps: int, skipped: int) -> None: ...

    def samples(self, step: int, images: Tensor, labels: Tensor) -> None: ...


class Curve:
    """The lines of a loss curve: every one at first, thinner as they grow, resumes always."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []
        self._every = 1

    def append(self, line: Mapping[str, Any]) -> None:
        if line["step"] % self._every and not line.get("resumed"):
            return
        kept = ("step", "loss", "grad_norm", "skipped", "resumed")
        self.lines.append({key: line[key] for key in kept if key in line})
        if len(self.lines) > CURVE_POINTS:
            self._every *= 2
            self.lines = [
                old for old in self.lines if old["step"] % self._every == 0 or old.get("resumed")
            ]


class Report(Quiet):
    """The report of rank 0: one line a step, a picture now and then."""

    def __init__(self, run: RunFolder, tracker: Silent, progress: Progress, recipe: Recipe) -> None:
        self._run, self._tracker, self._progress = run, tracker, progress
        self._log = MetricsLog(run.metrics)
        self._routing = MetricsLog(run.routing) if recipe.train.trace_experts else None
        self._recipe = recipe
        self._curve = Curve()
        self._resumed = False
        self.finished = False

    def note(self, text: str) -> None:
        self._progress.note(text)

    def resume(self, step: int) -> None:
        """Steps after `step` will come again: their lines and their samples are dropped."""
        for path in self._run.samples.glob("step-*"):
            if path.stem.removeprefix("step-").isdecimal() and _step_of(path) > step:
                path.unlink()
        self._log.close()
        metrics_log.truncate_after(self._run.metrics, step)
        self._log = MetricsLog(self._run.metrics)
        if self._routing is not None:
            self._routing.close()
        metrics_log.truncate_after(self._run.routing, step)
        if self._routing is not None:
            self._routing = MetricsLog(self._run.routing)
        for line in metrics_log.read(self._run.metrics):
            self._curve.append(line)
        self._resumed = step > 0

    def close(self) -> None:
        self._log.close()
        if self._routing is not None:
            self._routing.close()

    def step(self, line: Mapping[str, Any]) -> None:
        traced = line.get(TRACE)
        line = {key: value for key, value in line.items() if key != TRACE}
        if self._resumed:
            line = {**line, "resumed": True}
            self._resumed = False
        with _room(self._run):
            self._log.append(line)
            if self._routing is not None and traced is not None:
                self._routing.append({"step": line["step"], **traced})
            self._tracker.metrics(int(line["step"]), line)
        self._curve.append(line)
        self._progress.step(line)

    def _images(self, path: Path) -> Tensor | None:
        found = _read_images(path)
        if found is None:
            self.note(f"{path} is damaged and left out of the grid over training")
        return found

    def checkpoint(self, step: int) -> None:
        """A checkpoint was committed: MLflow gets its manifest, the person a line and the loss curve."""
        folder = f"step-{step:08d}"
        manifest = self._run.checkpoints / folder / "manifest.json"
        self._tracker.artifact(manifest, f"checkpoints/{folder}")
        with _room(self._run):
            pictures.loss_curve(self._curve.lines, self._run.loss_curve, self._recipe.name)
        self._tracker.artifact(self._run.loss_curve)
        self.note(f"checkpoint at step {step}")

    def experts(self, load: Tensor) -> None:
        """How much each expert had to do of late, (layers, intervals of time, experts): a picture."""
        with _room(self._run):
            pictures.expert_map(load.numpy(), self._run.experts, self._recipe.name)
        self._tracker.artifact(self._run.experts)

    def end(self, step: int, steps: int, skipped: int) -> None:
        """The loop returned after `step` of `steps`; fewer where it was asked to stop.

        skipped: since the run began
        """
        self.finished = step >= steps
        left_out = f", {skipped} of them skipped (the gradient was not finite)" if skipped else ""
        self.note(
            f"{'done' if self.finished else 'stopped'} after step {step} of {steps}{left_out}; pictures are "
            f"in {self._run.samples}, checkpoints in {self._run.checkpoints}"
        )

    def samples(self, step: int, images: Tensor, labels: Tensor) -> None:
        """A grid of this step, kept as numbers too, so that the grid over training can grow."""
        with _room(self._run):
            self._samples(step, images, labels)

    def _samples(self, step: int, images: Tensor, labels: Tensor) -> None:
        if broken := broken_rows(images):
            self.note(
                f"{len(broken)} of {len(images)} samples of step {step} are not finite: black"
            )
        path = self._run.samples / f"step-{step:08d}"
        # Replaced at once: a torn file would end every later grid over training, and the run with it.
        partial = path.with_suffix(".partial")
        with partial.open("wb") as file:
            np.savez_compressed(
                file, images=pictures.to_bytes(images).numpy(), labels=labels.numpy()
            )
        partial.replace(path.with_suffix(".npz"))
        picture = path.with_suffix(".png")
        pictures.class_grid(images, labels, asked_names(self._recipe), picture, GRID_COLUMNS)
        files = sorted(self._run.samples.glob("step-*.npz"))
        every = -(-len(files) // GRID_ROWS)
        shown = files[::-1][::every][::-1]
        rows = [
            (_step_of(file), held) for file in shown if (held := self._images(file)) is not None
        ]
        over_time = self._run.samples / "training.png"
        pictures.training_grids(rows, over_time, 2 * GRID_COLUMNS)
        for each in (picture, over_time):
            self._tracker.artifact(each, "samples")


def open_tracker(
    run: RunFolder, recipe: Recipe, warn: Callable[[str], None], *, begin: bool
) -> Silent:
    """MLflow for this run, or nobody if the recipe wants none; `begin`: it is running from now on."""
    section = recipe.tracking
    if not section.mlflow:
        return Silent()
    return tracking.start(
        run.root,
        store_address(run, recipe),
        section.experiment,
        recipe.name,
        begin=begin,
        warn=warn,
    )


def store_address(run: RunFolder, recipe: Recipe) -> str:
    """Where MLflow keeps this run."""
    return recipe.tracking.uri or f"sqlite:///{run.database}"


def add_artifact(
    run: RunFolder, recipe: Recipe, path: Path, folder: str, note: Callable[[str], None]
) -> None:
    """Add a file to the MLflow run of a training that has ended, whose status stays as it is.

    While a training goes on here, the records that wait for MLflow are its own: a note says so.
    """
    if not recipe.tracking.mlflow:
        return
    with lock_if_free(run) as free:
        if not free:
            note(f"{path} was not sent to MLflow, for a training goes on in {run.root}")
            return
        tracker = open_tracker(run, recipe, note, begin=False)
        tracker.artifact(path, folder)
        tracker.close(None)


@contextmanager
def _room(run: RunFolder) -> Iterator[None]:
    """Raises UserError where a full disk, or a folder that went away, takes no more."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"run.dir = {run.root} takes no more files ({error.strerror or error}); free some room, and the "
            "same command goes on from the newest checkpoint there is."
        ) from error


def _step_of(path: Path) -> int:
    return int(path.stem.removeprefix("step-"))


def _read_images(path: Path) -> Tensor | None:
    """The images of a step as they were kept; None where the file is damaged."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return torch.from_numpy(file["images"]).float() / 127.5 - 1
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error):
        return None
