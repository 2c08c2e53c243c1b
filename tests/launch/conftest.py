"""A small trained run, copied for every test, and the command line called without a new process."""

import hashlib
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from launch.cli import main

# The smallest run there is: a few steps of a network of some thousand weights.
TINY = (
    "model.width=8", "model.depth=1", "model.heads=1", "train.batch=8", "optimizer.warmup=1",
    "sample.every=0", "sample.steps=1", "data.lanes=4", "data.window=16", "data.threads=1",
    "tracking.mlflow=false",
)  # fmt: skip
SHORT = (*TINY, "train.steps=4", "checkpoint.every=2", "train.log_every=1")


class Ended(NamedTuple):
    """How a command ended, and what it wrote."""

    code: int
    out: str
    err: str


Flowmill = Callable[..., Ended]


@pytest.fixture(autouse=True, scope="session")
def _own_index_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def call(*arguments: str) -> int:
    """`flowmill <arguments>` in this process; its exit code."""
    before = sys.argv
    sys.argv = ["flowmill", *arguments]
    try:
        main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        sys.argv = before
    return 0


@pytest.fixture
def flowmill(capfd: pytest.CaptureFixture[str]) -> Flowmill:
    def run(*arguments: str) -> Ended:
        capfd.readouterr()
        code = call(*arguments)
        return Ended(code, *capfd.readouterr())

    return run


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of four steps with checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert call("train", "digits8", f"run.dir={folder}", *SHORT) == 0
    return folder


@pytest.fixture
def place(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder of a test, with a run of its own in `runs/kept`."""
    shutil.copytree(trained, tmp_path / "runs" / "kept")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def fingerprint(folder: Path) -> dict[str, str]:
    """Every file and folder below a folder, with a hash of its content."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else "folder"
        for path in sorted(folder.rglob("*"))
    }


class Refused:
    """The law of malformed input: a sentence, exit code 2, and nothing harmed."""

    def __init__(self, flowmill: Flowmill, runs: Path) -> None:
        self._flowmill, self._runs = flowmill, runs

    def __call__(self, *arguments: str, says: tuple[str, ...], sentences: int = 1) -> str:
        """What was said; `says` are the file, key or sample it has to name, and the remedy."""
        before = fingerprint(self._runs)
        ended = self._flowmill(*arguments)
        said = [line for line in ended.err.splitlines() if line.startswith("error: ")]
        assert ended.code == 2, ended
        assert len(said) == sentences, ended.err
        for line in said:
            assert re.search(r"[^.][.?]$", line), line
            assert not re.search(r"[.?] [A-Z]", line), f"more than one sentence: {line}"
        for words in says:
            assert words in "\n".join(said), f"{words!r} is not in:\n{said}"
        assert "Traceback" not in ended.err + ended.out
        debug = self._flowmill(*arguments, "--debug")
        assert debug.code == 2
        assert "Traceback" in debug.err
        assert fingerprint(self._runs) == before, "an existing run was touched"
        return "\n".join(said)


@pytest.fixture
def refused(flowmill: Flowmill, place: Path) -> Refused:
    return Refused(flowmill, place / "runs")


def environment(**changes: str) -> dict[str, str]:
    """The environment of a real process: this source tree, one thread."""
    found = os.pathsep.join(path for path in sys.path if path)
    return os.environ | {"PYTHONPATH": found, "OMP_NUM_THREADS": "1"} | changes
