"""A run that was killed and started again is the run that was never killed.

Real processes die in every way: all of them at a random step, in the middle of writing a
checkpoint, one rank alone, the parent alone, and by a polite signal. The same command goes on, and
what it leaves is compared with an uninterrupted run: bit by bit on the same layout, to rounding
where the number of ranks has changed.
"""

import os
import random
import re
import signal
import subprocess
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.trainer import runs
from trainer.assembly import plan
from trainer.run_folder import open_run
from trainer.running import open_loader
from trainer.trained import sample_checkpoint

pytestmark = pytest.mark.timeout(900)

EXACT = 1e-5
SAMPLES = 297
# Three epochs of a small data set; an epoch ends in the middle of a batch.
DATA = ("data.train=embedded:digits8/heldout-000000.tar", "data.augment={crop: random, flip: 0.5}")
CHANGES = (*DATA, "checkpoint.every=7")
# One rank is so fast that a kill needs room to come in time; here old checkpoints are deleted.
ALONE = (*CHANGES, "train.steps=200", "checkpoint.keep=2")
SHARDED = (*CHANGES, "train.steps=60", "checkpoint.keep=1000")
ATTEMPTS = 10
dice = random.Random(20)


@dataclass
class Death:
    """How one process of a run ended.

    code: of the parent, negative for a signal
    logged: the last step in the log
    seconds: from the blow to the end of the last process
    torn: whether a half-written checkpoint lies there
    """

    code: int
    logged: int
    seconds: float = 0.0
    torn: bool = False


@dataclass
class Story:
    """A run that died several times and came to its end."""

    folder: Path
    deaths: list[Death] = field(default_factory=list)

    def dies(
        self,
        step: int,
        *changes: str,
        ranks: int = 1,
        blow: signal.Signals = signal.SIGKILL,
        member: int | None = None,
    ) -> None:
        """Start or go on; after `step` the signal hits all, or one member (0: parent, 1: rank 0)."""
        # Lines from before do not count: this process has to write one more.
        step = max(step, runs.last_step(self.folder) + 1)
        with runs.training(self.folder, *changes, ranks=ranks) as process:
            runs.wait_until(lambda: runs.last_step(self.folder) >= step, process=process)
            assert process.poll() is None, f"ended by itself:\n{runs.said(self.folder)}"
            family = runs.members(process)
            began = time.monotonic()
            if member is None:
                os.killpg(process.pid, blow)
            else:
                family[member].send_signal(blow)
            runs.wait_until(lambda: not any(map(runs.alive, family)), process=None)
            self._died(process, began)

    def dies_writing(self, *changes: str, ranks: int = 1, later: float = 0.0) -> None:
        """Start or go on until a kill hits between the first and the last byte of a checkpoint.

        later: up to so many seconds after the first byte
        """
        for _ in range(ATTEMPTS):
            old = torn(self.folder)
            with runs.training(self.folder, *changes, ranks=ranks) as process:
                runs.wait_until(lambda old=old: torn(self.folder) - old, process=process)
                time.sleep(dice.uniform(0.0, later))
                began = time.monotonic()
                runs.kill(process)
                self._died(process, began)
            if torn(self.folder) - old:
                return
        raise AssertionError(f"no kill in {ATTEMPTS} hit a checkpoint being written")

    def ends(self, *changes: str, ranks: int = 1) -> "Story":
        runs.train(self.folder, *changes, ranks=ranks)
        return self

    def _died(self, process: subprocess.Popen[bytes], began: float) -> None:
        code, logged = process.wait(runs.PATIENCE_SECONDS), runs.last_step(self.folder)
        seconds = time.monotonic() - began
        self.deaths.append(Death(code, logged, seconds, bool(torn(self.folder))))


def torn(folder: Path) -> set[tuple[str, int]]:
    """Half-written checkpoints, with the time at which each was begun or last written to."""
    found = set()
    for path in (folder / "checkpoints").glob(".writing-*"):
        with suppress(FileNotFoundError):  # committed meanwhile
            found.add((path.name, path.stat().st_ctime_ns))
    return found


def some_steps(count: int, low: int, high: int) -> list[int]:
    return sorted(dice.sample(range(low, high), count))


def alone(folder: Path) -> Story:
    """One rank: two random steps, then a checkpoint being written."""
    story = Story(folder)
    for step in some_steps(2, 10, 100):
        story.dies(step, *ALONE)
    story.dies_writing(*ALONE, "checkpoint.every=1")
    return story.ends(*ALONE)


def sharded(folder: Path) -> Story:
    """Two ranks of one sharded model: one rank alone, then the parent alone; with samples drawn."""
    story, (first, second) = Story(folder), some_steps(2, 8, 40)
    changes = (*SHARDED, "sample.every=30", "sample.count=5", "sample.steps=2")
    story.dies(first, *changes, ranks=2, member=2)
    story.dies(second, *changes, ranks=2, member=0)
    return story.ends(*changes, ranks=2)


def moving(folder: Path) -> Story:
    """4 -> 2 -> 1 -> 4 ranks: one rank is asked to stop, then all as by Ctrl-C, then a kill."""
    story, (first, second, third) = Story(folder), some_steps(3, 8, 40)
    story.dies(first, *SHARDED, ranks=4, blow=signal.SIGTERM, member=4)
    story.dies(second, *SHARDED, ranks=2, blow=signal.SIGINT)
    story.dies(third, *SHARDED)
    return story.ends(*SHARDED, ranks=4)


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Story]:
    """All the stories, and the two runs that nothing befell, two at a time."""
    parent = tmp_path_factory.mktemp("stories")
    with ThreadPoolExecutor(2) as pool:
        told: dict[str, Future[Story]] = {
            made.__name__: pool.submit(made, parent / made.__name__)
            for made in (moving, sharded, alone)
        }
        for name, changes, ranks in (("whole", ALONE, 1), ("whole sharded", SHARDED, 2)):
            story = Story(parent / name.replace(" ", "-"))
            told[name] = pool.submit(story.ends, *changes, ranks=ranks)
        return {name: story.result() for name, story in told.items()}


def same_bits(story: Story, whole: Story) -> None:
    for key in ("loss", "grad_norm", "lr"):
        assert torch.equal(runs.series(story.folder, key), runs.series(whole.folder, key)), key
    assert not runs.different(runs.tensors(story.folder), runs.tensors(whole.folder))
    theirs = [line["loss_by_time"] for line in runs.lines(whole.folder)]
    assert [line["loss_by_time"] for line in runs.lines(story.folder)] == theirs


def to_rounding(story: Story, whole: Story) -> None:
    ours, theirs = runs.tensors(story.folder), runs.tensors(whole.folder)
    errors = {key: runs.relative(runs.series(story.folder, key), runs.series(whole.folder, key))
              for key in ("loss", "grad_norm")}  # fmt: skip
    errors |= {part: runs.distance(ours, theirs, part) for part in ("model.", "ema.", "optimizer.")}
    assert max(errors.values()) <= EXACT, errors


def test_killed_and_resumed_on_one_rank_is_the_same_run_bit_by_bit(stories):
    same_bits(stories["alone"], stories["whole"])


def test_killed_and_resumed_on_two_sharded_ranks_is_the_same_run_bit_by_bit(stories):
    same_bits(stories["sharded"], stories["whole sharded"])


def test_moving_over_numbers_of_ranks_is_the_same_run_to_rounding(stories):
    to_rounding(stories["moving"], stories["whole sharded"])


def test_runs_were_cut_where_it_says(stories):
    """Otherwise nothing above was proved: each died in time, and one in the middle of a write."""
    for story in stories.values():
        total = runs.last_step(story.folder)
        assert all(death.logged < total for death in story.deaths)
        assert len(resumed_from(story.folder)) == len(story.deaths)
    assert [death.code for death in stories["alone"].deaths] == [-signal.SIGKILL] * len(
        stories["alone"].deaths
    )
    assert stories["alone"].deaths[-1].torn


def test_every_step_is_logged_once(stories):
    for story in stories.values():
        steps = [line["step"] for line in runs.lines(story.folder)]
        assert steps == list(range(1, len(steps) + 1))
        assert steps[-1] in (60, 200)


def test_nothing_half_written_stays_and_the_position_is_that_of_the_step(stories):
    for story in stories.values():
        assert not list((story.folder / "checkpoints").glob(".*"))
        for step, manifest in runs.manifests(story.folder).items():
            assert manifest.state["step"] == step
            assert manifest.state["loader"]["position"] == 16 * step


def test_asked_to_stop_all_ranks_save_the_same_step_and_the_exit_code_says_so(stories):
    """Also where one rank alone was asked. Not 0: `train && evaluate` must not go on; 75: try again."""
    story = stories["moving"]
    asked = story.deaths[:2]
    assert [death.code for death in asked] == [75, 75]
    for death, origin, ranks in zip(asked, resumed_from(story.folder), ("4 ", "2 "), strict=False):
        assert origin == death.logged
        assert runs.manifests(story.folder)[origin].layout.startswith(ranks)
        assert f"stopped after step {origin} of 60" in runs.said(story.folder)


def test_a_rank_that_dies_alone_is_named_and_ends_the_run(stories):
    death = stories["sharded"].deaths[0]
    assert death.code == 128 + signal.SIGKILL
    assert death.seconds < 30
    assert "rank 1 was ended by signal SIGKILL" in runs.said(stories["sharded"].folder)


def test_ranks_do_not_outlive_their_parent(stories):
    death = stories["sharded"].deaths[1]
    assert death.code == -signal.SIGKILL
    assert death.seconds < 30


def test_two_sharded_ranks_draw_what_one_process_draws_from_their_checkpoint(stories):
    """That drawing left no trace in the training is part of the bits above."""
    folder = stories["sharded"].folder
    with np.load(folder / "samples" / "step-00000060.npz") as file:
        drawn, labels = file["images"].astype(int), file["labels"].tolist()
    run, recipe = open_run(str(folder))
    again = sample_checkpoint(run, recipe, 5)
    assert labels == again.labels.tolist() == [0, 1, 2, 3, 4]
    pixels = again.images.clamp(-1, 1).add(1).mul(127.5).numpy()
    # Half a step from rounding to whole numbers, and rounding of another kind.
    assert np.abs(drawn - pixels).max() <= 0.51
    assert drawn.std() > 20
    assert not any((stories["whole sharded"].folder / "samples").iterdir())


def test_no_sample_is_missed_or_repeated_while_ranks_come_and_go(stories):
    """Keys of what each part of the moving run read, from the positions its checkpoints hold."""
    folder = stories["moving"].folder
    origins = [0, *resumed_from(folder)]
    keys: dict[int, str] = {}
    for ranks, origin, end in zip((4, 2, 1, 4), origins, [*origins[1:], 60], strict=True):
        read = keys_read(folder, ranks, origin, end)
        assert not keys.keys() & read.keys()
        keys |= read
    assert sorted(keys) == list(range(60 * 16))
    for epoch in range(3):
        within = [keys[p] for p in range(epoch * SAMPLES, (epoch + 1) * SAMPLES)]
        assert len(set(within)) == SAMPLES
    assert [keys[p] for p in range(SAMPLES)] != [keys[p + SAMPLES] for p in range(SAMPLES)]


@pytest.mark.slow
def test_many_deaths_on_one_rank_leave_the_same_bits(stories, tmp_path):
    story = Story(tmp_path / "run")
    for step in some_steps(4, 8, 60):
        story.dies(step, *ALONE)
    for _ in range(4):
        story.dies_writing(*ALONE, "checkpoint.every=1", later=0.01)
    for step in some_steps(3, 80, 150):
        story.dies(step, *ALONE)
    same_bits(story.ends(*ALONE), stories["whole"])


@pytest.mark.slow
def test_many_deaths_on_two_sharded_ranks_leave_the_same_bits(stories, tmp_path):
    story = Story(tmp_path / "run")
    for step in some_steps(2, 8, 25):
        story.dies(step, *SHARDED, ranks=2)
    for _ in range(2):
        story.dies_writing(*SHARDED, "checkpoint.every=1", ranks=2, later=0.02)
    story.dies(40, *SHARDED, ranks=2, member=1)
    same_bits(story.ends(*SHARDED, ranks=2), stories["whole sharded"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (2, ["parallel.strategy=ddp"]),
        (2, ["parallel.strategy=ddp", "train.microbatch=3"]),
        (2, ["train.checkpoint_activations=1", "train.microbatch=5"]),
        (4, ["parallel.strategy=fsdp"]),
        (4, ["parallel.strategy=hsdp", "parallel.replicate=2"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else f"x{value}",
)
def test_killed_and_resumed_is_the_same_run_on_every_layout(tmp_path, ranks, layout):
    whole = Story(tmp_path / "whole").ends(*SHARDED, *layout, ranks=ranks)
    story = Story(tmp_path / "story")
    story.dies(some_steps(1, 8, 45)[0], *SHARDED, *layout, ranks=ranks)
    same_bits(story.ends(*SHARDED, *layout, ranks=ranks), whole)


@pytest.mark.slow
def test_moving_over_strategies_is_the_same_run_to_rounding(stories, tmp_path):
    """ddp x2 -> hsdp 2x2 -> none -> fsdp x4 recomputed -> ddp x2 accumulated."""
    story = Story(tmp_path / "run")
    for step, ranks, layout in (
        (10, 2, ["parallel.strategy=ddp"]),
        (20, 4, ["parallel.strategy=hsdp", "parallel.shard=2"]),
        (30, 1, []),
        (40, 4, ["train.checkpoint_activations=1"]),
    ):
        story.dies(step, *SHARDED, *layout, ranks=ranks)
    story.ends(*SHARDED, "parallel.strategy=ddp", "train.microbatch=3", ranks=2)
    to_rounding(story, stories["whole sharded"])


def resumed_from(folder: Path) -> list[int]:
    """The steps from whose checkpoints a run went on, as it told."""
    return [int(step) for step in re.findall(r"resuming .* from step (\d+)", runs.said(folder))]


def keys_read(folder: Path, ranks: int, origin: int, end: int) -> dict[int, str]:
    """Position -> key of all that `ranks` ranks read from the checkpoint of step `origin` on."""
    made = plan(runs.recipe(folder, *SHARDED), ranks)
    keys: dict[int, str] = {}
    for rank in range(ranks):
        with open_loader(made, rank, ranks, torch.device("cpu")) as loader:
            if origin:
                loader.load_state_dict(runs.manifests(folder)[origin].state["loader"])
            for _ in range(end - origin):
                positions = next(loader).position
                found = dict(zip(positions.tolist(), made.stream.keys(positions), strict=True))
                assert not keys.keys() & found.keys()
                keys |= found
    return keys
