"""Learned noise: it starts uniform, its density is right, and its bound is below that of uniform noise."""

import math

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from flows.batch import Batch
from flows.dequantisation import Levels
from flows.errors import UserError
from flows.initialise import initialise
from flows.models.dequantised import Dequantised, Dequantiser, DequantiserConfig, forward_flops
from flows.models.jet import Jet, JetConfig
from flows.objectives.likelihood import Likelihood
from flows.randomness import Draw

LEVELS = Levels(4, "inside")
NOISE = DequantiserConfig(
    image_size=4, channels=2, levels=LEVELS, patch=2, width=16, couplings=3, layers=1, heads=2
)
FLOW = JetConfig(
    image_size=4, channels=2, classes=3, patch=2, width=16, couplings=2, layers=1, heads=2
)


def built(std: float | None = None) -> Dequantised:
    model = Dequantised(Jet(FLOW), NOISE)
    initialise(model, seed=0)
    if std is not None:
        generator = torch.Generator().manual_seed(1)
        for weight in model.parameters():
            weight.data.normal_(0.0, std, generator=generator)
    return model


def objective(kind: str, levels: Levels = LEVELS) -> Likelihood:
    return Likelihood(kind, levels, 0.0, 0.0, 0.0, 3, None)


def images(count: int, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    level = torch.randint(4, (count, 2, 4, 4), generator=generator)
    return Batch(level / 1.5 - 1, torch.zeros(count, dtype=torch.int64), torch.arange(count))


def test_a_fresh_dequantiser_draws_uniform_noise() -> None:
    model, samples = built(), images(200)
    inputs = objective("variational").prepare(samples, Draw(0, 0, samples.position)).inputs
    u, log_q = model.dequantiser(inputs["x"], inputs["noise"])
    assert log_q.abs().max() <= 1e-4
    assert u.mean().item() == pytest.approx(0.5, abs=0.02)
    assert u.var().item() == pytest.approx(1 / 12, rel=0.05)
    output = model(**inputs)
    plain = model.flow(inputs["x"] + LEVELS.width * u, inputs["label"])
    torch.testing.assert_close(output.z, plain.z)
    torch.testing.assert_close(output.logdet, plain.logdet, atol=1e-4, rtol=0)
    torch.testing.assert_close(output.power, plain.power)


def test_the_density_of_the_noise_is_that_of_its_map() -> None:
    config = NOISE
    dequantiser = Dequantiser(config)
    generator = torch.Generator().manual_seed(3)
    for weight in dequantiser.parameters():
        weight.data.normal_(0.0, 0.2, generator=generator)
    x = LEVELS.lower(images(1).image)
    e = torch.randn(1, 2, 4, 4, generator=generator)
    noise = dequantiser(x, e)
    assert noise.log_q.abs().item() > 0.1
    jacobian = torch.autograd.functional.jacobian(lambda y: dequantiser(x, y).u, e)
    volume = torch.linalg.slogdet(jacobian.reshape(32, 32).double())[1]
    normal = -0.5 * e.double().square().sum() - 16 * math.log(2 * math.pi)
    assert noise.log_q.item() == pytest.approx((normal - volume).item(), abs=1e-4)
    # In every half the noise of the other half and the image matter.
    assert (jacobian.reshape(2, 16, 32).abs().amax((1, 2)) > 0).all()
    other = dequantiser(x.flip(0) + 0.5, e)
    assert not torch.allclose(other.u, noise.u, atol=1e-3)


def test_both_flows_are_trained_and_told_of_the_label() -> None:
    model = built(std=0.1)
    samples = images(3)
    chosen = objective("variational")
    ready = chosen.prepare(samples, Draw(0, 0, samples.position))
    chosen.loss(model(**ready.inputs), ready.targets).sum().backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.any(), name
    assert [id(block) for block in model.blocks] == [
        id(block) for block in (*model.flow.blocks, *model.dequantiser.blocks)
    ]


def test_the_cost_formula_equals_the_operator_count() -> None:
    with torch.device("meta"):
        model, x = Dequantiser(NOISE), torch.empty(5, 2, 4, 4)
    with FlopCounterMode(display=False) as counter:
        model(x, x)
    assert counter.get_total_flops() / 5 == forward_flops(NOISE)


def correlated_levels(count: int, seed: int) -> tuple[Tensor, float]:
    """(count, 2, 1, 1) pairs of 4 levels, and their entropy in bits for each number.

    Steep odds: a density must put all but a hundredth into a few bins, whose edges it cannot see.
    """
    a = torch.arange(4.0)
    weight = torch.exp(-2.0 * (a[:, None] - a[None, :]).abs()) * torch.exp(-0.5 * a)
    probability = (weight / weight.sum()).flatten()
    generator = torch.Generator().manual_seed(seed)
    pair = torch.multinomial(probability, count, True, generator=generator)
    level = torch.stack((pair // 4, pair % 4), 1).view(count, 2, 1, 1)
    entropy = -(probability * probability.log2()).sum().item() / 2
    return level / 1.5 - 1, entropy


def trained_bits(kind: str, steps: int) -> tuple[float, float]:
    """Bits per dimension of fresh data after training, and the entropy, on pairs of levels."""
    sizes = {"image_size": 1, "channels": 2, "patch": 1, "width": 16, "layers": 1, "heads": 2}
    flow = Jet(JetConfig(classes=1, couplings=4, kinds=("channel",), **sizes))
    noise = DequantiserConfig(levels=LEVELS, couplings=3, **sizes)
    model = Dequantised(flow, noise) if kind == "variational" else flow
    initialise(model, seed=0)
    chosen = objective(kind)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    image, entropy = correlated_levels(256 * steps, seed=0)
    for step in range(steps):
        rows = torch.arange(256 * step, 256 * (step + 1))
        batch = Batch(image[rows], torch.zeros(256, dtype=torch.int64), rows)
        ready = chosen.prepare(batch, Draw(0, step, rows))
        optimizer.zero_grad()
        chosen.loss(model(**ready.inputs), ready.targets).mean().backward()
        optimizer.step()
    image, entropy = correlated_levels(8_000, seed=1)
    batch = Batch(image, torch.zeros(8_000, dtype=torch.int64), torch.arange(8_000))
    with torch.no_grad():
        ready = chosen.prepare(batch, Draw(1, 0, batch.position))
        return chosen.bits(model(**ready.inputs)).mean().item(), entropy


def test_learned_noise_bounds_discrete_data_more_tightly_than_uniform_noise() -> None:
    """Entropy by enumeration <= variational bound < uniform bound, after equal steps."""
    uniform, entropy = trained_bits("uniform", steps=120)
    variational, _ = trained_bits("variational", steps=120)
    # 8,000 pairs with a spread of about one bit: four standard errors are 0.05.
    assert entropy - 0.05 <= variational
    assert variational <= uniform - 0.02


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"patch": 3}, r"data.image_size = 4 is not divisible by objective.dequantiser.patch = 3"),
        ({"heads": 3}, r"objective.dequantiser.width = 16 is not divisible"),
        ({"patch": 1, "channels": 1}, r"makes tokens of 1 numbers"),
    ],
)
def test_impossible_sizes_are_refused_by_key(changes, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        DequantiserConfig(**{**vars(NOISE), **changes})
