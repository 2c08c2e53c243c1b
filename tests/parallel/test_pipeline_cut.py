"""Stages are cut where they balance best, within flow blocks too."""

import itertools
import statistics
from typing import cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flows.errors import UserError
from flows.initialise import Initialisable, initialise
from flows.models.chain import Chain
from flows.models.starflow import STARFlow, STARFlowConfig
from parallel.pipeline.catalog import NAMES, Words, make_schedule
from parallel.pipeline.costs import operations, seconds
from parallel.pipeline.cut import balance, cut, work_of_ranks

# A deep block after shallow ones, as published, with more in it so that a small one is as lopsided.
DEEP = STARFlowConfig(
    image_size=8, channels=4, classes=3, patch=1, width=96, layers=(1, 1, 1, 28), head_width=32
)


def best_by_trial(costs: list[float], places: list[int]) -> float:
    """The least work of the busiest rank over all cuts."""
    count = len(costs)
    inner = itertools.combinations(range(1, count), len(places) - 1)
    return min(max(work_of_ranks(costs, (0, *c, count), places)) for c in inner)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.one_of(st.just(0.0), st.floats(0.1, 5.0)), min_size=2, max_size=9),
    st.integers(1, 3),
    st.booleans(),
)
def test_no_other_cut_has_less_for_the_busiest_rank(
    costs: list[float], ranks: int, v_shaped: bool
) -> None:
    places = [*range(ranks), *(reversed(range(ranks)) if v_shaped else ())]
    if len(places) > len(costs):
        with pytest.raises(UserError, match="too few for"):
            cut(costs, places)
        return
    bounds = cut(costs, places)
    assert bounds[0] == 0
    assert bounds[-1] == len(costs)
    assert all(begin < end for begin, end in itertools.pairwise(bounds))
    most = max(work_of_ranks(costs, bounds, places))
    assert most == pytest.approx(best_by_trial(costs, places), rel=1e-6, abs=1e-9)


def test_only_borders_are_cut_where_they_are_asked_for() -> None:
    costs = [1.0, 1.0, 1.0, 9.0, 9.0, 9.0, 9.0]
    assert cut(costs, [0, 1], borders=(0, 1, 2, 3)) == (0, 3, 7)
    assert cut(costs, [0, 1]) == (0, 5, 7)
    with pytest.raises(UserError, match="4 places to cut at, too few for 5 stages"):
        cut(costs, list(range(5)), borders=(0, 1, 2, 3))


def test_ranks_without_any_work_are_balanced() -> None:
    costs = [0.0] * 4
    assert balance(work_of_ranks(costs, cut(costs, [0, 1]), [0, 1])) == 1.0


@pytest.mark.parametrize("name", NAMES)
def test_every_schedule_balances_a_deep_shallow_flow_on_four_ranks(name: str) -> None:
    with torch.device("meta"):
        chain = STARFlow(DEEP).chain()
    inputs = {"x": torch.empty(1, 4, 8, 8, device="meta"), "label": torch.zeros(1, device="meta")}
    costs = operations(chain, {**inputs, "label": inputs["label"].long()})
    words = Words("schedule", "stages", "microbatches", "chunks")
    places = make_schedule(name, 4, 8, None, words).places[0]
    work = work_of_ranks(costs, cut(costs, places), places)
    assert balance(work) >= 0.9, name


def by_kind(chain: Chain, times: list[float]) -> list[float]:
    """Links of one shape do the same work: the time of each is the median of all of its kind."""
    kinds = [link.name.split(".")[2] for link in chain.links]
    medians = {
        kind: statistics.median(t for k, t in zip(kinds, times, strict=True) if k == kind)
        for kind in set(kinds)
    }
    return [medians[kind] for kind in kinds]


def test_a_deep_shallow_flow_is_balanced_within_blocks_and_not_at_their_borders() -> None:
    """By operations, and by the time that links were measured to take."""
    model = STARFlow(DEEP)
    initialise(cast(Initialisable, model), 0)
    chain, places = model.chain(), range(4)
    inputs = {"x": torch.randn(4, 4, 8, 8), "label": torch.tensor([0, 2, 1, 3])}
    counted = operations(chain, inputs)
    measured = by_kind(chain, seconds(chain, inputs, repeats=3))
    for way, costs in (("operations", counted), ("seconds", measured)):
        within = balance(work_of_ranks(costs, cut(costs, places), places))
        borders = balance(work_of_ranks(costs, cut(costs, places, chain.borders), places))
        print(f"{way}: {within:.1%} of the ideal between layers, {borders:.1%} at borders")
        assert within >= 0.9, (way, within)
        assert borders <= 0.3, (way, borders)
