"""Stochastic sampling: dx = (v + w_t s) dt + sqrt(2 w_t) dW, for any w_t >= 0.

Its marginals are those of the ODE (Ma et al. 2024, "SiT", section 2). s = grad log p_t is the
score, which a velocity implies.

Near an end where w_t or the score grows without bound, w_t is held to what a step can follow; the
marginals are the same for any w_t.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from flows.paths import Path
from flows.randomness import Draw
from flows.samplers.ode import VelocityField

SdeSolver = Literal["sde", "sde_heun"]
Diffusion = Literal["constant", "sbdm", "sigma", "linear", "decreasing", "bump"]
LastStep = Literal["tweedie", "mean", "euler"]

# Largest w h / sigma^2 of a step h. The slope of the score reaches 1 / sigma^2, so at 1 a step
# forgets where it started, and beyond 2 it diverges.
LARGEST_STEP = 0.5


@dataclass(frozen=True)
class Noise:
    """How much noise a path is sampled with, and how it ends.

    form, scale: w_t, see `coefficient`
    last: the last step, which draws no noise, as it would stay in the sample. `tweedie`: the mean of
        the data given x, at t = 1 on any path; `mean`: the drift of the SDE, to the end of the
        times; `euler`: the velocity alone, likewise. On the linear path tweedie and euler are one.
    """

    form: Diffusion
    scale: float
    last: LastStep

    def coefficient(self, path: Path, t: float) -> float:
        """w_t; `sbdm` is infinite at t = 0 where alpha is 0, `decreasing` is not 0 at scale 0."""
        match self.form:
            case "constant":
                return self.scale
            case "sbdm":
                return self.scale * path.score_diffusion(_time(t)).item() if self.scale else 0.0
            case "sigma":
                return self.scale * path.coefficients(_time(t)).sigma.item()
            case "linear":
                return self.scale * (1 - t)
            case "decreasing":
                return 0.25 * (self.scale * math.cos(math.pi * t) + 1) ** 2
            case "bump":
                return self.scale * math.sin(math.pi * t) ** 2


def solve_sde(
    field: VelocityField,
    x: Tensor,
    times: Sequence[float],
    solver: SdeSolver,
    *,
    path: Path,
    noise: Noise,
    seed: int,
    samples: Tensor,
) -> Tensor:
    """Data from x (batch, ...) float32 at times[0], with an evaluation of the field a step, or two.

    sde: Euler and Maruyama, of weak order 1. sde_heun: the trapezoidal rule for both drift and
    noise, of weak order 2 as the noise does not depend on x; the last step takes one evaluation.
    (SiT's Heun adds the noise before both evaluations, which leaves it at order 1.)

    samples: (batch,) int64 index of each sample, the key of its noise
    """
    sde = _Sde(field, path, noise)
    shape = tuple(x.shape[1:])
    for step, (start, end) in enumerate(pairwise(times[:-1])):
        width = end - start
        w, drift = sde.drift(x, start, width)
        normal = Draw(seed, step, samples).normal("sampler_noise", shape)
        if solver == "sde":
            x = x + width * drift + math.sqrt(2 * w * width) * normal
            continue
        w_end = sde.diffusion(end, width)
        kick = math.sqrt((w + w_end) * width) * normal
        _, after = sde.drift(x + width * drift + kick, end, width)
        x = x + width / 2 * (drift + after) + kick
    return sde.finish(x, times[-2], times[-1])


@dataclass(frozen=True)
class _Sde:
    field: VelocityField
    path: Path
    noise: Noise

    def diffusion(self, t: float, width: float) -> float:
        """w_t, held to what a step of this width can follow."""
        sigma = self.path.coefficients(_time(t)).sigma.item()
        return min(self.noise.coefficient(self.path, t), LARGEST_STEP * sigma**2 / width)

    def drift(self, x: Tensor, t: float, width: float) -> tuple[float, Tensor]:
        """w_t and v + w_t s."""
        w = self.diffusion(t, width)
        velocity = self.field(x, t)
        score = self.path.velocity_to_score(velocity, x, x.new_full((), t))
        return w, velocity + w * score

    def finish(self, x: Tensor, start: float, end: float) -> Tensor:
        match self.noise.last:
            case "tweedie":
                return self.path.velocity_to_data(self.field(x, start), x, x.new_full((), start))
            case "mean":
                return x + (end - start) * self.drift(x, start, end - start)[1]
            case "euler":
                return x + (end - start) * self.field(x, start)


def _time(t: float) -> Tensor:
    return torch.tensor(t, dtype=torch.float64)
