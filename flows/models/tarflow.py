"""TarFlow: a normalizing flow of causal transformers over image patches.

Zhai et al., Normalizing Flows are Capable Generative Models (2024). Blocks of equal depth read the
patches in turn forwards and backwards; each predicts from the tokens before how to scale and shift
the next one (flows/models/autoregressive.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flows.errors import UserError
from flows.initialise import Rule
from flows.models.autoregressive import (
    BlockShape,
    FlowBlock,
    block_rules,
    chain_of,
    layers_of,
    regions_of,
    transform,
)
from flows.models.causal import LayerShape, NormKind, Placement
from flows.models.chain import Chain, Told
from flows.models.division import Region
from flows.models.flow import FlowOutput

ZERO = {"minimum": 0}


@dataclass(frozen=True)
class TarFlowConfig:
    """Everything that decides the flow's shape.

    image_size: side of the square image (or latent) in pixels
    channels: channels of the image
    classes: classes of the data; the label `classes` stands for none
    patch: side of a patch in pixels
    flow_blocks: invertible maps, each a transformer of `layers` layers
    volume_preserving: tokens are shifted and not scaled
    conditional: each block adds a vector of the class; without, labels are ignored
    norm, placement: see `flows.models.causal`
    clip: c of a soft clip c tanh(o / c) on log-scales and shifts o, as STARFlow has it; 0 for none, as
        published. Nothing else bounds the scale of a token that follows tokens unlike any in the data
    """

    image_size: int
    channels: int
    classes: int
    patch: int
    width: int
    flow_blocks: int
    layers: int
    head_width: int = 64
    volume_preserving: bool = False
    conditional: bool = True
    norm: NormKind = "layer"
    placement: Placement = "pre"
    clip: float = field(default=0.0, metadata=ZERO)

    def __post_init__(self) -> None:
        check_patches(self.image_size, self.patch)
        if self.tokens < 2:
            raise UserError(
                f"model.patch = {self.patch} makes one token of an image, and a TarFlow changes all "
                "but the first; use a smaller patch."
            )
        check_clip(self.clip)
        self.block(0)

    @property
    def tokens(self) -> int:
        return (self.image_size // self.patch) ** 2

    @property
    def features(self) -> int:
        """Numbers in a token."""
        return self.channels * self.patch**2

    @property
    def shapes(self) -> list[BlockShape]:
        """Of all blocks, the one at the data first."""
        return [self.block(k) for k in range(self.flow_blocks)]

    def block(self, index: int) -> BlockShape:
        """The shape of a block, counted from the data; odd ones read backwards."""
        layer = LayerShape(
            width=self.width,
            head_width=self.head_width,
            kv_heads=self.width // self.head_width,
            bias=True,
            qk_norm=False,
            gated=False,
            turned=False,
            norm=self.norm,
            placement=self.placement,
        )
        return BlockShape(
            tokens=self.tokens,
            features=self.features,
            layers=self.layers,
            layer=layer,
            reverse=index % 2 == 1,
            start_token=False,
            scale="one" if self.volume_preserving else "exp",
            clip=self.clip,
            final_norm=False,
            rotary=None,
            classes=self.classes if self.conditional else 0,
            prefix_tokens=0,
            prefix_width=0,
        )


class TarFlow(nn.Module):
    """The flow from images to a standard normal; a fresh one is the identity.

    `blocks`, its repeated part, are the transformer layers of all flow blocks, called as `layer(x)`.
    """

    def __init__(self, config: TarFlowConfig) -> None:
        super().__init__()
        self.config = config
        self.flow_blocks = nn.ModuleList(FlowBlock(shape) for shape in config.shapes)

    @property
    def blocks(self) -> list[nn.Module]:
        return layers_of(self.flow_blocks)

    def forward(self, x: Tensor, label: Tensor | None = None) -> FlowOutput:
        """Towards the prior.

        x: (batch, channels, image_size, image_size)
        label: (batch,) int64 class, `classes` for none; None is none for all
        """
        condition = self.condition(label, None, len(x), x.device)
        return transform(self.flow_blocks, self.tokens(x), condition)

    def condition(
        self, label: Tensor | None, text: Tensor | None, batch: int, device: torch.device
    ) -> Tensor | None:
        """What the blocks are told: (batch,) labels, or None if nothing."""
        del text
        classes = self.config.classes
        if not (classes and self.config.conditional):
            return None
        return torch.full((batch,), classes, device=device) if label is None else label

    def tokens(self, image: Tensor) -> Tensor:
        """(batch, channels, height, width) -> (batch, tokens, features) in raster order.

        The features of a token are ordered (channel, row, column).
        """
        return F.pixel_unshuffle(image, self.config.patch).flatten(2).transpose(1, 2)

    def image(self, tokens: Tensor) -> Tensor:
        """The inverse of `tokens`."""
        side = self.config.image_size // self.config.patch
        grid = tokens.transpose(1, 2).unflatten(2, (side, side))
        return F.pixel_shuffle(grid, self.config.patch)

    def chain(self) -> Chain:
        """Its forward, cut between and within flow blocks."""

        def tell(inputs: Mapping[str, Tensor], batch: int) -> Told:
            label = inputs["label"]
            return {"condition": self.condition(label, inputs.get("text"), batch, label.device)}

        return chain_of(self.flow_blocks, self.tokens, tell)

    def regions(self) -> list[Region]:
        """Where tokens may be divided."""
        return regions_of(self.flow_blocks)

    def init_rules(self) -> dict[str, Rule]:
        """Parameter name -> how its first values are drawn."""
        return block_rules(self.flow_blocks)

    def reset_buffers(self) -> None:
        """It has none."""


PUBLISHED: dict[str, dict[str, Any]] = {
    f"TarFlow-{patch}-{width}-8-8": {"patch": patch, "width": width, "flow_blocks": 8, "layers": 8}
    for patch, width in ((2, 768), (4, 1024), (8, 768))
}


def check_patches(image_size: int, patch: int) -> None:
    """Raise UserError unless whole patches cover the image."""
    if image_size % patch:
        fits = [str(p) for p in range(1, image_size + 1) if image_size % p == 0]
        raise UserError(
            f"data.image_size = {image_size} is not divisible by model.patch = {patch}; "
            f"use a patch of {', '.join(fits[:-1])} or {fits[-1]}."
        )


def check_clip(clip: float) -> None:
    """Raises UserError for a soft clip that is none."""
    if clip < 0:
        raise UserError(f"model.clip = {clip} is negative; use 0 for no soft clip.")


class Blocks(Protocol):
    """What a configuration says of its flow blocks."""

    @property
    def shapes(self) -> list[BlockShape]: ...


def forward_flops(config: Blocks) -> int:
    """Floating point operations of the forward of one sample, two for each multiply-add.

    Matrix products alone, attention included as if it were not causal, as operator counters do.
    """
    return 2 * sum(shape.forward_products for shape in config.shapes)
