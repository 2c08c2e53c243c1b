"""Taking away the noise that a flow was trained with, which its samples still carry.

A flow trained on data plus normal noise of standard deviation sigma knows the score of that noisy
density, and by Tweedie's formula the mean of the clean data given a noisy sample is

    E[clean | x] = x + sigma^2 grad log p(x)

(Zhai et al. 2024, "TarFlow", section 2.5). -sigma grad log p(x) is the noise in x as the flow sees
it, of about unit variance; a network may learn to predict it (Gu et al. 2025, "STARFlow-V"), which
spares the backward through the flow and, being smooth, the spots that single large gradients leave.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from flows.models.flow import FlowOutput
from flows.objectives.likelihood import log_likelihood
from flows.samplers.guidance import Condition

# flow(x (batch, ...), **condition)
Flow = Callable[..., FlowOutput]


@dataclass(frozen=True)
class Denoised:
    """sample: (batch, ...) float32; network_calls: network evaluations for each sample, a backward
    counted as one more."""

    sample: Tensor
    network_calls: int


def score(flow: Flow, x: Tensor, condition: Condition, variance: Tensor | None = None) -> Tensor:
    """(batch, ...) float32 grad log p(x) of each sample, detached; leaves no gradient in weights.

    x: (batch, ...) points of data space
    condition: what the samples were asked to be
    variance: (tokens, features) of the prior, on the device of x; None for 1
    """
    with torch.enable_grad():
        point = x.detach().float().requires_grad_()
        density = log_likelihood(flow(point, **condition), variance)
        (gradient,) = torch.autograd.grad(density.sum(), point)
    return gradient


def denoise_by_score(
    flow: Flow,
    x: Tensor,
    condition: Condition,
    *,
    noise: float,
    scale: float,
    variance: Tensor | None = None,
) -> Denoised:
    """x + scale noise^2 grad log p(x).

    noise: standard deviation of the noise that the flow was trained with
    scale: 1 by Tweedie's formula; TarFlow tunes it to between 0.9 and 1.4
    variance: of the prior that x was drawn from, see `score`
    """
    step = scale * noise**2
    return Denoised(x.float() + step * score(flow, x, condition, variance), network_calls=2)


@torch.no_grad()
def denoise_by_network(
    denoiser: Callable[[Tensor], Tensor], x: Tensor, *, noise: float
) -> Denoised:
    """x - noise d(x), with d(x) the predicted noise of unit variance."""
    return Denoised(x.float() - noise * denoiser(x).float(), network_calls=1)


def noise_from_gradient(gradient: Tensor, *, noise: float) -> Tensor:
    """(batch, ...) -noise grad log p(x), from what the backward of a flow's own training leaves in x.

    gradient: (batch, ...) of the sum over samples of the objective's loss, without a regulariser;
        that loss is -log p(x) / D but for a constant, where the prior has variance 1
    """
    return gradient.detach().float() * (noise * gradient[0].numel())
