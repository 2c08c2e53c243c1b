"""Where on the path a sample is trained: from a uniform number to a time, 0 noise and 1 data."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from flows.randomness import Draw

SMALLEST = 2.0**-24  # half of the smallest number that `Draw.uniform` gives


@dataclass(frozen=True)
class TimeDistribution:
    """How training times are spread.

    kind: `uniform`; `logit_normal`: t = sigmoid(mean + std n), n standard normal (Esser et al. 2024,
        "Scaling rectified flow transformers", section 3.1); `mode`: more of the middle of the path
        (ibid.); `u_shaped`: more of both ends, p(t) proportional to e^(at) + e^(a(1 - t)), a the
        steepness (Lee et al. 2024, "Improving the training of rectified flows", section 4.1)
    shift: see `shift_time`; < 1 moves times towards the noise
    mode_scale: in [-1, 1.75]; 0 is uniform, below 0 more of both ends
    steepness: 0 is uniform
    strata: 0 for independent times; else samples a step, which draw one time from each of as many
        equal parts of the distribution, so that the loss of a step has less variance
    """

    kind: Literal["uniform", "logit_normal", "mode", "u_shaped"]
    mean: float
    std: float
    shift: float
    mode_scale: float = 0.0
    steepness: float = 0.0
    strata: int = 0

    def draw(self, draw: Draw) -> Tensor:
        """(batch,) times of the samples of `draw`, on their device."""
        uniform = draw.uniform("time")
        if not self.strata:
            return self(uniform)
        # Parts are dealt round the step from a place that the step draws: what comes back at the
        # same place of another step has another time. float64 holds all of the sum.
        first = Draw(draw.seed, draw.step, draw.samples.new_zeros(1)).uniform("stratum")
        stratum = (draw.samples + (first * self.strata).long()) % self.strata
        place = (stratum + uniform.to(torch.float64)) / self.strata
        return self(place.to(uniform.dtype).clamp(SMALLEST, 1 - SMALLEST))

    def __call__(self, uniform: Tensor) -> Tensor:
        """(batch,) times in [0, 1] from (batch,) uniform numbers in (0, 1), in the same dtype.

        Computed in float64 and rounded once: float32 functions would depend on where in the batch a
        sample lies.
        """
        t = self._quantile(uniform.to(torch.float64))
        return shift_time(t, self.shift).to(uniform.dtype)

    def _quantile(self, u: Tensor) -> Tensor:
        """The inverse of the distribution function, before the shift."""
        match self.kind:
            case "uniform":
                return u
            case "logit_normal":
                return torch.sigmoid(self.mean + self.std * torch.special.ndtri(u))
            case "mode":
                return u + self.mode_scale * (torch.cos(math.pi / 2 * u).square() - 1 + u)
            case "u_shaped" if self.steepness:
                half = self.steepness / 2
                return 0.5 + torch.asinh((2 * u - 1) * math.sinh(half)) / self.steepness
            case "u_shaped":
                return u


def shift_time(t: Tensor, shift: float) -> Tensor:
    """t' = s t / (1 + (s - 1) t): logit t' = logit t + log s (ibid., section 5.3.2).

    Shifts compose by multiplication, and s = 1 is the identity. Large images need more of the noisy
    end: s < 1 where t = 0 is noise.
    """
    return shift * t / (1 + (shift - 1) * t)
