"""Guidance is the formula, costs what it says, and is absent where it is switched off."""

import pytest
import torch
from torch import Tensor

from flows.initialise import initialise
from flows.metrics.energy import energy_distance
from flows.models.dit import DiT, DiTConfig
from flows.paths import LINEAR
from flows.randomness import Draw
from flows.samplers.guidance import Condition, Field, Guidance, Velocity, null_condition
from flows.samplers.sampler import Sampled, sample
from tests.flows.gaussian import RING, RING_SPREAD, ring_velocity

NULL = 9
LABEL = torch.tensor([3, 0, 7])
X = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))


class Recorder:
    """A velocity that depends on everything, and remembers the batches it was asked for."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        label = condition["label"]
        assert len(x) == len(t) == len(label)
        self.batches.append(len(x))
        return torch.sin(3.0 * x + (t + label).reshape(-1, 1, 1, 1))


def field_of(velocity: Velocity, guidance: Guidance) -> Field:
    condition = {"label": LABEL}
    return Field(velocity, condition, null_condition(condition, NULL), guidance, torch.arange(3))


def plain(label: Tensor, t: float) -> Tensor:
    return Recorder()(X, torch.full((len(X),), t), {"label": label})


def guided(scale: float, low: float = 0.0, high: float = 1.0) -> tuple[Field, Recorder]:
    velocity = Recorder()
    return field_of(velocity, Guidance(scale, low, high)), velocity


@pytest.mark.parametrize("scale", [0.3, 1.5, 4.0])
def test_it_extrapolates_from_the_null_label_in_one_batch_of_twice_the_size(scale: float) -> None:
    field, velocity = guided(scale)
    with_label, without = plain(LABEL, 0.4), plain(torch.full_like(LABEL, NULL), 0.4)
    torch.testing.assert_close(field(X, 0.4), without + scale * (with_label - without))
    assert velocity.batches == [6]
    assert field.network_calls.tolist() == [2, 2, 2]


def test_scale_zero_is_the_null_label_to_the_bit() -> None:
    assert torch.equal(guided(0.0)[0](X, 0.4), plain(torch.full_like(LABEL, NULL), 0.4))


def test_scale_one_is_the_label_alone_to_the_bit() -> None:
    field, velocity = guided(1.0)
    assert torch.equal(field(X, 0.4), plain(LABEL, 0.4))
    assert velocity.batches == [3]
    assert field.network_calls.tolist() == [1, 1, 1]


def test_outside_its_interval_there_is_no_guidance() -> None:
    field, velocity = guided(4.0, low=0.25, high=0.5)
    for t in (0.0, 0.2, 0.5, 1.0):
        assert torch.equal(field(X, t), plain(LABEL, t)), t
    assert velocity.batches == [3] * 4
    for t in (0.25, 0.4):
        assert not torch.allclose(field(X, t), plain(LABEL, t)), t
    assert velocity.batches[4:] == [6, 6]
    assert field.network_calls.tolist() == [4 + 2 * 2] * 3


def test_an_interval_up_to_one_includes_the_end() -> None:
    field, _ = guided(4.0, low=0.5, high=1.0)
    assert not torch.allclose(field(X, 1.0), plain(LABEL, 1.0))


def test_a_network_that_ignores_its_label_is_not_changed_by_guidance() -> None:
    model = DiT(DiTConfig(4, 2, 9, patch=2, width=16, depth=1, heads=2, learn_sigma=False))
    initialise(model, seed=0)
    for name, weight in model.named_parameters():
        weight.data.normal_(0.0, 0.2, generator=torch.Generator().manual_seed(len(name)))
    model.label.weight.data.fill_(0.1)
    fields = [
        field_of(lambda x, t, asked: model(x, t, **asked), Guidance(scale, 0.0, 1.0))
        for scale in (1.0, 5.0)
    ]
    torch.testing.assert_close(fields[0](X, 0.3), fields[1](X, 0.3))
    model.label.weight.data[NULL] += 1.0
    assert not torch.allclose(fields[0](X, 0.3), fields[1](X, 0.3))


def test_velocities_are_float32_whatever_the_network_computes_in() -> None:
    field = field_of(lambda x, t, condition: x.bfloat16(), Guidance(2.0, 0.0, 1.0))
    assert field(X, 0.3).dtype == torch.float32


def test_every_part_of_a_condition_has_its_null() -> None:
    """A dropped text is all zeros, as a dropped label is the null label."""
    text = torch.randn(3, 5, 2, generator=torch.Generator().manual_seed(1))

    def velocity(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        shift = condition["text"].mean((1, 2)) + condition["label"]
        return torch.cos(x) * shift.reshape(-1, 1, 1, 1)

    both = {"label": LABEL, "text": text}
    null = null_condition(both, NULL)
    assert torch.equal(null["label"], torch.full((3,), NULL))
    assert torch.equal(null["text"], torch.zeros(3, 5, 2))
    t = torch.full((3,), 0.4)
    expected = torch.lerp(velocity(X, t, null), velocity(X, t, both), 3.0)
    scale = Guidance(3.0, 0.0, 1.0)
    found = Field(velocity, both, null, scale, torch.arange(3))(X, 0.4)
    torch.testing.assert_close(found, expected)
    # Away from another text instead: a negative prompt.
    negative = {"label": LABEL, "text": text.flip(0)}
    expected = torch.lerp(velocity(X, t, negative), velocity(X, t, both), 3.0)
    found = Field(velocity, both, negative, scale, torch.arange(3))(X, 0.4)
    torch.testing.assert_close(found, expected)


def test_some_channels_may_be_guided_alone() -> None:
    whole, _ = guided(4.0)
    field = field_of(Recorder(), Guidance(4.0, 0.0, 1.0, channels=1))
    found = field(X, 0.4)
    assert torch.equal(found[:, :1], whole(X, 0.4)[:, :1])
    assert torch.equal(found[:, 1:], plain(LABEL, 0.4)[:, 1:])
    assert field.network_calls.tolist() == [2, 2, 2]
    both = field_of(Recorder(), Guidance(4.0, 0.0, 1.0, channels=2))
    assert torch.equal(both(X, 0.4), whole(X, 0.4))


class Turning:
    """v_null along the first axis; v_label at an angle of (label - t): sample i meets it at t = label."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        self.batches.append(len(x))
        angle = torch.where(condition["label"] == NULL, 0.0, condition["label"] - t)
        return torch.stack((angle.cos(), angle.sin()), 1)


def test_a_sample_whose_velocities_agree_is_guided_no_longer() -> None:
    """To the end, and without regard to the others."""
    condition = {"label": torch.tensor([0.0, 0.4, 0.2])}
    velocity, cosine = Turning(), torch.tensor(0.15).cos().item()
    guidance = Guidance(3.0, 0.0, 1.0, cosine=cosine)
    field = Field(velocity, condition, null_condition(condition, NULL), guidance, torch.arange(3))
    x = torch.zeros(3, 2)
    angles = []
    for t in (0.0, 0.1, 0.2, 0.3, 0.4, 0.9):
        found = field(x, t)
        angles.append(torch.atan2(found[:, 1], found[:, 0]))
    # Within 0.15 of its label: at t = 0, 0.3 and 0.1, each being the last that is guided.
    assert velocity.batches == [6, 5, 4, 4, 3, 3]
    assert field.network_calls.tolist() == [7, 10, 8]
    assert angles[0][0] == 0.0, "where they are the same, guidance changes nothing"
    assert angles[2][1] > 0.2 + 0.1, "guided beyond its own 0.2"
    torch.testing.assert_close(angles[4], torch.tensor([-0.4, 0.0, -0.2]))
    assert angles[5][1].item() == pytest.approx(-0.5), "apart again, and still alone"


@pytest.mark.parametrize("threshold", [None, 1.0])
def test_a_threshold_that_is_not_reached_is_full_guidance_to_the_bit(
    threshold: float | None,
) -> None:
    field = field_of(Recorder(), Guidance(2.5, 0.0, 1.0, cosine=threshold))
    for t in (0.1, 0.6):
        assert torch.equal(field(X, t), guided(2.5)[0](X, t))
    assert field.network_calls.tolist() == [4, 4, 4]


def test_a_threshold_that_every_cosine_reaches_is_no_guidance_to_the_bit() -> None:
    velocity = Recorder()
    field = field_of(velocity, Guidance(2.5, 0.0, 1.0, cosine=-1.0))
    assert torch.equal(field(X, 0.1), plain(LABEL, 0.1))
    assert velocity.batches == [3]
    assert field.network_calls.tolist() == [1, 1, 1]


def test_velocities_of_zero_have_no_direction_to_agree_in() -> None:
    field = field_of(lambda x, t, c: torch.zeros_like(x), Guidance(2.0, 0.0, 1.0, cosine=0.5))
    assert torch.equal(field(X, 0.1), torch.zeros_like(X))
    field(X, 0.2)
    assert field.network_calls.tolist() == [4, 4, 4]


def test_adaptive_guidance_saves_a_quarter_and_keeps_the_distribution() -> None:
    samples = torch.arange(2000)
    full, adaptive = ring(samples, None), ring(samples, 0.99)
    assert full.network_calls.tolist() == [80] * 2000
    assert adaptive.network_calls.double().mean() < 0.75 * 80
    # How far guidance moves the distribution, beside how far leaving it out early does.
    real = RING[samples % 8] + RING_SPREAD * Draw(2, 0, samples).normal("real", (2,))
    moved = energy_distance(full.sample, real, chunk=500)
    changed = energy_distance(adaptive.sample, full.sample, chunk=500)
    assert changed < 0.05 * moved


def test_when_guidance_ends_does_not_depend_on_the_batch() -> None:
    samples = torch.arange(64)
    part = samples[5::7]
    whole, alone = ring(samples, 0.99), ring(part, 0.99)
    assert torch.equal(whole.network_calls[part], alone.network_calls)
    assert len(whole.network_calls.unique()) > 4, "each ends at a time of its own"
    torch.testing.assert_close(whole.sample[part], alone.sample, rtol=0.0, atol=1e-5)


def ring(samples: Tensor, cosine: float | None) -> Sampled:
    """40 guided steps to the Gaussian of each sample's class, classes in turn."""
    label = {"label": samples % 8}
    return sample(
        ring_velocity,
        label,
        null_condition(label, 8),
        samples,
        shape=(2,),
        seed=1,
        path=LINEAR,
        prediction="velocity",
        solver="euler",
        steps=40,
        times=None,
        time_shift=1.0,
        guidance=2.0,
        guidance_low=0.0,
        guidance_high=1.0,
        guidance_channels=None,
        guidance_cosine=cosine,
        diffusion="sigma",
        diffusion_scale=0.0,
        diffusion_last="tweedie",
    )
