"""Placements of experts: laws of costs and algorithms on random counts, optima on planted ones."""

import math
import time
from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.placement import planted, routed, zipf
from flows.errors import UserError
from parallel.placement import exact
from parallel.placement.alternating import alternate, balanced
from parallel.placement.problem import Problem, busyness, contiguous, hops, imbalance, kept
from parallel.placement.solve import SMALL, load_caps, place

SHAPES = [(2, 4, 2), (3, 4, 2), (2, 6, 3), (3, 6, 2), (2, 4, 4)]  # layers, experts, ranks


def solved(problem: Problem, method="auto", starts=8, seconds=30.0):
    return place(problem, method=method, starts=starts, seed=0, seconds=seconds)


def all_placements(experts: int, ranks: int):
    """Of one layer, every one."""
    if ranks == 1:
        yield np.zeros(experts, dtype=np.int64)
        return
    for mine in combinations(range(experts), experts // ranks):
        others = [expert for expert in range(experts) if expert not in mine]
        for rest in all_placements(len(others), ranks - 1):
            layer = np.zeros(experts, dtype=np.int64)
            layer[others] = rest + 1
            yield layer


def brute_force(problem: Problem, caps: np.ndarray) -> float:
    """The most tokens that any placement keeps whose ranks are not busier than `caps`."""
    layers = [
        [p for p in all_placements(problem.experts, problem.ranks)
         if busyness(p, own, problem.ranks).max() <= cap]
        for own, cap in zip(problem.load, caps, strict=True)
    ]  # fmt: skip
    # A chain: of each placement of a layer, the most kept up to there.
    most = np.zeros(len(layers[0]))
    for index, flow in enumerate(problem.flow):
        pairs = np.array(
            [[kept(flow[None], np.stack([a, b])) for b in layers[index + 1]] for a in layers[index]]
        )
        most = (most[:, None] + pairs).max(0)
    return float(most.max())


@st.composite
def problems(draw, limit=None):
    layers, experts, ranks = draw(st.sampled_from(SHAPES))
    tokens, seed = draw(st.integers(1, 300)), draw(st.integers(0, 2**16))
    skew = draw(st.sampled_from([0.2, 1.0, 5.0]))

    def spread(generator, layer, at):
        return generator.choice(experts, size=tokens, p=generator.dirichlet([skew] * experts))

    flow, load = routed(layers, experts, tokens, seed, spread)
    bound = draw(st.sampled_from([1.0, 1.05, 1.5, math.inf])) if limit is None else limit
    return Problem(flow, load, ranks, bound)


@given(problems(), st.integers(0, 2**16))
@settings(max_examples=12, deadline=None)
def test_costs_are_those_of_a_loop_over_experts(problem, seed) -> None:
    generator = np.random.default_rng(seed)
    places = generator.permuted(contiguous(problem.layers, problem.experts, problem.ranks), axis=1)
    crossing = 0.0
    everyone = range(problem.experts)
    for layer, i, j in product(range(problem.layers - 1), everyone, everyone):
        crossing += problem.flow[layer, i, j] * (places[layer, i] != places[layer + 1, j])
    assert hops(problem.flow, places) == crossing
    for layer, found in enumerate(imbalance(problem.load, places, problem.ranks)):
        busy = [problem.load[layer][places[layer] == rank].sum() for rank in range(problem.ranks)]
        assert found == pytest.approx(max(busy) / np.mean(busy))


@given(problems())
@settings(max_examples=12, deadline=None)
def test_both_ways_obey_the_law_of_a_placement(problem) -> None:
    best = {}
    for method in ("exact", "alternating"):
        placed = solved(problem, method)
        for layer in placed.places:
            assert (np.bincount(layer, minlength=problem.ranks) == problem.seats).all()
        best[method] = kept(problem.flow, placed.places)
    assert placed.proven is False
    caps, _ = load_caps(problem, 30.0)
    places = solved(problem, "exact").places
    for layer, own, cap in zip(places, problem.load, caps, strict=True):
        assert busyness(layer, own, problem.ranks).max() <= cap
    if math.isinf(problem.limit):
        assert best["exact"] >= best["alternating"]


@given(problems())
@settings(max_examples=10, deadline=None)
def test_the_integer_program_finds_the_optimum_of_all_placements(problem) -> None:
    placed = solved(problem, "exact")
    assert placed.proven
    caps, _ = load_caps(problem, 30.0)
    assert kept(problem.flow, placed.places) == brute_force(problem, caps)


@pytest.mark.parametrize("limit", [1.05, math.inf])
def test_alternating_comes_near_the_optimum_where_affinity_is_weak(limit) -> None:
    """Tokens go anywhere: only counting errors are left to gain from, the hardest case there is."""
    for seed in range(3):
        flow, load, _ = planted(3, 8, 2, 0.9, seed)
        problem = Problem(flow, load, 2, limit)
        best, near = (hops(flow, solved(problem, way).places) for way in ("exact", "alternating"))
        assert best <= near <= 1.005 * best


@given(problems(limit=1.0))
@settings(max_examples=10, deadline=None)
def test_the_least_that_ranks_can_be_busy_is_that_of_all_placements(problem) -> None:
    caps, _ = load_caps(problem, 30.0)
    for own, cap in zip(problem.load, caps, strict=True):
        least = min(
            busyness(layer, own, problem.ranks).max()
            for layer in all_placements(problem.experts, problem.ranks)
        )
        assert cap == pytest.approx(least)


@given(problems(), st.integers(0, 2**16))
@settings(max_examples=10, deadline=None)
def test_names_of_experts_do_not_matter_to_the_optimum(problem, seed) -> None:
    generator = np.random.default_rng(seed)
    order = [generator.permutation(problem.experts) for _ in range(problem.layers)]
    flow = np.stack([own[order[at]][:, order[at + 1]] for at, own in enumerate(problem.flow)])
    load = np.stack([own[new] for own, new in zip(problem.load, order, strict=True)])
    renamed = Problem(flow, load, problem.ranks, problem.limit)
    found = [kept(one.flow, solved(one, "exact").places) for one in (problem, renamed)]
    assert found[0] == found[1]


@pytest.mark.parametrize("shape", [(12, 8, 4), (12, 32, 4), (12, 64, 8)])
@pytest.mark.parametrize("noise", [0.0, 0.1, 0.3])
@pytest.mark.parametrize("limit", [math.inf, 1.05])
def test_planted_affinity_is_found_and_saves_two_thirds_of_the_hops(shape, noise, limit) -> None:
    layers, experts, ranks = shape
    flow, load, hidden = planted(layers, experts, ranks, noise, seed=1)
    problem = Problem(flow, load, ranks, limit)
    placed = solved(problem)
    assert placed.method == "alternating"
    after, before = hops(flow, placed.places), hops(flow, contiguous(*shape))
    assert after <= hops(flow, hidden)
    assert after <= (1 - 0.67) * before
    assert imbalance(load, placed.places, ranks).max() <= min(limit, 1.1)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("noise", [0.0, 0.1, 0.3])
def test_planted_affinity_of_few_experts_is_proven_to_be_the_optimum(ranks, noise) -> None:
    flow, load, hidden = planted(4, 8, ranks, noise, seed=2)
    placed = solved(Problem(flow, load, ranks, math.inf))
    assert placed.method == "exact"
    assert placed.proven
    assert hops(flow, placed.places) == hops(flow, hidden)
    assert hops(flow, placed.places) <= (1 - 0.67) * hops(flow, contiguous(4, 8, ranks))


@pytest.mark.parametrize(
    ("experts", "ranks", "exponent"), [(16, 2, 1.0), (64, 2, 1.0), (64, 4, 0.8), (64, 8, 0.4)]
)
def test_loads_of_a_zipf_trace_are_evened(experts, ranks, exponent) -> None:
    flow, load = zipf(6, experts, exponent, seed=3)
    assert imbalance(load, contiguous(6, experts, ranks), ranks).max() > 1.2
    placed = solved(Problem(flow, load, ranks, 1.05))
    assert imbalance(load, placed.places, ranks).max() <= 1.05


def test_where_no_placement_is_as_even_the_most_even_one_is_taken() -> None:
    """Of eight experts on two ranks, the busiest and the three idlest have more than 1.05 of the half."""
    flow, load = zipf(3, 8, 1.2, seed=4)
    problem = Problem(flow, load, 2, 1.0)
    placed = solved(problem, "exact")
    assert placed.proven
    for layer, own in zip(placed.places, load, strict=True):
        least = min(busyness(p, own, 2).max() for p in all_placements(8, 2))
        assert least > 1.05 * own.sum() / 2
        assert busyness(layer, own, 2).max() == least


@pytest.mark.parametrize("method", ["exact", "alternating"])
@pytest.mark.parametrize("limit", [1.0, math.inf])
def test_counts_of_any_size_are_placed_as_well(method, limit) -> None:
    flow, load = zipf(3, 8, 0.7, seed=7)
    largest = 2**53 // int(max(flow.sum(), load.sum()))
    best = {
        hops(flow, solved(Problem(flow * times, load * times, 2, limit), method).places)
        for times in (1, 10**6, largest)
    }
    assert len(best) == 1


def test_a_looser_limit_allows_fewer_hops() -> None:
    flow, load = zipf(4, 16, 1.0, seed=5)
    found = [
        hops(flow, solved(Problem(flow, load, 4, limit)).places) for limit in (1.0, 1.6, math.inf)
    ]
    assert found[0] > found[1] > found[2]


def test_the_choice_is_made_by_size_and_said() -> None:
    flow, load = np.ones((1, 4, 4)), np.ones((2, 4))
    small = Problem(flow, load, 2, math.inf)
    assert exact.variables(small) == (2 * 4 + 16) * 2
    assert solved(small).method == "exact"
    assert solved(small, "alternating").why == "as asked; the program has 48 variables"
    large = Problem(np.ones((3, 16, 16)), np.ones((4, 16)), 4, math.inf)
    assert exact.variables(large) > SMALL
    assert solved(large).method == "alternating"
    assert solved(large).why == "the program has 3,328 variables, more than 1,000"


@pytest.mark.parametrize("method", ["exact", "alternating"])
def test_all_of_it_ends_after_the_seconds_and_says_so(method) -> None:
    flow, load = zipf(3, 8, 1.0, 0)
    begun = time.monotonic()
    found = solved(Problem(flow, load, 2, 1.05), method, starts=10**7, seconds=0.3)
    assert time.monotonic() - begun < 20  # all starts would take hours
    assert "0.3 s were too short for" in found.why
    assert not found.proven


def test_alternating_ends_where_it_began_with_the_same_seed() -> None:
    flow, load = zipf(4, 16, 1.0, seed=6)
    problem = Problem(flow, load, 4, 1.3)
    caps, even = load_caps(problem, 0.0)
    ends = [alternate(problem, caps, even, starts=4, seed=seed) for seed in (0, 0)]
    assert np.array_equal(*ends)
    for layer, own, cap in zip(ends[0], load, caps, strict=True):
        assert busyness(layer, own, 4).max() <= cap
        assert busyness(balanced(own, 4), own, 4).max() <= cap


@pytest.mark.parametrize(
    ("ranks", "limit", "sentence"),
    [
        (3, 1.05, r"--ranks 3: 8 experts a layer lie on 2, 4 or 8 ranks"),
        (1, 1.05, r"--ranks 1: 8 experts a layer lie on 2, 4 or 8 ranks"),
        (16, 1.05, r"--ranks 16: 8 experts a layer"),
        (2, 0.5, r"--limit 0\.5 is not 1 or more"),
        (2, math.nan, r"--limit nan is not 1 or more"),
    ],
)
def test_what_cannot_be_is_refused(ranks, limit, sentence) -> None:
    with pytest.raises(UserError, match=sentence):
        solved(Problem(np.ones((1, 8, 8)), np.ones((2, 8)), ranks, limit))
