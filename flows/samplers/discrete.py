"""From source tokens to data tokens: the jumps of a continuous-time Markov chain, by Euler's method.

Gat et al. 2024, "Discrete flow matching". In a step a likely data token y is drawn for each place; a
place whose token is not y jumps with probability 1 - exp(-L), L the integral of kappa' / (1 - kappa)
over the step. The corrector adds jumps that leave every marginal as it is, so that early mistakes can
be mended: c kappa' / (kappa (1 - kappa)) towards a fresh draw from (1 - kappa) source + kappa p(data | x_t).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from flows.mixture import MixturePath
from flows.randomness import Draw
from flows.samplers.guidance import Condition

# predict(x (batch, tokens) int64, t (batch,), condition) -> logits (batch, tokens, levels)
Predict = Callable[[Tensor, Tensor, Condition], Tensor]


@dataclass(frozen=True)
class SampledTokens:
    """tokens: (batch, tokens) int64; network_calls: (batch,) int64 evaluations for each sample."""

    tokens: Tensor
    network_calls: Tensor


@torch.no_grad()
def sample_tokens(
    predict: Predict,
    condition: Condition,
    null: Condition,
    samples: Tensor,
    *,
    path: MixturePath,
    tokens: int,
    steps: int,
    corrector: float,
    guidance: float,
    seed: int,
) -> SampledTokens:
    """Draw the samples of the given indices; each depends on (seed, its index, its condition) alone.

    condition, null: what is asked for and what guidance leads away from, each value (batch, ...)
    samples: (batch,) int64 index of each sample, on the device of the result
    tokens: places of a sample
    steps: network calls, twice as many where guided
    corrector: c >= 0; 0 is none
    guidance: w in log p = log p_null + w (log p_condition - log p_null); 1 is none
    """
    x = path.draw_source(Draw(seed, 0, samples), tokens)
    grid = torch.linspace(0.0, 1.0, steps + 1, dtype=torch.float64).tolist()
    for step in range(steps):
        t, h = grid[step], grid[step + 1] - grid[step]
        draw = Draw(seed, step + 1, samples)
        law = _law(predict, x, t, condition, null, guidance)
        likely = _draw(law, draw.uniform("likely", (tokens,)))
        x = likely if step == steps - 1 else _jump(path, x, likely, t, h, corrector, draw)
    calls = steps if guidance == 1.0 else 2 * steps
    return SampledTokens(x, torch.full_like(samples, calls))


def _law(
    predict: Predict,
    x: Tensor,
    t: float,
    condition: Condition,
    null: Condition,
    guidance: float,
) -> Tensor:
    """(batch, tokens, levels) p(data | x), guided."""
    if guidance == 1.0:
        time = torch.full((len(x),), t, device=x.device)
        return torch.softmax(predict(x, time, condition).float(), -1)
    both = {name: torch.cat((value, null[name])) for name, value in condition.items()}
    time = torch.full((2 * len(x),), t, device=x.device)
    asked, unasked = torch.log_softmax(predict(torch.cat((x, x)), time, both).float(), -1).chunk(2)
    return torch.softmax(torch.lerp(unasked, asked, guidance), -1)


def _jump(
    path: MixturePath, x: Tensor, likely: Tensor, t: float, h: float, corrector: float, draw: Draw
) -> Tensor:
    """x one step later: (batch, tokens) int64. Rates are integrated over the step, likely tokens held."""
    now, later = path.kappa(torch.tensor([t, t + h], dtype=torch.float64)).tolist()
    forward = math.log((1 - now) / (1 - later))
    arrival = F.one_hot(likely, path.symbols).to(torch.float64)
    rates = forward * arrival
    if corrector and now:
        fresh = (1 - now) * path.source_law().to(x.device) + now * arrival
        rates = rates + corrector * forward / now * fresh
    rates.scatter_(-1, x[..., None], 0.0)
    total = rates.sum(-1)
    leaves = draw.uniform("leaves", (x.shape[1],)) < -torch.expm1(-total)
    return torch.where(leaves, _draw(rates, draw.uniform("where", (x.shape[1],))), x)


def _draw(weights: Tensor, uniform: Tensor) -> Tensor:
    """(batch, tokens) int64 drawn by weights (batch, tokens, symbols) >= 0, a number in (0, 1) each."""
    cumulative = weights.to(torch.float64).cumsum(-1)
    aim = uniform.to(torch.float64) * cumulative[..., -1]
    found = torch.searchsorted(cumulative, aim[..., None], right=True).squeeze(-1)
    return found.clamp_max(weights.shape[-1] - 1)
