"""The order of the stream: each sample once an epoch, whoever reads it, found from any position."""

import time
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.order import Order, fold, permute
from data_pipeline.share import share_of

sizes = st.lists(st.integers(0, 23), min_size=1, max_size=9).filter(lambda s: sum(s) > 0)
lanes = st.integers(1, 40)
windows = st.integers(1, 30)
seeds = st.integers(0, 2**63 - 1)
law = settings(max_examples=500, deadline=None)


def pairs(order, positions):
    found = order.sample_at(np.asarray(positions))
    return list(zip(found.shard.tolist(), found.sample.tolist(), strict=True))


@law
@given(sizes, lanes, windows, seeds, st.integers(0, 10**6))
def test_every_epoch_is_each_sample_once(sizes, lanes, windows, seed, epoch):
    order = Order(sizes, seed=seed, lanes=lanes, window=windows)
    found = order.sample_at(epoch * sum(sizes) + np.arange(sum(sizes)))
    assert set(found.epoch.tolist()) == {epoch}
    got = sorted(zip(found.shard.tolist(), found.sample.tolist(), strict=True))
    assert got == [(shard, n) for shard, size in enumerate(sizes) for n in range(size)]


@law
@given(sizes, lanes, windows, seeds, st.integers(1, 17), st.lists(st.integers(1, 7), min_size=1))
def test_any_sequence_of_world_sizes_reads_the_same_global_batches(
    sizes, lanes, windows, seed, batch, worlds
):
    """Each rank asks for its contiguous shares alone; the world changes at every batch."""
    steps = max(len(worlds), -(-sum(sizes) // batch))
    whole = pairs(Order(sizes, seed=seed, lanes=lanes, window=windows), range(batch * steps))
    asked: list[list[int]] = [[] for _ in range(max(worlds))]
    for step in range(steps):
        ranks = worlds[step % len(worlds)]
        for rank in range(ranks):
            first, end = share_of(batch, rank, ranks)
            asked[rank] += range(step * batch + first, step * batch + end)
    read = {}
    for positions in asked:
        fresh = Order(sizes, seed=seed, lanes=lanes, window=windows)
        read |= dict(zip(positions, pairs(fresh, positions), strict=True))
    assert [read[position] for position in range(batch * steps)] == whole
    assert len(set(whole[: sum(sizes)])) == sum(sizes)


@law
@given(sizes, lanes, windows, seeds)
def test_lanes_are_contiguous_even_and_shuffled_inside_windows_alone(sizes, lanes, windows, seed):
    order = Order(sizes, seed=seed, lanes=lanes, window=windows)
    count = sum(sizes)
    used = min(lanes, count)
    # With window 1 the same lanes read the epoch's list as it lies.
    plain = Order(sizes, seed=seed, lanes=lanes, window=1)
    lengths = set()
    all_straight, all_shuffled = (pairs(one, range(count)) for one in (plain, order))
    for lane in range(used):
        straight, shuffled = all_straight[lane::used], all_shuffled[lane::used]
        lengths.add(len(straight))
        for first in range(0, len(straight), windows):
            part = slice(first, first + windows)
            assert sorted(straight[part]) == sorted(shuffled[part])
        for (shard, sample), (next_shard, next_sample) in pairwise(straight):
            assert next_sample == (sample + 1 if next_shard == shard else 0)
    assert max(lengths) - min(lengths) <= 1


@law
@given(sizes, lanes, windows, seeds, st.lists(st.integers(0, 10**12), min_size=1, max_size=8))
def test_a_position_is_found_without_the_others(sizes, lanes, windows, seed, positions):
    order = Order(sizes, seed=seed, lanes=lanes, window=windows)
    together = pairs(order, positions)
    assert together == [pairs(order, [p])[0] for p in positions]


def test_epochs_and_seeds_differ():
    def epoch(seed, number):
        order = Order([50] * 8, seed=seed, lanes=4, window=64)
        return tuple(pairs(order, number * 400 + np.arange(400)))

    seen = {epoch(seed, number) for seed in range(5) for number in range(5)}
    assert len(seen) == 25


def test_shards_change_places_between_epochs():
    order = Order([1] * 20, seed=3, lanes=1, window=1)
    first = {tuple(order.sample_at(e * 20 + np.arange(20)).shard.tolist()) for e in range(10)}
    assert len(first) == 10


def test_permutations_are_uniform():
    """Over many keys every place goes everywhere equally often, and so does every pair of
    places."""
    keys = fold(11, np.arange(20_000))
    for count in (2, 3, 5):
        size = np.full(len(keys), count)
        images = np.stack([permute(np.full(len(keys), i), size, keys) for i in range(count)])
        for i in range(count):
            for j in range(i + 1, count):
                pair = np.bincount(images[i] * count + images[j], minlength=count**2)
                pair = pair[pair > 0]
                cells = count * (count - 1)
                assert len(pair) == cells
                expected = len(keys) / cells
                # Six standard deviations: the keys are fixed, so this passes always or never.
                assert np.abs(pair - expected).max() < 6 * np.sqrt(expected)


@pytest.mark.alone
def test_a_late_position_costs_what_an_early_one_does():
    order = Order([1000] * 100, seed=0, lanes=64, window=256)

    def seconds(start):
        best = np.inf
        for turn in range(20):
            began = time.perf_counter()
            order.sample_at(start + 512 * turn + np.arange(512))
            best = min(best, time.perf_counter() - began)
        return best

    assert seconds(10**12) < 3 * seconds(0)


def test_a_batch_smaller_than_the_lanes_draws_from_all_over_the_data():
    """Eight batches pass over the lanes once; each would else come from one shard of the eight."""
    order = Order([100] * 8, seed=0, lanes=64, window=16)
    shards = order.sample_at(np.arange(800)).shard
    held = [len(set(shards[start : start + 8].tolist())) for start in range(0, 800, 8)]
    assert np.mean(held) > 4
