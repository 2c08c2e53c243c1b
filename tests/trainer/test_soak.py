"""Three epochs on a changing number of ranks that are killed again and again: each sample is trained on
once an epoch."""

from collections import Counter
from itertools import chain, groupby, pairwise

import pytest

from data_pipeline.share import share_of
from tests.data_pipeline.conftest import sample, write_tar
from tests.trainer.soaked import train_with_kills

EPOCHS, BATCH, EVERY = 3, 12, 3


@pytest.fixture(autouse=True)
def _own_index_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def soak(folder, sizes, worlds, kill_after):
    """Keys of all samples, and what every rank took; kills are that many steps into an attempt."""
    number = 0
    keys = []
    for shard, size in enumerate(sizes):
        members = []
        for n in range(number, number + size):
            members += sample(f"{n:04d}", n % 256, n % 10)
            keys.append(f"train-{shard}/{n:04d}")
        write_tar(folder / f"train-{shard}.tar", members)
        number += size
    recipe = {
        "name": "soak",
        "run": {"dir": str(folder / "run")},
        "data": {
            "train": str(folder / "train-*.tar"), "image_size": 4, "channels": 1, "classes": 10,
            "decoder": "pillow", "lanes": 5, "window": 8,
        },
        "model": {"patch": 2, "width": 16, "depth": 1, "heads": 2},
        "train": {"epochs": EPOCHS, "batch": BATCH},
        "parallel": {"timeout_seconds": 20},
        "checkpoint": {"every": EVERY},
        "tracking": {"mlflow": False},
    }  # fmt: skip
    return keys, train_with_kills(recipe, worlds, kill_after, folder / "logs")


def check_that_nothing_is_lost_or_repeated(keys, taken, worlds):
    by_attempt = [[t for t in taken if t.attempt == attempt] for attempt in range(len(worlds))]
    for earlier, later in pairwise(by_attempt):
        committed = min(t.step for t in later)
        # The next attempt goes on at a checkpoint that this one reached.
        assert committed % EVERY == 0
        assert min(t.step for t in earlier) <= committed <= max(t.step for t in earlier) + 1
    assert min(t.step for t in by_attempt[-1]) > 0
    # Whoever takes a step again takes the same global batch of it.
    batches = {}
    attempts = groupby(
        sorted(taken, key=lambda t: (t.attempt, t.step, t.rank)), lambda t: (t.attempt, t.step)
    )
    for (_, step), shares in attempts:
        whole: list[str | None] = [None] * BATCH
        for share in shares:
            first, end = share_of(BATCH, share.rank, share.world_size)
            whole[first:end] = share.keys
        seen = batches.setdefault(step, whole)
        assert all(a == b for a, b in zip(seen, whole, strict=True) if a and b)
        batches[step] = [a or b for a, b in zip(seen, whole, strict=True)]
    steps = -(-EPOCHS * len(keys) // BATCH)
    assert sorted(batches) == list(range(steps))
    # What the weights have seen: of every step its last attempt, which has to be whole.
    last = {step: max(t.attempt for t in taken if t.step == step) for step in range(steps)}
    trained = [
        key
        for step in range(steps)
        for key in chain.from_iterable(
            t.keys
            for t in sorted(taken, key=lambda t: t.rank)
            if t.step == step and t.attempt == last[step]
        )
    ]
    assert len(trained) == steps * BATCH
    for epoch in range(EPOCHS):
        assert Counter(trained[epoch * len(keys) : (epoch + 1) * len(keys)]) == Counter(keys)


def test_three_epochs_on_four_three_two_one_and_four_ranks_with_a_kill_in_each(tmp_path):
    worlds = (4, 3, 2, 1, 4)
    keys, taken = soak(tmp_path, (31, 2, 45, 0, 29), worlds, kill_after=(7, 6, 8, 5))
    check_that_nothing_is_lost_or_repeated(keys, taken, worlds)


@pytest.mark.slow
def test_three_epochs_with_ten_kills(tmp_path):
    worlds = (4, 3, 2, 1, 4, 3, 1, 2, 4, 2, 4)
    kills = (17, 1, 30, 22, 13, 26, 9, 34, 12, 21)
    keys, taken = soak(tmp_path, (310, 20, 290, 0, 131, 93), worlds, kill_after=kills)
    check_that_nothing_is_lost_or_repeated(keys, taken, worlds)
