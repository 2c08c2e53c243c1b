"""Where to cut a model into stages: between any two links of its chain, so that no rank has much more to do.

A rank's work in a step is that of all its stages. Balance is what the busiest rank leaves of the ideal:
mean work of a rank / most work of a rank, 1 if all have the same.
"""

import itertools
from collections.abc import Sequence

from flows.errors import UserError

Bounds = tuple[int, ...]  # of stage i: links bounds[i] ... bounds[i + 1] - 1


def cut(
    costs: Sequence[float], places: Sequence[int], borders: Sequence[int] | None = None
) -> Bounds:
    """The cut into len(places) stages, none of them empty, whose busiest rank has the least to do.

    costs: of each link, 0 or more
    places: the rank of each stage: 0, 1, ... D - 1; V-shaped, with the same again backwards; or looped,
        with the same again any number of times. Looped, it is the longest stage that is shortest, since
        the stages of a rank lie far apart.
    borders: the only places where stages may begin, the first link's 0 among them; None for any

    Raises UserError if there are more stages than links between which to cut.
    """
    starts = list(range(len(costs)) if borders is None else borders)
    if len(starts) < len(places):
        raise UserError(
            f"the model has {len(starts)} places to cut at, too few for {len(places)} stages; use fewer "
            "ranks in the pipeline, fewer stages on each, or a deeper model."
        )
    runs = [sum(costs[a:b]) for a, b in itertools.pairwise([*starts, len(costs)])]
    ranks = max(places) + 1
    v_shaped = len(places) == 2 * ranks and list(places[ranks:]) == list(range(ranks))[::-1]
    sizes = _cut_v(runs, ranks) if v_shaped else _cut_row(runs, len(places))
    begins = (starts[i] for i in itertools.accumulate(sizes, initial=0) if i < len(runs))
    return (*begins, len(costs))


def work_of_ranks(costs: Sequence[float], bounds: Bounds, places: Sequence[int]) -> list[float]:
    """The cost of all stages of each rank."""
    work = [0.0] * (max(places) + 1)
    for place, (begin, end) in zip(places, itertools.pairwise(bounds), strict=True):
        work[place] += sum(costs[begin:end])
    return work


def balance(work: Sequence[float]) -> float:
    """Mean over most: the share of the ideal speed that is left; all of it where nobody has work."""
    return sum(work) / len(work) / max(work) if max(work) else 1.0


def _cut_row(runs: Sequence[float], stages: int) -> list[int]:
    """Sizes of contiguous stages, the largest of which costs least: by dynamic programming.

    best[k][i] is the least largest cost of k stages that take the first i runs.
    """
    before = [0.0, *itertools.accumulate(runs)]
    count = len(runs)
    best = [[0.0 if not i else float("inf") for i in range(count + 1)]]
    last: list[list[int]] = [[0] * (count + 1)]
    for k in range(1, stages + 1):
        row, ends = [float("inf")] * (count + 1), [0] * (count + 1)
        for i in range(k, count + 1):
            options = ((max(best[k - 1][j], before[i] - before[j]), j) for j in range(k - 1, i))
            row[i], ends[i] = min(options)
        best.append(row)
        last.append(ends)
    sizes, end = [], count
    for k in range(stages, 0, -1):
        sizes.append(end - last[k][end])
        end = last[k][end]
    return sizes[::-1]


def _cut_v(runs: Sequence[float], ranks: int) -> list[int]:
    """Sizes of 2 x ranks stages, of which rank r has the r-th from either end, by the least busiest rank.

    best[i, j] is the least that the busiest of the ranks so far has to do, if they have the first i and the
    last j runs. No rank need do more than in the cut whose longest stage is shortest.
    """
    count = len(runs)
    near = [0.0, *itertools.accumulate(runs)]
    far = [0.0, *itertools.accumulate(reversed(runs))]
    simple = _cut_row(runs, 2 * ranks)
    parts = [
        near[b] - near[a] for a, b in itertools.pairwise(itertools.accumulate(simple, initial=0))
    ]
    bound = max(a + b for a, b in zip(parts[:ranks], parts[ranks:][::-1], strict=True)) * (1 + 1e-9)
    steps: list[dict[tuple[int, int], tuple[float, tuple[int, int]]]] = [{(0, 0): (0.0, (0, 0))}]
    for rank in range(ranks):
        last = rank == ranks - 1
        left = 2 * (ranks - 1 - rank)  # runs that later ranks need
        step: dict[tuple[int, int], tuple[float, tuple[int, int]]] = {}
        for (i, j), (busiest, _) in steps[-1].items():
            for i_next in range(i + 1, count - j - left):
                own = near[i_next] - near[i]
                if own > bound:
                    break
                ends = (count - i_next,) if last else range(j + 1, count - i_next - left + 1)
                for j_next in ends:
                    work = own + far[j_next] - far[j]
                    if work > bound:
                        break
                    most = max(busiest, work)
                    if most < step.get((i_next, j_next), (float("inf"),))[0]:
                        step[i_next, j_next] = (most, (i, j))
        steps.append(step)
    place = min(steps[-1], key=lambda ends: steps[-1][ends][0])
    near_sizes, far_sizes = [], []
    for step in steps[:0:-1]:
        before = step[place][1]
        near_sizes.append(place[0] - before[0])
        far_sizes.append(place[1] - before[1])
        place = before
    return near_sizes[::-1] + far_sizes
