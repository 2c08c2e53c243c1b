"""The exact density that a flow-matching model gives to data.

Along dx/dt = v(x, t) a density changes by d log p / dt = -div v (Chen et al. 2018, "Neural ordinary
differential equations"), so from data x at the last time back to noise z at the first

    log p(x) = log N(z; 0, I) - integral of div v dt

The divergence is the trace of the Jacobian J: exactly, by D backward passes, or as e J e with a
random vector e of signs (Hutchinson 1989; Grathwohl et al. 2019, "FFJORD"), whose mean is the trace
and which for a diagonal J is the trace. The vector is one for a solve, since with another one at each
time the integrand would be noise, and it belongs to the sample.

The solver carries one number beside each of x: e_i (J e)_i, or J_ii, which sum to the divergence. So a
solver that chooses its steps has the volume in view as much as the place.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from flows.dequantisation import Levels, truncated_normal_in_bin, uniform_in_bin
from flows.errors import UserError
from flows.paths import Coefficients, Path
from flows.randomness import Draw
from flows.samplers.guidance import Condition, Velocity
from flows.samplers.ode import OdeSolver, solve_ode

Divergence = Literal["hutchinson", "exact"]

# Of the solver that chooses its steps: bits are compared in their third decimal, samples by eye. The
# network must compute in float32, for the rounding of bfloat16 would look like error of a step.
RELATIVE, ABSOLUTE = 3e-6, 1e-6


@dataclass(frozen=True)
class Density:
    """log_p: (batch,) float64 nats; noise: (batch, ...) what each x comes from; velocity_calls: of each
    sample, each with one backward pass (with D of them where the divergence is exact)."""

    log_p: Tensor
    noise: Tensor
    velocity_calls: int


@torch.no_grad()
def log_density(
    velocity: Velocity,
    x: Tensor,
    condition: Condition,
    samples: Tensor,
    *,
    times: Sequence[float],
    solver: OdeSolver,
    divergence: Divergence,
    seed: int,
) -> Density:
    """log p of each x, by the ODE that `flows.samplers.ode` samples with.

    velocity: v(x, t, condition), differentiable in x
    x: (batch, ...) float32 or float64 at times[-1]; the velocity is asked in the same dtype
    samples: (batch,) int64 index of each sample, the key of its random signs
    times: ascending, from the noise, where the density is N(0, I), to x
    """
    draw = Draw(seed, 0, samples)
    signs = (draw.uniform("hutchinson", tuple(x.shape[1:])) < 0.5).to(x.dtype) * 2 - 1
    calls = 0

    def field(state: Tensor, t: float) -> Tensor:
        nonlocal calls
        calls += 1
        time = x.new_full((len(x),), t)
        with torch.enable_grad():
            point = state[:, 0].detach().requires_grad_()
            v = velocity(point, time, condition)
            terms = _diagonal(v, point) if divergence == "exact" else _signed(v, point, signs)
        return torch.stack((v.detach().to(x.dtype), terms), dim=1)

    start = torch.stack((x, torch.zeros_like(x)), dim=1)
    ends = solve_ode(field, start, times[::-1], solver, relative=RELATIVE, absolute=ABSOLUTE)
    noise, integral = ends.unbind(1)
    noise, integral = noise.double().flatten(1), integral.double().flatten(1)
    normal = -0.5 * (noise.square().sum(1) + noise.shape[1] * math.log(2 * math.pi))
    # The integral was taken from data to noise, so it is minus that from noise to data.
    return Density(normal + integral.sum(1), noise.to(x.dtype).view_as(x), calls)


def _signed(v: Tensor, x: Tensor, signs: Tensor) -> Tensor:
    """(batch, ...) e_i (J^T e)_i."""
    (product,) = torch.autograd.grad(v, x, signs.to(v.dtype))
    return signs * product


def _diagonal(v: Tensor, x: Tensor) -> Tensor:
    """(batch, ...) J_ii, one backward pass for each i; samples do not depend on each other."""
    outputs = v.flatten(1).sum(0).unbind()
    rows = [torch.autograd.grad(out, x, retain_graph=True)[0].flatten(1) for out in outputs]
    return torch.stack([row[:, i] for i, row in enumerate(rows)], dim=1).view_as(x)


@dataclass(frozen=True)
class Bits:
    """bits: (batch,) float64 bits per dimension, a bound for discrete pixels, of a density for latents;
    velocity_calls: see `Density`."""

    bits: Tensor
    velocity_calls: int


def bits_of_data(
    velocity: Velocity,
    x: Tensor,
    condition: Condition,
    samples: Tensor,
    *,
    levels: Levels | None,
    dequantisation: Literal["uniform", "truncated_normal"],
    path: Path,
    times: Sequence[float],
    solver: OdeSolver,
    divergence: Divergence,
    seed: int,
) -> Bits:
    """-log2 P / D of discrete images, bounded by one draw of dequantisation noise for each, or of a density.

    Flow matching is trained on the levels themselves and knows what is between them from the noise of
    its path alone. At a last time t < 1 its density is that of alpha_t data + sigma_t noise; the noise
    "truncated_normal" has just that shape, and "uniform" has not, which costs bits where sigma_t is
    small against a bin (Zheng et al. 2023, section 4.2).

    x: (batch, ...) float32, images in [-1, 1] on the levels
    levels: None for latents, which have none: nothing fills their bins, and bits may be negative
    times: ascending; the last one < 1 for "truncated_normal"
    """
    c = _at(path, times[-1])
    alpha, std = c.alpha.item(), (c.sigma / c.alpha).item()
    draw = Draw(seed, 0, samples)
    if levels is None:
        y, log_q = x, x.new_zeros(len(x))
    elif dequantisation == "uniform":
        y, log_q = uniform_in_bin(x, levels, draw)
    elif std > 0:
        y, log_q = truncated_normal_in_bin(x, levels, draw, std=std)
    else:
        raise ValueError("at t = 1 there is no noise to fill a bin with; end before it")
    density = log_density(
        velocity,
        alpha * y,
        condition,
        samples,
        times=times,
        solver=solver,
        divergence=divergence,
        seed=seed,
    )
    dimensions = y[0].numel()
    nats = density.log_p + dimensions * math.log(alpha) - log_q.double()
    return Bits(-nats / (dimensions * math.log(2)), density.velocity_calls)


def _at(path: Path, time: float) -> Coefficients:
    return path.coefficients(torch.tensor(time, dtype=torch.float64))


def end_that_fills(path: Path, levels: Levels, *, deviations: float) -> float:
    """The time at which half a bin is `deviations` standard deviations of sigma_t / alpha_t.

    At 3 the noise of one level has 0.3 % outside its bin: the density there is the level's own. Found
    by bisection, for sigma / alpha falls along every path.

    Raises UserError for a path that leaves more noise in the data.
    """
    wanted = levels.width / 2 / deviations
    last = _at(path, 1.0)
    if (least := (last.sigma / last.alpha).item()) > wanted:
        raise UserError(
            f"the path ends with noise of {least:g} of the data, and half a bin of {levels.count} levels is "
            f"{wanted:g} at {deviations:g} deviations; take fewer deviations, or uniform dequantisation."
        )
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        c = _at(path, middle)
        low, high = (middle, high) if (c.sigma / c.alpha).item() > wanted else (low, middle)
    return low
