"""Images go on from what is given, and what is seen of them stays bit by bit."""

import pytest
import torch

from flows.bases import Inpainting, SuperResolution
from flows.errors import UserError
from flows.randomness import Draw
from flows.samplers.completion import complete, in_painting_start, super_resolution_start

SAMPLES = torch.arange(5)
IMAGE = torch.randn(5, 2, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("solver", ["euler", "heun", "midpoint", "rk4", "dopri5"])
def test_what_is_seen_keeps_its_bits(solver):
    seen = Inpainting(2, 0.5).mask(IMAGE, Draw(0, 0, SAMPLES))
    start = in_painting_start(IMAGE, seen, SAMPLES, seed=3)
    done = complete(
        lambda x, t: 5 * torch.cos(9 * x) + t, start, [0.0, 0.3, 1.0], solver, seen=seen
    )
    seen = seen.expand_as(IMAGE)
    assert torch.equal(done[seen], IMAGE[seen])
    assert (done[~seen] != start[~seen]).double().mean() > 0.99


@pytest.mark.parametrize("wrong", [torch.ones(5, 1, 8, 8), torch.ones(5, 8, 8, dtype=torch.bool)])
def test_a_mask_that_is_none_is_refused(wrong):
    with pytest.raises(UserError, match=r"give a torch\.bool one that broadcasts"):
        complete(lambda x, _: x, IMAGE, [0.0, 1.0], "euler", seen=wrong)
    with pytest.raises(UserError, match=r"give a torch\.bool one that broadcasts"):
        in_painting_start(IMAGE, wrong, SAMPLES, seed=3)


def test_completion_of_a_known_law():
    """Two equal pixels: the exact velocity brings the hidden one to the value of the seen one.

    Given the seen value s, the hidden pixel's path is from noise to s: v = (s - x) / (1 - t).
    """
    image = IMAGE[:, :1, :1, :1].expand(5, 1, 1, 2)
    seen = torch.tensor([True, False])
    start = in_painting_start(image, seen, SAMPLES, seed=3)
    times = torch.linspace(0, 1, 11).tolist()
    done = complete(
        lambda x, t: (x[..., :1] - x) / max(1 - t, 1e-6), start, times, "euler", seen=seen
    )
    assert torch.allclose(done, image, atol=1e-5)
    assert not torch.allclose(start, image, atol=0.1)


def test_super_resolution_begins_as_it_was_trained():
    """The same mean and spread about the coarse image as the base of training has."""
    base = SuperResolution(2, 0.3)
    coarse = base.coarse(IMAGE)
    start = super_resolution_start(coarse, 0.3, SAMPLES, seed=1)
    difference = (start - coarse) / 0.3
    assert difference.std().item() == pytest.approx(1, abs=4 / (2 * difference.numel()) ** 0.5)
    still = complete(lambda x, t: torch.zeros_like(x), start, [0.0, 1.0], "euler", seen=None)
    assert torch.equal(still, start)
