"""How training times are spread."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from flows.randomness import Draw
from flows.times import TimeDistribution, shift_time

UNIFORM = torch.rand(50_000, generator=torch.Generator().manual_seed(0)).clamp(2**-24, 1 - 2**-24)


def times(kind="uniform", mean=0.0, std=1.0, shift=1.0, **more):
    return TimeDistribution(kind, mean, std, shift, **more)(UNIFORM)


def test_uniform_without_shift_is_the_identity():
    assert torch.equal(times(), UNIFORM)


@pytest.mark.parametrize(
    ("mean", "std", "shift"), [(0, 1, 1), (-0.8, 0.5, 1), (0.4, 2, 1), (0, 1, 0.3), (0, 1, 3)]
)
def test_logit_normal(mean, std, shift):
    """logit t ~ N(mean + log shift, std): a shift only moves the mean."""
    t = times("logit_normal", mean, std, shift)
    assert t.dtype == torch.float32
    assert ((t >= 0) & (t <= 1)).all()
    logit = torch.logit(t.double()).numpy()
    expected = stats.norm(mean + math.log(shift), std)
    assert stats.kstest(logit, expected.cdf).pvalue > 1e-3


def test_logit_normal_density():
    """The published density, against a histogram."""
    mean, std = -0.5, 0.8
    t = times("logit_normal", mean, std)
    count = torch.histc(t, bins=20, min=0, max=1)
    x = torch.linspace(0, 1, 20_001, dtype=torch.float64)[1:-1]
    logit = torch.logit(x)
    density = torch.exp(-((logit - mean) ** 2) / (2 * std**2)) / (x * (1 - x))
    density /= std * math.sqrt(2 * math.pi)
    assert torch.trapezoid(density, x) == pytest.approx(1, abs=1e-6)
    for i in range(20):
        inside = (x >= i / 20) & (x <= (i + 1) / 20)
        share = torch.trapezoid(density[inside], x[inside]).item()
        assert abs(count[i].item() - 50_000 * share) < 5 * math.sqrt(50_000 * share) + 5


def test_shifted_uniform():
    """P(t' <= x) = x / (s + (1 - s) x)"""
    for shift in (0.3, 3.0):
        t = times(shift=shift).numpy()
        assert stats.kstest(t, lambda x, s=shift: x / (s + (1 - s) * x)).pvalue > 1e-3


@given(st.floats(0.01, 100), st.floats(0.01, 100))
def test_shifts_compose_by_multiplication(a, b):
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    assert torch.allclose(shift_time(shift_time(t, a), b), shift_time(t, a * b), atol=1e-13)
    assert torch.allclose(shift_time(shift_time(t, a), 1 / a), t, atol=1e-13)


@given(st.floats(0.01, 100))
def test_shift_is_a_logit_offset_that_keeps_the_ends(shift):
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    moved = shift_time(t, shift)
    assert moved[0] == 0
    assert moved[-1] == pytest.approx(1, abs=1e-15)
    offset = torch.logit(moved[1:-1]) - torch.logit(t[1:-1])
    assert torch.allclose(offset, torch.full_like(offset, math.log(shift)), atol=1e-10)


def test_small_shift_moves_towards_the_noise():
    t = torch.linspace(0.1, 0.9, 9)
    assert (shift_time(t, 0.3) < t).all()
    assert torch.equal(shift_time(t, 1.0), t)


def test_times_do_not_depend_on_the_batch():
    """One sample alone, or a piece that starts anywhere, gives the bits of the whole."""
    whole = times("logit_normal", -0.3, 1.1, 0.5)
    distribution = TimeDistribution("logit_normal", -0.3, 1.1, 0.5)
    for start, stop in ((0, 1), (1, 2), (3, 8), (17, 1000), (1, 50_000)):
        assert torch.equal(distribution(UNIFORM[start:stop]), whole[start:stop])


def test_extremes_stay_in_the_interval():
    ends = torch.tensor([2**-24, 1 - 2**-24])
    for kind in ("uniform", "logit_normal", "mode", "u_shaped"):
        t = TimeDistribution(kind, 0.0, 5.0, 0.1, mode_scale=-1.0, steepness=8.0)(ends)
        assert t.isfinite().all()
        assert (t >= 0).all()
        assert (t <= 1).all()


@pytest.mark.parametrize("steepness", [0.5, 2.0, 4.0])
def test_u_shaped(steepness):
    """The published density a / (2 (e^a - 1)) (e^(at) + e^(a (1 - t))) and its distribution."""
    t = times("u_shaped", steepness=steepness).double()
    x = torch.linspace(0, 1, 100_001, dtype=torch.float64)
    scale = steepness / (2 * math.expm1(steepness))
    density = scale * (torch.exp(steepness * x) + torch.exp(steepness * (1 - x)))
    assert torch.trapezoid(density, x).item() == pytest.approx(1, abs=1e-7)
    below = torch.cumulative_trapezoid(density, x)
    assert stats.kstest(t.numpy(), lambda at: np.interp(at, x[1:], below)).pvalue > 1e-3
    # One number in place of the published two, log(1 + q (e^a - 1)) / a and a coin.
    generator = torch.Generator().manual_seed(5)
    q = torch.rand(50_000, generator=generator, dtype=torch.float64)
    one_side = torch.log1p(q * math.expm1(steepness)) / steepness
    coin = torch.rand(50_000, generator=generator) < 0.5
    published = torch.where(coin, one_side, 1 - one_side)
    assert stats.ks_2samp(t.numpy(), published.numpy()).pvalue > 1e-3


@pytest.mark.parametrize("scale", [-1.0, -0.4, 0.8, 1.29, 1.75])
def test_mode(scale):
    """1 - u - s (cos^2(pi u / 2) - 1 + u) of noise levels 1 - t; monotone and symmetric."""
    u = torch.linspace(0, 1, 1001, dtype=torch.float64)
    t = TimeDistribution("mode", 0.0, 1.0, 1.0, mode_scale=scale)(u)
    level = 1 - u - scale * (torch.cos(math.pi * u / 2).square() - 1 + u)
    assert torch.allclose(t, 1 - level, atol=1e-12)
    assert torch.allclose(t, 1 - t.flip(0), atol=1e-12)
    assert (t.diff() >= 0).all()
    assert t[[0, -1]].tolist() == pytest.approx([0, 1])
    middle = ((t > 0.25) & (t < 0.75)).double().mean()
    assert (middle > 0.5) == (scale > 0)


def test_nothing_asked_for_is_uniform():
    for kind in ("mode", "u_shaped"):
        assert torch.equal(times(kind), UNIFORM)


def test_strata_hold_one_time_each():
    """Of 64 samples a step each has its own 64th of the distribution, and another in other steps."""
    spread = TimeDistribution("uniform", 0.0, 1.0, 1.0, strata=64)
    seen = []
    for step in range(200):
        place = torch.arange(64 * step, 64 * step + 64)
        t = spread.draw(Draw(3, step, place))
        parts = (t.double() * 64).floor()
        assert parts.sort().values.tolist() == list(range(64))
        assert torch.equal(spread.draw(Draw(3, step, place[17:40])), t[17:40])
        seen.append(t)
    assert stats.kstest(torch.stack(seen)[:, 5].numpy(), "uniform").pvalue > 1e-3
    independent = TimeDistribution("uniform", 0.0, 1.0, 1.0)
    loose = [independent.draw(Draw(3, s, torch.arange(64 * s, 64 * s + 64))) for s in range(200)]
    assert torch.stack(seen).mean(1).std() < 0.02 * torch.stack(loose).mean(1).std()
