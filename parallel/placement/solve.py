"""One call for a placement: how even ranks can be, then the fewest hops among placements as even.

Balance comes first: a bound on each layer's busiest rank, `Problem.limit` times the mean or the least that
is reached; affinity is then made the most of under it. Small problems are solved exactly, others by
alternating assignment.
"""

import math
import time
from dataclasses import dataclass
from typing import Literal

import numpy as np

from flows.errors import UserError
from parallel.mesh import divisors
from parallel.placement import exact
from parallel.placement.alternating import alternate, balanced
from parallel.placement.problem import Layer, Places, Problem, Reals, busyness, kept

Method = Literal["auto", "exact", "alternating"]
METHODS: tuple[Method, ...] = ("auto", "exact", "alternating")
# Variables of the integer program up to which a proven optimum takes seconds.
SMALL = 1000
# Float64 sums of the same counts in another order.
ROUNDING = 1e-9


@dataclass(frozen=True)
class Placed:
    """A placement, and how it was found.

    method: exact or alternating
    why: of that choice, in words
    proven: no placement with loads as even has fewer hops
    """

    places: Places
    method: Method
    why: str
    proven: bool


def place(problem: Problem, *, method: Method, starts: int, seed: int, seconds: float) -> Placed:
    """The best placement found.

    starts, seed: of the alternating assignment
    seconds: that all of it may take, but for the one start that there is always
    Raises UserError for ranks that do not divide the experts, or a limit below 1.
    """
    _check(problem)
    size = exact.variables(problem)
    small = size <= SMALL
    chosen: Method = method if method != "auto" else "exact" if small else "alternating"
    why = f"as asked; the program has {size:,} variables"
    if method == "auto":
        why = f"the program has {size:,} variables, {'at most' if small else 'more than'} {SMALL:,}"
    until = time.monotonic() + seconds
    caps, even = load_caps(problem, seconds if chosen == "exact" else 0.0)
    found = alternate(problem, caps, even, starts=starts, seed=seed, until=until)
    left = until - time.monotonic()
    if chosen == "alternating":
        why += "" if left > 0 else f", and {seconds:g} s were too short for all its starts"
        return Placed(found, chosen, why, proven=False)
    solved = exact.Exact(None, proven=False)
    if left > 0:
        solved = exact.fewest_hops(problem, caps, left)
    if not solved.proven:
        why += f", and {seconds:g} s were too short for a proof"
    if solved.places is None or kept(problem.flow, solved.places) < kept(problem.flow, found):
        return Placed(found, chosen, why, solved.proven)
    return Placed(solved.places, chosen, why, solved.proven)


def load_caps(problem: Problem, seconds: float) -> tuple[Reals, Places]:
    """(layers,) how busy the busiest rank may be, and a placement where none is busier.

    seconds: for all proofs, where exchanges of experts do not reach the limit; 0: they are believed
    """
    even = np.stack([balanced(own, problem.ranks) for own in problem.load])
    if math.isinf(problem.limit):
        return np.full(problem.layers, np.inf), even
    caps, until = np.zeros(problem.layers), time.monotonic() + seconds
    for layer, load in enumerate(problem.load):
        wanted = problem.limit * float(load.sum()) / problem.ranks
        left = until - time.monotonic()
        if _busiest(even[layer], load, problem.ranks) > wanted and left > 0:
            better = exact.most_even(load, problem.ranks, left)
            if better is not None:
                even[layer] = better
        least = _busiest(even[layer], load, problem.ranks)
        caps[layer] = max(least, wanted) * (1 + ROUNDING)
    return caps, even


def _busiest(layer: Layer, load: Reals, ranks: int) -> float:
    return float(busyness(layer, load, ranks).max())


def check_ranks(experts: int, ranks: int) -> None:
    """Raises UserError unless several ranks can have as many of the experts each."""
    if ranks < 2 or experts % ranks:
        useful = divisors(experts).removeprefix("1, ").removeprefix("1 or ")
        raise UserError(
            f"--ranks {ranks}: {experts} experts a layer lie on {useful} ranks, as many on each; choose one "
            "of these."
        )


def _check(problem: Problem) -> None:
    check_ranks(problem.experts, problem.ranks)
    if not problem.limit >= 1:
        raise UserError(
            f"--limit {problem.limit:g} is not 1 or more, and 1 is the load of a rank where all have the "
            "same; use 1.05, or inf to place by hops alone."
        )
