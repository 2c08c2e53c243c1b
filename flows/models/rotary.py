"""Rotary positions: adjacent pairs of features turn by angles that grow with the place.

Su et al. 2021, "RoFormer", section 3.2. Features 2i and 2i + 1 make a pair, as in STARFlow,
LightningDiT and FLUX.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BASE = 10_000.0
TEXT_PAIRS = 8  # that turn along a text, where there is one before the image


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


@dataclass(frozen=True)
class Rotary:
    """Angles of a square grid of tokens, and of a text before it.

    Row and column have a quarter of a head's features in pairs each; with text both give four of
    their pairs to a third axis, along which the text lies.

    side: of the grid in tokens
    trained_side: of the grid that coordinates are stretched to, whatever the side is
    third_axis: the model has a text, even if this block does not read it
    """

    side: int
    trained_side: int
    third_axis: bool

    def turn(self, head_width: int, text_tokens: int, chain: int) -> Tensor:
        """(2, text_tokens + chain, head_width / 2) cosines and sines of text and image."""
        place = torch.arange(chain, dtype=torch.float64, device="cpu")
        step = self.trained_side / self.side
        row, column = place.div(self.side, rounding_mode="floor") * step, place % self.side * step
        pairs = head_width // 4 - (TEXT_PAIRS // 2 if self.third_axis else 0)
        image = [axis_angles(row, pairs), axis_angles(column, pairs)]
        text = [torch.zeros(text_tokens, pairs, dtype=torch.float64)] * 2
        if self.third_axis:
            read = torch.arange(text_tokens, dtype=torch.float64, device="cpu")
            read = read * (self.trained_side / max(text_tokens, 1))
            image.append(torch.zeros(chain, TEXT_PAIRS, dtype=torch.float64))
            text.append(axis_angles(read, TEXT_PAIRS))
        return turns(torch.cat((torch.cat(text, dim=1), torch.cat(image, dim=1))))


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
