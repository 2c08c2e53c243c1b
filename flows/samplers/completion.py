"""From part of an image, or a coarse one, to the whole: for networks trained from a `flows.bases` base."""

from collections.abc import Sequence

import torch
from torch import Tensor

from flows.errors import UserError
from flows.randomness import Draw
from flows.samplers.ode import OdeSolver, VelocityField, solve_ode


def in_painting_start(image: Tensor, seen: Tensor, samples: Tensor, seed: int) -> Tensor:
    """The image where it is seen and standard normal noise elsewhere, as `bases.Inpainting` begins.

    image: (batch, channels, height, width); seen: bool, of a shape that meets it
    samples: (batch,) int64 index of each sample, the key of its noise

    Raises UserError for another kind of mask.
    """
    noise = Draw(seed, 0, samples).normal("sample_noise", tuple(image.shape[1:]))
    _check_mask(seen, image)
    return torch.where(seen, image, noise)


def super_resolution_start(coarse: Tensor, noise: float, samples: Tensor, seed: int) -> Tensor:
    """A coarse image, as large as the result, with the noise that `bases.SuperResolution` adds."""
    drawn = Draw(seed, 0, samples).normal("sample_noise", tuple(coarse.shape[1:]))
    return coarse + noise * drawn


@torch.no_grad()
def complete(
    field: VelocityField,
    start: Tensor,
    times: Sequence[float],
    solver: OdeSolver,
    *,
    seen: Tensor | None,
) -> Tensor:
    """The images that `start` (batch, ...) becomes; where `seen`, they keep its bits.

    field: the velocity at (x, t), such as a `guidance.Field`
    times: from 0 to 1
    seen: bool, of a shape that meets `start`; None: nothing stays

    Raises UserError for a mask that is not.
    """
    if seen is None:
        return solve_ode(field, start, times, solver)
    _check_mask(seen, start)
    hidden = (~seen).to(start.dtype)
    done = solve_ode(lambda x, t: field(x, t) * hidden, start, times, solver)
    # An adaptive solver interpolates its last step, which rounds.
    return torch.where(seen, start, done)


def _check_mask(seen: Tensor, image: Tensor) -> None:
    sizes = zip(reversed(seen.shape), reversed(image.shape), strict=False)
    meets = seen.dim() <= image.dim() and all(own in (1, other) for own, other in sizes)
    if seen.dtype != torch.bool or not meets:
        raise UserError(
            f"the mask `seen` is {seen.dtype} {tuple(seen.shape)}, beside images {tuple(image.shape)}; give "
            "a torch.bool one that broadcasts to them, as (batch, 1, height, width)."
        )
