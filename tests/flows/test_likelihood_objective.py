"""Maximum likelihood: constants, closed forms, discrete pixels, and randomness by key."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flows.batch import Batch
from flows.dequantisation import Levels, truncated_normal_in_bin, uniform_in_bin
from flows.errors import UserError
from flows.models.flow import FlowOutput
from flows.objectives.likelihood import (
    Likelihood,
    bits_per_dimension,
    log_likelihood,
    prior_variance,
)
from flows.randomness import Draw

CLASSES = 5
BYTES = Levels(256, "inside")
EVERY_BIN = pytest.mark.parametrize("bins", ["inside", "above", "around"])


def objective(dequantisation="none", levels=BYTES, noise=0.0, power=0.0, text_drop=None, drop=0.1):
    return Likelihood(dequantisation, levels, noise, power, drop, CLASSES, text_drop)


def scaled(x: Tensor, scale: float = 1.0) -> FlowOutput:
    """The flow z = x / scale."""
    z = x.flatten(2).transpose(1, 2) / scale
    logdet = z.new_full((len(z),), -z[0].numel() * math.log(scale))
    return FlowOutput(z, logdet, x.square().flatten(1).mean(1))


def pixels(size, levels=256, shape=(3, 4, 4), seed=0):
    generator = torch.Generator().manual_seed(seed)
    level = torch.randint(levels, (size, *shape), generator=generator)
    label = torch.randint(CLASSES, (size,), generator=generator)
    text = torch.randn(size, 6, 2, generator=generator)
    image = (level.float() - (levels - 1) / 2) / ((levels - 1) / 2)
    return Batch(image, label, torch.arange(size) + 1000, {"text": text}), level


def draw_for(samples, step=3):
    return Draw(11, step, samples.position)


def test_bits_of_a_normal_are_its_entropy_and_grow_with_its_scale():
    x = torch.randn(4000, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    entropy = 0.5 * math.log2(2 * math.pi * math.e)
    # Half the square of 512,000 normals has mean 1/2 and standard error 0.7 / 715.
    error = 4 * 0.7 / 715 / math.log(2)
    for scale in (1.0, 0.25, 3.0):
        output = scaled(x * scale, scale)
        bits = bits_per_dimension(output, bin_width=1 / 128)
        assert abs(bits.mean().item() - (entropy + math.log2(128) + math.log2(scale))) < error
        assert bits.dtype == torch.float32
        assert bits.shape == (4000,)


def test_constants_are_those_published():
    """log 128 for TarFlow's bins of a byte, log 127.5 for Jet's."""
    output = scaled(torch.zeros(1, 1, 2, 2))
    for bins, scale in (("inside", 128.0), ("above", 127.5), ("around", 127.5)):
        bits = objective(levels=Levels(256, bins)).bits(output).item()
        expected = (0.5 * math.log(2 * math.pi) + math.log(scale)) / math.log(2)
        assert bits == pytest.approx(expected, rel=1e-6)
    assert objective(levels=None).bits(output).item() == pytest.approx(
        0.5 * math.log2(2 * math.pi), rel=1e-6
    )


def test_the_loss_is_the_negative_log_likelihood_without_its_constant():
    x = torch.randn(7, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    output = scaled(x, 0.3)
    loss = objective().loss(output, {})
    expected = -torch.distributions.Normal(0, 0.3).log_prob(x).flatten(1).mean(1)
    torch.testing.assert_close(loss + 0.5 * math.log(2 * math.pi), expected)
    torch.testing.assert_close(log_likelihood(output), -48 * expected, rtol=1e-5, atol=1e-5)
    powered = objective(power=0.25).loss(output, {})
    torch.testing.assert_close(powered - loss, 0.25 * x.square().flatten(1).mean(1))
    half = FlowOutput(output.z.bfloat16(), output.logdet, output.power)
    assert objective().loss(half, {}).dtype == torch.float32


@EVERY_BIN
@pytest.mark.parametrize("count", [2, 17, 256])
def test_bins_follow_each_other_and_hold_their_value(bins, count):
    levels = Levels(count, bins)
    value = torch.linspace(-1, 1, count, dtype=torch.float64).float()
    lower = levels.lower(value)
    torch.testing.assert_close(lower.diff(), torch.full((count - 1,), levels.width))
    if bins == "inside":
        assert lower[0] == -1
        torch.testing.assert_close(lower[-1] + levels.width, torch.tensor(1.0))
    else:
        offset = levels.width / 2 if bins == "around" else 0.0
        torch.testing.assert_close(lower + offset, value, atol=1e-6, rtol=0)
    # Pixels come as float32: what lies a little beside a level is that level.
    assert torch.equal(levels.lower(value + 0.2 * levels.width), lower)


@EVERY_BIN
def test_uniform_noise_fills_the_bin_evenly(bins):
    samples, level = pixels(300)
    levels = Levels(256, bins)
    y, log_q = uniform_in_bin(samples.image, levels, draw_for(samples))
    inside = (y - levels.lower(samples.image)) / levels.width
    assert inside.min() > -1e-4
    assert inside.max() < 1 + 1e-4
    counts = torch.histc(inside, 10, 0, 1)
    assert (counts - counts.mean()).abs().max() < 5 * counts.mean().sqrt()
    torch.testing.assert_close(log_q, torch.full((300,), -48 * math.log(levels.width)))
    prepared = objective("uniform", levels).prepare(samples, draw_for(samples)).inputs["x"]
    assert torch.equal(prepared, y)
    if bins == "inside":
        places = (y + 1) * 128
        assert ((places - level) > -1e-3).all()
        assert ((places - level) < 1 + 1e-3).all()


@pytest.mark.parametrize("std", [1e-3, 0.05, 3.0])
def test_truncated_normal_noise_stays_in_the_bin_and_has_the_density_it_says(std):
    samples, _ = pixels(400, 17, shape=(1, 4, 4))
    levels = Levels(17, "around")
    y, log_q = truncated_normal_in_bin(samples.image, levels, draw_for(samples), std=std)
    u = (y - samples.image).double()
    assert u.abs().max() <= levels.width / 2 + 1e-6
    # By quadrature over the bin.
    grid = torch.linspace(-levels.width / 2, levels.width / 2, 200_001, dtype=torch.float64)
    weight = torch.exp(-0.5 * (grid / std).square())
    mass = torch.trapezoid(weight, grid)
    expected = (-0.5 * (u / std).square() - mass.log()).flatten(1).sum(1)
    # y is a float32 near 1, so the offset in it is off by 6e-8, in units of std.
    torch.testing.assert_close(log_q.double(), expected, rtol=1e-4, atol=16 * 6e-8 * 8 / std)
    variance = torch.trapezoid(weight * grid.square(), grid) / mass
    assert u.square().mean().item() == pytest.approx(variance.item(), rel=0.1)


def exact_flow(y: Tensor, levels: Levels, probability: Tensor) -> FlowOutput:
    """The flow whose density is P(level) / width in each bin, independently for each pixel."""
    place = (y.double() - levels.lower(torch.tensor(-1.0))) / levels.width
    level = place.long().clamp(0, levels.count - 1)
    below = probability.cumsum(0) - probability
    cdf = below[level] + probability[level] * (place - level)
    z = torch.special.ndtri(cdf.clamp(1e-9, 1 - 1e-9))
    normal = -0.5 * z.square() - 0.5 * math.log(2 * math.pi)
    slope = (probability[level] / levels.width).log() - normal
    tokens = z.flatten(2).transpose(1, 2)
    return FlowOutput(tokens.float(), slope.flatten(1).sum(1).float(), torch.zeros(len(y)))


@EVERY_BIN
def test_the_bound_of_uniform_noise_is_the_entropy_for_the_exact_model_and_above_it_for_another(
    bins,
):
    levels = Levels(4, bins)
    probability = torch.tensor([0.55, 0.05, 0.3, 0.1], dtype=torch.float64)
    entropy = -(probability * probability.log2()).sum().item()
    generator = torch.Generator().manual_seed(0)
    level = torch.multinomial(probability, 4000 * 4, True, generator=generator).view(-1, 1, 2, 2)
    samples = Batch(level / 1.5 - 1.0, torch.zeros(4000, dtype=torch.int64), torch.arange(4000))
    chosen = objective("uniform", levels)
    y = chosen.prepare(samples, draw_for(samples)).inputs["x"]
    exact = chosen.bits(exact_flow(y, levels, probability))
    each = -probability.log2()[level].flatten(1).mean(1).float()
    torch.testing.assert_close(exact, each, atol=1e-4, rtol=1e-4)
    other = torch.tensor([0.25, 0.25, 0.25, 0.25], dtype=torch.float64)
    assert chosen.bits(exact_flow(y, levels, other)).mean().item() == pytest.approx(2.0, rel=1e-4)
    assert chosen.bits(scaled(y)).mean().item() > entropy


def test_gaussian_noise_has_the_size_asked_for():
    samples, _ = pixels(500)
    ready = objective(noise=0.05).prepare(samples, draw_for(samples))
    added = ready.inputs["x"] - samples.image
    assert added.std().item() == pytest.approx(0.05, rel=0.02)
    assert torch.equal(objective().prepare(samples, draw_for(samples)).inputs["x"], samples.image)
    both = objective("uniform", noise=0.05).prepare(samples, draw_for(samples)).inputs["x"]
    alone = objective("uniform").prepare(samples, draw_for(samples)).inputs["x"]
    torch.testing.assert_close(both - alone, added, atol=1e-6, rtol=0)


def test_variational_noise_is_left_to_the_model():
    samples, _ = pixels(50)
    ready = objective("variational").prepare(samples, draw_for(samples))
    assert torch.equal(ready.inputs["x"], BYTES.lower(samples.image))
    assert ready.inputs["noise"].shape == samples.image.shape
    assert ready.inputs["noise"].std().item() == pytest.approx(1.0, rel=0.05)


def test_labels_and_texts_are_dropped_at_the_rate_asked_for_and_apart():
    samples, _ = pixels(8000, shape=(1, 1, 1))
    for rate in (0.0, 0.3, 1.0):
        ready = objective(text_drop=rate, drop=rate).prepare(samples, draw_for(samples))
        label, text = ready.inputs["label"], ready.inputs["text"]
        no_label, no_text = label == CLASSES, ~text.flatten(1).any(1)
        assert torch.equal(label[~no_label], samples.label[~no_label])
        assert torch.equal(text[~no_text], samples.extras["text"][~no_text])
        error = 4 * (rate * (1 - rate) / 8000) ** 0.5
        for dropped in (no_label, no_text):
            assert abs(dropped.double().mean().item() - rate) <= error
        both = (no_label & no_text).double().mean().item()
        assert abs(both - rate**2) <= 4 * (rate**2 * (1 - rate**2) / 8000) ** 0.5
    assert "text" not in objective().prepare(samples, draw_for(samples)).inputs


@settings(max_examples=20, deadline=None)
@given(
    order=st.permutations(range(9)),
    cut=st.integers(1, 8),
    kind=st.sampled_from(["none", "uniform", "variational"]),
)
def test_a_sample_is_prepared_alike_in_every_batch(order, cut, kind):
    samples, _ = pixels(9)
    noise = 0.0 if kind == "variational" else 0.1
    chosen = objective(kind, noise=noise, text_drop=0.5, drop=0.5, power=0.1)
    whole = chosen.prepare(samples, draw_for(samples))
    index = torch.tensor(order)
    losses = chosen.loss(scaled(whole.inputs["x"]), whole.targets)
    for number, part in enumerate(samples.take(index).split(cut)):
        ready = chosen.prepare(part, draw_for(part))
        rows = index[number * cut : (number + 1) * cut]
        assert ready.inputs.keys() == whole.inputs.keys()
        for key, value in ready.inputs.items():
            assert torch.equal(value, whole.inputs[key][rows]), key
        loss = chosen.loss(scaled(ready.inputs["x"]), ready.targets)
        torch.testing.assert_close(loss, losses[rows], rtol=1e-6, atol=1e-6)


def test_the_prior_of_latents_is_their_own_and_the_most_likely():
    generator = torch.Generator().manual_seed(0)
    scale = torch.rand(4, 3, generator=generator) + 0.5
    z = torch.randn(1000, 4, 3, generator=generator) * scale
    variance = prior_variance([z[:300], z[300:]])
    torch.testing.assert_close(variance, z.double().square().mean(0).float())
    output = FlowOutput(z, torch.zeros(1000), torch.zeros(1000))
    best = bits_per_dimension(output, bin_width=1.0, variance=variance).mean()
    normal = torch.distributions.Normal(torch.zeros(()), variance.sqrt())
    expected = -normal.log_prob(z).mean() / math.log(2)
    torch.testing.assert_close(best, expected)
    for other in (torch.ones_like(variance), variance * 1.2, variance / 1.2):
        assert bits_per_dimension(output, bin_width=1.0, variance=other).mean() > best
    with pytest.raises(ValueError, match="at least one"):
        prior_variance([])


def test_what_cannot_be_is_refused_by_key():
    with pytest.raises(UserError, match=r"objective.dequantisation = uniform .* latents"):
        objective("uniform", levels=None)
    with pytest.raises(UserError, match=r"objective.noise = 0.05 would leave the bins"):
        objective("variational", noise=0.05)
