"""The learnable denoiser of STARFlow-V (Gu et al. 2025): noisy image in, its noise out.

A plain transformer over patches in which every token sees every token. A fresh one predicts no
noise.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from flows.errors import UserError
from flows.initialise import Rule
from flows.models.division import Region
from flows.models.embeddings import patchify, unpatchify
from flows.models.network import Network, init_rule, network_products


@dataclass(frozen=True)
class DenoiserConfig:
    """Everything that decides the network's shape.

    classes: unused; the noise is found without the class
    """

    image_size: int
    channels: int
    classes: int
    patch: int
    width: int
    layers: int
    heads: int

    def __post_init__(self) -> None:
        if self.image_size % self.patch:
            raise UserError(
                f"data.image_size = {self.image_size} is not divisible by model.patch = {self.patch}; "
                "use a patch that divides it."
            )
        if self.width % self.heads:
            raise UserError(
                f"model.width = {self.width} is not divisible by model.heads = {self.heads}; "
                "use a number of heads that divides it."
            )

    @property
    def tokens(self) -> int:
        return (self.image_size // self.patch) ** 2

    @property
    def features(self) -> int:
        return self.patch**2 * self.channels


class Denoiser(nn.Module):
    """d(x), the noise in x at unit variance, whatever `x` was asked to be."""

    def __init__(self, config: DenoiserConfig) -> None:
        super().__init__()
        self.config = config
        self.network = Network(
            config.features,
            config.features,
            tokens=config.tokens,
            width=config.width,
            layers=config.layers,
            heads=config.heads,
            conditional=False,
        )

    @property
    def blocks(self) -> nn.ModuleList:
        return self.network.layers

    def reset_buffers(self) -> None:
        """It has none."""

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, image_size, image_size), and the same again."""
        patch = self.config.patch
        return unpatchify(self.network(patchify(x, patch)), patch, self.config.image_size)

    def regions(self) -> list[Region]:
        """Where tokens may be divided."""
        return [self.network.region("model").within("network")]

    def init_rules(self) -> dict[str, Rule]:
        """Parameter name -> how its first values are drawn."""
        return {name: init_rule(name, weight.shape) for name, weight in self.named_parameters()}


def forward_flops(config: DenoiserConfig) -> int:
    """Floating point operations of the forward of one sample, two for each multiply-add."""
    features = config.features
    return 2 * network_products(features, features, config.tokens, config.width, config.layers)
