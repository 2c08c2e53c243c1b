"""Schedules with two replicas of the model that run through the ranks in opposite directions.

Chimera: Li and Hoefler, Chimera: Efficiently Training Large-Scale Neural Networks with
Bidirectional Pipelines (2021). BitPipe: Wu et al., BitPipe: Bidirectional Interleaved Pipeline
Parallelism for Accelerating Large Models Training (2024).

With D ranks, N microbatches and backwards that cost two forwards, the share of time that is waited is
(D - 2) / (1.5 N + D - 2) for Chimera and (D - 2) / (3 N + D - 2) for BitPipe, at the price of every
weight being held twice, on two ranks that must add their gradients.
"""

from collections.abc import Iterable
from itertools import product

from parallel.pipeline.schedule import FREES, Action, Schedule, Work, looped, v_shaped
from parallel.pipeline.timeline import equal_costs, simulate
from parallel.pipeline.weave import Places, Rule, weave

Orders = tuple[tuple[Action, ...], ...]

BACKWARD = 2.0  # in forwards: the paper's assumption, for which the order is found


def bitpipe(ranks: int, microbatches: int) -> Schedule:
    """Two V-shaped interleaved pipelines in opposite directions, the paper's steps in its order.

    ranks, microbatches: even
    """
    # 1. Interleave: each replica is cut into twice as many stages as ranks, and every rank has two of
    #    them. V-shaped: the second half of the stages turns back, so that the middle two are neighbours
    #    on one rank and pass their result on by reference.
    down = v_shaped(ranks)
    # 2. Merge: the second replica lies the other way round, and takes half of the microbatches. While
    #    one replica fills or drains at a rank, the other one has work there.
    places = down, _mirrored(down, ranks)
    # 3. A unit is D microbatches, D / 2 each way. For more of them units follow each other without a
    #    flush: forwards of the next fill the gaps at the end of the last, as far as memory allows.
    order = _shortest(places, microbatches)
    # 4. Eager synchronisation: a stage's gradients are added to its twin's as soon as both are whole,
    #    while the ranks are at work on other stages.
    return _with_eager_sync(Schedule("bitpipe", microbatches, places, order))


def chimera(ranks: int, microbatches: int) -> Schedule:
    """Two plain pipelines in opposite directions, one stage of each on every rank.

    ranks, microbatches: even
    """
    down = looped(ranks, 1)
    places = down, _mirrored(down, ranks)
    return _with_eager_sync(
        Schedule("chimera", microbatches, places, _shortest(places, microbatches))
    )


def in_flight(ranks: int) -> int:
    """Microbatches of each replica that are on their way at a time, at most: two units.

    So no rank ever holds more than 2 D activations (of a microbatch in a rank's share of the model), and
    D where there is one unit only.
    """
    return ranks


def _shortest(places: Places, microbatches: int) -> Orders:
    """Of the orders by all rules the shortest; of such, the one with the smallest peak of activations."""

    def costs(order: Orders) -> tuple[float, float]:
        schedule = Schedule("", microbatches, places, order)
        line = simulate(schedule, equal_costs(schedule.stages, weight=BACKWARD - 1.0))
        return line.makespan, max(line.peak_activations)

    ranks = max(places[0]) + 1
    orders = [
        weave(
            places,
            microbatches,
            unit=ranks // 2,
            in_flight=in_flight(ranks),
            backward=BACKWARD,
            rule=Rule(*rule),
        )
        for rule in product((False, True), repeat=3)
    ]
    return min(orders, key=costs)


def _mirrored(places: Iterable[int], ranks: int) -> tuple[int, ...]:
    return tuple(ranks - 1 - place for place in places)


def _with_eager_sync(woven: Schedule) -> Schedule:
    """Put the addition of gradients as early as both ranks of a pair can do it in the same order.

    Rank r and rank D - 1 - r hold the same stages. Both add them in the order in which the later of
    the two gradients is whole.
    """
    costs = equal_costs(woven.stages, weight=BACKWARD - 1.0)
    whole: dict[int, float] = {}
    for event in (event for row in simulate(woven, costs).events for event in row):
        stage = event.action.stage
        whole[stage] = max(whole.get(stage, 0.0), event.end)
    actions = []
    for rank, order in enumerate(woven.actions):
        waiting = sorted(woven.local(rank), key=lambda held: (whole[held[1]], held[1]))
        actions.append(tuple(_insert_syncs(order, waiting)))
    return Schedule(woven.name, woven.microbatches, woven.places, tuple(actions))


def _insert_syncs(order: tuple[Action, ...], waiting: list[tuple[int, int]]) -> Iterable[Action]:
    """Every addition after the last backward of its own stage and of those added before it."""
    left = {held: sum(_frees(action, held) for action in order) for held in waiting}
    for action in order:
        yield action
        held = action.direction, action.stage
        left[held] -= _frees(action, held)
        while waiting and left[waiting[0]] == 0:
            direction, stage = waiting.pop(0)
            yield Action(direction, stage, Work.SYNC, -1)


def _frees(action: Action, held: tuple[int, int]) -> bool:
    return (action.direction, action.stage) == held and action.work in FREES
