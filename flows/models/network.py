"""A small ViT that says something of each token: of what is between the ends of a coupling, or of noise.

Pre-norm layers between two linear ones, with a learned table of places (Kolesnikov et al. 2024, "Jet").
"""

import math
from typing import cast

import torch
from torch import Tensor, nn

from flows.initialise import Rule, xavier_uniform
from flows.models.attention import Attention
from flows.models.division import Region
from flows.models.feedforward import RATIO, FeedForward
from flows.models.norms import LayerNorm

LABEL_STD = 0.02


class Layer(nn.Module):
    """A pre-norm transformer layer; every token sees every token."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = LayerNorm(width, affine=True)
        self.attention = Attention(width, heads)
        self.feedforward_norm = LayerNorm(width, affine=True)
        self.feedforward = FeedForward(width)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, width) -> (batch, tokens, width)."""
        x = x + self.attention(self.attention_norm(x))
        update: Tensor = self.feedforward(self.feedforward_norm(x))
        return x + update


class Network(nn.Module):
    """What one half says about the other. It is the unit that is cut, recomputed and compiled:
    between two of them there are no more numbers than the image has.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        tokens: int,
        width: int,
        layers: int,
        heads: int,
        conditional: bool,
    ) -> None:
        """inputs, outputs: numbers of each token"""
        super().__init__()
        self.heads = heads
        self.up = nn.Linear(inputs, width)
        self.position = nn.Parameter(torch.empty(tokens, width))
        self.condition = nn.Linear(width, width) if conditional else None
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(layers))
        self.norm = LayerNorm(width, affine=True)
        self.out = nn.Linear(width, outputs)

    def forward(self, half: Tensor, label: Tensor | None = None) -> Tensor:
        """(batch, tokens, inputs) -> (batch, tokens, outputs).

        label: (batch, width) embedded label. Cross-attention to it, of a single token, would add to
            every token one linear function of it; so does this.
        """
        x = self.up(half.to(self.up.weight.dtype))
        x = x + self.position.to(x.dtype)
        if self.condition is not None:
            x = x + self.condition(label)[:, None]
        for layer in self.layers:
            x = layer(x)
        parameters: Tensor = self.out(self.norm(x))
        return parameters

    def region(self, section: str) -> Region:
        """Where tokens may be divided: layers and what follows them.

        section: of a recipe, that has the keys of this network
        """
        layers = tuple(f"layers.{index}" for index in range(len(self.layers)))
        return Region(
            blocks=layers,
            after=("norm", "out"),
            ends=("out",),
            vectors=(),
            parts={f"(data.image_size / {section}.patch)^2": len(self.position)},
            heads={f"{section}.heads": self.heads},
        )


def network_regions(networks: nn.ModuleList, section: str) -> list[Region]:
    """The regions of a model's `blocks`, each a `Network`."""
    named = enumerate(cast(list[Network], list(networks)))
    return [network.region(section).within(f"blocks.{index}") for index, network in named]


def init_rule(name: str, shape: torch.Size) -> Rule:
    """Zero where a coupling ends, ones in norms, Xavier within layers, unit variance at the entry."""
    if name.endswith("bias") or (".out." in name and ".attention." not in name):
        return Rule.constant(0.0)
    if "norm" in name:
        return Rule.constant(1.0)
    if name.startswith("label."):
        return Rule.normal(LABEL_STD)
    outputs, inputs = shape
    if name.endswith("position"):
        return Rule.normal(1 / math.sqrt(inputs))
    if ".up." in name and ".feedforward." not in name:
        return Rule.normal(1 / math.sqrt(inputs))
    if name.endswith("qkv.weight"):
        outputs = inputs  # three matrices in one
    return xavier_uniform(inputs, outputs)


def network_products(inputs: int, outputs: int, tokens: int, width: int, layers: int) -> int:
    """Multiply-adds of matrix products, attention included, of a network without a condition."""
    layer = tokens * (4 + 2 * RATIO) * width**2 + 2 * tokens**2 * width
    return layers * layer + tokens * width * (inputs + outputs)
