"""Whole trainings for tests: real `flowmill train` processes, the same recipe in this process, and
how far apart two runs lie.

The recipe is the shipped digits8 made smaller. Processes see no GPU, so that a machine with one
does as a machine without, and have a session of their own, so that all of a run can be killed.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor

from parallel import processes
from parallel.processes import Ranks
from trainer import metrics_log
from trainer.assembly import Plan
from trainer.checkpoints.commit import committed
from trainer.checkpoints.manifest import Manifest, read_manifest
from trainer.checkpoints.shards import TORCH_DTYPES
from trainer.checkpoints.store import load
from trainer.recipe import Recipe, load_recipe
from trainer.run_folder import RunFolder
from trainer.running import Outcome, run_training, train_rank

RECIPE = "digits8"
TINY = [
    "model.width=32",
    "model.depth=2",
    "data.window=16",
    "train.batch=16",
    # Early steps average faster than either asks, so only a short memory tells the two apart.
    "train.ema=[0.5, 0.99]",
    "optimizer.lr=0.001",
    "optimizer.warmup=5",
    "optimizer.weight_decay=0.01",
    "sample.every=0",
    "tracking.mlflow=false",
]
# A shared machine may be slow; nothing that works comes near this.
PATIENCE_SECONDS = 240.0


def recipe(folder: Path, *changes: str) -> Recipe:
    return load_recipe(RECIPE, [*TINY, f"run.dir={folder}", *changes])


def start(folder: Path, *changes: str, ranks: int = 1) -> subprocess.Popen[bytes]:
    """`flowmill train` of the recipe into `folder`; what it says goes to `said(folder)`."""
    overrides = [*TINY, f"run.dir={folder}", *changes]
    command = [sys.executable, "-m", "launch", "train", RECIPE, *overrides]
    if ranks > 1:
        command += ["--ranks", str(ranks)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with _spoken(folder).open("ab") as output:
        return subprocess.Popen(
            command, env=environment, stdout=output, stderr=output, start_new_session=True
        )


def said(folder: Path) -> str:
    """All that the processes of a run wrote for people."""
    return _spoken(folder).read_text(errors="replace")


@contextmanager
def training(folder: Path, *changes: str, ranks: int = 1) -> Iterator[subprocess.Popen[bytes]]:
    """A run in the background; nothing of it is left at the end, whatever happens."""
    process = start(folder, *changes, ranks=ranks)
    try:
        yield process
    finally:
        kill(process)


def train(folder: Path, *changes: str, ranks: int = 1) -> Path:
    """Train to the end; the folder."""
    with training(folder, *changes, ranks=ranks) as process:
        code = process.wait(PATIENCE_SECONDS)
    assert code == 0, f"exit code {code}:\n{said(folder)}"
    return folder


def kill(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL a run and all its ranks; returns when none is left."""
    family = members(process)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    wait_until(lambda: not any(alive(one) for one in family), process=None)


def members(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The process and its ranks, rank 0 first after it."""
    try:
        parent = psutil.Process(process.pid)
        return [parent, *sorted(parent.children(recursive=True), key=lambda one: one.pid)]
    except psutil.NoSuchProcess:
        return []


def alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_until(
    condition: Callable[[], Any],
    *,
    process: subprocess.Popen[bytes] | None,
    seconds: float = PATIENCE_SECONDS,
) -> None:
    """Return as soon as `condition` holds, or, where a process is given, when that has ended."""
    deadline = time.monotonic() + seconds
    while not condition():
        if process is not None and process.poll() is not None:
            return
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.001)


def train_here(made: Recipe, progress: "Silence | None" = None) -> Outcome:
    """Train within this process, as one rank on the CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "choose_device", lambda *_: torch.device("cpu"))
        return run_training(made, 1, progress or Silence())


def train_as_rank(made: Plan, ranks: Ranks) -> None:
    """Train to the end within this process, as one of the ranks of a group that is there."""
    folder = RunFolder(Path(made.recipe.run.dir))
    with ExitStack() as stack:
        assert train_rank(made, folder, ranks, Silence(), [], stack).finished


class Silence:
    """A person who listens and says nothing."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def note(self, text: str) -> None:
        self.heard.append(text)

    def step(self, line: Mapping[str, Any]) -> None: ...


def lines(folder: Path) -> list[dict[str, Any]]:
    return metrics_log.read(folder / "metrics.jsonl")


def last_step(folder: Path) -> int:
    """The last step logged, 0 if none is."""
    logged = folder / "metrics.jsonl"
    whole = logged.read_bytes().rpartition(b"\n")[0] if logged.exists() else b""
    return int(metrics_log.decode(whole.rpartition(b"\n")[2].decode())["step"]) if whole else 0


def series(folder: Path, key: str) -> Tensor:
    """(steps,) float64 values of a metric; float64 holds every float32."""
    return torch.tensor([line[key] for line in lines(folder)], dtype=torch.float64)


def manifests(folder: Path) -> dict[int, Manifest]:
    """Step -> manifest of every committed checkpoint."""
    return {step: read_manifest(path) for step, path in committed(folder / "checkpoints")}


def tensors(folder: Path) -> dict[str, Tensor]:
    """Everything in the newest checkpoint: `model.*`, `ema.*`, `optimizer.*`."""
    path = committed(folder / "checkpoints")[-1][1]
    found = {
        name: torch.empty(entry.shape, dtype=TORCH_DTYPES[entry.dtype])
        for name, entry in read_manifest(path).tensors.items()
    }
    load(path, found)
    return found


def relative(ours: Tensor, theirs: Tensor) -> float:
    """Largest relative difference of two series."""
    assert ours.shape == theirs.shape
    return float(((ours - theirs).abs() / theirs.abs()).max())


def distance(ours: dict[str, Tensor], theirs: dict[str, Tensor], part: str) -> float:
    """Relative L2 distance of all tensors whose names begin with `part`, together."""
    assert ours.keys() == theirs.keys()
    names = [name for name in sorted(theirs) if name.startswith(part)]
    assert names
    a, b = (torch.cat([held[n].flatten().double() for n in names]) for held in (ours, theirs))
    return float((a - b).norm() / b.norm())


def different(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> list[str]:
    """Names of the tensors that are not equal bit by bit."""
    assert ours.keys() == theirs.keys()
    return [name for name in theirs if not torch.equal(ours[name], theirs[name])]


def _spoken(folder: Path) -> Path:
    return folder.with_name(folder.name + ".output")
