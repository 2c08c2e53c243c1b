"""Discrete flow matching (Gat et al. 2024): learn p(data | x_t) of every token of a mixture path."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from flows.batch import Batch
from flows.mixture import MixturePath, to_tokens
from flows.objectives.conditions import kept_conditions
from flows.objectives.objective import Couple, Prepared
from flows.paths import TimeSupport
from flows.randomness import Draw
from flows.times import TimeDistribution

DiscreteLoss = Literal["cross_entropy", "kullback_leibler"]

# The rate of the last jumps, and with it the divergence's weight, grows without bound at t = 1.
SUPPORT = {
    "cross_entropy": TimeSupport(0.0, 1.0),
    "kullback_leibler": TimeSupport(0.0, 1.0 - 1e-3),
}


@dataclass(frozen=True)
class DiscreteFlowMatching:
    """An objective for networks that give logits (batch, tokens, levels) of the data.

    loss_kind: `cross_entropy`: -log p(x1 | x_t); `kullback_leibler`: the generalised divergence of the
        jump rates, which bounds the likelihood (Shaul et al. 2024, "Flow matching with general discrete
        paths"): -kappa' / (1 - kappa) (p(x_t) - [x_t = x1] + [x_t != x1] log p(x1))
    label_drop, null_label: as in `FlowMatching`
    """

    path: MixturePath
    loss_kind: DiscreteLoss
    label_drop: float
    null_label: int
    time: TimeDistribution

    @property
    def couple(self) -> Couple | None:
        """None: samples are independent."""
        return None

    def prepare(self, batch: Batch, draw: Draw) -> Prepared:
        """Tokens of the images, mixed with their source at a drawn time."""
        t = SUPPORT[self.loss_kind].rescale(self.time.draw(draw))
        data = to_tokens(batch.image, self.path.levels)
        x = self.path.mix(data, t, draw)
        told = kept_conditions(batch, draw, drop=self.label_drop, null_label=self.null_label)
        return Prepared(
            inputs={"x": x, "t": t} | told,
            targets={"data": data, "x": x, "rate": self.path.rate(t)},
            time=t,
        )

    def loss(self, outputs: Tensor, targets: dict[str, Tensor]) -> Tensor:
        """(batch,) mean over tokens, in float32."""
        logarithm = torch.log_softmax(outputs.to(torch.float32), -1)
        data, x = targets["data"], targets["x"]
        right = _at(logarithm, data)
        if self.loss_kind == "cross_entropy":
            return -right.mean(1)
        masked = x == self.path.levels  # which the data never are
        stays = _at(logarithm, x.masked_fill(masked, 0)).exp().masked_fill(masked, 0.0)
        arrived = x == data
        gain = stays - arrived.to(stays.dtype) + torch.where(arrived, 0.0, right)
        return -targets["rate"] * gain.mean(1)


def _at(values: Tensor, symbol: Tensor) -> Tensor:
    """(batch, tokens) the entries of values (batch, tokens, levels) at a symbol (batch, tokens)."""
    return values.gather(-1, symbol[..., None]).squeeze(-1)
