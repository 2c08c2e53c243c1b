"""Recomputing changes what is kept and what is computed, and no gradient."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from flows.initialise import initialise
from flows.models.dit import DiT, DiTConfig
from parallel.activation import Recompute, checkpoint_blocks
from parallel.memory import LiveBytes

CONFIG = DiTConfig(image_size=8, channels=1, classes=3, patch=2, width=32, depth=4, heads=2)
MODES = {
    "none": Recompute(0),
    "products kept": Recompute(1, "products"),
    "every second": Recompute(2),
    "all": Recompute(1),
}


def step(recompute: Recompute) -> tuple[list[torch.Tensor], int, int]:
    """Gradients, operations of forward and backward, and the bytes that forward left to backward."""
    model = DiT(CONFIG)
    initialise(model, 0)
    with torch.no_grad():
        for weight in model.parameters():  # a fresh DiT is zero in many places
            weight.add_(
                0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
            )
    checkpoint_blocks(model, model.blocks, recompute)
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as flops, LiveBytes() as live:
        loss = model(x, torch.rand(3), torch.tensor([0, 1, 3])).square().sum()
        kept = live.now
        loss.backward()
    return [weight.grad for weight in model.parameters()], flops.get_total_flops(), kept


@pytest.fixture(scope="module")
def found():
    torch.manual_seed(0)
    result = {}
    for name, recompute in MODES.items():
        torch.manual_seed(0)
        result[name] = step(recompute)
    return result


@pytest.mark.parametrize("mode", list(MODES))
def test_gradients_are_the_same_bits(found, mode):
    for ours, plain in zip(found[mode][0], found["none"][0], strict=True):
        torch.testing.assert_close(ours, plain, rtol=0, atol=0)


def test_what_is_kept_falls_and_what_is_computed_grows(found):
    bytes_kept = [found[mode][2] for mode in MODES]
    assert bytes_kept == sorted(bytes_kept, reverse=True)
    assert bytes_kept[-1] < 0.5 * bytes_kept[0]
    none, products, half, every = (found[mode][1] for mode in MODES)
    # Every second block once more; all of them; and no product of matrices twice.
    assert products == none
    assert none < half < every
    assert every - none == pytest.approx(2 * (half - none), rel=1e-6)
