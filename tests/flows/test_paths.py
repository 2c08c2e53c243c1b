"""The algebra of paths: two linear equations in data and noise, and all that follows from them."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flows.errors import UserError
from flows.paths import (
    GVP,
    LINEAR,
    LINEAR_VP,
    PATHS,
    VP,
    brownian_bridge,
    linear,
    path_named,
    polynomial,
)
from flows.schedule_change import change_of_schedule, reschedule

KINDS = ("velocity", "data", "noise", "score")
EVERY_PATH = pytest.mark.parametrize("path", PATHS.values(), ids=lambda p: p.name)


def triple(path, t, seed=0, shape=(3, 4), dtype=torch.float32):
    """Data, noise and every prediction of a batch at times `t`, from their definitions."""
    generator = torch.Generator().manual_seed(seed)
    data = torch.randn(len(t), *shape, generator=generator, dtype=torch.float64)
    noise = torch.randn(len(t), *shape, generator=generator, dtype=torch.float64)
    point = path.interpolate(data, noise, t.double())
    sigma = path.coefficients(t.double(), data.dim()).sigma
    exact = {
        "velocity": point.velocity,
        "data": data,
        "noise": noise,
        "score": -noise / sigma,
    }
    return point.x.to(dtype), {kind: value.to(dtype) for kind, value in exact.items()}


def convert(path, source, target, value, x, t):
    return getattr(path, f"{source}_to_{target}")(value, x, t)


@EVERY_PATH
def test_ends(path):
    """Noise at t = 0 and data at t = 1; VP leaves exp(-5.025) of the data at t = 0."""
    c = path.coefficients(torch.tensor([0.0, 1.0], dtype=torch.float64))
    first = math.exp(-19.9 / 4 - 0.1 / 2) if path is VP else 0.0
    assert c.alpha.tolist() == pytest.approx([first, 1.0], abs=1e-12)
    assert c.sigma.tolist() == pytest.approx([math.sqrt(1 - first**2), 0.0], abs=1e-12)


@EVERY_PATH
def test_derivatives_match_autograd(path):
    t = torch.linspace(0.001, 0.999, 501, dtype=torch.float64, requires_grad=True)
    c = path.coefficients(t)
    for value, derivative in ((c.alpha, c.alpha_dot), (c.sigma, c.sigma_dot)):
        expected = torch.autograd.grad(value.sum(), t, retain_graph=True)[0]
        assert torch.allclose(derivative, expected, rtol=1e-9, atol=1e-12)


@EVERY_PATH
def test_coefficients_are_rounded_once(path):
    """float32 coefficients are the float64 ones, rounded: no matter where in a batch."""
    t = torch.linspace(0, 0.9999, 997)
    single, double = path.coefficients(t), path.coefficients(t.double())
    for name in ("alpha", "sigma", "alpha_dot", "sigma_dot"):
        assert torch.equal(getattr(single, name), getattr(double, name).float()), name


@EVERY_PATH
def test_delta_is_positive_inside(path):
    t = torch.linspace(0, 1, 10_001)[1:-1]
    for dtype in (torch.float32, torch.float64):
        assert (path.coefficients(t.to(dtype)).delta > 0).all()


@EVERY_PATH
def test_ratio_of_derivative_and_coefficient(path):
    """alpha' / alpha of the published table."""
    t = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    expected = {
        LINEAR: 1 / t,
        GVP: math.pi / (2 * torch.tan(math.pi * t / 2)),
        VP: 0.5 * (1 - t) * 19.9 + 0.5 * 0.1,
        polynomial(2.0): 2 / t,
        LINEAR_VP: 1 / t,
    }[path]
    c = path.coefficients(t)
    assert torch.allclose(c.alpha_dot / c.alpha, expected, rtol=1e-12)


@pytest.mark.parametrize("path", [GVP, VP, LINEAR_VP], ids=lambda p: p.name)
def test_variance_is_preserved(path):
    c = path.coefficients(torch.linspace(0, 1, 101, dtype=torch.float64))
    assert torch.allclose(c.alpha**2 + c.sigma**2, torch.ones(101, dtype=torch.float64))


@EVERY_PATH
def test_velocity_is_the_derivative_of_the_point(path):
    """Central differences of x_t in float64."""
    t = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    data, noise = torch.randn(2, 19, 3, 4, dtype=torch.float64)
    step = 1e-6
    later, earlier = (path.interpolate(data, noise, t + s).x for s in (step, -step))
    velocity = path.interpolate(data, noise, t).velocity
    assert torch.allclose(velocity, (later - earlier) / (2 * step), atol=1e-7)


@EVERY_PATH
@pytest.mark.parametrize(("source", "target"), itertools.permutations(KINDS, 2))
def test_every_conversion_is_right(path, source, target):
    """Against the definitions, in float64, over the support of all predictions."""
    t = torch.linspace(1e-3, 1 - 1e-3, 301, dtype=torch.float64)
    x, exact = triple(path, t, dtype=torch.float64)
    value = convert(path, source, target, exact[source], x, t)
    assert torch.allclose(value, exact[target], rtol=1e-8, atol=1e-8)


@EVERY_PATH
@pytest.mark.parametrize("middle", ["data", "noise", "score"])
def test_round_trips_in_float32(path, middle):
    """v -> other -> v to 5e-6 of the velocity's size where no coefficient is small."""
    t = torch.linspace(0.3, 0.9, 200)
    x, exact = triple(path, t)
    velocity = exact["velocity"]
    there = convert(path, "velocity", middle, velocity, x, t)
    back = convert(path, middle, "velocity", there, x, t)
    assert ((back - velocity).abs() / velocity.abs().clamp_min(1)).max() <= 5e-6


@EVERY_PATH
def test_round_trips_lose_no_more_than_their_condition(path):
    """Over the whole support: 5e-7 (four roundings) of the largest number on the way."""
    t = torch.linspace(1e-3, 1 - 1e-3, 1000)
    x, exact = triple(path, t)
    velocity = exact["velocity"]
    c = path.coefficients(t, x.dim())
    for middle in ("data", "noise", "score"):
        there = convert(path, "velocity", middle, velocity, x, t)
        back = convert(path, middle, "velocity", there, x, t)
        size = (c.alpha_dot.abs() + c.sigma_dot.abs() + c.delta) / torch.minimum(c.alpha, c.sigma)
        assert ((back - velocity).abs() / (size * 4)).max() <= 5e-7, middle


def test_linear_formulas():
    """s = (t v - x) / (1 - t), x1 = x + (1 - t) v, x0 = x - t v."""
    t = torch.linspace(0.1, 0.9, 9, dtype=torch.float64)
    x, exact = triple(LINEAR, t, dtype=torch.float64)
    v, time = exact["velocity"], t[:, None, None]
    assert torch.allclose(exact["score"], (time * v - x) / (1 - time))
    assert torch.allclose(exact["data"], x + (1 - time) * v)
    assert torch.allclose(exact["noise"], x - time * v)
    assert torch.allclose(LINEAR.velocity_to_score(v, x, t), (time * v - x) / (1 - time))


@EVERY_PATH
def test_velocity_is_drift_plus_diffusion_times_score(path):
    """v = f + g s with f = (alpha'/alpha) x and g = (alpha'/alpha) sigma^2 - sigma sigma'."""
    t = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    x, exact = triple(path, t, dtype=torch.float64)
    c = path.coefficients(t, x.dim())
    ratio = c.alpha_dot / c.alpha
    g = ratio * c.sigma**2 - c.sigma * c.sigma_dot
    assert torch.allclose(exact["velocity"], ratio * x + g * exact["score"], rtol=1e-9)
    assert torch.allclose(path.score_diffusion(t), g.flatten(), rtol=1e-9)


def test_vp_diffusion_is_half_of_beta():
    t = torch.linspace(0, 0.999, 100, dtype=torch.float64)
    assert torch.allclose(VP.score_diffusion(t), (0.1 + 19.9 * (1 - t)) / 2, rtol=1e-9)


@EVERY_PATH
def test_tweedie_is_the_posterior_mean(path):
    """Data N(m, s^2): E[data | x_t] from the true score equals the Gaussian posterior mean."""
    mean, std = 0.7, 0.5
    t = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    x = torch.linspace(-2, 2, 19, dtype=torch.float64)
    c = path.coefficients(t)
    variance = (c.alpha * std) ** 2 + c.sigma**2
    score = -(x - c.alpha * mean) / variance
    posterior = mean + c.alpha * std**2 / variance * (x - c.alpha * mean)
    assert torch.allclose(path.score_to_data(score, x, t), posterior, rtol=1e-10)


@EVERY_PATH
@pytest.mark.parametrize("kind", KINDS)
def test_gain_is_the_derivative_of_the_velocity(path, kind):
    t = torch.linspace(0.01, 0.99, 50)
    x, exact = triple(path, t)
    base = path.to_velocity(kind, exact[kind].double(), x.double(), t.double())
    moved = path.to_velocity(kind, exact[kind].double() + 1.0, x.double(), t.double())
    gain = path.velocity_gain(kind, t.double())
    assert torch.allclose((moved - base).abs(), gain[:, None, None].expand_as(x), rtol=1e-6)


@EVERY_PATH
def test_support(path):
    for sampling in (False, True):
        for kind in KINDS:
            support = path.support(kind, sampling=sampling)
            t = support.rescale(torch.linspace(0, 1, 1001))
            assert torch.tensor([support.low, support.high]).equal(t[[0, -1]])
            gain = path.velocity_gain(kind, t)
            assert gain.isfinite().all()
            assert path.interpolate(torch.ones(1001), torch.ones(1001), t).velocity.isfinite().all()
    whole = path.support("velocity", sampling=False)
    if not path.ends_infinite:
        assert (whole.low, whole.high) == (0.0, 1.0)
        t = torch.rand(100)
        assert torch.equal(whole.rescale(t), t)
    else:
        assert (whole.low, whole.high) == (0.0, 1.0 - 1e-5)
        assert path.support("velocity", sampling=True).high == 1.0 - 1e-3


@settings(max_examples=30, deadline=None)
@given(
    name=st.sampled_from(list(PATHS)),
    size=st.integers(1, 20),
    shape=st.sampled_from([(), (5,), (2, 3, 3)]),
)
def test_results_do_not_depend_on_the_batch(name, size, shape):
    """Each sample alone gives the bits it has in the batch; a scalar time serves all."""
    path = path_named(name)
    generator = torch.Generator().manual_seed(size)
    t = torch.rand(size, generator=generator) * 0.99
    data, noise = torch.randn(2, size, *shape, generator=generator)
    point = path.interpolate(data, noise, t)
    for i in range(size):
        for time in (t[i : i + 1], t[i]):
            alone = path.interpolate(data[i : i + 1], noise[i : i + 1], time)
            assert torch.equal(alone.x[0], point.x[i])
            assert torch.equal(alone.velocity[0], point.velocity[i])


def test_an_unknown_path_is_named():
    with pytest.raises(UserError, match="no path 'cosine'; use one of linear, gvp, vp"):
        path_named("cosine")


@EVERY_PATH
def test_the_time_of_a_ratio(path):
    """time_at is the inverse of alpha / sigma, the ends included."""
    t = torch.linspace(1e-3, 1 - 1e-6, 401, dtype=torch.float64)
    c = path.coefficients(t)
    assert torch.allclose(path.time_at(c.alpha / c.sigma), t, rtol=0, atol=1e-9)
    ends = path.coefficients(torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert torch.allclose(path.time_at(ends.alpha / ends.sigma), torch.tensor([0.0, 1.0]).double())


@pytest.mark.parametrize("sigma_min", [1e-5, 0.1])
def test_forms_of_the_path_that_keeps_some_noise(sigma_min):
    """Lipman's conditional velocity and LFM's path with time turned round are this path."""
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    data, noise = torch.randn(2, 11, 3, 4, dtype=torch.float64)
    path, time = linear(sigma_min), t[:, None, None]
    point = path.interpolate(data, noise, t)
    lipman = (data - (1 - sigma_min) * point.x) / (1 - (1 - sigma_min) * time)
    assert torch.allclose(point.velocity, lipman, rtol=1e-9)
    turned = 1 - time
    z = (1 - turned) * data + (sigma_min + (1 - sigma_min) * turned) * noise
    assert torch.allclose(point.x, z, rtol=1e-12)
    assert torch.allclose(point.velocity, -((1 - sigma_min) * noise - data), rtol=1e-12)
    ratio = path.coefficients(t).alpha / path.coefficients(t).sigma
    assert torch.allclose(path.time_at(ratio), t)


def test_paths_that_are_the_same():
    """The trigonometric path is GVP, t^1 is linear, and no noise left at the end is rectified flow."""
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    data, noise = torch.randn(2, 11, dtype=torch.float64)
    angle, point = math.pi * t / 2, GVP.interpolate(data, noise, t)
    assert torch.allclose(point.x, angle.cos() * noise + angle.sin() * data)
    assert torch.allclose(
        point.velocity, math.pi / 2 * (angle.cos() * data - angle.sin() * noise), atol=1e-15
    )
    assert path_named("linear") is LINEAR is linear(0.0)
    for path in (LINEAR, polynomial(1.0)):
        assert torch.equal(path.interpolate(data, noise, t).velocity, data - noise)
    assert path_named("polynomial", exponent=3.0) == polynomial(3.0)


@EVERY_PATH
def test_likelihood_weight(path):
    """A weighted error of any prediction is g times the squared error of the score it implies."""
    t = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    x, exact = triple(path, t, dtype=torch.float64)
    for kind in KINDS:
        off = path.to_velocity(kind, exact[kind] + 0.1, x, t)
        score_error = path.velocity_to_score(off, x, t) - exact["score"]
        expected = path.score_diffusion(t)[:, None, None] * score_error.square()
        weighted = path.likelihood_weight(kind, t)[:, None, None] * 0.01
        assert torch.allclose(weighted.expand_as(expected), expected, rtol=1e-6), kind
    c = path.coefficients(t)
    published = path.score_diffusion(t) / c.sigma.square()
    assert torch.allclose(path.likelihood_weight("noise", t), published, rtol=1e-9)


def test_brownian_bridge():
    """The spread of a bridge, its velocity by differences, and its middle and end."""
    t = torch.linspace(0.02, 0.98, 25, dtype=torch.float64)
    data, noise, z = torch.randn(3, 25, 3, 4, dtype=torch.float64)
    sigma, step = 0.7, 1e-7

    def at(time):
        return brownian_bridge(LINEAR.interpolate(data, noise, time), time, z, sigma)

    point, mean = at(t), LINEAR.interpolate(data, noise, t)
    spread = sigma * (t * (1 - t)).sqrt()[:, None, None]
    assert torch.allclose(point.x - mean.x, spread * z)
    differences = (at(t + step).x - at(t - step).x) / (2 * step)
    assert torch.allclose(point.velocity, differences, atol=1e-5)
    time = t[:, None, None]
    published = (1 - 2 * time) / (2 * time * (1 - time)) * (point.x - mean.x) + data - noise
    assert torch.allclose(point.velocity, published, rtol=1e-9)
    half = torch.full((25,), 0.5, dtype=torch.float64)
    assert torch.equal(at(half).velocity, data - noise)
    calm = brownian_bridge(mean, t, z, 0.0)
    assert torch.equal(calm.x, mean.x)
    assert torch.equal(calm.velocity, mean.velocity)


def gaussian_velocity(path):
    """The velocity of data N(0.7, 0.5^2) on a path."""

    def velocity(x, t):
        c = path.coefficients(t, x.dim())
        variance = (c.alpha * 0.5) ** 2 + c.sigma**2
        slope = (c.alpha * c.alpha_dot * 0.25 + c.sigma * c.sigma_dot) / variance
        return c.alpha_dot * 0.7 + slope * (x - c.alpha * 0.7)

    return velocity


@pytest.mark.parametrize(
    ("source", "target"), itertools.permutations([*PATHS.values(), linear(0.01)], 2)
)
def test_a_velocity_changes_its_schedule(source, target):
    """Of a Gaussian, the velocity of one path gives that of another."""
    r = torch.linspace(0.1, 0.95, 35, dtype=torch.float64)
    x = torch.randn(35, 4, dtype=torch.float64)
    moved = reschedule(gaussian_velocity(source), source, target)(x, r)
    assert torch.allclose(moved, gaussian_velocity(target)(x, r), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(
    ("source", "target"), itertools.permutations([*PATHS.values(), linear(0.3)], 2)
)
def test_a_velocity_is_asked_at_no_time_it_has_not(source, target):
    """At the ends of the other path, too, where the trained one may hold less noise, or less data."""
    own, asked = source.support("velocity", sampling=True), []

    def velocity(x, t):
        asked.append(t)
        return gaussian_velocity(source)(x, t)

    ends = target.support("velocity", sampling=True)
    near = torch.tensor([0.0, 1e-6, 1e-3, 0.5, 1 - 1e-3, 1 - 1e-6, 1.0], dtype=torch.float64)
    moved = reschedule(velocity, source, target)(torch.ones(7, 4).double(), ends.rescale(near))
    assert moved.isfinite().all()
    (times,) = asked
    assert own.low <= times.min()
    assert times.max() <= own.high


def test_a_change_of_schedule_is_finite_at_the_ends():
    ends = torch.tensor([0.0, 1.0])
    change = change_of_schedule(LINEAR, GVP, ends, 2)
    for value in vars(change).values():
        assert value.isfinite().all()
        assert value.shape == (2, 1)
    assert change.time.flatten().tolist() == pytest.approx([0, 1])
    same = change_of_schedule(GVP, GVP, torch.linspace(0, 1, 9).double(), 1)
    for name, expected in (("scale", 1.0), ("scale_dot", 0.0), ("time_dot", 1.0)):
        assert torch.allclose(getattr(same, name), torch.full((9,), expected).double(), atol=1e-12)
