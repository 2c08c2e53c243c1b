"""A trained velocity on another path than its own (Lipman et al. 2024, "Flow matching guide and code").

Two paths with the same ratio alpha / sigma hold the same mixture of data and noise at another scale:
x on `target` at time r is s_r times x' on `source` at time t(r), and its velocity is

    u_r(x) = (s_r' / s_r) x + s_r t'(r) u_t(x / s_r).

So a network need not be trained again to be sampled, or to be made a diffusion of, on another path.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from flows.paths import Path


@dataclass(frozen=True)
class ScheduleChange:
    """Where on the trained path a point of another path lies; all (batch, 1, ...) or ().

    time: t(r)
    scale, scale_dot, time_dot: s_r, s_r' and t'(r)
    """

    time: Tensor
    scale: Tensor
    scale_dot: Tensor
    time_dot: Tensor

    def point(self, x: Tensor) -> Tensor:
        """The point of the trained path that `x` is on the other."""
        return x / self.scale

    def velocity(self, velocity: Tensor, x: Tensor) -> Tensor:
        """The velocity at `x` of the other path, from that of the trained path at `point(x)`."""
        return self.scale_dot / self.scale * x + self.scale * self.time_dot * velocity


def change_of_schedule(source: Path, target: Path, r: Tensor, dimensions: int) -> ScheduleChange:
    """From the path a network was trained on, `source`, to `target` at its times `r`.

    alpha and sigma of both paths are in proportion at t(r), so s, s' and t' follow from lengths and
    products of (alpha, sigma), which are never 0, and t' = Delta_target / (Delta_source s^2).

    Where `target` is nearer to noise or data than `source` ever is, t(r) stays at the end of the times at
    which the network has a velocity.

    r: (batch,) or () times; computed in float64
    dimensions: axes of the samples that the result meets
    """
    ours = target.coefficients(r.to(torch.float64), dimensions)
    support = source.support("velocity", sampling=True)
    low, high = (
        source.coefficients(torch.tensor(end, dtype=torch.float64, device=r.device))
        for end in (support.low, support.high)
    )
    ratio = (ours.alpha / ours.sigma).clamp(low.alpha / low.sigma, high.alpha / high.sigma)
    time = source.time_at(ratio).clamp(support.low, support.high)
    theirs = source.coefficients(time.flatten() if r.dim() else time, dimensions)
    squared = theirs.alpha.square() + theirs.sigma.square()
    scale = torch.sqrt((ours.alpha.square() + ours.sigma.square()) / squared)
    time_dot = ours.delta / (theirs.delta * scale.square())
    scale_dot = (
        ours.alpha_dot * theirs.alpha
        + ours.sigma_dot * theirs.sigma
        - scale * time_dot * (theirs.alpha * theirs.alpha_dot + theirs.sigma * theirs.sigma_dot)
    ) / squared
    return ScheduleChange(
        time.to(r.dtype), scale.to(r.dtype), scale_dot.to(r.dtype), time_dot.to(r.dtype)
    )


def reschedule(
    velocity: Callable[[Tensor, Tensor], Tensor], source: Path, target: Path
) -> Callable[[Tensor, Tensor], Tensor]:
    """A function (x (batch, ...), t (batch,)) -> velocity on `target`, of one trained on `source`."""

    def on_target(x: Tensor, r: Tensor) -> Tensor:
        change = change_of_schedule(source, target, r, x.dim())
        return change.velocity(velocity(change.point(x), change.time.flatten()), x)

    return on_target
