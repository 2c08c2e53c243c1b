"""Denoising: exact where the density is known, and learned from a flow."""

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from flows.batch import Batch
from flows.errors import UserError
from flows.initialise import initialise
from flows.models.denoiser import Denoiser, DenoiserConfig, forward_flops
from flows.models.flow import FlowOutput
from flows.models.jet import Jet, JetConfig
from flows.objectives.denoising import Denoising
from flows.objectives.likelihood import Likelihood, log_likelihood
from flows.randomness import Draw
from flows.samplers.denoise import (
    denoise_by_network,
    denoise_by_score,
    noise_from_gradient,
    score,
)

NOISE = 0.3
SIZES = DenoiserConfig(image_size=4, channels=2, classes=3, patch=2, width=16, layers=2, heads=2)


def gaussian_flow(spread: Tensor, mean: float = 0.5):
    """The exact flow of noisy data whose clean data is N(mean, spread^2) in each dimension."""
    total = (spread**2 + NOISE**2).sqrt()

    def flow(x: Tensor) -> FlowOutput:
        z = ((x - mean) / total).flatten(2).transpose(1, 2)
        logdet = -total.log().sum().expand(len(x))
        return FlowOutput(z, logdet, torch.zeros(len(x)))

    return flow


def jet() -> Jet:
    config = JetConfig(
        image_size=4,
        channels=2,
        classes=3,
        patch=2,
        width=16,
        couplings=3,
        layers=1,
        heads=2,
        conditional=True,
    )
    model = Jet(config)
    initialise(model, seed=0)
    generator = torch.Generator().manual_seed(1)
    for weight in model.parameters():
        weight.data.normal_(0.0, 0.2, generator=generator)
    return model


def samples(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 2, 4, 4, generator=generator)
    return x, torch.randint(0, 4, (count,), generator=generator)


def test_the_score_step_is_the_posterior_mean_for_gaussian_data() -> None:
    """E[clean | x] = mean + s^2 / (s^2 + sigma^2) (x - mean)."""
    spread = torch.linspace(0.2, 2.0, 32).view(1, 2, 4, 4)
    x, _ = samples(6)
    found = denoise_by_score(gaussian_flow(spread), x, {}, noise=NOISE, scale=1.0)
    expected = 0.5 + spread**2 / (spread**2 + NOISE**2) * (x - 0.5)
    torch.testing.assert_close(found.sample, expected, atol=1e-6, rtol=1e-6)
    assert found.network_calls == 2
    none = denoise_by_score(gaussian_flow(spread), x, {}, noise=NOISE, scale=0.0)
    assert torch.equal(none.sample, x)
    twice = denoise_by_score(gaussian_flow(spread), x, {}, noise=NOISE, scale=2.0)
    torch.testing.assert_close(twice.sample - x, 2 * (expected - x), atol=1e-5, rtol=1e-5)


def test_a_volume_preserving_flow_is_denoised_by_the_prior_it_is_sampled_from() -> None:
    """The identity, of N(0, s^2) data with noise: E[clean | x] = s^2 / (s^2 + sigma^2) x."""
    spread = torch.linspace(0.2, 2.0, 32).view(1, 2, 4, 4)

    def identity(x: Tensor) -> FlowOutput:
        return FlowOutput(x.flatten(2).transpose(1, 2), torch.zeros(len(x)), torch.zeros(len(x)))

    variance = identity(spread**2 + NOISE**2).z[0]
    x, _ = samples(6)
    found = denoise_by_score(identity, x, {}, noise=NOISE, scale=1.0, variance=variance)
    expected = spread**2 / (spread**2 + NOISE**2) * x
    torch.testing.assert_close(found.sample, expected, atol=1e-6, rtol=1e-6)


def test_the_score_is_the_slope_of_the_density_of_each_sample() -> None:
    model = jet()
    x, label = samples(5)
    found = score(model, x, {"label": label})
    assert not found.requires_grad
    assert all(weight.grad is None for weight in model.parameters())
    step = 1e-3
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        above, below = (
            log_likelihood(model(x + sign * step * direction, label)) for sign in (1, -1)
        )
    slope = (found * direction).flatten(1).sum(1)
    torch.testing.assert_close((above - below) / (2 * step), slope, rtol=1e-2, atol=2e-2)
    for i in range(5):
        alone = score(model, x[i : i + 1], {"label": label[i : i + 1]})
        torch.testing.assert_close(alone[0], found[i], rtol=1e-5, atol=1e-5)


def test_the_score_is_found_where_gradients_are_off() -> None:
    x, label = samples(2)
    with torch.no_grad():
        assert score(jet(), x, {"label": label}).any()


def test_the_gradient_that_training_leaves_is_the_noise() -> None:
    model = jet()
    x, label = samples(4)
    chosen = Likelihood("none", None, NOISE, 0.0, 0.0, 3, None)
    point = x.clone().requires_grad_()
    chosen.loss(model(point, label), {}).sum().backward()
    target = noise_from_gradient(point.grad, noise=NOISE)
    expected = -NOISE * score(model, x, {"label": label})
    torch.testing.assert_close(target, expected, rtol=1e-5, atol=1e-5)
    # Taking the flow's own target away is the score step.
    found = denoise_by_network(lambda _: target, x, noise=NOISE)
    by_score = denoise_by_score(model, x, {"label": label}, noise=NOISE, scale=1.0)
    torch.testing.assert_close(found.sample, by_score.sample, rtol=1e-5, atol=1e-5)
    assert found.network_calls == 1


def test_the_target_of_the_denoiser_belongs_to_the_noisy_data_the_flow_saw() -> None:
    model = jet()
    x, label = samples(6)
    batch = Batch(x, label, torch.arange(6) + 40)
    trained_by = Likelihood("none", None, NOISE, 0.0, 0.5, 3, None)
    chosen = Denoising(model, trained_by)
    draw = Draw(5, 2, batch.position)
    ready = chosen.prepare(batch, draw)
    seen = trained_by.prepare(batch, draw).inputs
    assert ready.inputs.keys() == {"x"}
    assert torch.equal(ready.inputs["x"], seen["x"])
    target = -NOISE * score(model, seen["x"], {"label": seen["label"]})
    torch.testing.assert_close(ready.targets["noise"], target)
    assert torch.equal(chosen.loss(ready.targets["noise"], ready.targets), torch.zeros(6))
    off = chosen.loss((ready.targets["noise"] + 2).bfloat16(), ready.targets)
    assert off.dtype == torch.float32
    torch.testing.assert_close(off, torch.full((6,), 4.0), rtol=0.05, atol=0)


def test_a_trained_denoiser_removes_noise_as_the_flow_does() -> None:
    spread = torch.full((1, 2, 4, 4), 0.4)
    flow, denoiser = gaussian_flow(spread), Denoiser(SIZES)
    initialise(denoiser, seed=0)
    trained_by = Likelihood("none", None, NOISE, 0.0, 0.0, 3, None)
    chosen = Denoising(lambda x, label: flow(x), trained_by)
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=3e-3)

    def clean(step: int) -> Batch:
        image = 0.5 + 0.4 * samples(128, seed=step)[0]
        return Batch(image, torch.zeros(128, dtype=torch.int64), torch.arange(128) + 128 * step)

    for step in range(120):
        batch = clean(step)
        ready = chosen.prepare(batch, Draw(0, step, batch.position))
        optimizer.zero_grad()
        chosen.loss(denoiser(**ready.inputs), ready.targets).mean().backward()
        optimizer.step()
    batch = clean(1000)
    noisy = trained_by.prepare(batch, Draw(0, 1000, batch.position)).inputs["x"]
    learned = denoise_by_network(denoiser, noisy, noise=NOISE).sample
    exact = denoise_by_score(flow, noisy, {}, noise=NOISE, scale=1.0).sample
    before, after, best = (
        (image - batch.image).square().mean().item() for image in (noisy, learned, exact)
    )
    assert before == pytest.approx(NOISE**2, rel=0.1)
    assert best == pytest.approx(1 / (1 / 0.4**2 + 1 / NOISE**2), rel=0.1)
    assert after < best + 0.2 * (before - best)


def test_a_fresh_denoiser_finds_no_noise_and_costs_what_it_says() -> None:
    denoiser = Denoiser(SIZES)
    initialise(denoiser, seed=0)
    x, _ = samples(3)
    assert torch.equal(denoiser(x), torch.zeros_like(x))
    assert len(denoiser.blocks) == SIZES.layers
    with torch.device("meta"):
        model, image = Denoiser(SIZES), torch.empty(3, 2, 4, 4)
    with FlopCounterMode(display=False) as counter:
        model(image)
    assert counter.get_total_flops() / 3 == forward_flops(SIZES)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"patch": 3}, r"data.image_size = 4 is not divisible by model.patch = 3"),
        ({"heads": 3}, r"model.width = 16 is not divisible by model.heads = 3"),
    ],
)
def test_impossible_sizes_are_refused_by_key(changes, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        DenoiserConfig(**{**vars(SIZES), **changes})
