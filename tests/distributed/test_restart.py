"""Ranks that an elastic launcher starts again find each other at once."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
@pytest.mark.parametrize("rendezvous", ["static", "c10d"])
def test_the_first_restart_joins(tmp_path, rendezvous):
    """The launcher's store still holds the dead ranks' addresses; they must not be called."""
    root = Path(__file__).parents[2]
    how = ["--standalone"] if rendezvous == "c10d" else ["--master-port", str(free_port())]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    worker = ["-m", "tests.distributed.restarted", str(tmp_path)]
    done = subprocess.run(
        [*launcher, "--max-restarts", "1", *how, *worker],
        cwd=root,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ["1 2", "1 2"]
