"""Claims of papers on what is learnt along a path, and on how it is sampled."""

import itertools
from collections.abc import Iterator

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from benchmarks.calibration import (
    CLASSES,
    FRESH,
    SAMPLES,
    STD,
    STEPS,
    Baseline,
    Row,
    Trained,
    centres,
    eight_gaussians,
    energy,
    fresh_data,
    fresh_noise,
    objective,
    train,
)
from flows.mixture import MixturePath
from flows.objectives.boundary import Boundary
from flows.paths import LINEAR, PATHS, Prediction
from flows.randomness import Draw
from flows.samplers.discrete import sample_tokens
from flows.samplers.ode import OdeSolver
from flows.samplers.sampler import time_grid
from flows.samplers.sde import Diffusion, Noise, solve_sde


def flow_matching(base: Baseline) -> Iterator[Row]:
    """Eight atoms: the marginal velocity is a weighted mean, known in closed form."""
    paper = "Flow matching (Lipman et al. 2023)"
    atoms = centres()

    def source(draw: Draw) -> tuple[Tensor, Tensor]:
        label = (draw.uniform("class") * CLASSES).long()
        return atoms[label], label

    # The claim is of a network that has converged.
    trained = train(objective(), seed=base.seed, source=source, steps=2 * STEPS)
    draw = Draw(3, 0, torch.arange(SAMPLES) + FRESH)
    t = draw.uniform("time") * 0.95  # later the atoms are apart, and nothing is left to learn
    x = LINEAR.interpolate(source(draw)[0], draw.normal("noise", (2,)), t).x
    distance = (x[:, None] - t[:, None, None] * atoms).square().sum(-1)
    weight = torch.softmax(-distance / (2 * (1 - t[:, None]) ** 2), 1)
    exact = (weight @ atoms - x) / (1 - t[:, None])
    label = torch.full((SAMPLES,), CLASSES)
    error = float((trained.velocity(x, t, label) - exact).square().mean())
    yield Row(
        paper,
        "regressing conditional velocities learns the marginal one",
        "mean squared error < 1e-2",
        f"{error:.1e}",
        error < 1e-2,
    )
    # A score says little of the velocity near t = 0 and data little near t = 1: the one wants short steps
    # there, the other a solver that does not look at the end.
    kinds: tuple[tuple[str, Prediction, OdeSolver, int], ...] = (
        ("gvp", "velocity", "euler", 50),
        ("vp", "noise", "euler", 50),
        ("polynomial", "velocity", "euler", 50),
        ("linear_vp", "score", "heun", 200),
        ("linear", "data", "euler", 50),
    )
    found = []
    for name, prediction, solver, steps in kinds:
        chosen = objective(PATHS[name], prediction=prediction)
        found.append(energy(train(chosen, seed=base.seed).sample(steps, solver), base.data))
    names = ", ".join(f"{name} {kind}, {solver} {steps}" for name, kind, solver, steps in kinds)
    yield Row(
        paper,
        f"other paths and predictions learn the law: {names} steps",
        "ED <= 0.01 each",
        ", ".join(f"{distance:.4f}" for distance in found),
        max(found) <= 0.01,
    )


def stochastic_interpolants(base: Baseline) -> Iterator[Row]:
    forms: tuple[Diffusion, ...] = ("constant", "sbdm", "sigma", "linear", "decreasing", "bump")
    found = [stochastic(base.flow, form) for form in forms]
    plain = base.distance(base.flow, 100)
    yield Row(
        "Stochastic interpolants (Albergo et al. 2023)",
        "any diffusion samples the law that the ODE samples: " + ", ".join(forms),
        "ED of 200 steps <= 0.01 each",
        ", ".join(f"{distance:.4f}" for distance in found) + f"; ODE {plain:.4f}",
        max(found) <= 0.01,
    )


def stochastic(trained: Trained, form: Diffusion, steps: int = 200, seed: int = 1) -> float:
    """Energy distance of samples by the SDE."""
    samples = torch.arange(SAMPLES) + FRESH
    drawn = solve_sde(
        trained.field,
        fresh_noise(seed),
        time_grid(steps, 0.0, 1.0, 1.0),
        "sde",
        path=LINEAR,
        noise=Noise(form, 1.0, "tweedie"),
        seed=seed,
        samples=samples,
    )
    return energy(drawn, fresh_data(seed))


def contrastive(base: Baseline) -> Iterator[Row]:
    """The best velocity of a class against the closed form of its Gaussian."""
    errors = {}
    for lam in (0.0, 0.05, 0.2):
        chosen = objective(contrast=lam, label_drop=0.0)
        trained = train(chosen, seed=base.seed, labelled=True)
        draw = Draw(4, 0, torch.arange(SAMPLES) + FRESH)
        data, label = eight_gaussians(draw)
        t = 0.05 + 0.9 * draw.uniform("time")
        x = LINEAR.interpolate(data, draw.normal("noise", (2,)), t).x
        time, mean = t[:, None], centres()[label]
        variance = (time * STD) ** 2 + (1 - time) ** 2
        slope = (time * STD**2 - (1 - time)) / variance
        best = mean + slope * (x - time * mean)
        others = -mean / (CLASSES - 1)  # the mean of the other centres, whose noise is 0 on average
        expected = (best - lam * others) / (1 - lam)
        errors[lam] = float((trained.velocity(x, t, label) - expected).square().mean())
    yield Row(
        "Contrastive flow matching (Stoica et al. 2025)",
        "the minimum is (v* - lambda E u') / (1 - lambda); lambda 0, 0.05, 0.2",
        "mean squared error < 1e-2 each",
        ", ".join(f"{error:.1e}" for error in errors.values()),
        max(errors.values()) < 1e-2,
    )


def boundary(base: Baseline) -> Iterator[Row]:
    """Five seeds, each with and without, from the same weights on the same batches.

    In 20 steps: after 50 both are as near to the data as 4,096 samples can tell.
    """
    found: dict[bool, list[float]] = {True: [], False: []}
    for seed in range(base.seed, base.seed + 5):
        plain = base.flow if seed == base.seed else train(objective(), seed=seed)
        exact = train(objective(boundary=Boundary(2.0, (0.0, 0.0))), seed=seed)
        for chosen, trained in ((True, exact), (False, plain)):
            found[chosen].append(stochastic(trained, "sigma", steps=20))
    ours, theirs = (sum(values) / 5 for values in (found[True], found[False]))
    yield Row(
        "Boundary conditions (Hu et al. 2025)",
        "exact ends better 20 stochastic steps, mean of 5 seeds",
        "ED <= that without",
        f"{ours:.5f} beside {theirs:.5f}",
        ours <= theirs,
    )


def discrete(base: Baseline) -> Iterator[Row]:
    """Two tokens of four symbols, the exact posterior in place of a network."""
    law = torch.tensor([[8.0, 1, 0, 3], [0, 2, 6, 0], [1, 0, 4, 1], [5, 0, 2, 7]]).double()
    law, levels, count = law / law.sum(), 4, 8000
    values = []
    for source, corrector in itertools.product(("mask", "uniform"), (0.0, 1.0)):
        path = MixturePath(levels, source, 1.0)  # type: ignore[arg-type]
        label = {"label": torch.zeros(count, dtype=torch.int64)}
        drawn = sample_tokens(
            lambda x, t, _, path=path: _posterior(path, law, x, t),  # type: ignore[misc]
            label,
            label,
            torch.arange(count) + FRESH,
            path=path,
            tokens=2,
            steps=160,
            corrector=corrector,
            guidance=1.0,
            seed=base.seed,
        )
        pairs = torch.bincount(drawn.tokens @ torch.tensor([levels, 1]), minlength=16).double()
        inside = law.flatten() > 0
        expected = law.flatten()[inside] * pairs[inside].sum()
        values.append(float(stats.chisquare(pairs[inside].numpy(), expected.numpy()).pvalue))
    yield Row(
        "Discrete flow matching (Gat et al. 2024)",
        "jumps by the exact posterior give the data, masked or uniform source, corrector 0 and 1",
        "chi-squared p > 0.01 each",
        ", ".join(f"{value:.2f}" for value in values),
        bool(np.min(values) > 0.01),
    )


def _posterior(path: MixturePath, law: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """(batch, 2, levels) logarithms of p(data of a token | both tokens)."""
    kappa, source = path.kappa(t.double())[:, None], path.source_law().double()
    first, second = (
        (1 - kappa) * source[token][:, None]
        + kappa * torch.nn.functional.one_hot(token, path.symbols)[:, : path.levels]
        for token in x.T
    )
    joint = law * first[:, :, None] * second[:, None, :]
    joint = joint / joint.sum((1, 2), keepdim=True)
    posterior = torch.stack([joint.sum(2), joint.sum(1)], 1)
    # Two tokens that jump at once may make a pair without any law: what follows is as good.
    return posterior.nan_to_num(nan=1 / path.levels).clamp_min(1e-30).log()
