"""DiT-MoE: a DiT whose feed-forwards are mixtures of experts (Fei et al. 2024).

Each block is a DiT's with a `Mixture` in the place of the feed-forward; the condition's gate
multiplies the sum of all experts. A fresh network is the zero function.

It is cut by data: `blocks` is its repeated part, called as `block(x, condition, state, cell,
output_mask)` and returning a `Step`; routers that are recurrent hand their state from block to block.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flows.errors import UserError
from flows.initialise import Rule, xavier_uniform
from flows.models.attention import Attention
from flows.models.dit import Final, TimeKind, adaln_zero, block_region, told_time
from flows.models.division import Region
from flows.models.embeddings import TimeEmbedding, patchify, sincos_positions, unpatchify
from flows.models.feedforward import FeedForwardKind
from flows.models.mixture import ALIGNMENT, Mixture
from flows.models.norms import LayerNorm, gated_residual, modulated_norm
from flows.models.refusals import check_heads, check_patches, check_position_table
from flows.models.routers import Balance, Cell, Chooser, Gate, Router, RouterCell, Routing
from flows.routed import Mixed, Routed, stacked

RATIO = 4
SHARED_RATIO = 2


@dataclass(frozen=True)
class DiTMoEConfig:
    """Everything that decides the network's shape and its routing; see `flows.models.routers.Routing`.

    image_size: side of the square image (or latent) in pixels
    channels: channels of the image
    classes: classes without the null class, which is the label `classes`
    patch: side of a patch in pixels
    learn_sigma: the last layer gives two outputs a channel, as published; the second is unused
    """

    image_size: int
    channels: int
    classes: int
    patch: int
    width: int
    depth: int
    heads: int
    experts: int
    chosen: int = field(default=2, metadata={"description": "experts that a token goes to"})
    learn_sigma: bool = False
    expert: FeedForwardKind = field(
        default="swiglu",
        metadata={"description": "swiglu, without biases; gelu: as the feed-forward of a DiT"},
    )
    expert_hidden: int = field(
        default=0, metadata={"description": "width within an expert; 0: 4 width", "minimum": 0}
    )
    shared_hidden: int = field(
        default=-1,
        metadata={
            "description": "width within the network of all tokens; -1: 2 width, 0: there is none",
            "minimum": -1,
        },
    )
    chooser: Chooser = field(
        default="tokens",
        metadata={"description": "who chooses: tokens their experts, or experts their tokens"},
    )
    gate: Gate = "softmax"
    renormalise: bool = field(
        default=False, metadata={"description": "the weights of a token's experts sum to one"}
    )
    gate_scale: float = field(default=1.0, metadata={"description": "times those weights"})
    capacity: float = field(
        default=0.0,
        metadata={
            "description": "places of an expert in a sample, over its equal share; what is too much is "
            "dropped; 0: nothing is"
        },
    )
    balance: Balance = field(
        default="previous",
        metadata={
            "description": "balance loss by the loads of the previous step's batch, or of each sample "
            "(sequence)"
        },
    )
    balance_weight: float = field(default=0.01, metadata={"description": "of the balance loss"})
    z_weight: float = field(
        default=0.0, metadata={"description": "of the loss of large logits (0.001 as published)"}
    )
    bias_rate: float = field(
        default=0.0,
        metadata={"description": "a step's change of biases that balance choices; 0: none (0.001)"},
    )
    recurrent: int = field(
        default=0,
        metadata={"description": "width of the routers' recurrent state; 0: none", "minimum": 0},
    )
    mask_outputs: float = field(
        default=0.0,
        metadata={"description": "share of the experts' outputs masked in training (0.2 in NLLB)"},
    )
    time: TimeKind = field(
        default="flow",
        metadata={"description": "what the network is told: flow (t), reversed (1 - t), steps"},
    )

    def __post_init__(self) -> None:
        check_patches(self.image_size, self.patch)
        check_heads(self.width, self.heads)
        check_position_table(self.width)
        _check_routing(self)
        for key, value in (
            ("width", self.width),
            ("expert_hidden", self.hidden),
        ):
            if value % ALIGNMENT:
                raise UserError(
                    f"model.{key} = {value} is not a multiple of {ALIGNMENT}, as the products of grouped "
                    f"experts need; use {-(-value // ALIGNMENT) * ALIGNMENT}."
                )

    @property
    def tokens(self) -> int:
        return (self.image_size // self.patch) ** 2

    @property
    def outputs(self) -> int:
        """Channels of the last layer, the unused ones included."""
        return self.channels * (2 if self.learn_sigma else 1)

    @property
    def hidden(self) -> int:
        """Width within an expert."""
        return self.expert_hidden or RATIO * self.width

    @property
    def shared(self) -> int:
        """Width within the shared network, 0 where there is none."""
        return SHARED_RATIO * self.width if self.shared_hidden < 0 else self.shared_hidden

    @property
    def slots(self) -> int:
        """Numbers of a mask of one token in one layer."""
        return self.chosen if self.chooser == "tokens" else self.experts

    @property
    def routing(self) -> Routing:
        return Routing(
            self.experts,
            self.chosen,
            self.chooser,
            self.gate,
            self.renormalise,
            self.gate_scale,
            self.capacity,
            self.balance if self.chooser == "tokens" else "none",
            self.balance_weight,
            self.z_weight,
            self.bias_rate,
            self.recurrent,
        )


def _check_routing(config: DiTMoEConfig) -> None:
    if config.chosen > config.experts:
        raise UserError(
            f"model.chosen = {config.chosen} is more than model.experts = {config.experts}; a token goes to "
            f"at most {config.experts}."
        )
    if not 0.0 <= config.mask_outputs < 1.0:
        raise UserError(
            f"model.mask_outputs = {config.mask_outputs:g} is no share below 1; use 0.2, or 0 for none."
        )
    for key in ("capacity", "balance_weight", "z_weight", "bias_rate"):
        if getattr(config, key) < 0:
            raise UserError(f"model.{key} = {getattr(config, key):g} is below 0; use 0 for none.")
    if config.gate_scale <= 0:
        raise UserError(f"model.gate_scale = {config.gate_scale:g} is not above 0; use 1 for none.")
    if config.chooser == "experts" and config.bias_rate:
        raise UserError(
            f"model.bias_rate = {config.bias_rate:g} balances what tokens choose, and with "
            "model.chooser = experts every expert has as many; set model.bias_rate=0."
        )


class Step(NamedTuple):
    """What a block gives.

    x: (batch, tokens, width)
    state: (batch, tokens, recurrent) of the routers, or None
    penalty: (batch,) float32
    """

    x: Tensor
    state: Tensor | None
    penalty: Tensor
    routed: Routed


class Block(nn.Module):
    """Attention and a mixture of experts; the condition shifts, scales and gates them."""

    def __init__(self, config: DiTMoEConfig) -> None:
        super().__init__()
        width = config.width
        self.modulation = nn.Linear(width, 6 * width)
        self.attention = Attention(width, config.heads)
        self.mixture = Mixture(width, config.hidden, config.shared, config.routing, config.expert)

    def forward(
        self,
        x: Tensor,
        condition: Tensor,
        state: Tensor | None = None,
        cell: Cell | None = None,
        output_mask: Tensor | None = None,
    ) -> Step:
        """x (batch, tokens, width), condition (batch, width) after the SiLU that all blocks share.

        state, cell, output_mask: of the router, see `flows.models.routers.Router`
        """
        parts = self.modulation(condition).unsqueeze(1).chunk(6, dim=-1)
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = parts
        update = self.attention(modulated_norm(x, shift_1, scale_1))
        x = gated_residual(x, gate_1, update)
        hidden = modulated_norm(x, shift_2, scale_2)
        update, penalty, routed, state = self.mixture(hidden, state, cell, output_mask)
        return Step(gated_residual(x, gate_2, update), state, penalty, routed)


class DiTMoE(nn.Module):
    """The network v(x, t, label); computed in the dtype of its weights, routers in float32.

    The table of positions is a buffer that checkpoints leave out; what routers carry from step to step
    is one that they hold.
    """

    position: Tensor

    def __init__(self, config: DiTMoEConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.patches = nn.Linear(config.patch**2 * config.channels, width)
        self.time = TimeEmbedding(width)
        self.label = nn.Embedding(config.classes + 1, width)
        self.cell = RouterCell(config.recurrent) if config.recurrent else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.final = Final(width, config.patch**2 * config.outputs, LayerNorm(width, affine=False))
        self.register_buffer("position", torch.empty(config.tokens, width), persistent=False)
        self.reset_buffers()

    def reset_buffers(self) -> None:
        """Fill the table, and routers as before the first step; nothing to do on the meta device."""
        if self.position.is_meta:
            return
        side = self.config.image_size // self.config.patch
        self.position.copy_(sincos_positions(side, self.config.width))
        for router in routers(self):
            router.reset_buffers()

    def forward(
        self, x: Tensor, t: Tensor, label: Tensor, mask: Tensor | None = None
    ) -> Tensor | Mixed:
        """Velocity (or whatever the objective makes of it) at x.

        x: (batch, channels, image_size, image_size)
        t: (batch,) flow time, 0 noise, 1 data; keep it in float32 under mixed precision
        label: (batch,) int64 class, `classes` for none
        mask: (batch, depth, tokens, slots) that the weights of experts are multiplied with, or None;
            while training alone, like a dropout
        returns (batch, channels, image_size, image_size), with what routers did in training mode
        """
        config = self.config
        time = self.time(told_time(t, config.time))
        # The cast is for bfloat16: label rows gathered in it and rows rounded here are the same.
        condition = F.silu(time + self.label(label).to(time.dtype))
        tokens = self.patches(patchify(x, config.patch).to(self.patches.weight.dtype))
        tokens = tokens + self.position.to(tokens.dtype)
        cell = self.cell.weights() if self.cell is not None else None
        mask = mask if self.training else None
        masks = [None] * config.depth if mask is None else mask.unbind(1)
        state, steps = None, []
        for block, own in zip(self.blocks, masks, strict=True):
            tokens, state, penalty, routed = block(tokens, condition, state, cell, own)
            steps.append((penalty, routed))
        image = unpatchify(self.final(tokens, condition), config.patch, config.image_size)
        prediction = image[:, : config.channels]
        if not self.training:
            return prediction
        penalties, layers = zip(*steps, strict=True)
        return Mixed(prediction, torch.stack(penalties).sum(0), stacked(list(layers)))

    def regions(self) -> list[Region]:
        """Where tokens may be divided: blocks and last layer."""
        parts = {"(data.image_size / model.patch)^2": self.config.tokens}
        return [block_region(self.config.depth, ("final",), parts, self.config.heads)]

    def init_rules(self) -> dict[str, Rule]:
        """Parameter name -> how its first values are drawn."""
        return {name: _rule(name, weight.shape) for name, weight in self.named_parameters()}


def routers(model: nn.Module) -> list[Router]:
    """All routers of a network, in the order of its layers."""
    return [module for module in model.modules() if isinstance(module, Router)]


def _rule(name: str, shape: torch.Size) -> Rule:
    """As in a DiT; an expert starts as one alone would, gates as `torch.nn.Linear` starts."""
    if ".experts." in name:
        return Rule.constant(0.0) if len(shape) == 2 else xavier_uniform(shape[2], shape[1])
    if name.endswith(("gate.weight", "router.inward.weight")) or name.startswith("cell."):
        # Kaiming with the slope sqrt(5) is uniform in 1 / sqrt(inputs); a recurrent unit's biases too.
        return Rule.uniform(1.0 / (shape[-1] if len(shape) > 1 else shape[0] // 3) ** 0.5)
    return adaln_zero(name, shape, embeddings=("time.", "label."))


def active_parameters(config: DiTMoEConfig) -> int:
    """Trainable numbers that one token meets: of all experts, those it is computed by."""
    with torch.device("meta"):
        model = DiTMoE(config)
    total = sum(weight.numel() for weight in model.parameters())
    one = sum(
        weight[0].numel()
        for name, weight in model.named_parameters()
        if name.startswith("blocks.0.mixture.experts.")
    )
    return total - config.depth * (config.experts - config.chosen) * one


def forward_flops(config: DiTMoEConfig) -> int:
    """Floating point operations of the forward of one sample, two for each multiply-add.

    Of the experts that tokens go to, none dropped.
    """
    tokens, width, routed = config.tokens, config.width, config.recurrent
    conditioning = (TimeEmbedding.features + width) * width
    modulations = (6 * config.depth + 2) * width**2
    matrices = 3 if config.expert == "swiglu" else 2
    experts = matrices * config.chosen * width * config.hidden + 3 * width * config.shared
    router = config.experts * (routed or width)
    if routed:
        router += width * routed + 6 * routed**2
    block = tokens * (4 * width**2 + experts + router) + 2 * tokens**2 * width
    ends = tokens * width * config.patch**2 * (config.channels + config.outputs)
    return 2 * (conditioning + modulations + config.depth * block + ends)
