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
from functools import lru_cache
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
    inverse: alpha / sigma -> t, elementwise; from 0 to infinity
    starts_still: nothing moves at t = 0, so that a velocity says nothing there
    ends_infinite: the velocity is infinite at t = 1
    """

    name: str
    schedule: Callable[[Tensor], tuple[Tensor, Tensor, Tensor, Tensor]]
    inverse: Callable[[Tensor], Tensor]
    starts_still: bool = False
    ends_infinite: bool = False

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

    def time_at(self, ratio: Tensor) -> Tensor:
        """The times at which alpha / sigma is `ratio`, in its dtype; computed in float64."""
        return self.inverse(ratio.to(torch.float64)).to(ratio.dtype)

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

    def likelihood_weight(self, kind: Prediction, t: Tensor) -> Tensor:
        """gain^2 / g, like t: what makes a squared error of the prediction one of g |score|^2.

        The integral of g |score error|^2 bounds the Kullback-Leibler divergence of a diffusion's
        samples (Song et al. 2021, "Maximum likelihood training of score-based diffusion models");
        for a noise prediction it is the weight g / sigma^2 of SiT.
        """
        return self.velocity_gain(kind, t).square() / self.score_diffusion(t)

    def score_diffusion(self, t: Tensor) -> Tensor:
        """g = sigma Delta / alpha in v = f + g s, like t: the diffusion that SBDM takes."""
        c = self.coefficients(t)
        return c.sigma * c.delta / c.alpha

    def support(self, kind: Prediction, *, sampling: bool) -> TimeSupport:
        """Times to train or to sample at, as SiT's `check_interval` has them.

        Other predictions than the velocity divide by alpha or sigma, and so do samplers that ask a
        velocity for a score, where nothing moves. A data prediction divides by sigma and keeps the
        sampling distance in training too. VP leaves some of the data at t = 0.
        """
        divided = kind != "velocity" or (self.starts_still and sampling)
        low = 1e-3 if divided and self.name != "vp" else 0.0
        if self.ends_infinite:
            return TimeSupport(low, 1.0 - (1e-3 if sampling or kind == "data" else 1e-5))
        return TimeSupport(low, 1.0 if kind == "velocity" else 1.0 - 1e-3)


def brownian_bridge(point: Interpolation, t: Tensor, noise: Tensor, sigma: float) -> Interpolation:
    """A point that strays from the linear path, most in its middle, and its velocity there.

    x_t = mu_t + sigma sqrt(t (1 - t)) z has u = (1 - 2t) / (2t (1 - t)) (x_t - mu_t) + mu_t' (Tong et
    al. 2024, "Improving and generalizing flow-based generative models", equation 16). The times must
    lie inside (0, 1).

    noise: (batch, ...) standard normal z
    """
    shaped = t.reshape(-1, *(1,) * (noise.dim() - 1)).to(torch.float64)
    spread = torch.sqrt(shaped * (1 - shaped))
    pull = (1 - 2 * shaped) / (2 * spread)
    return Interpolation(
        x=point.x + sigma * spread.to(noise.dtype) * noise,
        velocity=point.velocity + sigma * pull.to(noise.dtype) * noise,
    )


@lru_cache
def linear(sigma_min: float) -> Path:
    """alpha = t, sigma = 1 - (1 - sigma_min) t: the data keep noise of that size at t = 1.

    sigma_min = 0 is rectified flow. Lipman et al. 2023 (equation 22) and, with time turned round,
    Dao et al. 2023 ("Flow matching in latent space", 1e-5) have the same x_t and the same velocity
    x1 - (1 - sigma_min) x0.
    """
    rate = 1.0 - sigma_min

    def schedule(t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return t, 1 - rate * t, torch.ones_like(t), -rate * torch.ones_like(t)

    return Path("linear", schedule, inverse=lambda ratio: 1 / (1 / ratio + rate))


@lru_cache
def polynomial(exponent: float) -> Path:
    """alpha = t^n, sigma = 1 - t^n: the linear path at another pace; exponent n >= 1."""

    def schedule(t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        alpha, slope = t**exponent, exponent * t ** (exponent - 1)
        return alpha, 1 - alpha, slope, -slope

    return Path(
        "polynomial",
        schedule,
        inverse=lambda ratio: (1 / (1 / ratio + 1)) ** (1 / exponent),
        starts_still=exponent > 1,
    )


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


def _vp_inverse(ratio: Tensor) -> Tensor:
    """The root of slope / 4 (1 - t)^2 + beta_min / 2 (1 - t) = -log alpha, without cancellation."""
    minus_log_alpha = torch.log1p(ratio**-2) / 2
    half, slope = BETA_MIN / 2, BETA_MAX - BETA_MIN
    return 1 - 2 * minus_log_alpha / (half + torch.sqrt(half**2 + slope * minus_log_alpha))


def _linear_vp(t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sigma = torch.sqrt((1 - t) * (1 + t))
    return t, sigma, torch.ones_like(t), -t / sigma


LINEAR = linear(0.0)
# Also the trigonometric path of stochastic interpolants and of VP-CFM.
GVP = Path("gvp", _gvp, inverse=lambda ratio: torch.atan(ratio) / (math.pi / 2))
VP = Path("vp", _vp, inverse=_vp_inverse, ends_infinite=True)
LINEAR_VP = Path(
    "linear_vp", _linear_vp, inverse=lambda ratio: (1 + ratio**-2) ** -0.5, ends_infinite=True
)
# One of each name.
PATHS = {path.name: path for path in (LINEAR, GVP, VP, polynomial(2.0), LINEAR_VP)}


def path_named(name: str, *, sigma_min: float = 0.0, exponent: float = 2.0) -> Path:
    """The path of that name; UserError if there is none.

    sigma_min: of `linear` alone, exponent: of `polynomial` alone
    """
    if name not in PATHS:
        raise UserError(f"there is no path {name!r}; use one of {', '.join(PATHS)}")
    if name == "linear":
        return linear(sigma_min)
    return polynomial(exponent) if name == "polynomial" else PATHS[name]
