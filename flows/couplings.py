"""Which noise an image is joined to: couplings of the two ends of a path over the global batch.

Independent noise makes paths cross, and a network can only learn their average. Pairs that lie near
each other cross less: straighter flows, and gradients of less variance (Tong et al. 2024, "Improving
and generalizing flow-based generative models with minibatch optimal transport"; Pooladian et al. 2023,
"Multisample flow matching").

An image keeps its place, its label and its text; it is its noise that is exchanged. So every sample of
the stream is trained on exactly once whatever the coupling. `assignment` and `stable` exchange noise
without replacement. `entropic` draws for each image from its row of the plan: noise may be drawn twice
or never in one batch, and is standard normal over many, for the columns of a plan sum to one as well.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from flows.randomness import Draw

# A plan is drawn from, not differentiated: its column sums need not be better than one batch shows.
TOLERANCE, ITERATIONS = 1e-3, 300
TURNS = 10  # of Sinkhorn between two exponentials


@dataclass(frozen=True)
class Coupled:
    """noise: (batch, ...) that each image is joined to
    weight: (batch,) float32 of each pair, 1 on average; None where all weigh the same
    """

    noise: Tensor
    weight: Tensor | None


@dataclass(frozen=True)
class Coupling:
    """How pairs are made, by their squared distances c.

    kind: `assignment`: one to one with the smallest sum of c (optimal transport; "BatchOT"); `entropic`:
        drawn from the plan that minimises the mean of c - epsilon entropy ("BatchEOT"); `stable`: one
        to one, the nearest first, so that no two would both rather have each other; `weighted`:
        independent noise, pairs weighted by exp(-c / epsilon) (Calvo-Ordonez et al. 2025, "Weighted
        conditional flow matching")
    epsilon: of `entropic` and `weighted`, in units of c
    group: samples that are coupled among themselves, consecutive in the global batch; 0 for all of it.
        An assignment of n samples takes n^3 operations.
    """

    kind: Literal["assignment", "entropic", "stable", "weighted"]
    epsilon: float
    group: int

    def __call__(self, image: Tensor, noise: Tensor, draw: Draw) -> Coupled:
        """Couple a whole batch: image, noise (batch, ...); draw: of its samples."""
        size = self.group or len(image)
        if self.kind == "weighted":
            pairs = zip(image.split(size), noise.split(size), strict=True)
            weights = [gibbs_weights(*pair, self.epsilon) for pair in pairs]
            return Coupled(noise, torch.cat(weights))
        uniform = draw.uniform("coupling")
        chosen = [
            start + self._partners(image[start : start + size], noise[start : start + size], u)
            for start, u in zip(range(0, len(image), size), uniform.split(size), strict=True)
        ]
        return Coupled(noise[torch.cat(chosen)], None)

    def _partners(self, image: Tensor, noise: Tensor, uniform: Tensor) -> Tensor:
        """(n,) int64 index of the noise that each image is joined to."""
        cost = squared_distances(image, noise)
        match self.kind:
            case "assignment":
                return assignment(cost)
            case "stable":
                return stable_matching(cost)
            case _:
                plan = sinkhorn(cost, self.epsilon, tolerance=TOLERANCE, iterations=ITERATIONS)
                return draw_partners(plan, uniform)


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """(n, m) float64 squared distances of x (n, ...) and y (m, ...)."""
    x, y = x.flatten(1).to(torch.float64), y.flatten(1).to(torch.float64)
    return (x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T).clamp_min_(0.0)


def assignment(cost: Tensor) -> Tensor:
    """(n,) int64 column of each row, each column once, with the smallest sum of cost (n, n)."""
    # Brings in half of scipy, which every rank of any training would otherwise wait for.
    from scipy.optimize import linear_sum_assignment

    _, columns = linear_sum_assignment(cost.cpu().numpy())
    return torch.from_numpy(columns).to(cost.device, torch.int64)


def stable_matching(cost: Tensor) -> Tensor:
    """(n,) int64 column of each row, each column once: the cheapest pair first, then the next.

    No row and column that are not a pair cost less than both their pairs (Gale and Shapley 1962).
    Whoever are each other's cheapest are a pair, so all such are found at once: O(n^2 log n) where
    one assignment takes O(n^3).
    """
    rows = torch.arange(len(cost), device=cost.device)
    columns, partner = rows, torch.empty_like(rows)
    while len(rows):
        nearest, row = cost.argmin(1), cost.argmin(0)
        paired = row[nearest] == torch.arange(len(rows), device=cost.device)
        partner[rows[paired]] = columns[nearest[paired]]
        free = torch.ones_like(paired)
        free[nearest[paired]] = False
        cost = cost[~paired][:, free]
        rows, columns = rows[~paired], columns[free]
    return partner


def sinkhorn(cost: Tensor, epsilon: float, *, tolerance: float, iterations: int) -> Tensor:
    """The (n, m) plan P of equal marginals that minimises <P, cost> - epsilon entropy(P), in float64.

    P = exp((f + g - cost) / epsilon), f and g made right in turn (Cuturi 2013). A few turns are products
    with exp of the last logarithms, which then take up what the products gave (Schmitzer 2019): no
    exponential in between, and no overflow, since a turn multiplies by max(n, m) at most. Rows sum to
    1 / n exactly.

    tolerance: largest relative error of a sum at which the turns end
    iterations: most turns; the error of the columns is then what it is
    """
    kernel = -cost.to(torch.float64) / epsilon
    n, m = kernel.shape
    f = -torch.logsumexp(kernel, 1) - math.log(n)
    g = -torch.logsumexp(kernel + f[:, None], 0) - math.log(m)
    for _ in range(0, iterations, TURNS):
        plan = torch.exp(kernel + f[:, None] + g)
        if ((plan.sum(1) * n - 1).abs() <= tolerance).all():
            break
        column = kernel.new_ones(m)
        for _ in range(TURNS):
            row = 1 / (n * (plan @ column))
            column = 1 / (m * (plan.T @ row))
        f, g = f + torch.log(row), g + torch.log(column)
    f = -torch.logsumexp(kernel + g, 1) - math.log(n)
    return torch.exp(kernel + f[:, None] + g)


def draw_partners(plan: Tensor, uniform: Tensor) -> Tensor:
    """(n,) int64 column drawn for each row of a plan (n, m) by a (n,) number in (0, 1)."""
    cumulative = plan.cumsum(1)
    aim = uniform.to(plan.dtype) * cumulative[:, -1]
    return torch.searchsorted(cumulative, aim[:, None]).squeeze(1).clamp_max(plan.shape[1] - 1)


def gibbs_weights(image: Tensor, noise: Tensor, epsilon: float) -> Tensor:
    """(n,) float32 exp(-|image - noise|^2 / epsilon) over its mean, in logarithms until the end."""
    difference = (image - noise).flatten(1).to(torch.float64)
    logarithm = -difference.square().sum(1) / epsilon
    return (torch.softmax(logarithm, 0) * len(image)).to(torch.float32)


def other_samples(label: Tensor, own: Tensor, uniform: Tensor) -> Tensor:
    """Another sample for some of a batch: of another class if there is one, any other if there is none.

    label: (n,) class of all; own: (k,) index of those that ask; uniform: (k,) numbers in (0, 1)
    returns (k,) int64 index; the sample's own where it is alone
    """
    everyone = torch.arange(len(label), device=label.device)
    others = everyone != own[:, None]
    strangers = label != label[own][:, None]
    allowed = torch.where(strangers.any(1, keepdim=True), strangers, others)
    count = allowed.cumsum(1)
    nth = (uniform.to(torch.float64) * count[:, -1]).long() + 1
    found = torch.searchsorted(count, nth[:, None]).squeeze(1)
    return torch.where(count[:, -1] > 0, found, own)
