"""The few times at which a trained model is best asked, found on its own trajectories."""

from collections.abc import Callable

import torch

from flows.errors import UserError
from flows.randomness import Draw
from flows.samplers.guidance import Field, Guidance, null_condition
from flows.samplers.sampler import time_grid
from flows.samplers.steps import optimal_steps, step_costs
from trainer.asked import ask
from trainer.assembly import build_flow_matching
from trainer.drawing import velocity_of
from trainer.trained import Trained, batches
from trainer.velocity_sections import SampleSection

# As the paper has them: a grid of 100 steps, and the mean over 100 trajectories.
FINE, TRAJECTORIES = 100, 100


def choose_times(
    trained: Trained, steps: int, *, batch: int, report: Callable[[int, int], None]
) -> list[float]:
    """`sample.times` of so many steps, with the guidance of the recipe; see `flows.samplers.steps`.

    report: told how many trajectories are done, of how many

    Raises UserError for a model or a solver without steps to choose, or more than the fine grid has.
    """
    recipe, section = trained.recipe, trained.recipe.sample
    if not isinstance(section, SampleSection):
        raise UserError(
            f"model.family = {recipe.model.family} is sampled without time steps, so that there are none "
            "to choose; drop --optimise-steps"
        )
    if section.solver == "dopri5":
        raise UserError(
            "sample.solver = dopri5 takes steps of its own, so that there are none to choose; use euler, "
            "or drop --optimise-steps"
        )
    if steps > FINE:
        raise UserError(
            f"--optimise-steps {steps}: so many cannot be chosen from a grid of {FINE}; ask for 1 to {FINE}"
        )
    objective, data = build_flow_matching(recipe), recipe.data
    support = objective.path.support(objective.prediction, sampling=True)
    times = time_grid(FINE, support.low, support.high, 1.0)
    guidance = Guidance(
        section.guidance,
        section.guidance_low,
        section.guidance_high,
        section.guidance_channels,
        section.guidance_cosine,
    )
    costs = torch.zeros(len(times), len(times), dtype=torch.float64)
    for ids in batches(range(TRAJECTORIES), batch):
        samples = torch.arange(ids.start, ids.stop, device=trained.device)
        condition = ask(recipe, torch.arange(ids.start, ids.stop)).condition(trained.device)
        null = null_condition(condition, objective.null_label)
        velocity = velocity_of(trained.model, objective)
        # Other noise than any sample's: the times are not to suit the ones that are drawn.
        noise = Draw(recipe.seed, 0, samples).normal(
            "trajectory_noise", (data.channels, data.image_size, data.image_size)
        )
        costs += step_costs(Field(velocity, condition, null, guidance, samples), noise, times)
        report(ids.stop, TRAJECTORIES)
    chosen = optimal_steps(costs, steps)
    return [i / FINE for i in chosen]
