"""Placements of many experts: layer by layer the best one beside its neighbours, again and again.

One layer beside two that stay is a linear assignment of experts to seats, which is solved exactly
(Jonker-Volgenant); where the loads it makes are too uneven, it is repaired, and experts change places as
long as that keeps more tokens. Sweeps over the layers end in a placement that no single layer can better;
several starts are made, each with one random layer, and from the best end some more, each after a few random
exchanges in two layers (iterated local search). The best of all counts.
"""

import math
import time

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from parallel.placement.problem import Layer, Places, Problem, Reals, busyness, gains, kept

# Of a count, differences are whole numbers; of a float64 sum, less than this is rounding.
ROUNDING = 1e-9
KICKS = 4  # further ends for each start


def balanced(load: Reals, ranks: int) -> Layer:
    """(experts,) a placement of one layer with loads as even as exchanges of two experts can make them.

    The heaviest first, each to the least busy rank that has a seat left (Graham 1969).
    """
    seats, busy = np.full(ranks, len(load) // ranks), np.zeros(ranks, dtype=np.float64)
    layer = np.zeros(len(load), dtype=np.int64)
    for expert in np.argsort(-load, kind="stable"):
        free = np.flatnonzero(seats)
        rank = free[np.argmin(busy[free])]
        layer[expert], seats[rank], busy[rank] = rank, seats[rank] - 1, busy[rank] + load[expert]
    while True:
        busy = busyness(layer, load, ranks)
        move = load[None, :] - load[:, None]  # what the rank of the first gains in an exchange
        apart = busy[layer][:, None] - busy[layer][None, :]
        change = np.where(layer[:, None] != layer[None, :], 2 * move * (apart + move), 0.0)
        best = int(np.argmin(change))
        if change.flat[best] >= -ROUNDING * float(load.sum()) ** 2:
            return layer
        _exchange(layer, best)


def alternate(
    problem: Problem, caps: Reals, even: Places, *, starts: int, seed: int, until: float = math.inf
) -> Places:
    """The best placement that is found, of those whose ranks are nowhere busier than `caps`.

    caps: (layers,) the largest load of a rank; infinite: any
    even: a placement as even as that
    until: by `time.monotonic`, when no other start or kick is begun; there is one start always
    """
    generator = np.random.default_rng(seed)
    best = _begun(problem, caps, even, generator)
    for _ in range(starts - 1):
        if time.monotonic() >= until:
            return best
        places = _begun(problem, caps, even, generator)
        if kept(problem.flow, places) > kept(problem.flow, best):
            best = places
    for _ in range(KICKS * starts):
        if time.monotonic() >= until:
            return best
        places, two = best.copy(), min(2, problem.layers)
        for layer in generator.choice(problem.layers, size=two, replace=False):
            _shake(problem, caps, places, int(layer), two, generator)
        places = _swept(problem, caps, places)
        if kept(problem.flow, places) >= kept(problem.flow, best):
            best = places
    return best


def _begun(problem: Problem, caps: Reals, even: Places, generator: np.random.Generator) -> Places:
    """One start: a layer at random, its neighbours one after the other, then sweeps."""
    layers, places = problem.layers, even.copy()
    known = np.zeros(layers, dtype=np.bool_)
    first = int(generator.integers(layers))
    _shake(problem, caps, places, first, 4 * problem.experts, generator)
    known[first] = True
    for layer in [*range(first + 1, layers), *range(first - 1, -1, -1)]:
        places[layer] = _best(problem, caps, places, layer, known)
        known[layer] = True
    return _swept(problem, caps, places)


def _shake(
    problem: Problem,
    caps: Reals,
    places: Places,
    layer: int,
    times: int,
    generator: np.random.Generator,
) -> None:
    """Random exchanges in one layer, in place, but for those that make a rank busier than `caps`."""
    for _ in range(times):
        own = places[layer].copy()
        _exchange(own, int(generator.integers(problem.experts**2)))
        if busyness(own, problem.load[layer], problem.ranks).max() <= caps[layer]:
            places[layer] = own


def _swept(problem: Problem, caps: Reals, places: Places) -> Places:
    """`places`, after every layer in turn was placed at best beside its neighbours until nothing moved."""
    layers, known = problem.layers, np.ones(problem.layers, dtype=np.bool_)
    before = -1.0
    while (now := kept(problem.flow, places)) > before + ROUNDING * problem.flow.sum():
        before = now
        for layer in [*range(layers), *range(layers - 2, -1, -1)]:
            places[layer] = _best(problem, caps, places, layer, known)
    return places


def _best(
    problem: Problem, caps: Reals, places: Places, layer: int, known: NDArray[np.bool_]
) -> Layer:
    """The best placement of one layer that is found; never worse than the one it has."""
    gain, load, cap = gains(problem, places, layer, known), problem.load[layer], float(caps[layer])
    free = _assigned(gain, problem.seats)
    if float(busyness(free, load, problem.ranks).max()) <= cap:
        return free
    renamed = _renamed(gain, places[layer])
    found = [_exchanged(renamed, gain, load, cap)]
    repaired = _repaired(free, gain, load, cap)
    if repaired is not None:
        found.append(_exchanged(repaired, gain, load, cap))
    return max(found, key=lambda own: float(gain[np.arange(len(own)), own].sum()))


def _assigned(gain: Reals, seats: int) -> Layer:
    """(experts,) the placement that keeps most, whatever the loads."""
    _, seat = linear_sum_assignment(np.repeat(gain, seats, axis=1), maximize=True)
    rank: Layer = np.asarray(seat, dtype=np.int64) // seats
    return rank


def _renamed(gain: Reals, layer: Layer) -> Layer:
    """The same groups of experts, on the ranks where they keep most."""
    together = np.eye(gain.shape[1])[layer].T @ gain
    _, rank = linear_sum_assignment(together, maximize=True)
    renamed: Layer = np.asarray(rank, dtype=np.int64)[layer]
    return renamed


def _repaired(layer: Layer, gain: Reals, load: Reals, cap: float) -> Layer | None:
    """After the exchanges that lose least for what they take off busy ranks; None where they do not do."""
    layer, ranks = layer.copy(), gain.shape[1]
    for _ in range(len(layer) ** 2):  # each takes something off, be it little
        over = _excess(busyness(layer, load, ranks), cap)
        if not over.sum() > 0:
            return layer
        won, after = _exchanges(layer, gain, load)
        mine, other = after
        left = _excess(mine, cap) + _excess(other, cap)
        less = over[layer][:, None] + over[layer][None, :] - left
        useful = (layer[:, None] != layer[None, :]) & (less > ROUNDING * load.sum())
        if not useful.any():
            return None
        price = np.where(useful, -won / np.where(useful, less, 1.0), np.inf)
        # Of those that cost nothing, the one that takes off most.
        cheapest = useful & (price <= max(price.min(), 0.0))
        _exchange(layer, int(np.argmax(np.where(cheapest, less, -np.inf))))
    return None


def _exchanged(layer: Layer, gain: Reals, load: Reals, cap: float) -> Layer:
    """After the exchanges of two experts that keep more tokens and make no rank busier than `cap`."""
    layer, least = layer.copy(), ROUNDING * float(np.abs(gain).sum())
    while True:
        won, (mine, other) = _exchanges(layer, gain, load)
        allowed = (mine <= cap) & (other <= cap) & (layer[:, None] != layer[None, :])
        won = np.where(allowed, won, 0.0)
        best = int(np.argmax(won))
        if won.flat[best] <= least:
            return layer
        _exchange(layer, best)


def _exchanges(layer: Layer, gain: Reals, load: Reals) -> tuple[Reals, tuple[Reals, Reals]]:
    """(experts, experts) tokens won if two experts change places, and then the loads of the two ranks."""
    there = gain[:, layer]  # of the first, on the rank of the second
    now = np.diagonal(there)
    busy = busyness(layer, load, gain.shape[1])[layer]
    move = load[None, :] - load[:, None]
    won = there + there.T - now[:, None] - now[None, :]
    return won, (busy[:, None] + move, busy[None, :] - move)


def _exchange(layer: Layer, pair: int) -> None:
    one, other = divmod(pair, len(layer))
    layer[[one, other]] = layer[[other, one]]


def _excess(busy: Reals, cap: float) -> Reals:
    excess: Reals = np.maximum(busy - cap, 0.0)
    return excess
