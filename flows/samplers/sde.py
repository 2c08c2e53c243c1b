"""Stochastic sampling: dx = (v + w_t s) dt + sqrt(2 w_t) dW, for any w_t >= 0.

Its marginals are those of the ODE (Ma et al. 2024, "SiT", section 2). s = grad log p_t is the
score, which a velocity implies.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from flows.paths import Path
from flows.randomness import Draw
from flows.samplers.ode import VelocityField

Diffusion = Literal["constant", "sbdm", "sigma", "linear", "decreasing", "bump"]

# Largest w h / sigma^2 of a step h. The slope of the score reaches 1 / sigma^2, so at 1 a step
# forgets where it started, and beyond 2 it diverges.
LARGEST_STEP = 0.5


def diffusion_coefficient(form: Diffusion, scale: float, path: Path, t: float) -> float:
    """w_t; `sbdm` is infinite at t = 0 where alpha is 0, `decreasing` is not 0 at scale 0."""
    match form:
        case "constant":
            return scale
        case "sbdm":
            return scale * path.score_diffusion(_time(t)).item() if scale else 0.0
        case "sigma":
            return scale * path.coefficients(_time(t)).sigma.item()
        case "linear":
            return scale * (1 - t)
        case "decreasing":
            return 0.25 * (scale * math.cos(math.pi * t) + 1) ** 2
        case "bump":
            return scale * math.sin(math.pi * t) ** 2


def solve_sde(
    field: VelocityField,
    x: Tensor,
    times: Sequence[float],
    *,
    path: Path,
    form: Diffusion,
    scale: float,
    seed: int,
    samples: Tensor,
) -> Tensor:
    """Data from x (batch, ...) float32 at times[0], by Euler and Maruyama.

    The last step draws no noise and goes to t = 1 by Tweedie's formula, to the mean of the data
    given x: finite on every path, and on the linear one the Euler step of the ODE. Near an end
    where w_t or the score grows without bound, w_t is held to what a step can follow,
    w_t h <= sigma_t^2 / 2; the marginals are the same for any w_t.

    samples: (batch,) int64 index of each sample, the key of its noise
    """
    shape = tuple(x.shape[1:])
    for step, (start, end) in enumerate(pairwise(times[:-1])):
        width = end - start
        sigma = path.coefficients(_time(start)).sigma.item()
        w = diffusion_coefficient(form, scale, path, start)
        w = min(w, LARGEST_STEP * sigma**2 / width)
        velocity = field(x, start)
        score = path.velocity_to_score(velocity, x, x.new_full((), start))
        noise = Draw(seed, step, samples).normal("sampler_noise", shape)
        x = x + width * (velocity + w * score) + math.sqrt(2 * w * width) * noise
    last = times[-2]
    return path.velocity_to_data(field(x, last), x, x.new_full((), last))


def _time(t: float) -> Tensor:
    return torch.tensor(t, dtype=torch.float64)
