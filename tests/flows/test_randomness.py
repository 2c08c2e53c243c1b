"""Random numbers depend on seed, stream, step, sample and element, and on nothing else."""

import math
import time
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from flows.randomness import (
    Draw,
    log,
    normal_runs,
    normals,
    philox,
    sin_cos,
    sqrt,
    uniform_runs,
    uniforms,
)

LARGEST = 2**63 - 1
GOLDEN_NORMAL_BITS = [1041884413, -1087094161, -1110175005, -1086397168, 1073924214, -1075527486]
GOLDEN_UNIFORM = [9171129.0, 10115669.0]


def draw(seed=1, step=2, samples=range(64)) -> Draw:
    return Draw(seed, step, torch.tensor(list(samples), dtype=torch.int64))


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_known_answers(counter, key, expected):
    """The vectors of Random123, alone and inside a tensor long enough for vector instructions."""
    for size in (1, 37):
        words = philox(tuple(torch.full((size,), word) for word in counter), tuple(key))
        for word, text in zip(words, expected.split(), strict=True):
            assert word.tolist() == [int(text, 16)] * size


def test_philox_leaves_its_counter_alone():
    counter = tuple(torch.full((3,), word) for word in (1, 2, 3, 4))
    philox(counter, (5, 6))
    assert [word.tolist() for word in counter] == [[1] * 3, [2] * 3, [3] * 3, [4] * 3]


def test_bits_never_change():
    """A run that goes on under a new version goes on with the same numbers."""
    d = draw(seed=LARGEST, step=12345, samples=[0, 2**40 + 1])
    bits = d.normal("noise", (3,)).view(torch.int32).flatten().tolist()
    assert bits == GOLDEN_NORMAL_BITS
    assert (d.uniform("time") * 2**24).tolist() == GOLDEN_UNIFORM


def test_shapes_and_types():
    d = draw(samples=range(5))
    for shape in ((), (1,), (3, 2), (0,), (2, 3, 5)):
        for numbers in (d.uniform("a", shape), d.normal("a", shape)):
            assert numbers.shape == (5, *shape)
            assert numbers.dtype == torch.float32
            assert numbers.is_contiguous()
    assert draw(samples=[]).normal("a", (4,)).shape == (0, 4)


def test_uniform_is_uniform_and_open():
    u = draw(samples=range(1000)).uniform("u", (200,)).flatten()
    assert stats.kstest(u.numpy(), "uniform").pvalue > 1e-3
    extremes = torch.tensor([0, 0xFFFFFFFF])
    ends = uniforms((extremes, extremes, extremes, extremes))
    assert 0 < ends.min() < 1e-7
    assert 1 - 1e-7 < ends.max() < 1


def test_normal_is_normal():
    x = draw(samples=range(1000)).normal("n", (200,)).flatten().double().numpy()
    n = len(x)
    assert stats.kstest(x, "norm").pvalue > 1e-3
    # Standard errors of the first four moments of n standard normal numbers; 4 of them.
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((x**power).mean() - expected) < 4 * math.sqrt(variance / n), power


def test_tails_are_as_heavy_as_they_should_be():
    x = draw(samples=range(2000)).normal("tail", (1000,)).abs()
    for bound in (3.0, 4.0):
        expected = 2_000_000 * 2 * stats.norm.sf(bound)
        assert abs((x > bound).sum().item() - expected) < 4 * math.sqrt(expected)
    assert x.max() > 4.5


def test_radius_reaches_over_six_and_never_breaks():
    """At the ends of both words no number is infinite or NaN; the largest is beyond 6 sigma."""
    edge = [0, 1, 2, 255, 2**29, 2**30 - 1, 2**30, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1]
    radius, angle = torch.meshgrid(torch.tensor(edge), torch.tensor(edge), indexing="ij")
    words = tuple(w.flatten() for w in (radius, angle, radius, angle))
    pair = normals(words).view(-1, 2)
    assert pair.isfinite().all()
    assert 6 < pair.abs().max() < 6.7


def test_normals_are_the_exact_evaluation_of_their_formula():
    """Bit for bit the same formula in numpy float32, whose + - * / round as IEEE 754 asks.

    Any operation that a device rounds in its own way would show here.
    """
    generator = torch.Generator().manual_seed(0)
    words = tuple(torch.randint(0, 2**32, (5, 20_011), generator=generator) for _ in range(4))
    first, angle = (
        np.stack([w.numpy() for w in words[i::2]], -1).astype(np.uint32) for i in (0, 1)
    )
    f = np.float32
    u = ((first >> 1).astype(f) + f(0.5)) * f(2.0**-31)
    bits = u.view(np.int32) - np.int32(0x3F3504F3)
    exponent = (bits >> 23).astype(f)
    mantissa = ((bits & 0x7FFFFF) + np.int32(0x3F3504F3)).view(f)
    s = (mantissa - f(1)) / (mantissa + f(1))
    z = s * s
    series = (((z * f(2 / 9) + f(2 / 7)) * z + f(2 / 5)) * z + f(2 / 3)) * z * s
    log_u = ((series + exponent * f(-2.12194440e-4)) + s * f(2)) + exponent * f(0.693359375)
    squared = np.maximum(log_u * f(-2), f(2.0**-24))
    length = ((squared.view(np.int32) >> 1) + np.int32(0x1FBD1DF5)).view(f)
    for _ in range(3):
        length = (length + squared / length) * f(0.5)
    x = ((angle << 2).view(np.int32).astype(f) + f(2)) * f(math.pi / 2**33)
    z = x * x
    sine = ((z * f(-1.9515295891e-4) + f(8.3321608736e-3)) * z + f(-1.6666654611e-1)) * z * x + x
    cosine = (z * f(2.443315711809948e-5) + f(-1.388731625493765e-3)) * z + f(4.166664568298827e-2)
    cosine = ((cosine * z) * z + z * f(-0.5)) + f(1)
    cosine = np.where(angle >> 31, -cosine * length, cosine * length)
    sine = sine * length
    swap = (angle >> 30) & 1
    pair = np.stack([np.where(swap, sine, cosine), np.where(swap, cosine, sine)], -1)
    assert np.array_equal(normals(words).numpy(), pair.reshape(5, -1))


def test_angles_cover_the_circle():
    """Box-Muller with the signs and the swap from bits: all eight octants, equally."""
    pair = draw(samples=range(1000)).normal("angle", (200,)).view(-1, 2).double()
    angle = torch.atan2(pair[:, 1], pair[:, 0]) / (2 * math.pi) % 1.0
    assert stats.kstest(angle.numpy(), "uniform").pvalue > 1e-3


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 0},
        {"seed": 1 + 2**32},
        {"seed": LARGEST},
        {"step": 3},
        {"step": 2 + 2**32},
        {"step": LARGEST},
        {"samples": range(1, 65)},
        {"samples": range(2**32, 2**32 + 64)},
        {"samples": range(2**62, 2**62 + 64)},
    ],
)
def test_every_bit_of_a_key_matters(other):
    """Numbers of another seed, step or sample are independent, also where only high bits differ."""
    a = draw().normal("noise", (500,))
    b = draw(**other).normal("noise", (500,))
    assert_independent(a, b)


def test_streams_and_elements_are_independent():
    d = draw()
    a = d.normal("noise", (500,))
    assert_independent(a, d.normal("noisf", (500,)))
    assert_independent(a[:, :-1], a[:, 1:])
    assert_independent(a[:-1], a[1:])
    assert_independent(a, normal_runs(1, "noise", torch.arange(64) * 500, 500))


def assert_independent(a, b):
    """Correlation of the numbers and of their squares within 4 standard errors of 0."""
    for x, y in ((a, b), (a.square(), b.square())):
        r = np.corrcoef(x.flatten().numpy(), y.flatten().numpy())[0, 1]
        assert abs(r) < 4 / math.sqrt(x.numel())


@settings(max_examples=25, deadline=None)
@given(
    order=st.permutations(range(13)),
    cuts=st.lists(st.integers(0, 13), max_size=4),
    shape=st.sampled_from([(), (1,), (5,), (3, 7), (2, 4, 4)]),
)
def test_bits_do_not_depend_on_the_batch(order, cuts, shape):
    """Permuted and cut in any way, every sample keeps its bits: what lets ranks share a batch."""
    d = draw(samples=range(13))
    edges = [0, *sorted(cuts), 13]
    for name in ("normal", "uniform"):
        whole = getattr(d, name)("noise", shape)
        parts = [
            getattr(draw(samples=order[i:j]), name)("noise", shape) for i, j in pairwise(edges)
        ]
        assert torch.equal(torch.cat(parts), whole[list(order)])


def test_bits_do_not_depend_on_threads():
    samples = range(300)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = draw(samples=samples).normal("noise", (3, 97))
        torch.set_num_threads(3)
        three = draw(samples=samples).normal("noise", (3, 97))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one, three)


@settings(max_examples=25, deadline=None)
@given(starts=st.lists(st.integers(0, 60), min_size=1, max_size=5), count=st.integers(0, 17))
def test_runs_are_windows_of_one_stream(starts, count):
    for runs in (uniform_runs, normal_runs):
        for base in (0, 2**33, 2**50):
            whole = runs(3, "weight", torch.tensor([base]), 80)[0]
            parts = runs(3, "weight", torch.tensor(starts) + base, count)
            for start, part in zip(starts, parts, strict=True):
                assert torch.equal(part, whole[start : start + count])


def test_own_functions_are_accurate():
    """Against float64: the logarithm and root relative, the circle absolute."""
    u = torch.cat([torch.arange(1, 2**24, 11) * 2.0**-24, torch.logspace(-9.6, 0, 100_000)])
    exact = u.double().log()
    away = exact != 0
    relative = (log(u).double() - exact).abs()[away] / exact.abs()[away]
    assert relative.max() < 2e-7
    assert log(torch.ones(3)).tolist() == [0.0] * 3
    x = torch.linspace(-math.pi / 4, math.pi / 4, 500_001)
    sine, cosine = sin_cos(x)
    assert (sine.double() - x.double().sin()).abs().max() < 1e-7
    assert (cosine.double() - x.double().cos()).abs().max() < 1e-7
    square = torch.logspace(-7.2, 1.7, 500_001)
    assert (sqrt(square).double() / square.double().sqrt() - 1).abs().max() < 2e-7


def test_operations_of_the_transform_are_rounded_exactly():
    """What bit equality rests on: these agree with IEEE 754 in the vector body and in the tail."""
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(100_003, generator=generator) * 50 + 1e-3
    b = torch.rand(100_003, generator=generator) * 7 + 1e-3
    words = torch.randint(-(2**31), 2**31, (100_003,), generator=generator).to(torch.int32)
    assert np.array_equal((a / b).numpy(), a.numpy() / b.numpy())
    assert np.array_equal((a * b).numpy(), a.numpy() * b.numpy())
    assert np.array_equal((a + b).numpy(), a.numpy() + b.numpy())
    assert np.array_equal((a - b).numpy(), a.numpy() - b.numpy())
    assert np.array_equal(words.to(torch.float32).numpy(), words.numpy().astype(np.float32))


@pytest.mark.alone
def test_fast_enough_for_the_training_step():
    """128 x 784 normal numbers take about 2 ms on one core; ten times that would be felt."""
    d = draw(samples=range(128))
    times = []
    for _ in range(5):
        start = time.perf_counter()
        d.normal("noise", (1, 28, 28))
        times.append(time.perf_counter() - start)
    assert min(times) < 0.03


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_same_bits_on_cuda():
    here, there = draw(samples=range(257)), draw(samples=range(257))
    there = Draw(there.seed, there.step, there.samples.cuda())
    for shape in ((), (3, 33)):
        assert torch.equal(here.normal("n", shape), there.normal("n", shape).cpu())
        assert torch.equal(here.uniform("u", shape), there.uniform("u", shape).cpu())
