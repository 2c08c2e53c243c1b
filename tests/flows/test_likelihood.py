"""Densities of ODEs: closed forms, estimates of the divergence, and bits of discrete pixels."""

import math

import pytest
import torch
from torch import Tensor

from flows.dequantisation import Levels
from flows.errors import UserError
from flows.initialise import initialise
from flows.likelihood import bits_of_data, end_that_fills, log_density
from flows.models.dit import DiT, DiTConfig
from flows.paths import linear, path_named
from flows.samplers.ode import solve_ode
from flows.samplers.sampler import time_grid

LINEAR = path_named("linear")


def grid(steps: int, high: float = 1.0) -> list[float]:
    return time_grid(steps, 0.0, high, 1.0)


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def normal_log_p(x: Tensor, mean=0.0, std=1.0) -> Tensor:
    each = torch.distributions.Normal(
        torch.as_tensor(mean, dtype=torch.float64), torch.as_tensor(std, dtype=torch.float64)
    ).log_prob(x.double())
    return each.flatten(1).sum(1)


def density(velocity, x, *, steps=20, solver="rk4", divergence="exact", samples=None, high=1.0):
    samples = torch.arange(len(x)) if samples is None else samples
    return log_density(
        lambda x, t, _: velocity(x, t),
        x,
        {},
        samples,
        times=grid(steps, high),
        solver=solver,
        divergence=divergence,
        seed=3,
    )


def growing(a: float, b: float):
    """v = (a + b t) x."""
    return lambda x, t: (a + b * t).view(-1, *(1,) * (x.dim() - 1)) * x


@pytest.mark.parametrize("divergence", ["exact", "hutchinson"])
@pytest.mark.parametrize(
    ("solver", "steps", "bound"),
    [("rk4", 20, 1e-6), ("heun", 200, 1e-4), ("midpoint", 200, 1e-4), ("dopri5", 1, 4e-5)],
)
def test_a_linear_field_has_its_closed_form(solver, steps, bound, divergence) -> None:
    """log p = log N(x e^-C) - D C with C = a + b / 2; the Jacobian is diagonal, so both are exact."""
    a, b = 0.7, -1.9
    x = normals(8, 3, 2)
    found = density(growing(a, b), x, solver=solver, steps=steps, divergence=divergence)
    c = a + b / 2
    expected = normal_log_p(x * math.exp(-c)) - 6 * c
    assert found.log_p.dtype == torch.float64
    assert (found.log_p - expected).abs().max() <= bound
    torch.testing.assert_close(found.noise, x * math.exp(-c), rtol=1e-3, atol=1e-4)


def test_volume_changes_by_the_trace_and_errors_fall_with_their_order() -> None:
    matrix = 0.5 * normals(5, 5, seed=1)
    x = normals(4, 5)
    expected = torch.linalg.solve(torch.linalg.matrix_exp(matrix), x.T).T
    exact = normal_log_p(expected) - matrix.trace()
    for solver, order in (("euler", 1), ("heun", 2), ("midpoint", 2), ("rk4", 4)):
        errors = []
        for steps in (16, 32):
            found = density(lambda x, _: x @ matrix.T, x, solver=solver, steps=steps)
            volume = found.log_p - normal_log_p(found.noise)
            torch.testing.assert_close(volume, -matrix.trace().expand(4), rtol=1e-9, atol=1e-9)
            errors.append((found.log_p - exact).abs().max().item())
        assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.25)


def test_the_estimate_has_the_trace_as_its_mean() -> None:
    matrix = normals(6, 6, seed=1)
    x = normals(1, 6).expand(20_000, 6)
    found = density(lambda x, _: x @ matrix.T, x, divergence="hutchinson", solver="euler", steps=1)
    estimate = normal_log_p(found.noise) - found.log_p
    # Var of e J e is the sum over pairs of (J_ij + J_ji)^2.
    symmetric = matrix + matrix.T
    variance = symmetric.square().triu(1).sum().item()
    error = 4 * math.sqrt(variance / 20_000)
    assert abs(estimate.mean().item() - matrix.trace().item()) < error
    assert estimate.var().item() == pytest.approx(variance, rel=0.1)


def gaussian_velocity(path, mean: float, std: float):
    """The exact velocity where data is N(mean, std^2) in every dimension."""

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        c = path.coefficients(t, x.dim())
        variance = (c.alpha * std).square() + c.sigma.square()
        gain = (c.alpha * c.alpha_dot * std**2 + c.sigma * c.sigma_dot) / variance
        return c.alpha_dot * mean + gain * (x - c.alpha * mean)

    return velocity


@pytest.mark.parametrize("name", ["linear", "gvp"])
@pytest.mark.parametrize(("solver", "steps"), [("rk4", 40), ("dopri5", 1)])
def test_the_density_of_gaussian_data_is_its_own(name, solver, steps) -> None:
    x = 0.4 + 0.6 * normals(16, 1, 2, 2)
    velocity = gaussian_velocity(path_named(name), 0.4, 0.6)
    found = density(velocity, x, solver=solver, steps=steps)
    bound = 1e-5 if solver == "rk4" else 1e-4
    assert (found.log_p - normal_log_p(x, 0.4, 0.6)).abs().max() <= bound
    half = density(velocity, x.float(), solver=solver, steps=steps)
    assert half.noise.dtype == torch.float32
    assert (half.log_p - normal_log_p(x, 0.4, 0.6)).abs().max() <= bound


def curved(x: Tensor, t: Tensor) -> Tensor:
    """A field whose Jacobian is full and changes with place and time."""
    mix = torch.linspace(-1, 1, 36, dtype=x.dtype).view(6, 6)
    return torch.tanh(x @ mix.T + t[:, None]) + 0.3 * x.roll(1, 1)


@pytest.mark.parametrize("solver", ["rk4", "dopri5"])
def test_going_to_the_noise_and_back_returns(solver) -> None:
    x = normals(5, 6)
    found = density(curved, x, solver=solver, steps=60)
    back = solve_ode(
        lambda y, t: curved(y, y.new_full((len(y),), t)), found.noise, grid(60), solver
    )
    assert (back - x).abs().max() <= (1e-6 if solver == "rk4" else 1e-3)


def test_the_density_integrates_to_one() -> None:
    side = torch.linspace(-6, 6, 121, dtype=torch.float64)
    x = torch.cartesian_prod(side, side)

    def swirl(x: Tensor, t: Tensor) -> Tensor:
        return torch.stack((torch.sin(x[:, 1]) * t, 0.5 * x[:, 0].cos() + 0.2 * x[:, 1]), 1)

    mass = density(swirl, x, steps=20).log_p.exp().sum() * 0.1**2
    assert mass.item() == pytest.approx(1.0, abs=1e-3)


def test_a_sample_has_its_density_in_every_batch() -> None:
    x, samples = normals(7, 6), torch.tensor([5, 3, 100, 7, 2, 8, 1])
    whole = density(curved, x, divergence="hutchinson", samples=samples)
    for rows in (slice(0, 3), slice(3, 7), torch.tensor([6, 0])):
        part = density(curved, x[rows], divergence="hutchinson", samples=samples[rows])
        torch.testing.assert_close(part.log_p, whole.log_p[rows], rtol=1e-12, atol=1e-12)
    other = density(curved, x, divergence="hutchinson", samples=samples + 1)
    assert (other.log_p - whole.log_p).abs().min() > 1e-6
    exact = density(curved, x)
    assert exact.velocity_calls == whole.velocity_calls == 80


def test_a_network_has_a_density_and_keeps_no_gradient() -> None:
    model = DiT(
        DiTConfig(
            image_size=4,
            channels=1,
            classes=3,
            patch=2,
            width=16,
            depth=2,
            heads=2,
            learn_sigma=False,
        )
    )
    initialise(model, seed=0)
    generator = torch.Generator().manual_seed(1)
    for weight in model.parameters():
        weight.data.normal_(0.0, 0.2, generator=generator)
    x, label = normals(4, 1, 4, 4).float(), torch.tensor([0, 1, 2, 3])
    found = {
        (kind, seed): log_density(
            lambda x, t, condition: model(x, t, **condition),
            x,
            {"label": label},
            torch.arange(4),
            times=grid(4),
            solver="heun",
            divergence=kind,
            seed=seed,
        )
        for kind in ("exact", "hutchinson")
        for seed in range(1 if kind == "exact" else 30)
    }
    assert all(weight.grad is None for weight in model.parameters())
    exact = found["exact", 0].log_p
    estimates = torch.stack([found["hutchinson", seed].log_p for seed in range(30)])
    error = (estimates.mean(0) - exact).abs() / (estimates.std(0) / math.sqrt(30))
    assert error.max() < 4
    assert exact.unique().numel() == 4


def level_probability(levels: Levels, std: float) -> Tensor:
    """(count,) of a normal that is cut into levels, each the mass of its bin around it."""
    value = torch.linspace(-1, 1, levels.count, dtype=torch.float64)
    edges = torch.cat((value - levels.width / 2, value[-1:] + levels.width / 2))
    below = torch.special.ndtr(edges / std)
    return below.diff() / (below[-1] - below[0])


def discrete_images(count: int, probability: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    levels = len(probability)
    drawn = torch.multinomial(probability, count * 4, True, generator=generator)
    return (drawn.view(count, 1, 2, 2) * (2 / (levels - 1)) - 1).float()


def bits(velocity, image, levels, dequantisation, high, steps) -> Tensor:
    return bits_of_data(
        lambda x, t, _: velocity(x, t),
        image,
        {},
        torch.arange(len(image)),
        levels=levels,
        dequantisation=dequantisation,
        path=LINEAR,
        times=grid(steps, high),
        solver="rk4",
        divergence="hutchinson",
        seed=0,
    ).bits


def test_bits_of_a_finely_cut_normal_are_its_discrete_entropy() -> None:
    levels, std = Levels(256, "around"), 0.2
    probability = level_probability(levels, std)
    image = discrete_images(3000, probability)
    found = bits(gaussian_velocity(LINEAR, 0.0, std), image, levels, "uniform", 1.0, 40)
    level = ((image + 1) * 127.5).round().long()
    each = -probability.log2()[level].flatten(1).mean(1)
    # Paired with each image's own information, so that the draw of images does not matter; the place
    # in the bin adds 0.005 of spread.
    assert abs((found - each).mean().item()) <= 1e-3
    entropy = -(probability * probability.log2()).sum().item()
    assert abs(found.mean().item() - entropy) <= 0.01 + 4 * each.std().item() / math.sqrt(3000)


def exact_discrete_velocity(probability: Tensor):
    """The velocity of data on the levels alone: E[data - noise | x], a softmax over levels."""
    value = torch.linspace(-1, 1, len(probability), dtype=torch.float64)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        t = t.view(-1, *(1,) * (x.dim() - 1)).double()
        distance = x.double()[..., None] - t[..., None] * value
        logits = probability.log() - 0.5 * (distance / (1 - t[..., None])).square()
        data = (logits.softmax(-1) * value).sum(-1)
        return ((data - x) / (1 - t)).to(x.dtype)

    return velocity


def test_truncated_normal_noise_finds_the_entropy_of_levels_and_uniform_noise_does_not() -> None:
    levels = Levels(5, "around")
    probability = torch.tensor([0.1, 0.35, 0.05, 0.3, 0.2], dtype=torch.float64)
    image = discrete_images(400, probability)
    end = end_that_fills(LINEAR, levels, deviations=3.0)
    assert (1 - end) / end == pytest.approx(levels.width / 6, rel=1e-9)
    velocity = exact_discrete_velocity(probability)
    truncated = bits(velocity, image.double(), levels, "truncated_normal", end, 100)
    uniform = bits(velocity, image.double(), levels, "uniform", end, 100)
    level = ((image + 1) * 2).round().long()
    each = -probability.log2()[level].flatten(1).mean(1)
    assert abs((truncated - each).mean().item()) <= 0.01
    # Uniform noise puts points where the density of the levels has holes.
    gain = uniform - truncated
    assert gain.mean().item() > max(0.3, 4 * gain.std().item() / math.sqrt(400))


def test_data_scaled_by_s_costs_log2_s_more() -> None:
    x = 0.5 * normals(200, 4)
    for scale in (2.0, 0.25):
        one = density(gaussian_velocity(LINEAR, 0.0, 0.5), x, steps=40).log_p
        other = density(gaussian_velocity(LINEAR, 0.0, 0.5 * scale), x * scale, steps=40).log_p
        change = (one - other) / (4 * math.log(2))
        torch.testing.assert_close(
            change, torch.full_like(change, math.log2(scale)), atol=1e-3, rtol=0
        )


def test_at_the_very_end_there_is_no_noise_to_fill_bins_with() -> None:
    levels = Levels(5, "around")
    image = torch.zeros(2, 1, 2, 2)
    with pytest.raises(ValueError, match="end before it"):
        bits(gaussian_velocity(LINEAR, 0.0, 1.0), image, levels, "truncated_normal", 1.0, 2)


def test_a_path_that_never_has_so_little_noise_is_refused() -> None:
    with pytest.raises(UserError, match=r"ends with noise of 0\.5 of the data"):
        end_that_fills(linear(0.5), Levels(256, "around"), deviations=3)
