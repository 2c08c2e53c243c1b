"""Schedules: all work once, nothing waits for ever, and bubbles as the papers count them."""

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flows.errors import UserError
from parallel.pipeline.bidirectional import in_flight
from parallel.pipeline.catalog import NAMES, Words, make_schedule, places_of
from parallel.pipeline.schedule import Action, Schedule, Work, check
from parallel.pipeline.timeline import Costs, equal_costs, simulate

WORDS = Words("--schedule", "--stages", "--microbatches", "--chunks")


def make(name: str, ranks: int, microbatches: int, chunks: int | None = None) -> Schedule:
    return make_schedule(name, ranks, microbatches, chunks, WORDS)


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    """Any schedule with whatever ranks and microbatches it takes."""
    name = draw(st.sampled_from(NAMES))
    ranks, microbatches = draw(st.integers(2, 8)), draw(st.integers(1, 20))
    looped = name in ("interleaved1f1b", "looped_bfs", "interleaved_zero_bubble")
    chunks = draw(st.integers(1, 3)) if looped else None
    if name in ("bitpipe", "chimera"):
        ranks, microbatches = ranks // 2 * 2, 2 * microbatches
    if name == "dualpipev":
        microbatches += 2 * ranks
    if looped:
        microbatches = microbatches if microbatches < ranks else microbatches // ranks * ranks
    return make(name, ranks, microbatches, chunks)


@settings(max_examples=120, deadline=None)
@given(schedules())
def test_every_stage_does_every_microbatch_once_and_nothing_waits_for_ever(
    schedule: Schedule,
) -> None:
    check(schedule)


@settings(max_examples=60, deadline=None)
@given(schedules(), st.data())
def test_the_simulation_keeps_the_order_of_ranks_and_of_results(
    schedule: Schedule, data: st.DataObject
) -> None:
    times = st.lists(st.floats(0.1, 3.0), min_size=schedule.stages, max_size=schedule.stages)
    costs = Costs(*(tuple(data.draw(times)) for _ in range(3)), latency=data.draw(st.floats(0, 1)))
    line = simulate(schedule, costs)
    forward = {
        (e.action.direction, e.action.stage, e.action.microbatch): (e, rank)
        for rank, row in enumerate(line.events)
        for e in row
        if e.action.work is Work.FORWARD
    }
    for (direction, stage, number), (event, rank) in forward.items():
        if stage:
            before, where = forward[direction, stage - 1, number]
            way = costs.latency if where != rank else 0.0
            assert event.start >= before.end + way - 1e-9
    for rank, row in enumerate(line.events):
        assert tuple(e.action for e in row) == schedule.actions[rank]
        assert all(a.end <= b.start for a, b in pairwise(row))
        spent = sum(costs.of(action) for action in schedule.actions[rank])
        assert line.idle(rank) == pytest.approx(1 - spent / line.makespan, abs=1e-9)


def bubble(name: str, ranks: int, microbatches: int) -> float:
    """With a backward of two forwards, as the papers have it."""
    schedule = make(name, ranks, microbatches)
    return simulate(schedule, equal_costs(schedule.stages)).bubble


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
@pytest.mark.parametrize("microbatches", [8, 16, 32])
def test_bubbles_of_one_replica(ranks: int, microbatches: int) -> None:
    d, n = ranks, microbatches
    assert bubble("1f1b", d, n) == pytest.approx((d - 1) / (n + d - 1), abs=1e-12)
    assert bubble("gpipe", d, n) == pytest.approx((d - 1) / (n + d - 1), abs=1e-12)
    if n % d == 0:
        assert bubble("interleaved1f1b", d, n) == pytest.approx(
            (d - 1) / (2 * n + d - 1), abs=1e-12
        )
        assert bubble("looped_bfs", d, n) == pytest.approx((d - 1) / (2 * n + d - 1), abs=1e-12)


@pytest.mark.parametrize("d", [2, 4, 6, 8, 12, 16])
def test_bubble_of_chimera(d: int) -> None:
    assert bubble("chimera", d, d) == pytest.approx((d - 2) / (1.5 * d + d - 2), abs=1e-12)


def test_bubble_of_bitpipe() -> None:
    assert bubble("bitpipe", 4, 4) == pytest.approx(1 / 7, abs=1e-12)
    for d, n in ((2, 2), (6, 6), (4, 8)):
        assert bubble("bitpipe", d, n) == pytest.approx((d - 2) / (3 * n + d - 2), abs=1e-12)
    for d in (8, 16):
        assert bubble("bitpipe", d, d) <= (d - 2) / (3 * d + d - 2) + 0.02
    # Over several units too it waits less than interleaved 1F1B.
    for d, n in ((4, 8), (4, 16), (8, 16)):
        assert bubble("bitpipe", d, n) < bubble("interleaved1f1b", d, n)


def test_zero_bubble_schedules_leave_a_third_of_what_1f1b_leaves() -> None:
    """With I = W = F only the D - 1 forwards at the start are waited: 1/3 of 3 (D - 1), on half stages."""
    for name in ("zbv", "interleaved_zero_bubble", "dualpipev"):
        assert bubble(name, 4, 8) == pytest.approx(3 / (6 * 8 + 3), abs=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(("bitpipe", "chimera")), st.integers(1, 4), st.integers(1, 24))
def test_a_bidirectional_rank_holds_no_more_than_the_stated_cap(
    name: str, half: int, pairs: int
) -> None:
    schedule = make(name, 2 * half, 2 * pairs)
    line = simulate(schedule, equal_costs(schedule.stages))
    assert max(line.peak_activations) <= 2 * in_flight(2 * half)
    flying = dict.fromkeys((0, 1), 0)
    events = sorted((e for row in line.events for e in row), key=lambda event: event.end)
    for action in (e.action for e in events if e.action.stage == 0):
        flying[action.direction] += {"F": 1, "B": -1, "S": 0}[action.work.value]
        assert max(flying.values()) <= in_flight(2 * half)


def test_peak_activations_of_the_classic_schedules() -> None:
    gpipe, plain = (make(name, 4, 8) for name in ("gpipe", "1f1b"))
    assert simulate(gpipe, equal_costs(4)).peak_activations == (8, 8, 8, 8)
    assert simulate(plain, equal_costs(4)).peak_activations == (4, 3, 2, 1)


def test_gradients_are_added_early_where_a_pair_of_ranks_can() -> None:
    """Most additions overlap with work; the last stage of a pair can only be added at the end."""
    schedule = make("bitpipe", 4, 8)
    for actions in schedule.actions:
        at = [index for index, action in enumerate(actions) if action.work is Work.SYNC]
        assert len(at) == 4
        assert at[0] < len(actions) - 4
        assert [a.work for a in actions[at[0] + 1 :]].count(Work.BACKWARD) > 0


def _changed(schedule: Schedule, rank: int, actions: tuple[Action, ...]) -> Schedule:
    rows = list(schedule.actions)
    rows[rank] = actions
    return replace(schedule, actions=tuple(rows))


def test_a_wrong_schedule_is_found() -> None:
    schedule = make("bitpipe", 4, 4)
    row = schedule.actions[1]
    with pytest.raises(ValueError, match="rank 1 does stage"):
        check(_changed(schedule, 1, row[1:]))
    with pytest.raises(ValueError, match="rank 1 does stage"):
        check(_changed(schedule, 1, (row[0], *row)))
    with pytest.raises(ValueError, match="waits for ever"):
        check(_changed(schedule, 1, (*row[3:-4], *row[:3], *row[-4:])))
    with pytest.raises(ValueError, match="too early"):
        check(_changed(schedule, 1, (row[-1], *row[:-1])))
    with pytest.raises(ValueError, match="actions"):
        check(_changed(schedule, 1, (*row, Action(0, 0, Work.FORWARD, 0))))
    syncs = [index for index, action in enumerate(row) if action.work is Work.SYNC]
    other = list(row)
    last, before = syncs[-1], syncs[-2]
    other.append(other.pop(before))
    assert last > before
    with pytest.raises(ValueError, match="different orders"):
        check(_changed(schedule, 1, tuple(other)))


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        (("fast", 4, 8), "--schedule = fast is no schedule"),
        (("1f1b", 1, 8), "--stages = 1 is no pipeline"),
        (("1f1b", 4, 0), "--microbatches = 0 is too few"),
        (("bitpipe", 5, 8), "--stages = 5 is odd"),
        (("bitpipe", 4, 7), "--microbatches = 7 is odd"),
        (("bitpipe", 4, 8, 3), "--chunks = 3 does not fit bitpipe; use 2"),
        (("looped_bfs", 4, 8, 0), "--chunks = 0 does not fit"),
        (("dualpipev", 4, 7), "use 8 or more"),
        (("interleaved1f1b", 4, 9), "use a multiple of 4"),
    ],
)
def test_what_a_schedule_cannot_do_is_refused(asked: tuple[object, ...], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence.replace("-", "[-]")):
        make(*asked)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NAMES)
def test_places_are_told_without_an_order(name) -> None:
    for ranks, chunks in ((2, None), (4, None), (4, 3)):
        if chunks and name not in ("interleaved1f1b", "looped_bfs", "interleaved_zero_bubble"):
            continue
        told = places_of(name, ranks, 2 * ranks, chunks, WORDS)
        assert told == make(name, ranks, 2 * ranks, chunks).places[0]


def test_waits_are_those_of_the_table_of_schedules() -> None:
    def waits(name: str, ranks: int, microbatches: int, chunks: int | None = None) -> float:
        made = make(name, ranks, microbatches, chunks)
        return simulate(made, equal_costs(made.stages)).bubble

    for d in (2, 4, 6):
        for n in (d, 3 * d // 2, 2 * d, 2 * d + 2, 3 * d):
            for v in (1, 2, 3):
                assert waits("interleaved1f1b", d, n, v) == pytest.approx((d - 1) / (v * n + d - 1))
                assert waits("looped_bfs", d, n, v) == pytest.approx((d - 1) / (v * n + d - 1))
                zero = (d - 1) / (3 * v * n + d - 1)
                assert waits("interleaved_zero_bubble", d, n, v) == pytest.approx(zero)
            two = pytest.approx((d - 1) / (6 * n + d - 1))
            assert n < 1.5 * d or waits("zbv", d, n) == two
            assert n < 2 * d or waits("dualpipev", d, n) == two
        assert waits("chimera", d, d) == pytest.approx((d - 2) / (1.5 * d + d - 2))
        assert waits("bitpipe", d, d) == pytest.approx((d - 2) / (3 * d + d - 2))
        assert waits("interleaved1f1b", d, d // 2) > (d - 1) / (2 * (d // 2) + d - 1) + 0.05
    assert waits("zbv", 4, 4) == pytest.approx(0.2)
    told = [round(waits("bitpipe", 4, n), 3) for n in (8, 10, 12)]
    assert told == [0.077, 0.143, 0.065]
    assert round(waits("bitpipe", 8, 8), 3) == 0.213
