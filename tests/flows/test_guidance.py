"""Guidance is the formula, costs what it says, and is absent where it is switched off."""

import pytest
import torch
from torch import Tensor

from flows.initialise import initialise
from flows.models.dit import DiT, DiTConfig
from flows.samplers.guidance import Condition, Field, Guidance, Velocity, null_condition

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
    return Field(velocity, condition, null_condition(condition, NULL), guidance)


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
    assert field.network_calls == 2


def test_scale_zero_is_the_null_label_to_the_bit() -> None:
    assert torch.equal(guided(0.0)[0](X, 0.4), plain(torch.full_like(LABEL, NULL), 0.4))


def test_scale_one_is_the_label_alone_to_the_bit() -> None:
    field, velocity = guided(1.0)
    assert torch.equal(field(X, 0.4), plain(LABEL, 0.4))
    assert velocity.batches == [3]
    assert field.network_calls == 1


def test_outside_its_interval_there_is_no_guidance() -> None:
    field, velocity = guided(4.0, low=0.25, high=0.5)
    for t in (0.0, 0.2, 0.5, 1.0):
        assert torch.equal(field(X, t), plain(LABEL, t)), t
    assert velocity.batches == [3] * 4
    for t in (0.25, 0.4):
        assert not torch.allclose(field(X, t), plain(LABEL, t)), t
    assert velocity.batches[4:] == [6, 6]
    assert field.network_calls == 4 + 2 * 2


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
    torch.testing.assert_close(
        Field(velocity, both, null, Guidance(3.0, 0.0, 1.0))(X, 0.4), expected
    )
    # Away from another text instead: a negative prompt.
    negative = {"label": LABEL, "text": text.flip(0)}
    expected = torch.lerp(velocity(X, t, negative), velocity(X, t, both), 3.0)
    torch.testing.assert_close(
        Field(velocity, both, negative, Guidance(3.0, 0.0, 1.0))(X, 0.4), expected
    )
