"""What a person at a terminal meets: real processes, one rank or two."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from data_pipeline.stream import open_stream
from launch.ranks import STOPPED
from tests.data_pipeline.conftest import grey, sample, write_tar
from tests.launch.conftest import SHORT, TINY, environment, fingerprint


def start(
    *words: str, module: str = "launch", before: tuple[str, ...] = (), **variables: str
) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *before, "-m", module, *words],
        env=environment(**variables), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=240)
    finally:
        process.kill()
    return process.returncode, out, err


def test_a_wrong_recipe_ends_the_process_with_a_sentence(place: Path) -> None:
    before = fingerprint(place)
    code, out, err = finish(start("train", "digits8", "train.stepz=3"))
    assert (code, out) == (2, "")
    assert err == (
        "error: command line: train.stepz is not a key of a recipe; did you mean train.steps?\n"
    )
    assert fingerprint(place) == before


def test_a_bad_sample_of_another_rank_reaches_the_terminal(place: Path) -> None:
    good = {f"{n:04d}": sample(f"{n:04d}", n, n % 10) for n in range(16)}
    shard = write_tar(place / "bad.tar", [member for pair in good.values() for member in pair])
    stream = open_stream([(shard, 1.0)], keep={}, classes=10, seed=0, lanes=4, window=16)
    # Of a batch of 16, the second rank reads positions 8 to 15.
    key = stream.keys(torch.tensor([12]))[0].rpartition("/")[2]
    stream.close()
    good[key][0] = (f"{key}.png", grey(1)[:50])
    write_tar(place / "bad.tar", [member for pair in good.values() for member in pair])
    before = fingerprint(place / "runs")
    command = ("train", "digits8", f"data.train={shard}", "run.dir=fresh", *SHORT)
    code, _, err = finish(start(*command, "train.batch=16", "--ranks", "2"))
    assert code == 2
    assert "Traceback" not in err
    said = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1, err
    assert f"bad.tar: sample {key}: " in said[0]
    assert re.search(r"rank 1 .*fresh/logs/rank-1\.log", err), err
    assert fingerprint(place / "runs") == before


def test_progress_that_nobody_reads_any_more_ends_no_training(place: Path) -> None:
    command = ("train", "digits8", "run.dir=fresh", *SHORT, "train.steps=6")
    process = start(*command)
    assert process.stderr is not None
    process.stderr.close()
    process.stderr = None
    code, _, _ = finish(process)
    assert code == 0
    assert len((place / "fresh" / "metrics.jsonl").read_text().splitlines()) == 6


def test_stopped_is_an_exit_code_of_its_own(place: Path) -> None:
    for ranks in ("1", "2"):
        folder = f"fresh{ranks}"
        process = start(
            "train", "digits8", f"run.dir={folder}", *TINY, "train.steps=100000", "--ranks", ranks
        )
        log = place / folder / "metrics.jsonl"
        while not (log.exists() and log.stat().st_size) and process.poll() is None:
            time.sleep(0.05)
        process.terminate()
        code, _, err = finish(process)
        assert code == STOPPED == 75, err
        assert "stopped after step " in err
        assert "error" not in err


@pytest.mark.slow
def test_a_killed_rank_is_named(place: Path) -> None:
    command = ("train", "digits8", "run.dir=fresh", *TINY, "train.steps=100000", "--ranks", "2")
    process = start(*command)
    log = place / "fresh" / "metrics.jsonl"
    while not (log.exists() and log.stat().st_size) and process.poll() is None:
        time.sleep(0.2)
    # The ranks are the parent's only children; the younger is rank 1.
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[1]), signal.SIGKILL)
    code, _, err = finish(process)
    assert code == 128 + signal.SIGKILL
    assert "rank 1 was ended by signal SIGKILL" in err
    assert "Traceback" not in err


@pytest.mark.slow
def test_ranks_of_torchrun_are_joined(place: Path) -> None:
    command = (
        "--nproc-per-node", "2", "--master-port", "29611", "-m", "launch",
        "train", "digits8", "run.dir=fresh", *SHORT,
    )  # fmt: skip
    code, _, err = finish(start(*command, module="torch.distributed.run"))
    assert code == 0, err
    assert err.count("done after step 4 of 4") == 1
    assert "step 4/4" in err
