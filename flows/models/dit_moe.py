"""DiT-MoE: a DiT whose feed-forwards are mixtures of experts (Fei et al. 2024).

Each block is a DiT's with a `Mixture` in the place of the feed-forward; the condition's gate
multiplies the sum of all experts. A fresh network is the zero function.

It is cut by data: `blocks` is its repeated part, called as `block(x, condition, state, cell,
output_mask, before)` and returning a `Step`; routers that are recurrent hand their state from block to
block, and those that are traced hand on whom their tokens asked for.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flows.initialise import Rule, xavier_uniform
from flows.models.adaln import adaln_zero, block_region, told_time
from flows.models.attention import Attention
from flows.models.chain import Chain, Link, Stream, Told
from flows.models.dit import Final
from flows.models.dit_moe_config import DiTMoEConfig
from flows.models.division import Region
from flows.models.embeddings import TimeEmbedding, patchify, sincos_positions, unpatchify
from flows.models.mixture import Mixture
from flows.models.norms import LayerNorm, gated_residual, modulated_norm
from flows.models.routers import Cell, RouterCell, is_traced, routers_of
from flows.models.routing_record import RoutingRecord
from flows.routed import Mixed, Routed, stacked


class Step(NamedTuple):
    """What a block gives.

    x: (batch, tokens, width)
    state: (batch, tokens, recurrent) of the routers, or None
    penalty: (batch,) float32
    asked: (batch, tokens, experts) bool, of traced routers
    """

    x: Tensor
    state: Tensor | None
    penalty: Tensor
    routed: Routed
    asked: Tensor | None


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
        before: Tensor | None = None,
    ) -> Step:
        """x (batch, tokens, width), condition (batch, width) after the SiLU that all blocks share.

        state, cell, output_mask, before: of the router, see `flows.models.routers.Router`
        """
        parts = self.modulation(condition).unsqueeze(1).chunk(6, dim=-1)
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = parts
        update = self.attention(modulated_norm(x, shift_1, scale_1))
        x = gated_residual(x, gate_1, update)
        hidden = modulated_norm(x, shift_2, scale_2)
        update, decision = self.mixture(hidden, state, cell, output_mask, before)
        _slots, penalty, routed, state, asked = decision
        return Step(gated_residual(x, gate_2, update), state, penalty, routed, asked)


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
        for router in routers_of(self):
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
        mask = mask if self.training else None
        masks = _of_layers(mask, self.config.depth)
        condition, tokens = self._condition(t, label), self._tokens(x)
        cell = self.cell.weights() if self.cell is not None else None
        state, asked, steps = None, None, []
        for block, own in zip(self.blocks, masks, strict=True):
            tokens, state, penalty, routed, asked = block(
                tokens, condition, state, cell, own, asked
            )
            steps.append((penalty, routed))
        prediction = self._prediction(tokens, condition)
        if not self.training:
            return prediction
        penalties, layers = zip(*steps, strict=True)
        return Mixed(prediction, torch.stack(penalties).sum(0), *stacked(list(layers)))

    def _condition(self, t: Tensor, label: Tensor) -> Tensor:
        """(batch, width) time and label, through the SiLU that all blocks share."""
        time = self.time(told_time(t, self.config.time))
        # The cast is for bfloat16: label rows gathered in it and rows rounded here are the same.
        return F.silu(time + self.label(label).to(time.dtype))

    def _tokens(self, x: Tensor) -> Tensor:
        """(batch, channels, image_size, image_size) -> (batch, tokens, width), positions added."""
        tokens: Tensor = self.patches(patchify(x, self.config.patch).to(self.patches.weight.dtype))
        return tokens + self.position.to(tokens.dtype)

    def _prediction(self, tokens: Tensor, condition: Tensor) -> Tensor:
        """(batch, tokens, width), (batch, width) -> (batch, channels, image_size, image_size)."""
        config = self.config
        image = unpatchify(self.final(tokens, condition), config.patch, config.image_size)
        return image[:, : config.channels]

    def chain(self) -> Chain:
        """Its forward, cut between blocks. The condition is computed from t and label.

        With the tokens travel a `RoutingRecord` and, from the first block on, the state of recurrent routers.
        """
        config = self.config
        kept = RoutingRecord(config.depth, config.experts, is_traced(self))

        def tell(inputs: Mapping[str, Tensor], _: int) -> Told:
            mask = inputs.get("mask") if self.training else None
            return {
                "condition": self._condition(inputs["t"], inputs["label"]),
                "cell": self.cell.weights() if self.cell is not None else None,
                "masks": _of_layers(mask, config.depth),
            }

        def begin(stream: Stream, _: Told) -> Stream:
            tokens = self._tokens(stream[0])
            return tokens, kept.empty(tokens)

        def apply(number: int, stream: Stream, told: Told) -> Stream:
            tokens, record, *states = stream
            state = states[0] if states else None
            # The first block may be where tokens are divided, and nobody asked before it.
            before = kept.asked_last(record, tokens.shape[1]) if number else None
            step = self.blocks[number](
                tokens, told["condition"], state, told["cell"], told["masks"][number], before
            )
            record = kept.entered(record, number, step.routed, step.penalty, step.asked)
            return (step.x, record, *((step.state,) if config.recurrent else ()))

        def finish(stream: Stream, told: Told) -> Stream:
            return self._prediction(stream[0], told["condition"]), stream[1]

        def end(stream: Stream) -> Tensor | Mixed:
            prediction, record = stream
            if not self.training:
                return prediction
            penalty, routed = kept.read(record)
            return Mixed(prediction, penalty, *routed)

        blocks = [
            Link(f"blocks.{number}", (f"blocks.{number}.",), partial(apply, number))
            for number in range(config.depth)
        ]
        return Chain(
            links=(
                Link("patches", ("patches.",), begin),
                *blocks,
                Link("final", ("final.",), finish),
            ),
            tell=tell,
            tells=("time.", "label.", "cell."),
            end=end,
            borders=tuple(range(config.depth + 2)),
        )

    def regions(self) -> list[Region]:
        """Where tokens may be divided: blocks and last layer."""
        parts = {"(data.image_size / model.patch)^2": self.config.tokens}
        return [block_region(self.config.depth, ("final",), parts, self.config.heads)]

    def init_rules(self) -> dict[str, Rule]:
        """Parameter name -> how its first values are drawn."""
        return {name: _rule(name, weight.shape) for name, weight in self.named_parameters()}


def _of_layers(mask: Tensor | None, depth: int) -> Sequence[Tensor | None]:
    return [None] * depth if mask is None else mask.unbind(1)


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
