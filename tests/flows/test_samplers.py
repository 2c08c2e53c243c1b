"""Samplers carry noise to the data's distribution at the rate theory gives, each sample on its own.

Data is Gaussian, so that the velocity and the solution of the ODE are known exactly.
"""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from flows.paths import GVP, LINEAR, PATHS, VP, Path
from flows.randomness import Draw
from flows.samplers.guidance import Condition, null_condition
from flows.samplers.ode import solve_ode
from flows.samplers.sampler import Sampled, sample, time_grid
from flows.samplers.sde import diffusion_coefficient

MEAN, STD = 1.5, 0.5
FORMS = ["constant", "sbdm", "sigma", "linear", "decreasing", "bump"]


class GaussianVelocity:
    """v of data N(MEAN + label, STD^2), elementwise; remembers the times it was asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.times: list[float] = []

    def __call__(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        assert bool((t == t[0]).all())
        self.times.append(t[0].item())
        mean = MEAN + condition["label"].to(x.dtype).reshape(-1, *(1,) * (x.dim() - 1))
        c = self.path.coefficients(t, x.dim())
        variance = c.alpha * c.alpha * STD**2 + c.sigma * c.sigma
        slope = (c.alpha_dot * c.alpha * STD**2 + c.sigma_dot * c.sigma) / variance
        return c.alpha_dot * mean + slope * (x - c.alpha * mean)


def draw(path: Path, velocity: GaussianVelocity | None = None, **changes) -> Sampled:
    count = len(changes.get("samples", range(4)))
    condition = {"label": changes.pop("label", torch.zeros(count, dtype=torch.int64))}
    arguments = {
        "condition": condition,
        "null": null_condition(condition, 7),
        "samples": torch.arange(count),
        "shape": (5,),
        "seed": 3,
        "path": path,
        "prediction": "velocity",
        "solver": "euler",
        "steps": 20,
        "guidance": 1.0,
        "guidance_low": 0.0,
        "guidance_high": 1.0,
        "diffusion": "sigma",
        "diffusion_scale": 1.0,
        "time_shift": 1.0,
    }
    return sample(velocity or GaussianVelocity(path), **(arguments | changes))


def exact(path: Path, noise: Tensor, low: float, high: float) -> Tensor:
    """The ODE keeps the quantile of a Gaussian: (x - alpha MEAN) / std_t does not change."""
    ends = path.coefficients(torch.tensor([low, high], dtype=torch.float64))
    std = (ends.alpha.square() * STD**2 + ends.sigma.square()).sqrt()
    return ends.alpha[1] * MEAN + std[1] / std[0] * (noise - ends.alpha[0] * MEAN)


@pytest.mark.parametrize("path", [LINEAR, GVP, VP], ids=lambda path: path.name)
@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2), ("midpoint", 2)])
def test_solvers_converge_at_their_order(path: Path, solver: str, order: int) -> None:
    velocity, condition = GaussianVelocity(path), {"label": torch.zeros(4)}
    noise = torch.linspace(-2.0, 2.0, 20, dtype=torch.float64).reshape(4, 5)
    # VP's velocity has no bound at t = 1; the order is that of the smooth part.
    high = 0.9 if path is VP else 1.0
    evaluations = order * (80 + 160)
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
    assert len(velocity.times) == evaluations


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_the_adaptive_solver_is_accurate_and_never_leaves_the_path(path: Path) -> None:
    velocity = GaussianVelocity(path)
    result = draw(path, velocity, solver="dopri5")
    support = path.support("velocity", sampling=True)
    noise = Draw(3, 0, torch.arange(4)).normal("sample_noise", (5,)).double()
    expected = exact(path, noise, support.low, support.high).float()
    torch.testing.assert_close(result.sample, expected, rtol=0.0, atol=2e-3)
    assert max(velocity.times) <= support.high
    assert result.network_calls == len(velocity.times)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("form", FORMS)
def test_every_diffusion_keeps_the_distribution(path: Path, form: str) -> None:
    many = {"samples": torch.arange(80), "label": torch.zeros(80, dtype=torch.int64)}
    drawn = draw(path, **many, shape=(500,), solver="sde", steps=200, diffusion=form).sample
    # 40 000 numbers: four standard errors are 0.01 and 0.007; the rest is the solver's order.
    assert drawn.mean().item() == pytest.approx(MEAN, abs=0.02)
    assert drawn.std().item() == pytest.approx(STD, abs=0.01)
    quiet = draw(path, **many, shape=(500,), solver="euler", steps=200).sample
    correlation = torch.corrcoef(torch.stack((drawn.flatten(), quiet.flatten())))[0, 1]
    assert correlation < 0.9, "the noise of the path itself left no trace"


def test_diffusion_forms_are_the_published_ones() -> None:
    t, scale = 0.3, 0.7
    expected = {
        "constant": 0.7,
        "sbdm": 0.7 * (1 - t) / t,
        "sigma": 0.7 * (1 - t),
        "linear": 0.7 * (1 - t),
        "decreasing": 0.25 * (0.7 * math.cos(math.pi * t) + 1) ** 2,
        "bump": 0.7 * math.sin(math.pi * t) ** 2,
    }
    for form in FORMS:
        assert diffusion_coefficient(form, scale, LINEAR, t) == pytest.approx(expected[form]), form
    assert diffusion_coefficient("sigma", 1.0, GVP, t) == pytest.approx(math.cos(math.pi * t / 2))
    # VP: g = beta_t / 2
    assert diffusion_coefficient("sbdm", 1.0, VP, t) == pytest.approx((0.1 + 19.9 * 0.7) / 2)


@pytest.mark.parametrize("form", ["constant", "sbdm", "sigma", "linear", "bump"])
def test_without_diffusion_the_sde_is_the_ode(form: str) -> None:
    still = draw(LINEAR, solver="sde", diffusion=form, diffusion_scale=0.0).sample
    torch.testing.assert_close(still, draw(LINEAR, solver="euler").sample, rtol=0.0, atol=1e-6)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_a_few_steps_of_any_diffusion_stay_finite(path: Path, steps: int) -> None:
    for form in FORMS:
        result = draw(path, solver="sde", steps=steps, diffusion=form, diffusion_scale=3.0)
        assert result.sample.abs().max() < 20.0, form
        assert result.network_calls == steps


@pytest.mark.parametrize("solver", ["euler", "heun", "midpoint", "sde"])
def test_a_sample_does_not_depend_on_its_batch(solver: str) -> None:
    label = torch.arange(12) % 3
    whole = draw(GVP, solver=solver, samples=torch.arange(12), label=label, guidance=2.0)
    order = torch.tensor([5, 11, 2])
    part = draw(GVP, solver=solver, samples=order, label=label[order], guidance=2.0)
    assert torch.equal(part.sample, whole.sample[order])
    other_seed = draw(GVP, solver=solver, samples=order, label=label[order], guidance=2.0, seed=4)
    assert not torch.allclose(part.sample, other_seed.sample)


def test_guidance_moves_samples_away_from_the_null_label() -> None:
    # Labels only shift the mean, and the null label 7 lies above; the solution is linear in it.
    plain, guided = draw(LINEAR, steps=50), draw(LINEAR, steps=50, guidance=3.0)
    torch.testing.assert_close(guided.sample, plain.sample - 2.0 * 7.0, rtol=0.0, atol=1e-4)


@pytest.mark.parametrize(
    ("solver", "calls", "early"),
    [("euler", 10, 5), ("heun", 20, 9), ("midpoint", 20, 10), ("sde", 10, 5)],
)
def test_network_calls_are_counted_for_each_sample(solver: str, calls: int, early: int) -> None:
    """`early` evaluations are at t < 1/2."""
    assert draw(LINEAR, solver=solver, steps=10).network_calls == calls
    assert draw(LINEAR, solver=solver, steps=10, guidance=2.0).network_calls == 2 * calls
    half = draw(LINEAR, solver=solver, steps=10, guidance=2.0, guidance_high=0.5)
    assert half.network_calls == calls + early


@pytest.mark.parametrize("solver", ["euler", "heun", "midpoint", "dopri5", "sde"])
@pytest.mark.parametrize("prediction", ["data", "noise"])
def test_no_prediction_is_asked_where_it_implies_no_velocity(solver: str, prediction: str) -> None:
    for path in PATHS.values():
        velocity = GaussianVelocity(path)
        result = draw(path, velocity, solver=solver, prediction=prediction, steps=4)
        support = path.support(prediction, sampling=True)
        # Times reach the network in float32.
        assert support.low - 1e-7 <= min(velocity.times), path.name
        assert max(velocity.times) <= support.high + 1e-7, path.name
        assert result.sample.isfinite().all(), path.name


def test_the_time_grid_is_uniform_in_the_unshifted_time() -> None:
    assert time_grid(4, 0.0, 1.0, 1.0) == [0.0, 0.25, 0.5, 0.75, 1.0]
    shifted = time_grid(4, 0.0, 1.0, 0.3)
    assert shifted[0] == 0.0
    assert shifted[-1] == 1.0
    gaps = [end - start for start, end in pairwise(shifted)]
    assert gaps == sorted(gaps), "a shift below 1 takes smaller steps near the noise"
    for t, u in zip(shifted[1:-1], (0.25, 0.5, 0.75), strict=True):
        logit = math.log(t / (1 - t)) - math.log(u / (1 - u))
        assert logit == pytest.approx(math.log(0.3))
    assert time_grid(2, 1e-3, 1 - 1e-3, 0.3)[0] == 1e-3


def test_a_shifted_grid_reaches_the_same_distribution() -> None:
    for solver in ("heun", "sde"):
        shape = (4000,)
        drawn = draw(LINEAR, solver=solver, steps=100, time_shift=0.3, shape=shape).sample
        assert drawn.mean().item() == pytest.approx(MEAN, abs=0.025)
        assert drawn.std().item() == pytest.approx(STD, abs=0.015)
