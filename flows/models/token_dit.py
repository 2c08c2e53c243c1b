"""TokenDiT: a DiT over discrete tokens, for discrete flow matching.

Every channel of every pixel is a token of one of a few levels, or the mask. The blocks are those of
DiT; tokens are embedded instead of patches, and the last layer gives logits of the levels. A fresh
network gives every level the same probability.

It is cut by data: `blocks` is its repeated part, called as `block(x, condition)`.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flows.initialise import Rule
from flows.models.adaln import adaln_zero, block_region
from flows.models.dit import Block, DiTConfig, Final
from flows.models.division import Region
from flows.models.embeddings import TimeEmbedding, sincos_positions
from flows.models.feedforward import feedforward_products
from flows.models.norms import LayerNorm


@dataclass(frozen=True)
class TokenDiTConfig:
    """Everything that decides the network's shape.

    image_size: side of the square image in pixels
    channels: channels of the image
    classes: classes without the null class, which is the label `classes`
    """

    image_size: int
    channels: int
    classes: int
    width: int
    depth: int
    heads: int
    levels: int = field(metadata={"description": "brightnesses of a token", "minimum": 2})

    def __post_init__(self) -> None:
        _ = self.blocks  # refuses sizes that cannot be

    @property
    def tokens(self) -> int:
        return self.image_size**2 * self.channels

    @property
    def blocks(self) -> DiTConfig:
        """The shape of the DiT whose blocks these are; it has a channel for each level."""
        return DiTConfig(
            image_size=self.image_size,
            channels=self.levels,
            classes=self.classes,
            patch=1,
            width=self.width,
            depth=self.depth,
            heads=self.heads,
        )


class TokenDiT(nn.Module):
    """The network p(data | x_t, label); deterministic, and computed in the dtype of its weights.

    The frozen position table is a buffer that checkpoints leave out: `reset_buffers` computes it.
    """

    position: Tensor

    def __init__(self, config: TokenDiTConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.token = nn.Embedding(config.levels + 1, width)
        self.channel = nn.Embedding(config.channels, width)
        self.time = TimeEmbedding(width)
        self.label = nn.Embedding(config.classes + 1, width)
        self.blocks = nn.ModuleList(Block(config.blocks) for _ in range(config.depth))
        self.final = Final(width, config.levels, LayerNorm(width, affine=False))
        pixels = config.image_size**2
        self.register_buffer("position", torch.empty(pixels, 1, width), persistent=False)
        self.reset_buffers()

    def reset_buffers(self) -> None:
        """Fill the position table in place, wherever it lies; nothing to do on the meta device."""
        if not self.position.is_meta:
            table = sincos_positions(self.config.image_size, self.config.width)
            self.position.copy_(table.unsqueeze(1))

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        """Logits of the data tokens.

        x: (batch, tokens) int64 in [0, levels], `levels` the mask; order row, column, channel
        t: (batch,) flow time, 0 source, 1 data
        label: (batch,) int64 class, `classes` for none
        returns (batch, tokens, levels)
        """
        time = self.time(t)
        # The cast is for bfloat16: label rows gathered in it and rows rounded here are the same.
        condition = F.silu(time + self.label(label).to(time.dtype))
        place = (self.position + self.channel.weight).flatten(0, 1)
        tokens = (self.token(x) + place).to(time.dtype)
        for block in self.blocks:
            tokens = block(tokens, condition)
        logits: Tensor = self.final(tokens, condition)
        return logits

    def regions(self) -> list[Region]:
        """Where tokens may be divided: blocks and last layer."""
        config = self.config
        parts = {"data.image_size^2 * data.channels": config.tokens}
        return [block_region(config.depth, ("final",), parts, config.heads)]

    def init_rules(self) -> dict[str, Rule]:
        """Parameter name -> how its first values are drawn."""
        embeddings = ("token.", "channel.", "time.", "label.")
        return {
            name: adaln_zero(name, weight.shape, embeddings)
            for name, weight in self.named_parameters()
        }


def forward_flops(config: TokenDiTConfig) -> int:
    """Floating point operations of the forward of one sample, two for each multiply-add."""
    tokens, width, depth = config.tokens, config.width, config.depth
    conditioning = (TimeEmbedding.features + width) * width
    modulations = (6 * depth + 2) * width**2
    projections = tokens * (4 * width**2 + feedforward_products("gelu", width))
    attention = 2 * tokens**2 * width
    logits = tokens * width * config.levels
    return 2 * (conditioning + modulations + depth * (projections + attention) + logits)
