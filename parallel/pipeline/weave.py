"""Replicas of a pipeline woven into one order: every rank does what can start first.

Among what can start at the same time a rank prefers the earlier unit of microbatches, and in it what its
rule says, then the earlier microbatch.
"""

from collections import defaultdict
from dataclasses import dataclass, field

from parallel.pipeline.schedule import Action, Result, Work, gives, needs

Places = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Rule:
    """What goes first within a unit: forwards or backwards; of either, what is deep in the model or not."""

    forwards: bool
    deep_forwards: bool
    deep_backwards: bool


@dataclass
class _Rank:
    """What a rank has done and may do.

    ready: what has all that it needs, and since when
    free: when the rank has ended what it does
    """

    ready: dict[Action, float] = field(default_factory=dict)
    order: list[Action] = field(default_factory=list)
    free: float = 0.0


def weave(
    places: Places,
    microbatches: int,
    *,
    unit: int,
    in_flight: int,
    backward: float,
    rule: Rule,
) -> tuple[tuple[Action, ...], ...]:
    """The actions of all ranks, for stages of equal cost.

    places: of each replica; the microbatches are shared out evenly, in order
    unit: microbatches of a replica that belong together
    in_flight: microbatches of a replica that have begun and not come back, at most
    backward: cost of a backward in forwards
    """
    share, stages = microbatches // len(places), len(places[0])
    ranks = [_Rank() for _ in range(max(places[0]) + 1)]
    flying = [0] * len(places)
    missing: dict[Action, set[Result]] = {}
    waiting: dict[Result, list[Action]] = defaultdict(list)
    for action in _all_actions(len(places), stages, share):
        missing[action] = set(needs(action, stages))
        for result in missing[action]:
            waiting[result].append(action)
        if not missing[action]:
            ranks[places[action.direction][action.stage]].ready[action] = 0.0

    def preference(rank: _Rank, action: Action) -> tuple[float, int, bool, int, int, int] | None:
        """The smallest goes first; None for what is held back."""
        forward = action.work is Work.FORWARD
        if forward and not action.stage and flying[action.direction] == in_flight:
            return None
        number = action.microbatch % share
        deep = rule.deep_forwards if forward else rule.deep_backwards
        place = -action.stage if deep else action.stage
        start, second = max(rank.free, rank.ready[action]), forward != rule.forwards
        return start, number // unit, second, place, number, action.direction

    for _ in range(len(missing)):
        options = [
            (found, index, action)
            for index, rank in enumerate(ranks)
            for action in rank.ready
            if (found := preference(rank, action)) is not None
        ]
        (start, *_), index, action = min(options, key=lambda option: option[:2])
        rank = ranks[index]
        del rank.ready[action]
        rank.order.append(action)
        forward = action.work is Work.FORWARD
        rank.free = start + (1.0 if forward else backward)
        if not action.stage:
            flying[action.direction] += 1 if forward else -1
        given = gives(action)
        assert given is not None
        for later in waiting[given]:
            missing[later].remove(given)
            if not missing[later]:
                ranks[places[later.direction][later.stage]].ready[later] = rank.free
    return tuple(tuple(rank.order) for rank in ranks)


def _all_actions(replicas: int, stages: int, share: int) -> list[Action]:
    return [
        Action(direction, stage, work, direction * share + number)
        for direction in range(replicas)
        for number in range(share)
        for stage in range(stages)
        for work in (Work.FORWARD, Work.BACKWARD)
    ]
