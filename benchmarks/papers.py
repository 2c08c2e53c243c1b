"""What papers claim of objectives, couplings and paths, tried on the problem of `benchmarks/calibration.py`.

Each check trains what its paper proposes and holds it against the plain rectified flow, or against what
theory says exactly. A gate stands beside what was measured; it was set before the measurement, by the
paper's claim where it makes one in numbers.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from benchmarks.calibration import (
    BATCH,
    CLASSES,
    FRESH,
    SAMPLES,
    STD,
    STEPS,
    Baseline,
    Trained,
    centres,
    eight_gaussians,
    energy,
    fresh_data,
    fresh_noise,
    objective,
    train,
)
from flows.batch import Batch
from flows.couplings import Coupling
from flows.mixture import MixturePath
from flows.objectives.boundary import Boundary
from flows.objectives.flow_matching import FlowMatching
from flows.paths import LINEAR, PATHS, Prediction
from flows.randomness import Draw
from flows.samplers.completion import complete, in_painting_start
from flows.samplers.discrete import sample_tokens
from flows.samplers.ode import OdeSolver
from flows.samplers.sampler import time_grid
from flows.samplers.sde import Diffusion, Noise, solve_sde
from flows.times import TimeDistribution

GROUP = (
    128  # points coupled among themselves: an assignment of 512 takes ten times as long as its step
)
U_SHAPED = TimeDistribution("u_shaped", 0.0, 1.0, 1.0, steepness=4.0)


@dataclass(frozen=True)
class Row:
    """One claim: what was asked for, what was found, whether it is met."""

    paper: str
    claim: str
    gate: str
    measured: str
    met: bool


def rectified_flow(base: Baseline) -> Iterator[Row]:
    paper = "Rectified flow (Liu et al. 2023)"
    first, second = (base.distance(flow, 1) for flow in (base.flow, base.straight))
    yield Row(
        paper,
        "one Euler step is enough after a reflow",
        "ED of the second flow <= 2 % of the first's",
        f"{second:.4f} of {first:.3f}, {second / first:.2%}",
        second <= 0.02 * first,
    )
    many = base.distance(base.straight, 50)
    yield Row(
        paper, "a reflow keeps the law", "ED of 50 steps <= 0.005", f"{many:.4f}", many <= 0.005
    )
    noise = fresh_noise(2)
    costs = [
        float((fresh_data(2) - noise).square().sum(1).mean()),
        *(
            float((flow.carry(noise, 50, "heun") - noise).square().sum(1).mean())
            for flow in (base.flow, base.straight)
        ),
    ]
    yield Row(
        paper,
        "E|x1 - x0|^2 falls with every flow",
        "not above the one before by 1 %",
        ", ".join(f"{cost:.3f}" for cost in costs),
        costs[1] <= 1.01 * costs[0] and costs[2] <= 1.01 * costs[1],
    )


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
    found = [_stochastic(base.flow, form) for form in forms]
    plain = base.distance(base.flow, 100)
    yield Row(
        "Stochastic interpolants (Albergo et al. 2023)",
        "any diffusion samples the law that the ODE samples: " + ", ".join(forms),
        "ED of 200 steps <= 0.01 each",
        ", ".join(f"{distance:.4f}" for distance in found) + f"; ODE {plain:.4f}",
        max(found) <= 0.01,
    )


def _stochastic(trained: Trained, form: Diffusion, steps: int = 200, seed: int = 1) -> float:
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


def optimal_transport(base: Baseline) -> Iterator[Row]:
    trained = train(objective(coupling=Coupling("assignment", 1.0, GROUP)), seed=base.seed)
    yield _straighter("OT-CFM (Tong et al. 2024)", base, trained, steps=1, share=0.02)


def multisample(base: Baseline) -> Iterator[Row]:
    paper = "Multisample flow matching (Pooladian et al. 2023)"
    trained = train(objective(coupling=Coupling("stable", 1.0, GROUP)), seed=base.seed)
    yield _straighter(paper + ", stable", base, trained, steps=1, share=0.05)
    plain = _gradient_variance(base.flow, objective())
    joined = _gradient_variance(base.flow, objective(coupling=Coupling("assignment", 1.0, 0)))
    yield Row(
        paper,
        "coupled batches have gradients of less variance",
        "ratio < 1",
        f"{joined / plain:.2f}",
        joined < plain,
    )


def _straighter(paper: str, base: Baseline, trained: Trained, steps: int, share: float) -> Row:
    ours = [base.distance(trained, n) for n in (1, 2, 4)]
    theirs = [base.distance(base.flow, n) for n in (1, 2, 4)]
    index = (1, 2, 4).index(steps)
    return Row(
        paper,
        "fewer steps are enough; ED at 1, 2, 4 steps",
        f"{steps} steps <= {share:.0%} of rectified flow's",
        ", ".join(f"{distance:.4f}" for distance in ours)
        + " beside "
        + ", ".join(f"{distance:.4f}" for distance in theirs),
        ours[index] <= share * theirs[index],
    )


def _gradient_variance(trained: Trained, chosen: FlowMatching, batches: int = 64) -> float:
    """Of the gradient of one batch, summed over weights, at a trained network."""
    gradients = []
    for step in range(batches):
        draw = Draw(9, step, torch.arange(BATCH) + step * BATCH)
        data, label = eight_gaussians(draw)
        batch = Batch(data, label, draw.samples)
        if chosen.couple is not None:
            batch = chosen.couple(batch, batch, 9, step)
        ready = chosen.prepare(batch, draw)
        loss = chosen.loss(trained.network(**ready.inputs), ready.targets).mean()
        parts = torch.autograd.grad(loss, list(trained.network.parameters()))
        gradients.append(torch.cat([part.flatten() for part in parts]))
    return float(torch.stack(gradients).var(0).sum())


def schroedinger_bridge(base: Baseline) -> Iterator[Row]:
    """Sigma 0.5, its plan regularised by 2 sigma^2."""
    chosen = objective(bridge=0.5, coupling=Coupling("entropic", 0.5, GROUP))
    trained = train(chosen, seed=base.seed)
    yield _straighter("SB-CFM (Tong et al. 2024)", base, trained, steps=4, share=1.0)
    many = base.distance(trained, 50)
    yield Row(
        "SB-CFM (Tong et al. 2024)",
        "the bridge ends at the data",
        "ED of 50 steps <= 0.01",
        f"{many:.4f}",
        many <= 0.01,
    )


def weighted(base: Baseline) -> Iterator[Row]:
    """Weights exp(-|x0 - x1|^2 / 2)."""
    paper = "Weighted CFM (Calvo-Ordonez et al. 2025)"
    trained = train(objective(coupling=Coupling("weighted", 2.0, 0)), seed=base.seed)
    yield _straighter(paper, base, trained, steps=1, share=0.2)
    ours, theirs = base.distance(trained, 50), base.distance(base.flow, 50)
    yield Row(
        paper,
        "without a plan its law is off a little, as predicted",
        "ED of 50 steps <= 0.005",
        f"{ours:.4f} beside {theirs:.4f}",
        ours <= 0.005,
    )


class FirstSeen:
    """The base of points whose first coordinate is given."""

    def __call__(self, image: Tensor, draw: Draw) -> Tensor:
        seen = torch.tensor([True, False])
        return torch.where(seen, image, draw.normal("noise", tuple(image.shape[1:])))


def data_dependent(base: Baseline) -> Iterator[Row]:
    trained = train(objective(base=FirstSeen()), seed=base.seed)
    given, seen = fresh_data(5), torch.tensor([True, False])
    start = in_painting_start(given, seen, torch.arange(SAMPLES) + FRESH, seed=1)
    done = complete(trained.field, start, time_grid(50, 0.0, 1.0, 1.0), "heun", seen=seen)
    distance = energy(done, base.data)
    kept = torch.equal(done[:, 0], given[:, 0])
    yield Row(
        "Data-dependent couplings (Albergo et al. 2023)",
        "completing points of which one coordinate is seen gives the law, and keeps what is seen",
        "ED <= 0.01, seen bits equal",
        f"{distance:.4f}, {'equal' if kept else 'not equal'}",
        distance <= 0.01 and kept,
    )


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


def improved_rectified_flow(base: Baseline) -> Iterator[Row]:
    chosen = objective(time=U_SHAPED, shape="pseudo_huber")
    trained = train(chosen, seed=base.seed, pairs=base.pairs, start=base.flow.network)
    ours, theirs = base.distance(trained, 1), base.distance(base.straight, 1)
    yield Row(
        "Improved rectified flows (Lee et al. 2024)",
        "U-shaped times and a pseudo-Huber loss better one step after a reflow",
        "ED <= that of the plain reflow",
        f"{ours:.5f} beside {theirs:.5f}",
        ours <= theirs,
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
            found[chosen].append(_stochastic(trained, "sigma", steps=20))
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


Check = Callable[[Baseline], Iterator[Row]]

CHECKS: dict[str, Check] = {
    "rectified-flow": rectified_flow,
    "flow-matching": flow_matching,
    "stochastic-interpolants": stochastic_interpolants,
    "ot-cfm": optimal_transport,
    "multisample": multisample,
    "sb-cfm": schroedinger_bridge,
    "weighted-cfm": weighted,
    "data-dependent": data_dependent,
    "contrastive": contrastive,
    "improved-rectified-flow": improved_rectified_flow,
    "boundary": boundary,
    "discrete": discrete,
}


def measure(names: list[str], seed: int, note: Callable[[str], None]) -> list[Row]:
    """The rows of the named checks; note: told of each row as it is found."""
    base, rows = Baseline(seed), []
    for name in names:
        for row in CHECKS[name](base):
            rows.append(row)
            note(f"{'met   ' if row.met else 'missed'} {row.paper}: {row.measured}")
    return rows
