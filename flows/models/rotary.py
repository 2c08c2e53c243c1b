"""Rotary positions: adjacent pairs of features turn by angles that grow with the place.

Su et al. 2021, "RoFormer", section 3.2. Features 2i and 2i + 1 make a pair, as in STARFlow,
LightningDiT and FLUX.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

BASE = 10_000.0


def axis_angles(place: Tensor, pairs: int, base: float = BASE) -> Tensor:
    """(tokens, pairs) float64 angles place * base^(-j / pairs), j = 0 ... pairs - 1.

    place: (tokens,) coordinate of each token along one axis
    """
    order = torch.arange(pairs, dtype=torch.float64, device=place.device)
    return place.to(torch.float64)[:, None] * base ** (-order / pairs)


def grid_places(side: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Row and column, (side * side,) each, of the places of a square grid in raster order."""
    place = torch.arange(side, device=device)
    return place.repeat_interleave(side), place.repeat(side)


def axial_turns(places: Sequence[Tensor], pairs: Sequence[int]) -> Tensor:
    """(2, tokens, sum of pairs) `turns` of places with several coordinates.

    places: for each axis, (tokens,) coordinates
    pairs: for each axis, how many pairs of features turn by it; axes follow each other
    """
    angles = [axis_angles(place, count) for place, count in zip(places, pairs, strict=True)]
    return turns(torch.cat(angles, dim=1))


def turns(angles: Tensor) -> Tensor:
    """(2, tokens, pairs) float32: cosines and sines of float64 angles."""
    return torch.stack((angles.cos(), angles.sin())).float()


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """(a, b) -> (a cos - b sin, b cos + a sin) for every pair of features, in the dtype of `x`.

    x: (..., tokens, 2 * pairs)
    turn: (2, tokens, pairs), see `turns`
    """
    cosine, sine = turn.unbind(0)
    pairs = x.float().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():
        # The compiler makes one kernel of these, and none of complex numbers.
        a, b = pairs.unbind(-1)
        turned = torch.stack((a * cosine - b * sine, b * cosine + a * sine), dim=-1)
    else:
        # One pass instead of eight, of which most would read every other number.
        beside = pairs if pairs.stride(-1) == 1 else pairs.contiguous()
        turned = torch.view_as_real(torch.view_as_complex(beside) * torch.complex(cosine, sine))
    return turned.flatten(-2).to(x.dtype)
