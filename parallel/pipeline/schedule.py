"""A pipeline schedule as data: what every rank does, in which order.

One object is checked, simulated, drawn and executed. A model is cut into `stages`; one replica of
them runs down the ranks and, in a bidirectional schedule, a second one runs up, with half of the
microbatches each. Every replica has a place (a rank) for every stage.
"""

from collections import Counter
from dataclasses import dataclass
from enum import StrEnum


class Work(StrEnum):
    """What an action does.

    BACKWARD is INPUT, the gradient of the stage's input, and WEIGHT, that of its weights, at once.
    SYNC adds the gradients of a stage to those of its twin in the other replica.
    """

    FORWARD = "F"
    BACKWARD = "B"
    INPUT = "I"
    WEIGHT = "W"
    SYNC = "S"


# After these a stage holds nothing of a microbatch any more.
FREES = (Work.BACKWARD, Work.WEIGHT)


@dataclass(frozen=True)
class Action:
    """One piece of work.

    direction: the replica, 0 or 1
    microbatch: of the whole batch, 0 ... microbatches - 1; -1 for SYNC, which is for all
    """

    direction: int
    stage: int
    work: Work
    microbatch: int

    def __str__(self) -> str:
        arrow = "^" if self.direction else ""
        number = "" if self.work is Work.SYNC else str(self.microbatch)
        return f"{self.stage}{arrow}{self.work.value}{number}"


def looped(ranks: int, chunks: int) -> tuple[int, ...]:
    """The rank of every stage, for stages that go down the ranks so many times."""
    return tuple(range(ranks)) * chunks


def v_shaped(ranks: int) -> tuple[int, ...]:
    """The rank of every stage, for stages that go down the ranks and back."""
    return tuple(range(ranks)) + tuple(range(ranks))[::-1]


@dataclass(frozen=True)
class Schedule:
    """Who does what in which order.

    places: for each replica, the rank of every stage
    actions: for each rank, in order
    """

    name: str
    microbatches: int
    places: tuple[tuple[int, ...], ...]
    actions: tuple[tuple[Action, ...], ...]

    @property
    def ranks(self) -> int:
        return len(self.actions)

    @property
    def stages(self) -> int:
        """Of one replica."""
        return len(self.places[0])

    @property
    def directions(self) -> int:
        return len(self.places)

    def direction(self, microbatch: int) -> int:
        """The replica that a microbatch goes through: the second half goes up."""
        return microbatch * self.directions // self.microbatches

    def local(self, rank: int) -> list[tuple[int, int]]:
        """(direction, stage) of all that a rank holds, the downward replica's first."""
        return [
            (direction, stage)
            for direction, places in enumerate(self.places)
            for stage, place in enumerate(places)
            if place == rank
        ]


# A result that other work waits for: (direction, stage, which, microbatch); which is FORWARD for the
# stage's output and INPUT for the gradient of its input, whichever action gave it.
Result = tuple[int, int, Work, int]


def gives(action: Action) -> Result | None:
    """The result of an action; None if nobody waits for it."""
    if action.work in (Work.WEIGHT, Work.SYNC):
        return None
    which = Work.FORWARD if action.work is Work.FORWARD else Work.INPUT
    return action.direction, action.stage, which, action.microbatch


def needs(action: Action, stages: int) -> list[Result]:
    """The results that an action begins with."""
    direction, stage, microbatch = action.direction, action.stage, action.microbatch
    if action.work is Work.SYNC:
        return []
    if action.work is Work.FORWARD:
        return [(direction, stage - 1, Work.FORWARD, microbatch)] if stage else []
    if action.work is Work.WEIGHT:
        return [(direction, stage, Work.INPUT, microbatch)]
    own = [(direction, stage, Work.FORWARD, microbatch)]
    return own if stage + 1 == stages else [*own, (direction, stage + 1, Work.INPUT, microbatch)]


def check(schedule: Schedule) -> None:
    """Raise ValueError if a schedule leaves work out, does it twice or elsewhere, or would never end.

    Every stage must do every microbatch of its replica once forward and once backward, whole or split,
    on its own rank; SYNC comes once for every stage with a twin, after the last of its gradients, and in
    the same order on both ranks of a pair.
    """
    for rank, actions in enumerate(schedule.actions):
        _check_rank(schedule, rank, actions)
    if schedule.directions == 2:
        _check_sync_order(schedule)
    _check_progress(schedule)


def _check_rank(schedule: Schedule, rank: int, actions: tuple[Action, ...]) -> None:
    numbers = range(schedule.microbatches)
    done = Counter(actions)
    expected = 0
    for direction, stage in schedule.local(rank):
        for microbatch in (m for m in numbers if schedule.direction(m) == direction):
            times = {work: done[Action(direction, stage, work, microbatch)] for work in Work}
            split = times[Work.INPUT] > 0
            wanted = (1, 0, 1, 1, 0) if split else (1, 1, 0, 0, 0)
            if tuple(times.values()) != wanted:
                raise ValueError(
                    f"rank {rank} does stage {stage}, microbatch {microbatch}: {times}"
                )
            expected += sum(wanted)
        if schedule.directions == 2:
            sync = Action(direction, stage, Work.SYNC, -1)
            last = max(i for i, a in enumerate(actions) if a.work in FREES and _same_stage(a, sync))
            if done[sync] != 1 or actions.index(sync) < last:
                raise ValueError(
                    f"rank {rank} adds the gradients of stage {stage} too early or not once"
                )
            expected += 1
    if expected != len(actions):
        raise ValueError(f"rank {rank} has {len(actions)} actions, {expected} are its own")


def _check_sync_order(schedule: Schedule) -> None:
    orders: dict[frozenset[int], set[tuple[int, ...]]] = {}
    for rank, actions in enumerate(schedule.actions):
        pair = frozenset((rank, schedule.ranks - 1 - rank))
        order = tuple(action.stage for action in actions if action.work is Work.SYNC)
        orders.setdefault(pair, set()).add(order)
    if any(len(found) > 1 for found in orders.values()):
        raise ValueError("two ranks add the gradients of their stages in different orders")


def _check_progress(schedule: Schedule) -> None:
    done: set[Result] = set()
    places = [0] * schedule.ranks
    moved = True
    while moved:
        moved = False
        for rank, actions in enumerate(schedule.actions):
            while places[rank] < len(actions):
                action = actions[places[rank]]
                if not done.issuperset(needs(action, schedule.stages)):
                    break
                if (result := gives(action)) is not None:
                    done.add(result)
                places[rank] += 1
                moved = True
    for rank, actions in enumerate(schedule.actions):
        if places[rank] < len(actions):
            raise ValueError(f"rank {rank} waits for ever with {actions[places[rank]]}")


def _same_stage(first: Action, second: Action) -> bool:
    return (first.direction, first.stage) == (second.direction, second.stage)
