"""From noise to samples, whatever the solver: the one entrance to this folder."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from flows.errors import UserError
from flows.paths import Path, Prediction, TimeSupport
from flows.randomness import Draw
from flows.samplers.guidance import Condition, Field, Guidance, Velocity
from flows.samplers.ode import solve_ode
from flows.samplers.sde import Diffusion, LastStep, Noise, solve_sde
from flows.times import shift_time

Solver = Literal[
    "euler", "heun", "midpoint", "rk4", "pseudo_corrector", "dopri5", "sde", "sde_heun"
]


@dataclass(frozen=True)
class Sampled:
    """sample: (batch, *shape) float32; network_calls: (batch,) evaluations for each sample."""

    sample: Tensor
    network_calls: Tensor


def time_grid(steps: int, low: float, high: float, shift: float) -> list[float]:
    """steps + 1 times from `low` to `high`, uniform before the shift (< 1: more at the noise)."""
    uniform = torch.linspace(0.0, 1.0, steps + 1, dtype=torch.float64)
    times: list[float] = (low + (high - low) * shift_time(uniform, shift)).tolist()
    # The end, which rounding may have passed, is exact: beyond it there may be no velocity.
    return [*times[:-1], high]


def explicit_grid(times: Sequence[float], low: float, high: float) -> list[float]:
    """Times of one's own choice, 0 and 1 at the ends, carried over to [low, high].

    Raises UserError, naming the recipe's key, where they do not rise from 0 to 1.
    """
    ends = len(times) >= 2 and times[0] == 0.0 and times[-1] == 1.0
    if not ends or any(start >= end for start, end in pairwise(times)):
        raise UserError(
            f"sample.times = {list(times)} does not rise from 0 to 1; begin with 0, end with 1, and "
            "let every time be later than the one before."
        )
    return [*(low + (high - low) * t for t in times[:-1]), high]


def check_settings(
    solver: Solver,
    times: Sequence[float] | None,
    guidance_channels: int | None,
    guidance_cosine: float | None,
    *,
    channels: int,
) -> None:
    """Raises UserError, naming the recipe's keys, for settings that do not go together.

    channels: of a sample
    """
    if times is not None:
        explicit_grid(times, 0.0, 1.0)
    if guidance_channels is not None and guidance_channels > channels:
        raise UserError(
            f"sample.guidance_channels = {guidance_channels} and data.channels = {channels}; guide "
            "some of these, or set sample.guidance_channels=null for all."
        )
    if solver != "dopri5":
        return
    if times is not None:
        raise UserError(
            "sample.times is given, and sample.solver = dopri5 takes steps of its own; use heun, or "
            "set sample.times=null."
        )
    if guidance_cosine is not None:
        raise UserError(
            f"sample.guidance_cosine = {guidance_cosine:g} ends guidance as time goes on, and "
            "sample.solver = dopri5 also goes back in time; use heun, or set "
            "sample.guidance_cosine=null."
        )


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
    times: Sequence[float] | None,
    time_shift: float,
    guidance: float,
    guidance_low: float,
    guidance_high: float,
    guidance_channels: int | None,
    guidance_cosine: float | None,
    diffusion: Diffusion,
    diffusion_scale: float,
    diffusion_last: LastStep,
) -> Sampled:
    """Draw the samples of the given indices; each depends on (seed, its index, its condition) alone.

    (But for `dopri5`, whose steps suit the whole batch: there this holds within its tolerance.)

    velocity: what the network's prediction implies; called with x (batch, *shape), t (batch,) and
        a condition, the batch being up to twice as large where it is guided
    condition: what is asked for, each value (batch, ...)
    null: what guidance leads away from, usually `guidance.null_condition`
    samples: (batch,) int64 index of each sample, on the device of the result
    shape: of one sample
    prediction: what the network predicts, which decides how close to the ends it may be asked
    times: a grid from 0 to 1 in place of `steps` and `time_shift`, such as `steps.optimal_grid` finds
    guidance*: see `guidance.Guidance`
    diffusion*: of the solvers `sde` and `sde_heun` alone, see `sde.Noise`

    Raises UserError for settings that do not go together.
    """
    check_settings(solver, times, guidance_channels, guidance_cosine, channels=shape[0])
    grid = _grid(path.support(prediction, sampling=True), steps, times, time_shift)
    guided = Guidance(guidance, guidance_low, guidance_high, guidance_channels, guidance_cosine)
    field = Field(velocity, condition, null, guided, samples)
    x = Draw(seed, 0, samples).normal("sample_noise", shape)
    match solver:
        case "sde" | "sde_heun":
            noise = Noise(diffusion, diffusion_scale, diffusion_last)
            x = solve_sde(
                field, x, grid, solver, path=path, noise=noise, seed=seed, samples=samples
            )
        case _:
            x = solve_ode(field, x, grid, solver)
    return Sampled(x, field.network_calls)


def _grid(
    support: TimeSupport, steps: int, times: Sequence[float] | None, shift: float
) -> list[float]:
    if times is None:
        return time_grid(steps, support.low, support.high, shift)
    return explicit_grid(times, support.low, support.high)
