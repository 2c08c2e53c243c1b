"""Gaussian data, and eight Gaussians on a ring, for which the velocity, the solution of the ODE and every
marginal are known."""

import math
from typing import Any

import torch
from torch import Tensor

from flows.paths import Path
from flows.samplers.guidance import Condition, null_condition
from flows.samplers.sampler import Sampled, sample

MEAN, STD = 1.5, 0.5
NULL = 7
_ANGLES = torch.arange(8) * (math.pi / 4)
RING, RING_SPREAD = 4.0 * torch.stack((_ANGLES.cos(), _ANGLES.sin()), 1), 0.5


class GaussianVelocity:
    """v of data N(MEAN + label, STD^2), elementwise; remembers the times it was asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.times: list[float] = []

    def __call__(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        assert bool((t == t[0]).all())
        self.times.append(t[0].item())
        mean = MEAN + condition["label"].to(x.dtype).reshape(-1, *(1,) * (x.dim() - 1))
        c = self.path.coefficients(t, x.dim())
        variance = c.alpha * c.alpha * STD**2 + c.sigma * c.sigma
        slope = (c.alpha_dot * c.alpha * STD**2 + c.sigma_dot * c.sigma) / variance
        return c.alpha_dot * mean + slope * (x - c.alpha * mean)


def draw(path: Path, velocity: GaussianVelocity | None = None, **changes: Any) -> Sampled:
    count = len(changes.get("samples", range(4)))
    condition = {"label": changes.pop("label", torch.zeros(count, dtype=torch.int64))}
    arguments = {
        "condition": condition,
        "null": null_condition(condition, NULL),
        "samples": torch.arange(count),
        "shape": (5,),
        "seed": 3,
        "path": path,
        "prediction": "velocity",
        "solver": "euler",
        "steps": 20,
        "times": None,
        "time_shift": 1.0,
        "guidance": 1.0,
        "guidance_low": 0.0,
        "guidance_high": 1.0,
        "guidance_channels": None,
        "guidance_cosine": None,
        "diffusion": "sigma",
        "diffusion_scale": 1.0,
        "diffusion_last": "tweedie",
    }
    return sample(velocity or GaussianVelocity(path), **(arguments | changes))


def moments(path: Path, t: float) -> tuple[float, float]:
    """Mean and standard deviation of x_t."""
    c = path.coefficients(torch.tensor(t, dtype=torch.float64))
    return (c.alpha * MEAN).item(), (c.alpha.square() * STD**2 + c.sigma.square()).sqrt().item()


def exact(path: Path, noise: Tensor, low: float, high: float) -> Tensor:
    """The ODE keeps the quantile of a Gaussian: (x - alpha MEAN) / std_t does not change."""
    (mean, std), (end_mean, end_std) = moments(path, low), moments(path, high)
    return end_mean + end_std / std * (noise - mean)


def ring_velocity(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
    """Of the linear path to the Gaussian on the ring that `label` names, or to all with label 8."""
    asked, t = condition["label"], t[:, None]
    variance = t.square() * RING_SPREAD**2 + (1 - t).square()
    away = x[:, None] - t[:, :, None] * RING
    chance = (-away.square().sum(2) / (2 * variance)).softmax(1)
    chance = torch.where((asked == 8)[:, None], chance, torch.eye(8)[asked.clamp(max=7)])
    slope = (t * RING_SPREAD**2 - (1 - t)) / variance
    velocities = RING + slope[:, :, None] * away
    return (chance[:, :, None] * velocities).sum(1)
