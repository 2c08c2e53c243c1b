"""Maximum likelihood of normalizing flows: carry data to a standard normal, and count the volume.

    L = 1/2 mean z^2 - (log |det dz / dx|) / D + weight * power

over the D dimensions of a sample: the negative log-likelihood in nats per dimension, without the
constant 1/2 log 2 pi (Zhai et al. 2024, "TarFlow", eq. 6; Gu et al. 2025, "STARFlow", with its
`power` of latents).

The prior of a flow that keeps volumes has a variance of its own in each dimension. It does not enter
the loss, so it is no state of the training: `prior_variance` takes it from data when it is needed,
and it is then the same whatever the layout was.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from flows.batch import Batch
from flows.dequantisation import Levels, uniform_in_bin
from flows.errors import UserError
from flows.models.flow import FlowOutput
from flows.objectives.conditions import kept_label, kept_text
from flows.objectives.objective import Couple, Prepared
from flows.randomness import Draw

Dequantisation = Literal["none", "uniform", "variational"]


@dataclass(frozen=True)
class Likelihood:
    """An objective, for models that return a `FlowOutput`.

    dequantisation: "none" takes images as they are; "uniform" draws a place in each pixel's bin;
        "variational" gives the model the lower end of the bin as `x` and normal numbers as `noise`,
        from which it makes the place itself (see `flows.models.dequantised`)
    levels: of the pixels; None for data without levels, such as latents
    noise: standard deviation of the normal noise added to the image
    power: weight of STARFlow's regulariser of latents
    label_drop, null_label: share of labels replaced by `null_label`, the number of classes
    text_drop: share of texts replaced by zeros; None if the model reads no text
    """

    dequantisation: Dequantisation
    levels: Levels | None
    noise: float
    power: float
    label_drop: float
    null_label: int
    text_drop: float | None

    def __post_init__(self) -> None:
        if self.dequantisation != "none" and self.levels is None:
            raise UserError(
                f"objective.dequantisation = {self.dequantisation} fills the bins of pixels, and "
                "latents have none; use objective.dequantisation=none."
            )
        if self.dequantisation == "variational" and self.noise:
            raise UserError(
                f"objective.noise = {self.noise:g} would leave the bins that "
                "objective.dequantisation = variational fills; set one of them to 0 or none."
            )

    @property
    def couple(self) -> Couple | None:
        """None: samples are independent."""
        return None

    @property
    def bin_width(self) -> float:
        """What a density is multiplied by to bound the probability of a level.

        1 without levels, and with noise, which leaves the bins: then a density stays one.
        """
        return self.levels.width if self.levels and not self.noise else 1.0

    def prepare(self, batch: Batch, draw: Draw) -> Prepared:
        """All noise and all that is dropped by sample key, on the device of `draw.samples`."""
        x, shape = batch.image, tuple(batch.image.shape[1:])
        inputs: dict[str, Tensor] = {}
        if self.levels and self.dequantisation == "uniform":
            x = uniform_in_bin(x, self.levels, draw).y
        elif self.levels and self.dequantisation == "variational":
            x = self.levels.lower(x)
            inputs["noise"] = draw.normal("dequantisation", shape)
        if self.noise:
            x = torch.add(x, draw.normal("noise", shape), alpha=self.noise)
        inputs["x"] = x
        inputs["label"] = kept_label(batch, draw, drop=self.label_drop, null_label=self.null_label)
        if self.text_drop is not None:
            inputs["text"] = kept_text(batch, draw, drop=self.text_drop)
        return Prepared(inputs, targets={}, time=None)

    def loss(self, outputs: FlowOutput, targets: dict[str, Tensor]) -> Tensor:  # noqa: ARG002
        """(batch,) nats per dimension of each sample without the normal's constant, in float32."""
        z, logdet, power = outputs
        fit = 0.5 * z.float().square().flatten(1).mean(1) - logdet.float() / z[0].numel()
        return fit + self.power * power.float() if self.power else fit

    def bits(self, outputs: FlowOutput, variance: Tensor | None = None) -> Tensor:
        """(batch,) bits per dimension; a bound for discrete pixels if these were dequantised.

        variance: (tokens, features) of the prior; None for 1
        """
        return bits_per_dimension(outputs, bin_width=self.bin_width, variance=variance)


def log_likelihood(output: FlowOutput, variance: Tensor | None = None) -> Tensor:
    """(batch,) float32 log p(x) in nats: log N(z; 0, variance) + log |det dz / dx|.

    variance: (tokens, features) of the prior; None for 1
    """
    z = output.z.float()
    square = z.square() if variance is None else z.square() / variance + variance.log()
    dimensions = z[0].numel()
    normal = -0.5 * (square.flatten(1).sum(1) + dimensions * math.log(2 * math.pi))
    return normal + output.logdet.float()


def bits_per_dimension(
    output: FlowOutput, *, bin_width: float, variance: Tensor | None = None
) -> Tensor:
    """(batch,) float32 -log2(p(x) bin_width^D) / D.

    [1/2 mean z^2 + 1/2 log 2 pi - logdet / D - log bin_width] / log 2, where -log bin_width is
    log 128 for TarFlow's bins of 256 levels and log 127.5 for Jet's.

    bin_width: see `flows.dequantisation.Levels`
    variance: (tokens, features) of the prior; None for 1
    """
    nats = log_likelihood(output, variance) / output.z[0].numel()
    return -(nats + math.log(bin_width)) / math.log(2)


def prior_variance(latents: Iterable[Tensor]) -> Tensor:
    """(tokens, features) float32 mean of z^2: the most likely prior N(0, variance) of those z.

    TarFlow keeps a running average while it trains; this is what it averages towards.

    latents: (batch, tokens, features) each, of data
    """
    total, count = torch.zeros(()), 0
    for z in latents:
        total, count = total.to(z.device) + z.double().square().sum(0), count + len(z)
    if count == 0:
        raise ValueError("the variance of a prior needs at least one latent")
    return (total / count).float()
