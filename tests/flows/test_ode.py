"""Solvers of the ODE converge at the order theory gives, at the cost they say."""

import math

import pytest
import torch
from torch import Tensor

from flows.paths import GVP, LINEAR, PATHS, VP, Path
from flows.randomness import Draw
from flows.samplers.ode import OdeSolver, solve_ode
from flows.samplers.sampler import time_grid
from tests.flows.gaussian import GaussianVelocity, draw, exact

FIXED = [("euler", 1), ("heun", 2), ("midpoint", 2), ("pseudo_corrector", 2), ("rk4", 4)]
# A spiral: neither symmetric nor normal.
MATRIX = torch.tensor([[-0.5, 2.0], [-1.0, -0.3]], dtype=torch.float64)


def evaluations(solver: OdeSolver, steps: int) -> int:
    each = {"euler": 1, "heun": 2, "midpoint": 2, "rk4": 4}
    return steps + 1 if solver == "pseudo_corrector" else each[solver] * steps


@pytest.mark.parametrize(("solver", "order"), FIXED)
def test_the_error_of_a_linear_ode_falls_at_the_order(solver: OdeSolver, order: int) -> None:
    """dx/dt = A x, whose solution is exp(A) x."""
    start = torch.tensor([[1.0, 0.5], [-2.0, 0.3]], dtype=torch.float64)
    asked: list[float] = []

    def field(x: Tensor, t: float) -> Tensor:
        asked.append(t)
        return x @ MATRIX.T

    errors = []
    for steps in (40, 80):
        asked.clear()
        end = solve_ode(field, start, time_grid(steps, 0.0, 1.0, 1.0), solver)
        errors.append((end - start @ torch.linalg.matrix_exp(MATRIX).T).abs().max().item())
        assert len(asked) == evaluations(solver, steps)
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize("path", [LINEAR, GVP, VP], ids=lambda path: path.name)
@pytest.mark.parametrize(("solver", "order"), FIXED)
def test_solvers_converge_at_their_order_on_every_path(
    path: Path, solver: OdeSolver, order: int
) -> None:
    velocity, condition = GaussianVelocity(path), {"label": torch.zeros(4)}
    noise = torch.linspace(-2.0, 2.0, 20, dtype=torch.float64).reshape(4, 5)
    # VP's velocity has no bound at t = 1; the order is that of the smooth part.
    high = 0.9 if path is VP else 1.0
    if solver == "midpoint" and path is LINEAR:
        # With y' = a y the error of a step begins with (a'' + 6 a a' + 4 a^3) h^3 / 24. It is zero
        # where a = q' / 2q of a quadratic q, and the variance on the linear path is one.
        order = 3

    def field(x: Tensor, t: float) -> Tensor:
        return velocity(x, x.new_full((len(x),), t), condition)

    errors = []
    for steps in (80, 160):
        end = solve_ode(field, noise, time_grid(steps, 0.0, high, 1.0), solver)
        errors.append((end - exact(path, noise, 0.0, high)).abs().max().item())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.15)
    assert len(velocity.times) == evaluations(solver, 80) + evaluations(solver, 160)


def test_the_first_step_of_the_pseudo_corrector_is_heuns() -> None:
    start = torch.tensor([[1.0, 0.5]], dtype=torch.float64)

    def field(x: Tensor, t: float) -> Tensor:
        return x @ MATRIX.T + t

    one, two = time_grid(1, 0.0, 0.2, 1.0), time_grid(2, 0.0, 0.4, 1.0)
    heun, ours = (solve_ode(field, start, one, solver) for solver in ("heun", "pseudo_corrector"))
    assert torch.equal(heun, ours)
    heun, ours = (solve_ode(field, start, two, solver) for solver in ("heun", "pseudo_corrector"))
    assert not torch.allclose(heun, ours, rtol=0.0, atol=1e-5), "later ones save an evaluation"


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_the_adaptive_solver_is_accurate_and_never_leaves_the_path(path: Path) -> None:
    velocity = GaussianVelocity(path)
    result = draw(path, velocity, solver="dopri5")
    support = path.support("velocity", sampling=True)
    noise = Draw(3, 0, torch.arange(4)).normal("sample_noise", (5,)).double()
    expected = exact(path, noise, support.low, support.high).float()
    torch.testing.assert_close(result.sample, expected, rtol=0.0, atol=2e-3)
    assert max(velocity.times) <= support.high
    assert result.network_calls.tolist() == [len(velocity.times)] * 4
