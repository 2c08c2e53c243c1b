"""Who computes a token, and how much it counts: choices made of the scores of tokens and experts.

Tokens choose experts (Shazeer et al. 2017; top-k of a softmax, or of sigmoids as in DeepSeek-V3), or
experts choose tokens (Zhou et al. 2022). A capacity counts the tokens of one sample, and so does what an
expert chooses, so that no split of a batch changes a choice (docs/decisions/0007).
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from flows.routed import Routed

Chooser = Literal["tokens", "experts"]
Gate = Literal["softmax", "sigmoid"]
Balance = Literal["none", "previous", "sequence"]

# Scores of fresh routers are about 1 / experts; layouts that add in another order differ below this.
TIE = 1e-6
SMALLEST = 1e-20


@dataclass(frozen=True)
class Routing:
    """How tokens and experts find each other.

    chosen: experts a token goes to; on average, where experts choose
    chooser: who chooses
    gate: what makes scores of logits
    renormalise: the weights of a token's experts sum to one
    scale: times all weights
    capacity: places of an expert in a sample over its equal share, so that 1 is just enough for balanced
        ones; the weakest slots are dropped. 0: all find a place
    balance: what the balance loss multiplies the mean scores of a sample with: the shares of the
        `previous` step's whole batch, or the shares of the same sample (`sequence`)
    balance_weight: of the balance loss, which is this much where loads are equal
    z_weight: of the mean squared logsumexp of the logits (Zoph et al. 2022, ST-MoE, eq. 5)
    bias_rate: step of the biases that balance without a loss (Wang et al. 2024); 0: there are none
    recurrent: width of the state that routers hand from layer to layer (Qiu et al. 2024, RMoE); 0: none
    """

    experts: int
    chosen: int
    chooser: Chooser = "tokens"
    gate: Gate = "softmax"
    renormalise: bool = False
    scale: float = 1.0
    capacity: float = 0.0
    balance: Balance = "none"
    balance_weight: float = 0.0
    z_weight: float = 0.0
    bias_rate: float = 0.0
    recurrent: int = 0


class Slots(NamedTuple):
    """The work of a mixture: slots, each a token for an expert, in the order of the experts.

    token: (slots,) int64 row of the token among all of the batch
    weight: (slots,) float32 of the expert's output
    counts: (experts,) int64 slots of each expert
    """

    token: Tensor
    weight: Tensor
    counts: Tensor


def tokens_choose(
    scores: Tensor, bias: Tensor | None, routing: Routing, mask: Tensor | None
) -> tuple[Slots, Routed, Tensor]:
    """Each token takes the experts of its highest scores (batch, tokens, experts).

    The last of the three is (batch, tokens, experts) bool, who asked for whom.
    """
    batch, tokens, experts = scores.shape
    chosen = routing.chosen
    ranked = scores.detach() if bias is None else scores.detach() + bias
    best = ranked.topk(min(chosen + 1, experts), dim=-1)
    expert = best.indices[..., :chosen]
    weight = score = scores.gather(-1, expert)
    if routing.renormalise:
        weight = weight / weight.sum(-1, keepdim=True).clamp_min(SMALLEST)
    weight = weight * routing.scale
    nobody = torch.zeros_like(scores, dtype=torch.bool)
    asked = nobody.scatter(-1, expert, True)
    load = asked.sum(1).float()
    ties = _ties(best.values, chosen)
    kept = None
    if routing.capacity:
        places = min(tokens, math.ceil(routing.capacity * chosen * tokens / experts))
        # By scores: renormalised weights of one expert a token are all 1.
        kept, close = _strongest(score.detach(), expert, experts, places)
        ties = ties + close
    dropped = load.new_zeros(batch) if kept is None else (~kept).sum((1, 2)).float()
    if mask is not None:
        weight = weight * mask
    found = asked if kept is None else nobody.scatter(-1, expert, kept)
    slots = _in_order(expert, weight, kept, found.sum((0, 1)))
    return slots, Routed(load, dropped, _entropy(scores), ties, _no_flow(load)), asked


def experts_choose(
    scores: Tensor, routing: Routing, mask: Tensor | None
) -> tuple[Slots, Routed, Tensor]:
    """In each sample every expert takes as many tokens, those that score it highest.

    The last of the three is (batch, tokens, experts) bool, who asked for whom.
    """
    batch, tokens, experts = scores.shape
    places = expert_places(routing, tokens)
    ranked = scores.detach().transpose(1, 2)
    best = ranked.topk(min(places + 1, tokens), dim=-1)
    token = best.indices[..., :places]  # (batch, experts, places)
    asked = torch.zeros_like(ranked, dtype=torch.bool).scatter(-1, token, True).transpose(1, 2)
    weight = scores if mask is None else scores * mask
    if routing.renormalise:
        weight = weight / (scores * asked).sum(-1, keepdim=True).clamp_min(SMALLEST)
    weight = (weight * routing.scale).transpose(1, 2).gather(-1, token)
    rows = token + tokens * torch.arange(batch, device=token.device)[:, None, None]
    counts = torch.full((experts,), batch * places, device=token.device)
    slots = Slots(rows.transpose(0, 1).flatten(), weight.transpose(0, 1).flatten(), counts)
    load = torch.full((batch, experts), float(places), device=token.device)
    dropped = (~asked.any(-1)).sum(-1).float()
    ties = _ties(best.values, places)
    return slots, Routed(load, dropped, _entropy(scores), ties, _no_flow(load)), asked


def expert_places(routing: Routing, tokens: int) -> int:
    """Tokens that an expert takes of a sample, where experts choose."""
    wanted = (routing.capacity or 1.0) * routing.chosen * tokens / routing.experts
    return max(1, min(tokens, math.ceil(wanted)))


def distribution(scores: Tensor) -> Tensor:
    """Scores that sum to one over experts, as those of a softmax do already."""
    return scores / scores.sum(-1, keepdim=True).clamp_min(SMALLEST)


def _strongest(score: Tensor, expert: Tensor, experts: int, places: int) -> tuple[Tensor, Tensor]:
    """The slots (batch, tokens, chosen) that are among the `places` highest scores of their expert.

    returns (batch, tokens, chosen) bool, and (batch,) experts whose last place hangs on less than TIE
    """
    tokens = score.shape[1]
    claims = score.new_full((len(score), tokens, experts), -math.inf).scatter(-1, expert, score)
    best = claims.topk(min(places + 1, tokens), dim=1)
    taken = torch.zeros_like(claims, dtype=torch.bool)
    taken.scatter_(1, best.indices[:, :places], True)
    return taken.gather(-1, expert), _ties(best.values.transpose(1, 2), places)


def _in_order(expert: Tensor, weight: Tensor, kept: Tensor | None, counts: Tensor) -> Slots:
    """Slots of (batch, tokens, chosen) choices; of one expert, in the order of their tokens.

    kept: those that found a place, None for all; counts: (experts,) how many each expert has
    """
    chosen, flat, weights = expert.shape[-1], expert.flatten(), weight.flatten()
    if kept is None:
        order = flat.argsort(stable=True)
    else:
        place = kept.flatten().nonzero().squeeze(1)
        order = place[flat[place].argsort(stable=True)]
    return Slots(order // chosen, weights[order], counts)


def _no_flow(load: Tensor) -> Tensor:
    return load.new_zeros(len(load), 0, 0)


def _entropy(scores: Tensor) -> Tensor:
    """(batch,) mean over tokens."""
    share = distribution(scores.detach())
    return -(share * share.clamp_min(SMALLEST).log()).sum(-1).mean(1)


def _ties(best: Tensor, chosen: int) -> Tensor:
    """(batch,) rows of the sorted `best` in which the last chosen score is hardly above the next."""
    if best.shape[-1] == chosen:
        return best.new_zeros(len(best))
    return (best[..., chosen - 1] - best[..., chosen] < TIE).sum(1).float()
