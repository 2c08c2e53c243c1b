"""The folder of a run: where everything lies, who may write, and what may change on resume."""

import errno
import fcntl
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from flows.errors import UserError
from trainer.recipe import Recipe, build_recipe
from trainer.refusals import shown
from trainer.yaml_text import read_yaml

# What decides the science of a run, by key or by section: a resume that changed one of these would be
# another run. Where the shards lie does not: the checkpoint knows which samples they hold.
FIXED = (
    "seed", "data.keep", "data.image_size", "data.channels", "data.classes", "data.augment",
    "data.latents", "data.lanes", "data.window", "model", "objective", "train.batch", "train.ema",
)  # fmt: skip


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run."""

    root: Path

    @property
    def recipe(self) -> Path:
        return self.root / "recipe.yaml"

    @property
    def deepspeed(self) -> Path:
        """What DeepSpeed was given, where it moved the model."""
        return self.root / "deepspeed.json"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def quarantine(self) -> Path:
        """Bad samples and shards, a line each."""
        return self.root / "quarantine.jsonl"

    @property
    def shards(self) -> Path:
        """The shards the run began with."""
        return self.root / "shards.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def samples(self) -> Path:
        return self.root / "samples"

    @property
    def loss_curve(self) -> Path:
        return self.root / "loss.png"

    @property
    def experts(self) -> Path:
        """The picture of experts by noise level, of networks that have experts."""
        return self.root / "experts.png"

    @property
    def routing(self) -> Path:
        """Which experts tokens went to from which, where a recipe asks for it."""
        return self.root / "routing.jsonl"

    @property
    def evaluation(self) -> Path:
        return self.root / "evaluation.json"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def database(self) -> Path:
        """MLflow's store when the recipe names none: one for all runs beside each other."""
        return self.root.resolve().parent / "mlflow.db"


def open_run(folder: str) -> tuple[RunFolder, Recipe]:
    """A run that exists, with its resolved recipe. Raises UserError if there is none."""
    run = RunFolder(Path(folder))
    if not run.recipe.is_file():
        raise UserError(
            f"{folder} is not a run folder (it has no recipe.yaml); give the run.dir of a training."
        )
    data = read_yaml(run.recipe, str(run.recipe))
    if not isinstance(data, dict):
        raise UserError(f"{run.recipe} is empty; restore it, or begin anew in another run.dir.")
    return run, build_recipe(data, str(run.recipe))


def check_resume(run: RunFolder, recipe: Recipe) -> list[str]:
    """What differs from the recipe this folder was begun with, as `key: old -> new` lines.

    Raises UserError if a key that decides the science differs; the folder is left untouched.
    """
    if not run.recipe.is_file():
        return []
    old, new = _flat(open_run(str(run.root))[1]), _flat(recipe)
    changed = [key for key in new if old.get(key) != new[key]]
    fixed = [key for key in changed if _is_fixed(key)]
    if fixed and run.checkpoints.is_dir() and any(run.checkpoints.iterdir()):
        raise _another_run(run, fixed, old, new)
    return [
        f"{key}: {shown(old.get(key))} -> {shown(new[key])}" for key in changed if key != "run.dir"
    ]


def science(recipe: Recipe) -> dict[str, Any]:
    """Every key that decides the science of a run, for its checkpoints."""
    return {key: value for key, value in _flat(recipe).items() if _is_fixed(key)}


def check_science(run: RunFolder, saved: Mapping[str, Any], recipe: Recipe) -> None:
    """Raises UserError if `recipe` would make another run of a checkpoint with the science `saved`."""
    new = science(recipe)
    if changed := [key for key in new if saved.get(key) != new[key]]:
        raise _another_run(run, changed, saved, new)


def check_length(run: RunFolder, step: int, recipe: Recipe) -> None:
    """Raises UserError if the run is longer already, at `step`, than the recipe wants it."""
    if step > recipe.train.steps:
        raise UserError(
            f"run.dir = {run.root} has a checkpoint of step {step}, beyond train.steps = "
            f"{recipe.train.steps}; raise train.steps, or choose another run.dir."
        )


def check_place(run: RunFolder) -> None:
    """Raises UserError if the run's folder could not be written, or another process trains in it."""
    check_writable(run)
    with lock_if_free(run) as free:
        if not free:
            raise _busy(run)


@contextmanager
def lock_if_free(run: RunFolder) -> Iterator[bool]:
    """Whether nobody trains in a run that exists, or does not yet; while held, nobody begins to."""
    # Open for writing: some network file systems give no exclusive lock without.
    try:
        lock = (run.root / ".lock").open("r+")
    except FileNotFoundError:
        yield True
        return
    except OSError as error:
        raise _unwritable(run, error) from None
    with lock:
        yield _hold(lock, run)


def check_writable(run: RunFolder) -> None:
    """Raises UserError if the run's folder cannot be written, or could not be made."""
    root = run.root.resolve()
    try:
        existing = next(path for path in (root, *root.parents) if path.exists())
    except OSError as error:
        raise _unwritable(run, error) from None
    if not existing.is_dir():
        raise UserError(
            f"run.dir = {run.root} cannot be a folder, for {existing} is a file; choose another."
        )
    if not os.access(existing, os.W_OK | os.X_OK):
        raise _unwritable(run, PermissionError(errno.EACCES, os.strerror(errno.EACCES)))


@contextmanager
def locked(run: RunFolder) -> Iterator[None]:
    """The one process that writes this run: makes the folders and holds the lock.

    Raises UserError if another process is training here, or if the folder cannot be written.
    """
    try:
        for folder in (run.root, run.checkpoints, run.samples, run.logs):
            folder.mkdir(parents=True, exist_ok=True)
        lock = (run.root / ".lock").open("w")
    except OSError as error:
        raise _unwritable(run, error) from None
    with lock:
        if not _hold(lock, run):
            raise _busy(run)
        yield


def _hold(lock: IO[str], run: RunFolder) -> bool:
    """Lock an open file until it is closed, or this process ends in whatever way; False if it is taken."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise _unwritable(run, error) from None
    return True


def _busy(run: RunFolder) -> UserError:
    return UserError(
        f"Another process is training in run.dir = {run.root}; wait for its end, or choose "
        "another run.dir."
    )


def _another_run(
    run: RunFolder, keys: list[str], old: Mapping[str, Any], new: Mapping[str, Any]
) -> UserError:
    lines = ", ".join(
        f"{key} was {shown(old.get(key))} and is now {shown(new[key])}" for key in keys
    )
    return UserError(
        f"run.dir = {run.root} holds another run ({lines}); give back the old value to go on "
        "with that run, or choose another run.dir."
    )


def _is_fixed(key: str) -> bool:
    return any(key == fixed or key.startswith(f"{fixed}.") for fixed in FIXED)


def _unwritable(run: RunFolder, error: OSError) -> UserError:
    return UserError(
        f"run.dir = {run.root} cannot be written ({error.strerror}); choose another folder, or "
        "change its permissions."
    )


def _flat(recipe: Recipe) -> dict[str, Any]:
    """Every leaf of a recipe by its dotted name."""

    def walk(value: Any, name: str) -> Iterator[tuple[str, Any]]:
        if isinstance(value, dict):
            for key, inner in value.items():
                yield from walk(inner, f"{name}.{key}" if name else key)
        else:
            yield name, value

    return dict(walk(recipe.model_dump(mode="json"), ""))
