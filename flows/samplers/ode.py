"""The probability-flow ODE dx/dt = v(x, t), from noise at t = 0 to data at t = 1."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

OdeSolver = Literal["euler", "heun", "midpoint", "rk4", "pseudo_corrector", "dopri5"]
VelocityField = Callable[[Tensor, float], Tensor]

# Tolerances of the adaptive solver. SiT's relative 1e-3 leaves 3 % of error in the spread of a
# Gaussian on the linear path, for as many evaluations.
RELATIVE, ABSOLUTE = 1e-4, 1e-5


def solve_ode(
    field: VelocityField,
    x: Tensor,
    times: Sequence[float],
    solver: OdeSolver,
    *,
    relative: float = RELATIVE,
    absolute: float = ABSOLUTE,
) -> Tensor:
    """x at times[-1] from x (batch, ...) at times[0]; the times may fall.

    Order, and evaluations of the field in N steps: euler 1, N; heun and midpoint 2, 2 N; rk4 4,
    4 N; pseudo_corrector 2, N + 1. dopri5 (order 5) uses the ends of `times` alone; its steps suit
    the sample with the largest error, which they hold to `relative` and `absolute`.
    """
    match solver:
        case "dopri5":
            return _dopri5(field, x, times[0], times[-1], relative, absolute)
        case "pseudo_corrector":
            return _pseudo_corrector(field, x, times)
    step = {"euler": _euler, "heun": _heun, "midpoint": _midpoint, "rk4": _rk4}[solver]
    for start, end in pairwise(times):
        x = step(field, x, start, end)
    return x


def _euler(field: VelocityField, x: Tensor, start: float, end: float) -> Tensor:
    return x + (end - start) * field(x, start)


def _heun(field: VelocityField, x: Tensor, start: float, end: float) -> Tensor:
    """The trapezoidal rule, its end predicted by Euler."""
    step = end - start
    before = field(x, start)
    after = field(x + step * before, end)
    return x + step / 2 * (before + after)


def _midpoint(field: VelocityField, x: Tensor, start: float, end: float) -> Tensor:
    step = end - start
    middle = x + step / 2 * field(x, start)
    return x + step * field(middle, start + step / 2)


def _rk4(field: VelocityField, x: Tensor, start: float, end: float) -> Tensor:
    """The classical method of Runge and Kutta."""
    step, middle = end - start, (start + end) / 2
    first = field(x, start)
    second = field(x + step / 2 * first, middle)
    third = field(x + step / 2 * second, middle)
    fourth = field(x + step * third, end)
    return x + step / 6 * (first + 2 * second + 2 * third + fourth)


def _pseudo_corrector(field: VelocityField, x: Tensor, times: Sequence[float]) -> Tensor:
    """Heun's steps, each begun with the velocity that ended the one before (Zhao et al. 2024,
    "FlowTurbo").

    That one was taken at the predicted point, O(step^2) from the corrected one: order 2 is kept.
    """
    before = field(x, times[0])
    for start, end in pairwise(times):
        step = end - start
        after = field(x + step * before, end)
        x = x + step / 2 * (before + after)
        before = after
    return x


def _dopri5(
    field: VelocityField, x: Tensor, start: float, end: float, relative: float, absolute: float
) -> Tensor:
    # Brings in half of scipy, which every rank of a training would otherwise wait for.
    from torchdiffeq import odeint

    ends = torch.tensor([start, end], dtype=torch.float64, device=x.device)
    path: Tensor = odeint(
        lambda t, y: field(y, t.item()),
        x,
        ends,
        rtol=relative,
        atol=absolute,
        method="dopri5",
        # A step must end at the last time: beyond it there is no velocity.
        options={"norm": _largest_rms, "step_t": ends[1:]},
    )
    return path[-1]


def _largest_rms(error: Tensor) -> Tensor:
    """() root mean square of the worst sample; the mean over the batch would hide it."""
    return error.flatten(1).square().mean(1).sqrt().max()
