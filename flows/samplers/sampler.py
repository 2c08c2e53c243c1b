"""From noise to samples, whatever the solver: the one entrance to this folder."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from flows.paths import Path, Prediction
from flows.randomness import Draw
from flows.samplers.guidance import Condition, Field, Guidance, Velocity
from flows.samplers.ode import solve_ode
from flows.samplers.sde import Diffusion, solve_sde
from flows.times import shift_time

Solver = Literal["euler", "heun", "midpoint", "dopri5", "sde"]


@dataclass(frozen=True)
class Sampled:
    """sample: (batch, *shape) float32; network_calls: network evaluations for each sample."""

    sample: Tensor
    network_calls: int


def time_grid(steps: int, low: float, high: float, shift: float) -> list[float]:
    """steps + 1 times from `low` to `high`, uniform before the shift (< 1: more at the noise)."""
    uniform = torch.linspace(0.0, 1.0, steps + 1, dtype=torch.float64)
    times: list[float] = (low + (high - low) * shift_time(uniform, shift)).tolist()
    # The end, which rounding may have passed, is exact: beyond it there may be no velocity.
    return [*times[:-1], high]


@torch.no_grad()
def sample(
    velocity: Velocity,
    condition: Condition,
    null: Condition,
    samples: Tensor,
    *,
    shape: tuple[int, ...],
    seed: int,
    path: Path,
    prediction: Prediction,
    solver: Solver,
    steps: int,
    guidance: float,
    guidance_low: float,
    guidance_high: float,
    diffusion: Diffusion,
    diffusion_scale: float,
    time_shift: float,
) -> Sampled:
    """Draw the samples of the given indices; each depends on (seed, its index, its condition)
    alone.

    (But for `dopri5`, whose steps suit the whole batch: there this holds within its tolerance.)

    velocity: what the network's prediction implies; called with x (batch, *shape), t (batch,) and
        a condition, the batch being twice as large where it is guided
    condition: what is asked for, each value (batch, ...)
    null: what guidance leads away from, usually `guidance.null_condition`
    samples: (batch,) int64 index of each sample, on the device of the result
    shape: of one sample
    prediction: what the network predicts, which decides how close to the ends it may be asked
    guidance, guidance_low, guidance_high: see `guidance.Guidance`
    diffusion, diffusion_scale: of the solver `sde` alone, see `sde.diffusion_coefficient`
    """
    support = path.support(prediction, sampling=True)
    times = time_grid(steps, support.low, support.high, time_shift)
    field = Field(velocity, condition, null, Guidance(guidance, guidance_low, guidance_high))
    noise = Draw(seed, 0, samples).normal("sample_noise", shape)
    if solver == "sde":
        x = solve_sde(
            field,
            noise,
            times,
            path=path,
            form=diffusion,
            scale=diffusion_scale,
            seed=seed,
            samples=samples,
        )
    else:
        x = solve_ode(field, noise, times, solver)
    return Sampled(x, field.network_calls)
