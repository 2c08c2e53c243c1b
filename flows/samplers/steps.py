"""Which few times to solve the ODE at, told by its own trajectories.

Bellman's recursion over a fine grid (Nguyen, Nguyen and Nguyen 2024, "Bellman optimal stepsize
straightening of flow-matching models"). A long step from t_i to t_j costs how far Euler
misses the fine trajectory, c(i, j) = E |x_i + (t_j - t_i) v(x_i, t_i) - x_j|^2; a grid costs the sum
over its steps, and the best one of K steps follows from the best ones of K - 1.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from flows.errors import UserError
from flows.samplers.ode import VelocityField
from flows.samplers.sampler import time_grid


def optimal_grid(
    field: VelocityField, noise: Tensor, *, low: float, high: float, fine: int, steps: int
) -> list[float]:
    """The best `steps` Euler steps of a uniform grid of `fine`, as `sample(times=...)` takes them.

    That is times from 0 to 1, whatever [low, high] they stand for.

    noise: (batch, ...) float32 where trajectories begin; the paper takes 100 of them and fine = 100

    Raises UserError if there are not so many steps in the grid.
    """
    costs = step_costs(field, noise, time_grid(fine, low, high, 1.0))
    times = time_grid(fine, 0.0, 1.0, 1.0)
    return [times[i] for i in optimal_steps(costs, steps)]


@torch.no_grad()
def step_costs(field: VelocityField, noise: Tensor, times: Sequence[float]) -> Tensor:
    """(len(times), len(times)) float64 c(i, j) for i < j, infinite elsewhere, on the CPU.

    The sum over the samples and their dimensions, so that those of several batches add up.
    """
    points, velocities = [noise], []
    for start, end in pairwise(times):
        velocities.append(field(points[-1], start))
        points.append(points[-1] + (end - start) * velocities[-1])
    costs = torch.full((len(times), len(times)), torch.inf, dtype=torch.float64)
    for i, velocity in enumerate(velocities):
        for j in range(i + 1, len(times)):
            missed = points[i] + (times[j] - times[i]) * velocity - points[j]
            costs[i, j] = missed.square().sum(dtype=torch.float64)
    return costs


def optimal_steps(costs: Tensor, steps: int) -> list[int]:
    """0 = i_0 < i_1 < ... < i_steps = last that costs least; the smallest index where some are equal.

    costs: (n, n) float64 of a step from i to j, infinite unless i < j

    Raises UserError if n indices do not have that many steps between them.
    """
    last = len(costs) - 1
    if not 1 <= steps <= last:
        raise UserError(
            f"{steps} steps cannot be chosen from a grid of {last}; ask for 1 to {last} of them."
        )
    to_end = costs[:, last]
    choices: list[Tensor] = []
    for _ in range(steps - 1):
        through = costs + to_end
        # Nothing goes on from the last index, so a step to it is no step of several.
        through[:, last] = torch.inf
        to_end, following = through.min(1).values, through.argmin(1)
        choices.append(following)
    chosen = [0]
    for following in reversed(choices):
        chosen.append(int(following[chosen[-1]]))
    return [*chosen, last]
