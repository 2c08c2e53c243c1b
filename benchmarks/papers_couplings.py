"""Claims of papers on which noise a path joins to which data: reflows, couplings, given parts."""

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.calibration import (
    BATCH,
    FRESH,
    SAMPLES,
    Baseline,
    Row,
    Trained,
    eight_gaussians,
    energy,
    fresh_data,
    fresh_noise,
    objective,
    train,
)
from flows.batch import Batch
from flows.couplings import Coupling
from flows.objectives.flow_matching import FlowMatching
from flows.randomness import Draw
from flows.samplers.completion import complete, in_painting_start
from flows.samplers.sampler import time_grid
from flows.times import TimeDistribution

GROUP = (
    128  # points coupled among themselves: an assignment of 512 takes ten times as long as its step
)
U_SHAPED = TimeDistribution("u_shaped", 0.0, 1.0, 1.0, steepness=4.0)


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
