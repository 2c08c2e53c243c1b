"""When everything of a schedule happens, given what stages and links cost."""

from dataclasses import dataclass

from parallel.pipeline.schedule import FREES, Action, Result, Schedule, Work, gives, needs


@dataclass(frozen=True)
class Costs:
    """Seconds (or any one unit of time).

    forward, input, weight: of one microbatch in each stage; a whole backward is input and weight
    latency: of a result's way to another rank; the sender goes on meanwhile
    sync: of adding the gradients of one stage to its twin's; both ranks go on meanwhile
    """

    forward: tuple[float, ...]
    input: tuple[float, ...]
    weight: tuple[float, ...]
    latency: float = 0.0
    sync: float = 0.0

    def of(self, action: Action) -> float:
        """How long the rank is busy with an action."""
        stage = action.stage
        match action.work:
            case Work.FORWARD:
                return self.forward[stage]
            case Work.INPUT:
                return self.input[stage]
            case Work.WEIGHT:
                return self.weight[stage]
            case Work.BACKWARD:
                return self.input[stage] + self.weight[stage]
            case Work.SYNC:
                return 0.0


def equal_costs(
    stages: int, forward: float = 1.0, input: float = 1.0, weight: float = 1.0, latency: float = 0.0
) -> Costs:
    """Stages that all cost the same."""
    return Costs((forward,) * stages, (input,) * stages, (weight,) * stages, latency)


@dataclass(frozen=True)
class Event:
    """An action from `start` to `end`."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """The events of every rank, in order.

    makespan: from the first start to the end of all, the additions of gradients included
    peak_activations: of every rank, the most microbatches it holds the activations of at a time, a
        microbatch in one of several stages of a rank counted as that part of one (with equal stages)
    """

    schedule: Schedule
    events: tuple[tuple[Event, ...], ...]
    makespan: float
    peak_activations: tuple[float, ...]

    def busy(self, rank: int) -> float:
        return sum(event.end - event.start for event in self.events[rank])

    def idle(self, rank: int) -> float:
        """The share of the makespan that a rank waits."""
        return 1.0 - self.busy(rank) / self.makespan

    @property
    def bubble(self) -> float:
        """The share of all ranks' time that is waited."""
        return sum(self.idle(rank) for rank in range(len(self.events))) / len(self.events)

    @property
    def title(self) -> str:
        """What it is of, and how much is waited, in words."""
        made = self.schedule
        microbatches = f"{made.microbatches} microbatch{'es' * (made.microbatches > 1)}"
        return (
            f"{made.name}: {made.ranks} ranks, {made.stages} stages, {microbatches}, "
            f"{self.bubble:.1%} idle"
        )


def simulate(schedule: Schedule, costs: Costs) -> Timeline:
    """Every rank does its actions in order, each as soon as what it needs has arrived.

    Raises ValueError if the schedule never ends; `check` says more.
    """
    ended: dict[Result, tuple[float, int]] = {}
    events: list[list[Event]] = [[] for _ in schedule.actions]
    left = sum(len(actions) for actions in schedule.actions)
    while left:
        before = left
        for rank, actions in enumerate(schedule.actions):
            for action in actions[len(events[rank]) :]:
                start = _start(schedule, action, rank, events[rank], ended, costs.latency)
                if start is None:
                    break
                end = start + costs.of(action)
                events[rank].append(Event(action, start, end))
                if (result := gives(action)) is not None:
                    ended[result] = (end, rank)
                left -= 1
        if left == before:
            raise ValueError(f"schedule {schedule.name} waits for ever")
    done = tuple(tuple(row) for row in events)
    ends = [row[-1].end for row in done] + _synced(done, costs.sync)
    return Timeline(schedule, done, max(ends), tuple(_peak(schedule, row) for row in done))


def _start(
    schedule: Schedule,
    action: Action,
    rank: int,
    before: list[Event],
    ended: dict[Result, tuple[float, int]],
    latency: float,
) -> float | None:
    """When an action can start after those before it; None while something is missing."""
    start = before[-1].end if before else 0.0
    for result in needs(action, schedule.stages):
        if result not in ended:
            return None
        end, where = ended[result]
        start = max(start, end if where == rank else end + latency)
    return start


def _synced(events: tuple[tuple[Event, ...], ...], sync: float) -> list[float]:
    """When the gradients of each stage with a twin are added: both have them, and the sum has travelled."""
    ready: dict[int, float] = {}
    for event in (event for row in events for event in row if event.action.work is Work.SYNC):
        stage = event.action.stage
        ready[stage] = max(ready.get(stage, 0.0), event.end)
    return [time + sync for time in ready.values()]


def _peak(schedule: Schedule, row: tuple[Event, ...]) -> float:
    held = most = 0
    for event in row:
        if event.action.work is Work.FORWARD:
            held += 1
        elif event.action.work in FREES:
            held -= 1
        most = max(most, held)
    return most * schedule.ranks / schedule.stages
