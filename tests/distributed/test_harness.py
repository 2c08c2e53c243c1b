"""What a test sees of its ranks: results in order, a failing rank's traceback, no process left."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from parallel.processes import Ranks
from tests.distributed.harness import RankFailed, run_ranks


def total(ranks: Ranks, offset: int) -> dict[str, object]:
    value = torch.tensor([float(ranks.rank + offset)])
    dist.all_reduce(value)
    return {"rank": ranks.rank, "total": value}


def fail_on_one(ranks: Ranks, folder: str) -> None:
    """Rank 0 hangs with a child of its own; rank 1 then raises."""
    if ranks.rank == 0:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        Path(folder, "pids").write_text(f"{os.getpid()} {child.pid}")
        dist.barrier()
        time.sleep(600)
    dist.barrier()
    raise ValueError("rank one does not like this")


def vanish(ranks: Ranks) -> None:
    os._exit(7)


def linger(ranks: Ranks) -> None:
    time.sleep(600)


def surroundings(ranks: Ranks) -> dict[str, object]:
    variables = {name: os.environ.get(name) for name in ("SET_LATELY", "HOME")}
    return variables | {"torch": torch.initial_seed(), "numpy": np.random.randint(1 << 31)}


def crash(ranks: Ranks, folder: str, times: int) -> int:
    """The last rank aborts so many times, and others hear of it by a connection that breaks."""
    runs = Path(folder, "runs")
    dist.barrier()
    if ranks.rank == ranks.world_size - 1:
        before = int(runs.read_text()) if runs.exists() else 0
        runs.write_text(str(before + 1))
        if before < times:
            os.abort()
    dist.barrier()
    return ranks.rank


def test_ranks_that_crash_are_started_once_more_and_say_so(tmp_path):
    with pytest.warns(
        UserWarning, match=r"rank 1 crashed \(-6\): its ranks were started once more"
    ):
        assert run_ranks(crash, 2, folder=str(tmp_path), times=1) == [0, 1]
    (tmp_path / "runs").unlink()
    once_more, again = (
        pytest.warns(UserWarning, match="once more"),
        pytest.raises(RankFailed, match="crashed"),
    )
    with once_more, again:
        run_ranks(crash, 1, folder=str(tmp_path), times=2)
    assert (tmp_path / "runs").read_text() == "2"


def test_results_come_in_rank_order():
    results = run_ranks(total, 2, offset=10)
    assert [result["rank"] for result in results] == [0, 1]
    assert [result["total"].item() for result in results] == [21, 21]


def test_a_failing_rank_is_shown_and_the_others_are_killed_with_their_children(tmp_path):
    with pytest.raises(RankFailed, match=r"(?s)rank 1 failed.*ValueError: rank one does not like"):
        run_ranks(fail_on_one, 2, folder=str(tmp_path))
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    deadline = time.monotonic() + 5
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(alive(pid) for pid in pids)


def test_a_rank_that_dies_is_named():
    with pytest.raises(RankFailed, match="rank 0 died with exit code 7"):
        run_ranks(vanish, 1)


def test_ranks_that_do_not_end_in_time_are_named():
    with pytest.raises(RankFailed, match=r"ranks \[0\] did not end in time"):
        run_ranks(linger, 1, timeout=0.5)


def test_ranks_have_variables_and_randomness_as_fresh_processes_do(monkeypatch):
    before = run_ranks(surroundings, 2)  # by now there is the server that ranks are forked from
    assert all(one["HOME"] and one["SET_LATELY"] is None for one in before)
    monkeypatch.delenv("HOME")
    monkeypatch.setenv("SET_LATELY", "set")
    after = run_ranks(surroundings, 2)
    assert all(one["HOME"] is None and one["SET_LATELY"] == "set" for one in after)
    for name in ("torch", "numpy"):
        assert len({one[name] for one in before + after}) == 4, f"{name} draws the same on ranks"


def alive(pid: int) -> bool:
    """Running: not gone, and not merely unburied by a parent that is no more."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"
