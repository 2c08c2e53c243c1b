"""A process finds its place from what the launcher told it, or is told what is missing."""

import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from flows.errors import UserError
from parallel import processes

PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def environment(monkeypatch):
    for name in PLACE:
        monkeypatch.delenv(name, raising=False)
    yield monkeypatch
    processes.stop()


def test_a_process_that_was_told_nothing_is_alone_and_has_a_group(environment):
    ranks = processes.start("cpu", 30)
    assert (ranks.rank, ranks.world_size, ranks.local_rank) == (0, 1, 0)
    assert ranks.device == torch.device("cpu")
    assert ranks.is_first
    total = torch.ones(3)
    dist.all_reduce(total)
    assert total.tolist() == [1, 1, 1]
    processes.stop()
    assert not dist.is_initialized()
    processes.stop()


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_ADDR is not set; start the ranks by"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two', which is not a whole number"),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}, "MASTER_PORT is None"),
        (
            {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"},
            "Rank 1 of 2 did not meet the others at 127.0.0.1:1 .*; check",
        ),
        ({"RANK": "-1"}, "RANK is '-1'"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK is 2 but WORLD_SIZE is 2"),
    ],
)
def test_an_incomplete_place_is_refused(environment, values, sentence):
    for name, value in values.items():
        environment.setenv(name, value)
    with pytest.raises(UserError, match=sentence):
        processes.start("cpu", 1)
    assert not dist.is_initialized()


def test_a_missing_accelerator_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert processes.choose_device("auto", 0) == torch.device("cpu")
    with pytest.raises(UserError, match=r"the machine has 0; start at most 0 ranks"):
        processes.choose_device("cuda", 0)


@pytest.mark.gpu
def test_each_rank_drives_its_own_accelerator():
    assert processes.choose_device("auto", 0) == torch.device("cuda", 0)
    with pytest.raises(UserError, match="has no CUDA device of its own"):
        processes.choose_device("auto", torch.cuda.device_count())


FAULTS = """
import resource, torch
from parallel.processes import keep_freed_memory

def faults_of_steps():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(4 * 2**20)  # 16 MiB, of 4,096 pages
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.set_num_threads(1)
before = faults_of_steps()
keep_freed_memory()
torch.ones(4 * 2**20)
print(before, faults_of_steps())
"""


def test_memory_of_tensors_is_taken_again_and_not_asked_for_anew() -> None:
    """In a process of its own, whose memory nobody else takes."""
    ran = subprocess.run(
        [sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True, timeout=60
    )
    before, kept = map(int, ran.stdout.split())
    assert kept * 10 < before  # how many pages there are, the system says
