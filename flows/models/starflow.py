"""STARFlow: a TarFlow of latents with text, most of whose layers are in the block nearest the prior.

Gu et al., STARFlow: Scaling Latent Normalizing Flows for High-resolution Image Synthesis (2025).
What differs from TarFlow: a start token, so that all tokens are transformed; a softplus scale; a
soft clip and a norm before the output; rotary positions, which stretch to other resolutions; a text
(or a class) that stands before the tokens, in the top block alone or in all.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flows.errors import UserError
from flows.initialise import Rule
from flows.models.autoregressive import (
    BlockShape,
    FlowBlock,
    Scale,
    block_rules,
    chain_of,
    layers_of,
    regions_of,
    transform,
)
from flows.models.causal import LayerShape, NormKind, Placement
from flows.models.chain import Chain, Told
from flows.models.division import Region
from flows.models.embeddings import patchify, unpatchify
from flows.models.flow import FlowOutput
from flows.models.rotary import TEXT_PAIRS, Rotary
from flows.models.tarflow import check_clip, check_patches

ZERO = {"minimum": 0}


@dataclass(frozen=True)
class STARFlowConfig:
    """Everything that decides the flow's shape.

    image_size, channels: of the square latent
    classes: classes of the data; the label `classes` stands for none
    text_width, text_tokens: of the embedded text; with text, labels are ignored; 0 without
    patch: side of a patch in pixels of the latent
    layers: transformer layers of each flow block, the one at the data first and the top one last
    top_width: width of the top block; 0 for `width`
    kv_heads: heads of keys and values; 0 for as many as heads
    bias: of the projections within layers
    order: which blocks read backwards; l2r: block k, counted from 0, if k is even; r2l: if k is odd
    position: rotary, or a learned table in every block
    trained_grid: tokens along the side of the grid that rotary positions are stretched to; 0: its own
    conditioned: blocks that read the text or the class
    conditional: without, texts and labels are ignored
    scale, clip, start_token, final_norm: see `flows.models.autoregressive`
    norm, placement: see `flows.models.causal`
    """

    image_size: int
    channels: int
    classes: int
    patch: int
    width: int
    layers: tuple[int, ...]
    text_width: int = 0
    text_tokens: int = 0
    top_width: int = field(default=0, metadata=ZERO)
    head_width: int = 64
    kv_heads: int = field(default=0, metadata=ZERO)
    bias: bool = True
    qk_norm: bool = False
    gated: bool = False
    norm: NormKind = "layer"
    placement: Placement = "pre"
    start_token: bool = True
    scale: Scale = "softplus"
    clip: float = 4.0
    final_norm: bool = True
    order: Literal["l2r", "r2l"] = "l2r"
    position: Literal["rotary", "learned"] = "rotary"
    trained_grid: int = field(default=0, metadata=ZERO)
    conditioned: Literal["top", "all"] = "top"
    conditional: bool = True

    def __post_init__(self) -> None:
        check_patches(self.image_size, self.patch)
        if not self.layers or min(self.layers) < 1:
            raise UserError(
                f"model.layers = {list(self.layers)} must give every flow block at least one layer; "
                "write for instance [2, 2, 2, 12]."
            )
        check_clip(self.clip)
        if self.tokens < 2 and not self.start_token:
            raise UserError(
                f"model.patch = {self.patch} makes one token of an image, which nothing changes "
                "without a start token; use a smaller patch or model.start_token=true."
            )
        self._check_rotary()
        _ = self.shapes  # each refuses what it cannot be

    def _check_rotary(self) -> None:
        if self.position != "rotary":
            return
        least = 2 * TEXT_PAIRS + 8 if self.prefix_tokens else 4
        if self.head_width % 4 or self.head_width < least:
            raise UserError(
                f"model.head_width = {self.head_width} is too small or odd for rotary positions of "
                f"{'text and image' if self.prefix_tokens else 'an image'}; use a multiple of 4 of at "
                f"least {least}, or model.position=learned."
            )

    @property
    def tokens(self) -> int:
        return (self.image_size // self.patch) ** 2

    @property
    def features(self) -> int:
        """Numbers in a token."""
        return self.channels * self.patch**2

    @property
    def prefix_tokens(self) -> int:
        """Tokens of the text; a class is one token; 0 for an unconditional flow."""
        if not self.conditional:
            return 0
        return self.text_tokens or (1 if self.classes else 0)

    @property
    def prefix_width(self) -> int:
        """Numbers in a token of the text; of a class, one for each and one for none."""
        if not self.prefix_tokens:
            return 0
        return self.text_width if self.text_tokens else self.classes + 1

    @property
    def shapes(self) -> list[BlockShape]:
        """Of all blocks, the one at the data first."""
        return [self.block(k) for k in range(len(self.layers))]

    def block(self, index: int) -> BlockShape:
        """The shape of a block, counted from the data."""
        top = index == len(self.layers) - 1
        reads = top or self.conditioned == "all"
        width = self.top_width if top and self.top_width else self.width
        side = self.image_size // self.patch
        rotary = Rotary(side, self.trained_grid or side, third_axis=self.prefix_tokens > 0)
        layer = LayerShape(
            width=width,
            head_width=self.head_width,
            kv_heads=self.kv_heads or width // self.head_width,
            bias=self.bias,
            qk_norm=self.qk_norm,
            gated=self.gated,
            turned=self.position == "rotary",
            norm=self.norm,
            placement=self.placement,
        )
        return BlockShape(
            tokens=self.tokens,
            features=self.features,
            layers=self.layers[index],
            layer=layer,
            reverse=(index % 2 == 0) == (self.order == "l2r"),
            start_token=self.start_token,
            scale=self.scale,
            clip=self.clip,
            final_norm=self.final_norm,
            rotary=rotary if self.position == "rotary" else None,
            classes=0,
            prefix_tokens=self.prefix_tokens if reads else 0,
            prefix_width=self.prefix_width if reads else 0,
        )


class STARFlow(nn.Module):
    """The flow from latents to a standard normal; a fresh one is the identity.

    `blocks`, its repeated part, are the transformer layers of all flow blocks, called as
    `layer(x, turn)` with rotary positions and as `layer(x)` without.
    """

    def __init__(self, config: STARFlowConfig) -> None:
        super().__init__()
        self.config = config
        self.flow_blocks = nn.ModuleList(FlowBlock(shape) for shape in config.shapes)

    @property
    def blocks(self) -> list[nn.Module]:
        return layers_of(self.flow_blocks)

    def forward(
        self, x: Tensor, label: Tensor | None = None, text: Tensor | None = None
    ) -> FlowOutput:
        """Towards the prior.

        x: (batch, channels, image_size, image_size)
        label: (batch,) int64 class, `classes` for none; None is none for all
        text: (batch, text_tokens, text_width) float32, zeros for none; None is none for all
        """
        condition = self.condition(label, text, len(x), x.device)
        return transform(self.flow_blocks, self.tokens(x), condition)

    def condition(
        self, label: Tensor | None, text: Tensor | None, batch: int, device: torch.device
    ) -> Tensor | None:
        """What the conditioned blocks read: (batch, prefix_tokens, prefix_width), or None."""
        config = self.config
        if not config.prefix_tokens:
            return None
        if config.text_tokens:
            shape = (batch, config.text_tokens, config.text_width)
            return torch.zeros(shape, device=device) if text is None else text
        if label is None:
            label = torch.full((batch,), config.classes, device=device)
        return F.one_hot(label, config.prefix_width).float()[:, None]

    def tokens(self, image: Tensor) -> Tensor:
        """(batch, channels, height, width) -> (batch, tokens, features) in raster order.

        The features of a token are ordered (row, column, channel).
        """
        return patchify(image, self.config.patch)

    def image(self, tokens: Tensor) -> Tensor:
        """The inverse of `tokens`."""
        return unpatchify(tokens, self.config.patch, self.config.image_size)

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
        """Fill the tables of rotary positions in place, wherever they lie."""
        for block in self.flow_blocks:
            cast(FlowBlock, block).reset_buffers()


PUBLISHED: dict[str, dict[str, Any]] = {
    "STARFlow-1.4B": {"patch": 1, "width": 2048, "layers": (2, 2, 2, 2, 2, 18)},
    "STARFlow-XL-v1": {"patch": 1, "width": 2048, "layers": (2, 2, 2, 2, 10, 10)},
    "STARFlow-3B": {"patch": 1, "width": 3072, "layers": (2, 2, 2, 2, 2, 24)},
    "STARFlow-XXL-v1": {
        "patch": 1,
        "width": 3072,
        "layers": (2, 2, 2, 2, 13, 13),
        "final_norm": False,
        "conditioned": "all",
    },
    # One frame at a time: the flow of the video model, without its denoiser.
    "STARFlow-V-7B": {
        "patch": 1,
        "width": 3072,
        "top_width": 4096,
        "layers": (2, 2, 2, 2, 2, 24),
    },
}
