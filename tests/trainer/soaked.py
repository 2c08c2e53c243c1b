"""Training on real ranks that are killed, and the samples that each of them took, step by step."""

import json
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from data_pipeline.loader import Loader
from flows.batch import Batch
from trainer.recipe import build_recipe
from trainer.running import run_training

# A rank forked from a process that has imported what every rank imports starts at once.
RANKS = multiprocessing.get_context("forkserver")
RANKS.set_forkserver_preload(["tests.trainer.soaked", "torch._dynamo", "matplotlib.figure"])
GRACE_SECONDS = 20.0


@dataclass(frozen=True)
class Taken:
    """What one rank of one attempt took of one global batch."""

    attempt: int
    world_size: int
    rank: int
    step: int
    keys: list[str]


class Watcher:
    """Nobody looks; the samples are what counts."""

    def note(self, text: str) -> None: ...

    def step(self, line: Mapping[str, Any]) -> None: ...


def train_with_kills(
    recipe: dict[str, Any], worlds: Sequence[int], kill_after: Sequence[int], logs: Path
) -> list[Taken]:
    """Attempt i trains on `worlds[i]` ranks; a random one is killed once `kill_after[i]` steps are
    logged.

    The attempt after the last kill has to end by itself.
    """
    logs.mkdir()
    chance = random.Random(0)
    for attempt, world_size in enumerate(worlds):
        victim = chance.randrange(world_size) if attempt < len(kill_after) else None
        store = dist.TCPStore("127.0.0.1", 0, None, is_master=True, wait_for_workers=False)
        ranks = [
            _start(recipe, rank, world_size, store.port, attempt, logs)
            for rank in range(world_size)
        ]
        try:
            if victim is not None:
                _wait_for_steps(_log(logs, attempt, victim), kill_after[attempt], ranks)
                ranks[victim].kill()
            _wait_for_end(ranks, killed=victim is not None)
        finally:
            for process in ranks:
                process.kill()
                process.join()
    return _read(logs, worlds)


def _start(
    recipe: dict[str, Any], rank: int, world_size: int, port: int, attempt: int, logs: Path
) -> BaseProcess:
    environment = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "XDG_CACHE_HOME": os.environ["XDG_CACHE_HOME"],
    }
    arguments = (recipe, world_size, environment, str(_log(logs, attempt, rank)))
    process = RANKS.Process(target=_rank, args=arguments, daemon=True)
    process.start()
    return process


def _rank(recipe: dict[str, Any], world_size: int, environment: dict[str, str], log: str) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    take = Loader.__next__
    with Path(log).open("w") as lines:

        def logged(loader: Loader) -> Batch:
            step = loader.position // loader.share.batch
            batch = take(loader)
            json.dump([step, loader.stream.keys(batch.position)], lines)
            lines.write("\n")
            lines.flush()
            return batch

        Loader.__next__ = logged  # type: ignore[method-assign]
        run_training(build_recipe(recipe, "soak"), world_size, Watcher())


def _wait_for_steps(log: Path, steps: int, ranks: Sequence[BaseProcess]) -> None:
    deadline = time.monotonic() + 100
    while not log.exists() or log.read_text().count("\n") < steps:
        assert all(process.exitcode is None for process in ranks), "a rank ended before its time"
        assert time.monotonic() < deadline, f"{log} did not come to {steps} steps"
        time.sleep(0.01)


def _wait_for_end(ranks: Sequence[BaseProcess], killed: bool) -> None:
    """Ranks that lost one of them give up by themselves; the others end well."""
    deadline = time.monotonic() + (GRACE_SECONDS if killed else 200)
    for process in ranks:
        process.join(max(0.0, deadline - time.monotonic()))
    codes = [process.exitcode for process in ranks]
    if killed:
        assert -signal.SIGKILL in codes, codes
        assert None not in codes, f"a rank stayed when another was killed: {codes}"
    else:
        assert codes == [0] * len(ranks), codes


def _log(logs: Path, attempt: int, rank: int) -> Path:
    return logs / f"{attempt}-{rank}.jsonl"


def _read(logs: Path, worlds: Sequence[int]) -> list[Taken]:
    taken = []
    for attempt, world_size in enumerate(worlds):
        for rank in range(world_size):
            for line in _log(logs, attempt, rank).read_text().splitlines(keepends=True):
                # The last line of a killed rank may be cut.
                if line.endswith("\n"):
                    step, keys = json.loads(line)
                    taken.append(Taken(attempt, world_size, rank, step, keys))
    return taken
