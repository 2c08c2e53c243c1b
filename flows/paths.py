"""Interpolants between noise and data, and what each kind of prediction says about the others.

x_t = alpha_t data + sigma_t noise, from noise at t = 0 to data at t = 1; its velocity is
u = alpha_t' data + sigma_t' noise (Albergo et al. 2023, "Stochastic interpolants"; Ma et al.
2024, "SiT", section 2).

These two equations are linear in (data, noise). Their determinant Delta = alpha' sigma - sigma'
alpha is positive inside (0, 1), so x and any one of velocity, data, noise and score = -noise /
sigma give the others.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from flows.errors import UserError

Prediction = Literal["velocity", "data", "noise", "score"]

# Variance-preserving diffusion (Song et al. 2021, appendix C): beta grows from 0.1 to 20.
BETA_MIN, BETA_MAX = 0.1, 20.0


@dataclass(frozen=True)
class Coefficients:
    """alpha, sigma and their derivatives in t, all of one shape that broadcasts against samples."""

    alpha: Tensor
    sigma: Tensor
    alpha_dot: Tensor
    sigma_dot: Tensor

    @property
    def delta(self) -> Tensor:
        """alpha' sigma - sigma' alpha: two terms >= 0, so nothing cancels."""
        return self.alpha_dot * self.sigma - self.sigma_dot * self.alpha


@dataclass(frozen=True)
class Interpolation:
    """x: (batch, ...) the point x_t; velocity: (batch, ...) dx_t / dt along the path."""

    x: Tensor
    velocity: Tensor


@dataclass(frozen=True)
class TimeSupport:
    """The times [low, high] on which a prediction determines a finite velocity."""

    low: float
    high: float

    def rescale(self, time: Tensor) -> Tensor:
        """[0, 1] onto [low, high]; exactly the identity where they are the same."""
        return time * (self.high - self.low) + self.low


@dataclass(frozen=True)
class Path:
    """One interpolant. Times are (batch,) or (); samples and predictions are (batch, ...).

    schedule: t -> (alpha, sigma, alpha', sigma'), elementwise
    """

    name: str
    schedule: Callable[[Tensor], tuple[Tensor, Tensor, Tensor, Tensor]]

    def coefficients(self, t: Tensor, dimensions: int = 0) -> Coefficients:
        """Coefficients at `t`, shaped to meet samples of `dimensions` axes where that is given.

        Computed in float64 and rounded once: near its ends a path is a difference of almost equal
        numbers, and float32 functions would depend on where in the batch a sample lies.
        """
        shaped = t if t.dim() == 0 else t.reshape(-1, *(1,) * max(dimensions - 1, 0))
        alpha, sigma, alpha_dot, sigma_dot = self.schedule(shaped.to(torch.float64))
        return Coefficients(
            alpha.to(t.dtype), sigma.to(t.dtype), alpha_dot.to(t.dtype), sigma_dot.to(t.dtype)
        )

    def interpolate(self, data: Tensor, noise: Tensor, t: Tensor) -> Interpolation:
        """x_t = alpha data + sigma noise and u = alpha' data + sigma' noise."""
        c = self.coefficients(t, data.dim())
        return Interpolation(
            x=c.alpha * data + c.sigma * noise,
            velocity=c.alpha_dot * data + c.sigma_dot * noise,
        )

    def velocity_to_data(self, velocity: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """x1 = (sigma v - sigma' x) / Delta"""
        c = self.coefficients(t, x.dim())
        return (c.sigma * velocity - c.sigma_dot * x) / c.delta

    def velocity_to_noise(self, velocity: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """x0 = (alpha' x - alpha v) / Delta"""
        c = self.coefficients(t, x.dim())
        return (c.alpha_dot * x - c.alpha * velocity) / c.delta

    def velocity_to_score(self, velocity: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """s = (alpha v - alpha' x) / (sigma Delta)"""
        c = self.coefficients(t, x.dim())
        return (c.alpha * velocity - c.alpha_dot * x) / (c.sigma * c.delta)

    def data_to_velocity(self, data: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """v = (sigma' x + Delta x1) / sigma"""
        c = self.coefficients(t, x.dim())
        return (c.sigma_dot * x + c.delta * data) / c.sigma

    def data_to_noise(self, data: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """x0 = (x - alpha x1) / sigma"""
        c = self.coefficients(t, x.dim())
        return (x - c.alpha * data) / c.sigma

    def data_to_score(self, data: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """s = (alpha x1 - x) / sigma^2"""
        c = self.coefficients(t, x.dim())
        return (c.alpha * data - x) / (c.sigma * c.sigma)

    def noise_to_velocity(self, noise: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """v = (alpha' x - Delta x0) / alpha"""
        c = self.coefficients(t, x.dim())
        return (c.alpha_dot * x - c.delta * noise) / c.alpha

    def noise_to_data(self, noise: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """x1 = (x - sigma x0) / alpha"""
        c = self.coefficients(t, x.dim())
        return (x - c.sigma * noise) / c.alpha

    def noise_to_score(self, noise: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """s = -x0 / sigma"""
        return -noise / self.coefficients(t, x.dim()).sigma

    def score_to_velocity(self, score: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """v = (alpha' x + sigma Delta s) / alpha = f + g s"""
        c = self.coefficients(t, x.dim())
        return (c.alpha_dot * x + c.sigma * c.delta * score) / c.alpha

    def score_to_data(self, score: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """x1 = (x + sigma^2 s) / alpha: Tweedie's formula"""
        c = self.coefficients(t, x.dim())
        return (x + c.sigma * c.sigma * score) / c.alpha

    def score_to_noise(self, score: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """x0 = -sigma s"""
        return -self.coefficients(t, x.dim()).sigma * score

    def to_velocity(self, kind: Prediction, prediction: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The velocity that a prediction of any kind implies."""
        match kind:
            case "velocity":
                return prediction
            case "data":
                return self.data_to_velocity(prediction, x, t)
            case "noise":
                return self.noise_to_velocity(prediction, x, t)
            case "score":
                return self.score_to_velocity(prediction, x, t)

    def velocity_gain(self, kind: Prediction, t: Tensor) -> Tensor:
        """|dv / dprediction|, like t: what an error of the prediction is worth in velocity."""
        c = self.coefficients(t)
        match kind:
            case "velocity":
                return torch.ones_like(t)
            case "data":
                return c.delta / c.sigma
            case "noise":
                return c.delta / c.alpha
            case "score":
                return self.score_diffusion(t)

    def score_diffusion(self, t: Tensor) -> Tensor:
        """g = sigma Delta / alpha in v = f + g s, like t: the diffusion that SBDM takes."""
        c = self.coefficients(t)
        return c.sigma * c.delta / c.alpha

    def support(self, kind: Prediction, *, sampling: bool) -> TimeSupport:
        """Times to train or to sample at, as SiT's `check_interval` has them.

        VP's sigma' is infinite at t = 1; other predictions than the velocity divide by alpha or
        sigma. A data prediction divides by sigma and keeps the sampling distance in training too.
        """
        if self.name == "vp":
            return TimeSupport(0.0, 1.0 - (1e-3 if sampling or kind == "data" else 1e-5))
        return TimeSupport(0.0, 1.0) if kind == "velocity" else TimeSupport(1e-3, 1.0 - 1e-3)


def _linear(t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return t, 1 - t, torch.ones_like(t), -torch.ones_like(t)


def _gvp(t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # cos written as a sine of 1 - t, so that sigma is 0 at t = 1 and not 6e-17.
    rate = math.pi / 2
    alpha, sigma = torch.sin(rate * t), torch.sin(rate * (1 - t))
    return alpha, sigma, rate * sigma, -rate * alpha


def _vp(t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rest, slope = 1 - t, BETA_MAX - BETA_MIN
    log_alpha = -rest * rest * slope / 4 - rest * BETA_MIN / 2
    alpha, sigma = torch.exp(log_alpha), torch.sqrt(-torch.expm1(2 * log_alpha))
    alpha_dot = alpha * (rest * slope + BETA_MIN) / 2
    return alpha, sigma, alpha_dot, -alpha * alpha_dot / sigma


LINEAR = Path("linear", _linear)
GVP = Path("gvp", _gvp)
VP = Path("vp", _vp)
PATHS = {path.name: path for path in (LINEAR, GVP, VP)}


def path_named(name: str) -> Path:
    """The path of that name; UserError if there is none."""
    if name not in PATHS:
        raise UserError(f"there is no path {name!r}; use one of {', '.join(PATHS)}")
    return PATHS[name]
