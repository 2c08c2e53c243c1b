"""A DiT over tokens: its sizes, its first output, what its output depends on."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from flows.errors import UserError
from flows.initialise import initialise
from flows.models.token_dit import TokenDiT, TokenDiTConfig, forward_flops

CONFIG = TokenDiTConfig(image_size=4, channels=2, classes=3, width=16, depth=2, heads=2, levels=5)


def model(config=CONFIG, trained=False):
    made = TokenDiT(config)
    initialise(made, 0)
    if trained:  # a fresh one says nothing
        generator = torch.Generator().manual_seed(1)
        for weight in made.parameters():
            weight.data += 0.1 * torch.randn(weight.shape, generator=generator)
    return made


def inputs(batch=3):
    generator = torch.Generator().manual_seed(0)
    return {
        "x": torch.randint(6, (batch, 32), generator=generator),
        "t": torch.rand(batch, generator=generator),
        "label": torch.randint(4, (batch,), generator=generator),
    }


def test_a_fresh_network_prefers_no_level():
    logits = model()(**inputs())
    assert logits.shape == (3, 32, 5)
    assert logits.count_nonzero() == 0


def test_logits_of_a_token_depend_on_all_that_is_given():
    made = model(trained=True)
    given = inputs()
    before = made(**given)
    for name, change in (("x", (given["x"] + 1) % 6), ("t", given["t"] / 2),
                         ("label", (given["label"] + 1) % 4)):  # fmt: skip
        after = made(**(given | {name: change}))
        assert not torch.allclose(after, before, atol=1e-4), name
    one = given["x"].clone()
    one[:, 7] = (one[:, 7] + 1) % 6
    assert not torch.allclose(made(**(given | {"x": one}))[:, 20], before[:, 20], atol=1e-5)


def test_places_and_channels_differ():
    """The same token everywhere has other logits at another pixel and in another channel."""
    same = inputs(1) | {"x": torch.full((1, 32), 2)}
    logits = model(trained=True)(**same)[0]
    assert not torch.allclose(logits[0], logits[1], atol=1e-4)
    assert not torch.allclose(logits[0], logits[2], atol=1e-4)


def test_parameters_and_operations():
    made = model()
    width, block = 16, 12 * 16**2 + 9 * 16 + 6 * 16**2 + 6 * 16
    ends = (6 + 2 + 4) * width + (256 * width + width) + (width**2 + width)
    final = 2 * width**2 + 2 * width + width * 5 + 5
    assert sum(p.numel() for p in made.parameters()) == 2 * block + ends + final
    assert set(made.init_rules()) == {name for name, _ in made.named_parameters()}
    with FlopCounterMode(display=False) as counter:
        made(**inputs(1))
    attention = 2 * 2 * (2 * 32**2 * 16)  # of two blocks, which the counter does not see on a CPU
    assert forward_flops(CONFIG) == counter.get_total_flops() + attention


def test_bfloat16_stays_near():
    made = model(trained=True)
    exact = made(**inputs())
    near = made.bfloat16()(**inputs())
    assert near.dtype == torch.bfloat16
    assert (near - exact).abs().max() < 0.05 * exact.abs().max()


def test_sizes_that_cannot_be_are_refused():
    with pytest.raises(UserError, match=r"model.width = 18 is not divisible by model.heads"):
        TokenDiTConfig(4, 1, 3, width=18, depth=1, heads=4, levels=2)
