"""A wheel of this tree works away from the tree: recipes, shards and licences travel in it."""

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(command: list[str], cwd: Path, environment: dict[str, str] | None = None) -> str:
    result = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=900
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from what git tracks, so that a file that is not committed is missed here."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    tracked = run(["git", "ls-files", "-z"], ROOT).split("\0")
    for name in filter(None, tracked):
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).exists():
            target.write_bytes((ROOT / name).read_bytes())
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    run([*build, "-w", str(folder), str(source)], folder)
    return next(folder.glob("flowmill-*.whl"))


def trains_and_doctors(python: str, cwd: Path, environment: dict[str, str]) -> None:
    where = run([python, "-c", "import trainer; print(trainer.__file__)"], cwd, environment)
    assert str(ROOT) not in where
    flowmill = [python, "-m", "launch"]
    rows = json.loads(run([*flowmill, "doctor", "--json"], cwd, environment))
    assert rows
    train = [*flowmill, "train", "digits8", "train.steps=4", "run.dir=run"]
    run(train, cwd, environment)
    checkpoints = run([*flowmill, "checkpoint", "list", "run", "--json"], cwd, environment)
    assert "4" in checkpoints


def test_unpacked_wheel_trains_the_embedded_recipe(wheel: Path, tmp_path: Path) -> None:
    """With this environment's libraries, but the wheel's own packages first."""
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target"]
    run([*install, str(tmp_path / "site"), str(wheel)], tmp_path)
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site"), "OMP_NUM_THREADS": "1"}
    trains_and_doctors(sys.executable, tmp_path, environment)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_wheel_in_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    """Nothing but the wheel and what it says it depends on."""
    venv.create(tmp_path / "venv", with_pip=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    constraints = str(ROOT / "constraints.txt")
    run([python, "-m", "pip", "install", "-q", "-c", constraints, str(wheel)], tmp_path)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    trains_and_doctors(python, tmp_path, environment)
