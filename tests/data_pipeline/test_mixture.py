"""Several data sets in one stream: exact shares over any prefix, each sample once in its set's epoch,
whoever reads it."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.mixture import LONGEST_PATTERN, MixedOrder, Mixture, whole_proportions
from data_pipeline.order import Order
from data_pipeline.share import share_of
from flows.errors import UserError
from tests.data_pipeline.test_loader import loader, numbers, stream_of

law = settings(max_examples=500, deadline=None)
weights = st.lists(st.integers(1, 40), min_size=1, max_size=7)
sizes = st.lists(st.integers(0, 9), min_size=1, max_size=3).filter(lambda s: sum(s) > 5)
sets = st.lists(st.tuples(sizes, st.integers(1, 3)), min_size=1, max_size=3)
layouts = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**63 - 1),
        "lanes": st.integers(1, 20),
        "window": st.integers(1, 15),
    }
)


def mixed(sets, layout):
    return MixedOrder([s for s, _ in sets], [w for _, w in sets], **layout)


def rows(order, positions):
    found = order.sample_at(np.asarray(positions, np.int64))
    columns = (found.source, found.epoch, found.shard, found.sample)
    return list(zip(*(column.tolist() for column in columns), strict=True))


@law
@given(weights, st.integers(0, 10**9))
def test_over_any_prefix_each_set_has_its_share_rounded_up_or_down(weights, late):
    mixture = Mixture(weights)
    total = sum(weights)
    source = mixture.draw(np.arange(2 * mixture.period)).source
    taken = np.cumsum(source[:, None] == np.arange(len(weights)), axis=0)
    length = np.arange(1, len(source) + 1)[:, None]
    assert (np.abs(taken * total - length * np.array(weights)) < total).all()
    for count, weight in zip(mixture.taken(late), weights, strict=True):
        assert abs(count * total - late * weight) < total
    assert sum(mixture.taken(late)) == late


@law
@given(weights, st.integers(0, 10**12))
def test_a_set_is_read_without_gap_or_repetition_from_any_position(weights, start):
    mixture = Mixture(weights)
    drawn = mixture.draw(np.arange(start, start + 200))
    for source, begun in enumerate(mixture.taken(start)):
        turns = drawn.turn[drawn.source == source]
        assert turns.tolist() == list(range(begun, begun + len(turns)))


@law
@given(sets, layouts, st.integers(1, 13), st.lists(st.integers(1, 4), min_size=1, max_size=9))
def test_no_sequence_of_world_sizes_changes_a_global_batch_or_loses_a_sample(
    sets, layout, batch, worlds
):
    """Every rank of every world has an order of its own and asks for its share alone."""
    order = mixed(sets, layout)
    total = sum(w for _, w in sets)
    # Far enough for each set to end its first epoch.
    steps = 1 + max(sum(s) * total // w for s, w in sets) // batch
    want = rows(order, range(steps * batch))
    asked: list[list[int]] = [[] for _ in range(max(worlds))]
    for step in range(steps):
        ranks = worlds[step % len(worlds)]
        for rank in range(ranks):
            first, end = share_of(batch, rank, ranks)
            asked[rank] += range(step * batch + first, step * batch + end)
    read = {}
    for positions in asked:
        read |= dict(zip(positions, rows(mixed(sets, layout), positions), strict=True))
    assert sorted(p for positions in asked for p in positions) == list(range(steps * batch))
    assert [read[position] for position in range(steps * batch)] == want
    seen = Counter(want)
    for source, (shards, _) in enumerate(sets):
        every = [(shard, n) for shard, size in enumerate(shards) for n in range(size)]
        epochs = order.mixture.taken(steps * batch)[source] // sum(shards)
        assert epochs >= 1
        for number in range(epochs):
            assert all(seen[(source, number, *one)] == 1 for one in every)


@law
@given(sizes, layouts, st.integers(0, 10**9))
def test_one_data_set_is_its_own_order_whatever_its_weight(sizes, layout, start):
    positions = np.arange(start, start + 12)
    alone = Order(sizes, **layout).sample_at(positions)
    found = MixedOrder([sizes], [0.3], **layout).sample_at(positions)
    assert (found.epoch == alone.epoch).all()
    assert (found.shard == alone.shard).all()
    assert (found.sample == alone.sample).all()


def test_sets_of_one_shape_do_not_run_in_step():
    order = MixedOrder([[50], [50]], [1, 1], seed=4, lanes=3, window=16)
    found = order.sample_at(np.arange(100))
    first, second = (found.sample[found.source == source].tolist() for source in (0, 1))
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second


@pytest.mark.parametrize(
    ("weights", "whole"),
    [
        ([1.0], [1]),
        ([0.1, 0.2, 0.7], [1, 2, 7]),
        ([2, 6], [1, 3]),
        ([0.25, 1], [1, 4]),
        ([1e-3, 1], [1, 1000]),
        ([1281167, 14197122], None),
        ([1 / 3, 2 / 3], [1, 2]),
        ([0.1234567, 1], None),
    ],
)
def test_weights_are_what_their_decimals_spell(weights, whole):
    if whole is not None:
        assert whole_proportions(weights) == whole
        return
    with pytest.raises(UserError, match=f"{LONGEST_PATTERN:,} are allowed; round them"):
        whole_proportions(weights)


def test_batches_of_a_mixture_hold_both_sets_in_their_shares(shards):
    """Images are painted with their number: those of the larger set are told by its size."""
    sources = [(shards([7, 6], "one"), 0.25), (shards([100, 60], "two"), 0.75)]
    with mixture_loader(sources) as batches:
        got = [numbers(next(batches)) for _ in range(20)]
        state = batches.state_dict()
    keys = stream_of(sources, seed=1, lanes=3, window=4).keys(torch.arange(240))
    assert Counter(key[0] for key in keys) == {"0": 60, "1": 180}
    assert [int(key[-4:]) for key in keys] == [n for batch in got for n in batch]
    assert all(Counter(key[0] for key in keys[i : i + 12])["0"] == 3 for i in range(0, 240, 12))
    assert state == stream_of(sources, seed=1, lanes=3, window=4).state_at(240)
    assert (state["taken"], state["samples"]) == ([60, 180], [13, 160])


def test_a_mixture_resumes_on_other_ranks_and_refuses_other_weights(shards):
    sources = [(shards([5, 8], "one"), 2), (shards([9], "two"), 1)]
    with mixture_loader(sources) as whole:
        want = [n for _ in range(6) for n in numbers(next(whole))]
    got, state = [], None
    for ranks in (3, 4, 1):
        every = [mixture_loader(sources, rank=rank, ranks=ranks) for rank in range(ranks)]
        for one in every:
            if state is not None:
                one.load_state_dict(state)
        for _ in range(2):
            got += [n for one in every for n in numbers(next(one))]
        state = every[0].state_dict()
        for one in every:
            one.close()
    assert got == want
    (one, _), (two, _) = sources
    for changed in ([(one, 1), (two, 1)], [(two, 2), (one, 1)], [(one, 2)]):
        with pytest.raises(UserError, match=r"another stream of samples \(13 \+ 9 an epoch"):
            mixture_loader(changed).load_state_dict(state)
    # Proportions count, not their scale.
    mixture_loader([(one, 0.5), (two, 0.25)]).load_state_dict(state)


def mixture_loader(sources, **options):
    return loader(sources, batch=12, **options)
