"""Variational dequantisation: a flow that learns which noise to add to pixels, before another flow.

Ho et al. 2019, "Flow++", section 3.1. From normal numbers e, a small conditional flow makes a place
u(e, x) in the bin of each pixel, and the main flow is shown y = x + width u. What it reports is the
bound log P(x) >= E [log p(y) - log q(u | x)] + D log width, so all that is done with a `FlowOutput`
stays as it is: its `logdet` is that of the main flow less log q(u | x).

u = Phi(h) with Phi the distribution function of a standard normal and h = c(e, x) a few couplings,

    log q(u | x) = log N(e) - log |det dh / de| - log N(h)

A fresh dequantiser has h = e, so u is uniform and log q = 0: training starts from the bound of
uniform noise, and can only lower it.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from flows.dequantisation import Levels
from flows.errors import UserError
from flows.initialise import Initialisable, Rule
from flows.models.division import Region
from flows.models.embeddings import patchify, unpatchify
from flows.models.family import Architecture
from flows.models.flow import FlowOutput
from flows.models.jet import couple
from flows.models.network import Network, init_rule, network_products, network_regions


@dataclass(frozen=True)
class DequantiserConfig:
    """Everything that decides the shape of the noise's flow.

    levels: of the pixels
    couplings: how many; layers: transformer layers in the network of each
    """

    image_size: int
    channels: int
    levels: Levels
    patch: int
    width: int
    couplings: int
    layers: int
    heads: int

    def __post_init__(self) -> None:
        if self.image_size % self.patch:
            raise UserError(
                f"data.image_size = {self.image_size} is not divisible by "
                f"objective.dequantiser.patch = {self.patch}; use a patch that divides it."
            )
        if self.width % self.heads:
            raise UserError(
                f"objective.dequantiser.width = {self.width} is not divisible by "
                f"objective.dequantiser.heads = {self.heads}; use a number of heads that divides it."
            )
        if self.features % 2:
            raise UserError(
                f"objective.dequantiser.patch = {self.patch} makes tokens of {self.features} numbers, "
                "which have no halves; use an even patch."
            )

    @property
    def features(self) -> int:
        return self.patch**2 * self.channels


class Noise(NamedTuple):
    """u: (batch, channels, height, width) in [0, 1]; log_q: (batch,) log density of u given x."""

    u: Tensor
    log_q: Tensor


class Dequantiser(nn.Module):
    """The noise's flow. Each coupling changes one half of every token, in turn."""

    def __init__(self, config: DequantiserConfig) -> None:
        super().__init__()
        self.config = config
        half = config.features // 2
        self.blocks = nn.ModuleList(
            Network(
                half + config.features,
                2 * half,
                tokens=(config.image_size // config.patch) ** 2,
                width=config.width,
                layers=config.layers,
                heads=config.heads,
                conditional=False,
            )
            for _ in range(config.couplings)
        )

    def forward(self, x: Tensor, noise: Tensor) -> Noise:
        """x, noise: (batch, channels, height, width), the second standard normal."""
        patch, height = self.config.patch, x.shape[2]
        image, e = patchify(x.float(), patch), patchify(noise.float(), patch)
        first, second = e.chunk(2, dim=2)
        log_q = -0.5 * e.square().flatten(1).sum(1)
        for network in self.blocks:
            second, logdet = couple(second, network(torch.cat((first, image), dim=2)))
            log_q = log_q - logdet
            first, second = second, first
        if len(self.blocks) % 2:
            first, second = second, first
        h = torch.cat((first, second), dim=2)
        log_q = log_q + 0.5 * h.square().flatten(1).sum(1)
        return Noise(torch.special.ndtr(unpatchify(h, patch, height)), log_q)


class Dequantised(nn.Module):
    """A flow of images behind a dequantiser; both are trained together, by the same objective.

    flow: a model of likelihood, `flow(image, **condition) -> FlowOutput`; what draws samples uses it
        alone, for the noise is only there to be trained with
    """

    def __init__(self, flow: nn.Module, config: DequantiserConfig) -> None:
        super().__init__()
        self.flow = flow
        self.dequantiser = Dequantiser(config)

    @property
    def blocks(self) -> list[nn.Module]:
        return [*cast(FlowModel, self.flow).blocks, *self.dequantiser.blocks]

    def reset_buffers(self) -> None:
        """Those of the flow."""
        cast(FlowModel, self.flow).reset_buffers()

    def forward(self, x: Tensor, noise: Tensor, **condition: Tensor) -> FlowOutput:
        """The flow of a point in the bins, its `logdet` less log q of that point.

        x: (batch, channels, height, width) float32, the lower end of each pixel's bin
        noise: the same shape, standard normal
        condition: whatever the flow takes besides, such as `label`
        """
        u, log_q = self.dequantiser(x, noise)
        output = self.flow(x + self.dequantiser.config.levels.width * u, **condition)
        return FlowOutput(output.z, output.logdet - log_q, output.power)

    def regions(self) -> list[Region]:
        """Where tokens may be divided: in the flow, and in the networks of the noise."""
        flow = [region.within("flow") for region in cast(FlowModel, self.flow).regions()]
        noise = network_regions(self.dequantiser.blocks, "objective.dequantiser")
        return flow + [region.within("dequantiser") for region in noise]

    def init_rules(self) -> dict[str, Rule]:
        """Parameter name -> how its first values are drawn."""
        rules = cast(FlowModel, self.flow).init_rules()
        flow = {f"flow.{name}": rule for name, rule in rules.items()}
        own = {
            f"dequantiser.{name}": init_rule(name, weight.shape)
            for name, weight in self.dequantiser.named_parameters()
        }
        return flow | own


class FlowModel(Initialisable, Protocol):
    """What a model of likelihood says about itself, besides being an `nn.Module`."""

    @property
    def blocks(self) -> Iterable[nn.Module]: ...

    def regions(self) -> list[Region]: ...


def forward_flops(config: DequantiserConfig) -> int:
    """Floating point operations of one sample's noise, two for each multiply-add."""
    tokens = (config.image_size // config.patch) ** 2
    half = config.features // 2
    network = network_products(
        half + config.features, 2 * half, tokens, config.width, config.layers
    )
    return 2 * config.couplings * network


def dequantised(flow: Architecture, config: DequantiserConfig) -> Architecture:
    """The architecture of `flow` behind a dequantiser; its sizes are those of the flow."""
    family = flow.family
    return Architecture(
        replace(
            family,
            build=lambda sizes: Dequantised(family.build(sizes), config),
            forward_flops=lambda sizes: family.forward_flops(sizes) + forward_flops(config),
        ),
        flow.config,
    )
