"""Placements of few experts, as integer programs that HiGHS solves to the proven optimum.

x[l, e, r] = 1 where expert e of layer l is on rank r: one rank for an expert, E / R experts for a rank. The
tokens that stay are sums of products of two of these, y[l, i, j, r] = x[l, i, r] x[l + 1, j, r]. They become
linear in Adams and Sherali's way: an expert on rank r has E / R companions there in the next layer, so that
sum_j y = (E / R) x[l, i, r], and likewise sum_i. With y <= both factors that is exact, and its relaxation is
far tighter than with these alone. Ranks are exchangeable: expert e of the first layer is on one of 0 ... e.
HiGHS's tolerances are absolute and its numbers float64: large counts are divided, so that their mean is
`MEAN`, and an optimum is proven to 1e-9 of the mean count.
"""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_matrix, eye, hstack, kron, vstack

from parallel.placement.problem import Layer, Places, Problem, Reals

OPTIMAL, RAN_OUT = 0, 1
MEAN = 1000.0


@dataclass(frozen=True)
class Exact:
    """What the program found in its time.

    places: None if it found none
    proven: nothing is better
    """

    places: Places | None
    proven: bool


def variables(problem: Problem) -> int:
    """The size of the program."""
    layers, experts = problem.layers, problem.experts
    return (layers * experts + (layers - 1) * experts**2) * problem.ranks


def most_even(load: Reals, ranks: int, seconds: float) -> Layer | None:
    """(experts,) a placement of one layer whose busiest rank has least to do; None if time ran out."""
    experts = len(load)
    count = experts * ranks
    one = kron(eye(experts), np.ones((1, ranks)))
    full = kron(np.ones((1, experts)), eye(ranks))
    work = kron(load[None, :] / _unit(load), eye(ranks))
    rows = vstack([_wide(one), _wide(full), hstack([work, -np.ones((ranks, 1))])])
    low = np.concatenate(
        [np.ones(experts), np.full(ranks, experts // ranks), np.full(ranks, -np.inf)]
    )
    high = np.concatenate([np.ones(experts), np.full(ranks, experts // ranks), np.zeros(ranks)])
    upper = np.ones(count + 1)
    upper[-1] = np.inf
    first = np.triu(np.ones((experts, ranks)), 1).ravel() > 0
    upper[:-1][first] = 0
    found = milp(
        np.concatenate([np.zeros(count), [1.0]]),
        constraints=LinearConstraint(csr_matrix(rows), low, high),
        integrality=np.concatenate([np.ones(count), [0]]),
        bounds=Bounds(0, upper),
        options={"time_limit": seconds, "mip_rel_gap": 0.0},
    )
    if found.status != OPTIMAL:
        return None
    layer: Layer = found.x[:-1].reshape(experts, ranks).argmax(1)
    return layer


def fewest_hops(problem: Problem, caps: Reals, seconds: float) -> Exact:
    """The placement that keeps most tokens where they are, no rank of layer l busier than `caps[l]`."""
    layers, experts, ranks = problem.layers, problem.experts, problem.ranks
    seats, width = problem.seats, experts * ranks
    xs = layers * width
    identity, ones = eye(ranks), np.ones((1, experts))
    of_first = kron(kron(eye(experts), ones), identity)  # sum over j of y[i, j, r]
    of_second = kron(kron(ones, eye(experts)), identity)
    spread_first = kron(kron(eye(experts), ones.T), identity)  # x[i, r] for every j
    spread_second = kron(kron(ones.T, eye(experts)), identity)
    rows, lows, highs = [], [], []

    def add(block: csr_matrix, low: Reals, high: Reals) -> None:
        rows.append(block)
        lows.append(low)
        highs.append(high)

    pairs = (layers - 1) * experts * width
    choose = kron(eye(layers * experts), np.ones((1, ranks)))
    fill = kron(eye(layers), kron(ones, identity))
    for block, value in ((choose, 1.0), (fill, float(seats))):
        size = np.full(block.shape[0], value)
        add(hstack([block, csr_matrix((block.shape[0], pairs))]), size, size)
    for layer in np.flatnonzero(np.isfinite(caps)).tolist():
        unit = _unit(problem.load[layer])
        work = kron(problem.load[layer][None, :] / unit, identity)
        before, after = layer * width, xs + pairs - (layer + 1) * width
        block = hstack([csr_matrix((ranks, before)), work, csr_matrix((ranks, after))])
        add(block, np.full(ranks, -np.inf), np.full(ranks, caps[layer] / unit))
    for layer in range(layers - 1):
        for neighbour, summed, spread in (
            (layer, of_first, spread_first),
            (layer + 1, of_second, spread_second),
        ):
            zero = np.zeros(width)
            add(_pair(problem, layer, neighbour, -seats * eye(width), summed), zero, zero)
            many = experts * width
            block = _pair(problem, layer, neighbour, -spread, eye(many))
            add(block, np.full(many, -np.inf), np.zeros(many))
    upper = np.ones(xs + pairs)
    upper[:width][np.triu(np.ones((experts, ranks)), 1).ravel() > 0] = 0
    flow = problem.flow.ravel() / _unit(problem.flow)
    found = milp(
        np.concatenate([np.zeros(xs), -np.repeat(flow, ranks)]),
        constraints=LinearConstraint(
            csr_matrix(vstack(rows)), np.concatenate(lows), np.concatenate(highs)
        ),
        integrality=np.concatenate([np.ones(xs), np.zeros(pairs)]),
        bounds=Bounds(0, upper),
        options={"time_limit": seconds, "mip_rel_gap": 0.0},
    )
    if found.status not in (OPTIMAL, RAN_OUT):
        raise RuntimeError(f"HiGHS gave up on a placement: {found.message}")
    if found.x is None:
        return Exact(None, proven=False)
    places: Places = found.x[:xs].reshape(layers, experts, ranks).argmax(2)
    return Exact(places, proven=found.status == OPTIMAL)


def _unit(counts: Reals) -> float:
    """By which counts are divided for HiGHS; 1 where they are small already."""
    return max(float(counts.sum()) / max(counts.size, 1) / MEAN, 1.0)


def _pair(
    problem: Problem, layer: int, neighbour: int, of_x: csr_matrix, of_y: csr_matrix
) -> csr_matrix:
    """Rows that compare `of_x` of the layer `neighbour` with `of_y` of the pair that begins at `layer`."""
    width, rows = problem.experts * problem.ranks, of_x.shape[0]
    many, left = problem.experts * width, problem.layers - 2 - layer
    return hstack(
        [
            csr_matrix((rows, neighbour * width)),
            of_x,
            csr_matrix((rows, (problem.layers - 1 - neighbour) * width + layer * many)),
            of_y,
            csr_matrix((rows, left * many)),
        ]
    )


def _wide(block: csr_matrix) -> csr_matrix:
    """With a column for the largest load."""
    return hstack([block, csr_matrix((block.shape[0], 1))])
