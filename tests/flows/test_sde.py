"""Stochastic samplers keep every marginal, whatever the noise.

On Gaussian data a sample is an affine function of its noises, x = B + A x_0 + sum_k C_k z_k. More
elements of one sample than it has noises give A, B and C by least squares, and with them the exact
moments of what the sampler draws, without error of chance.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from flows.paths import GVP, LINEAR, LINEAR_VP, PATHS, VP, Path
from flows.randomness import Draw
from flows.samplers.ode import solve_ode
from flows.samplers.sampler import time_grid
from flows.samplers.sde import Diffusion, LastStep, Noise, SdeSolver, solve_sde
from tests.flows.gaussian import MEAN, STD, GaussianVelocity, draw, moments

FORMS: list[Diffusion] = ["constant", "sbdm", "sigma", "linear", "decreasing", "bump"]
SOLVERS: list[SdeSolver] = ["sde", "sde_heun"]
LAST: list[LastStep] = ["tweedie", "mean", "euler"]
ONE = torch.arange(1)


@dataclass(frozen=True)
class Moments:
    """mean, std: of the samples; kept: the share of x_0 in the deviation, 1 without any noise."""

    mean: float
    std: float
    kept: float


def drawn_moments(sample: Tensor, starts: Tensor, steps: int) -> Moments:
    """sample, starts: (elements,) of sample 0, seed 3, after `steps` steps of which one has no noise."""
    noises = [
        Draw(3, step, ONE).normal("sampler_noise", sample.shape)[0] for step in range(steps - 1)
    ]
    columns = torch.stack([torch.ones_like(starts), starts, *noises], 1).double()
    solution = torch.linalg.lstsq(columns, sample[:, None].double()).solution[:, 0]
    assert (columns @ solution - sample).abs().max() < 1e-4, "affine in its noises"
    std = solution[1:].norm().item()
    return Moments(solution[0].item(), std, solution[1].abs().item() / std)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_every_diffusion_keeps_the_distribution(
    path: Path, form: Diffusion, solver: SdeSolver
) -> None:
    shape = (130,)
    starts = Draw(3, 0, ONE).normal("sample_noise", shape)[0]
    # What order 1 leaves at 100 steps; order 2 leaves the distance of VP's ends from 0 and 1. With
    # linear_vp the last step sets out at sigma = sqrt(2 / 100), which `tweedie` takes away.
    close = {"sde": 0.0075, "sde_heun": 0.003}[solver] if path is not LINEAR_VP else 0.022
    for last in LAST:
        drawn = draw(
            path, samples=ONE, shape=shape, steps=100, solver=solver, diffusion=form,
            diffusion_last=last,
        )  # fmt: skip
        found = drawn_moments(drawn.sample[0], starts, 100)
        assert found.mean == pytest.approx(MEAN, abs=0.0105), last
        assert found.std == pytest.approx(STD, abs=close), last
        assert found.kept < 0.7, "the noise of the path itself left no trace"


@pytest.mark.parametrize("form", ["constant", "sigma", "linear", "decreasing", "bump"])
@pytest.mark.parametrize(("solver", "order"), [("sde", 1), ("sde_heun", 2)])
def test_moments_converge_at_the_weak_order(form: Diffusion, solver: SdeSolver, order: int) -> None:
    velocity, condition = GaussianVelocity(GVP), {"label": torch.zeros(1)}

    def field(x: Tensor, t: float) -> Tensor:
        return velocity(x, x.new_full((1,), t), condition)

    def errors(steps: int) -> tuple[float, float]:
        starts = torch.linspace(-2.0, 2.0, 260, dtype=torch.float64)[None] ** 3
        # To where no w_t is held back yet, and a last step of no width.
        times = [*time_grid(steps, 0.0, 0.7, 1.0), 0.7 + 1e-9]
        end = solve_sde(
            field, starts, times, solver, path=GVP, noise=Noise(form, 1.0, "euler"), seed=3,
            samples=ONE,
        )  # fmt: skip
        found, (mean, std) = drawn_moments(end[0], starts[0], steps + 1), moments(GVP, 0.7)
        return found.mean - mean, found.std**2 - std**2

    for coarse, fine in zip(errors(80), errors(160), strict=True):
        assert math.log2(abs(coarse / fine)) == pytest.approx(order, abs=0.2)


def test_diffusion_forms_are_the_published_ones() -> None:
    t, scale = 0.3, 0.7
    expected: dict[Diffusion, float] = {
        "constant": 0.7,
        "sbdm": 0.7 * (1 - t) / t,
        "sigma": 0.7 * (1 - t),
        "linear": 0.7 * (1 - t),
        "decreasing": 0.25 * (0.7 * math.cos(math.pi * t) + 1) ** 2,
        "bump": 0.7 * math.sin(math.pi * t) ** 2,
    }
    for form in FORMS:
        found = Noise(form, scale, "mean").coefficient(LINEAR, t)
        assert found == pytest.approx(expected[form]), form
    sigma = Noise("sigma", 1.0, "mean").coefficient(GVP, t)
    assert sigma == pytest.approx(math.cos(math.pi * t / 2))
    # VP: g = beta_t / 2
    sbdm = Noise("sbdm", 1.0, "mean").coefficient(VP, t)
    assert sbdm == pytest.approx((0.1 + 19.9 * 0.7) / 2)


@pytest.mark.parametrize("form", ["constant", "sbdm", "sigma", "linear", "bump"])
@pytest.mark.parametrize(("solver", "still"), [("sde", "euler"), ("sde_heun", "heun")])
def test_without_diffusion_the_sde_is_the_ode(form: Diffusion, solver: SdeSolver, still) -> None:
    """With Euler's last step, at which no step with a score at its end could stop."""
    velocity, condition = GaussianVelocity(GVP), {"label": torch.zeros(4)}
    noise = Draw(3, 0, torch.arange(4)).normal("sample_noise", (5,))
    times = time_grid(20, 0.0, 1.0, 1.0)

    def field(x: Tensor, t: float) -> Tensor:
        return velocity(x, x.new_full((len(x),), t), condition)

    before = solve_ode(field, noise, times[:-1], still)
    expected = solve_ode(field, before, times[-2:], "euler")
    for last in ("mean", "euler"):
        drawn = draw(GVP, solver=solver, diffusion=form, diffusion_scale=0.0, diffusion_last=last)
        torch.testing.assert_close(drawn.sample, expected, rtol=0.0, atol=1e-6)


def test_the_last_steps_are_what_they_say() -> None:
    """From x at t = 0.9, straight to the end."""
    x = torch.tensor([[0.4, 1.9, 1.1]])
    velocity = GaussianVelocity(GVP)

    def end(last: LastStep) -> Tensor:
        return solve_sde(
            lambda x, t: velocity(x, x.new_full((1,), t), {"label": torch.zeros(1)}),
            x, [0.9, 1.0], "sde", path=GVP, noise=Noise("constant", 0.05, last), seed=3, samples=ONE,
        )  # fmt: skip

    c = GVP.coefficients(torch.tensor(0.9))
    mean, std = moments(GVP, 0.9)
    # The mean of a Gaussian given a noisy value of it, and the score of one.
    posterior = MEAN + c.alpha * STD**2 / std**2 * (x - mean)
    torch.testing.assert_close(end("tweedie"), posterior)
    drift = velocity(x, torch.tensor([0.9]), {"label": torch.zeros(1)})
    torch.testing.assert_close(end("euler"), x + 0.1 * drift)
    score = -(x - mean) / std**2
    torch.testing.assert_close(end("mean"), x + 0.1 * (drift + 0.05 * score), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_a_few_steps_of_any_diffusion_stay_finite(path: Path, steps: int) -> None:
    for form, solver, last in settings():
        result = draw(
            path, solver=solver, steps=steps, diffusion=form, diffusion_scale=3.0,
            diffusion_last=last,
        )  # fmt: skip
        assert result.sample.abs().max() < 20.0, (form, solver, last)
        calls = steps if solver == "sde" else 2 * steps - 1
        assert result.network_calls.tolist() == [calls] * 4


def settings() -> Sequence[tuple[Diffusion, SdeSolver, LastStep]]:
    return [(form, solver, last) for form in FORMS for solver in SOLVERS for last in LAST]
