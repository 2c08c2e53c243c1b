"""The chosen steps are the best there are, and better than as many equal ones."""

from itertools import combinations, pairwise

import pytest
import torch
from torch import Tensor

from flows.errors import UserError
from flows.metrics.energy import energy_distance
from flows.randomness import Draw
from flows.samplers.ode import solve_ode
from flows.samplers.sampler import time_grid
from flows.samplers.steps import optimal_grid, optimal_steps, step_costs
from tests.flows.gaussian import RING, RING_SPREAD, ring_velocity


def random_costs(last: int, seed: int) -> Tensor:
    costs = Draw(seed, 0, torch.arange(last + 1)).uniform("cost", (last + 1,)).double()
    earlier = torch.ones(last + 1, last + 1, dtype=torch.bool).tril()
    return costs.masked_fill(earlier, torch.inf)


@pytest.mark.parametrize("last", [1, 2, 5, 8])
def test_no_other_choice_costs_less(last: int) -> None:
    for seed in range(5):
        costs = random_costs(last, seed)
        for steps in range(1, last + 1):
            every = [(0, *inner, last) for inner in combinations(range(1, last), steps - 1)]
            total = {grid: sum(costs[i, j].item() for i, j in pairwise(grid)) for grid in every}
            assert tuple(optimal_steps(costs, steps)) == min(total, key=total.__getitem__)


def test_of_equal_choices_the_earliest_is_taken() -> None:
    free = random_costs(6, 0).masked_fill(torch.ones(7, 7, dtype=torch.bool).triu(1), 0.0)
    assert optimal_steps(free, 3) == [0, 1, 2, 6]
    assert optimal_steps(free, 6) == [0, 1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("steps", [0, 5])
def test_steps_that_are_not_there_are_refused(steps: int) -> None:
    with pytest.raises(UserError, match=rf"{steps} steps cannot .* of 4; ask for 1 to 4 of them\."):
        optimal_steps(random_costs(4, 0), steps)


def test_a_step_costs_how_far_it_misses_the_fine_trajectory() -> None:
    """dx/dt = 2 t, on a grid that is not uniform: Euler's sum beside its first term."""
    times = [0.0, 0.25, 0.75, 1.0]
    start = torch.zeros(3, 2)
    costs = step_costs(lambda x, t: torch.full_like(x, 2 * t), start, times)
    # From 0 at speed 0 to Euler's 0.25 * 0 + 0.5 * 0.5 + 0.25 * 1.5; six numbers miss it alike.
    assert costs[0, 3].item() == pytest.approx(6 * 0.625**2)
    assert costs[1, 3].item() == pytest.approx(6 * (0.75 * 0.5 - 0.625) ** 2)
    assert [costs[i, i + 1].item() for i in range(3)] == [0.0] * 3
    assert torch.isinf(costs.tril()[1, 0])
    both = step_costs(lambda x, t: torch.full_like(x, 2 * t), start[:1], times) * 3
    torch.testing.assert_close(both, costs)


def test_all_grids_of_a_straight_flow_cost_nothing() -> None:
    noise = Draw(0, 0, torch.arange(5)).normal("noise", (3,))
    costs = step_costs(lambda x, t: noise.flip(0) - noise, noise, time_grid(10, 0.0, 1.0, 1.0))
    assert costs[costs.isfinite()].max() < 1e-9


def test_every_step_of_the_grid_is_the_grid() -> None:
    noise = Draw(0, 0, torch.arange(20)).normal("noise", (2,))
    found = optimal_grid(ring_field, noise, low=1e-3, high=1 - 1e-3, fine=12, steps=12)
    assert found == time_grid(12, 0.0, 1.0, 1.0), "in units of the path, as the sampler takes it"


def test_few_chosen_steps_come_nearer_to_the_data_than_equal_ones() -> None:
    """The same noise by either grid, on eight Gaussians."""
    trajectories = Draw(9, 0, torch.arange(100)).normal("noise", (2,))
    chosen = optimal_grid(ring_field, trajectories, low=0.0, high=1.0, fine=60, steps=5)
    assert len(chosen) == 6
    for seed in range(3):
        ids = torch.arange(1500)
        noise = Draw(seed, 0, ids).normal("noise", (2,))
        real = RING[ids % 8] + RING_SPREAD * Draw(seed, 0, ids).normal("data", (2,))
        ours, equal = (
            energy_distance(solve_ode(ring_field, noise, times, "euler"), real, chunk=500)
            for times in (chosen, time_grid(5, 0.0, 1.0, 1.0))
        )
        assert ours < equal


def ring_field(x: Tensor, t: float) -> Tensor:
    return ring_velocity(x, x.new_full((len(x),), t), {"label": torch.full((len(x),), 8)})
