"""Velocities that are exact at both ends of the linear path, whatever the network says there.

At t = 1 the noise is gone, its mean is 0 and v(x, 1) = x; at t = 0 nothing is known of the data and
v(x, 0) = E[data] - x. Networks miss both a little, and a score made of such a velocity misses them by
far, for it divides by 1 - t (Hu et al. 2025, "Improving rectified flow with boundary conditions").
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Boundary:
    """v = t^k x + (1 - t)^k (m - x) + (1 - t^k - (1 - t)^k) F, F the network's output.

    power: k > 1; the greater, the nearer to the ends the network alone decides
    mean: E[data] of each channel, m; None leaves the noisy end to the network, v = t^k x + (1 - t^k) F
    """

    power: float
    mean: tuple[float, ...] | None

    def __call__(self, outputs: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """(batch, ...) velocity at x (batch, channels, ...) and t (batch,) or ()."""
        time = t.reshape(-1, *(1,) * (x.dim() - 1)) if t.dim() else t
        data = time**self.power
        if self.mean is None:
            return data * x + (1 - data) * outputs
        noise = (1 - time) ** self.power
        # Filled where x is: a tensor of the list would be a copy from the host in every step.
        one = (1, 1, *(1,) * (x.dim() - 2))
        mean = torch.cat([x.new_full(one, value) for value in self.mean], dim=1)
        return data * x + noise * (mean - x) + (1 - data - noise) * outputs
