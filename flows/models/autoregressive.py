"""One block of an autoregressive normalizing flow: a causal transformer shifts and scales tokens.

A block sees its tokens as a chain, in raster order or reversed. A causal network g reads the inputs
v_0, v_1, ... and predicts from v_0 ... v_j the scale s_j and the shift m_j of the next token u_j:

    forward   w_j = (u_j - m_j) / s_j      log |det| = - sum_j log s_j      all tokens at once
    inverse   u_j = s_j w_j + m_j                                            token after token

With a start token, v = (start, u_0, ..., u_{N-2}) and every token is transformed (STARFlow). Without
one, v = (u_0, ..., u_{T-2}), the first token passes unchanged, and N = T - 1 (TarFlow). Either way
v_{j+1} = u_j: samplers need to know no more than v_0.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flows.initialise import Rule
from flows.models.causal import CausalLayer, KeyValue, LayerShape, project
from flows.models.chain import Chain, Link, Stream, Told
from flows.models.division import Region
from flows.models.flow import FlowOutput
from flows.models.norms import RMSNorm
from flows.models.rotary import Rotary

# softplus(0 + SOFTPLUS_ONE) = 1
SOFTPLUS_ONE = math.log(math.e - 1.0)
TABLE_STD = 0.01

# How the network's first output a gives the scale: exp(a), softplus(a + log(e - 1)), or 1 with no
# such output (a volume-preserving block). a = 0 gives 1 in any case.
Scale = Literal["exp", "softplus", "one"]


@dataclass(frozen=True)
class BlockShape:
    """Everything that decides the shape of one block.

    tokens, features: of the sequence it transforms
    layers: transformer layers of shape `layer`
    reverse: the chain begins at the last token
    clip: c of the soft clip c tanh(o / c) on all outputs o; 0 for none
    rotary: how positions turn queries and keys; None for a learned table
    classes: rows of the table of vectors added to all tokens; 0 for none
    prefix_tokens, prefix_width: of the text before the chain; 0 for none
    """

    tokens: int
    features: int
    layers: int
    layer: LayerShape
    reverse: bool
    start_token: bool
    scale: Scale
    clip: float
    final_norm: bool
    rotary: Rotary | None
    classes: int
    prefix_tokens: int
    prefix_width: int

    @property
    def chain(self) -> int:
        """Tokens that are predicted."""
        return self.tokens if self.start_token else self.tokens - 1

    @property
    def outputs(self) -> int:
        return self.features * (1 if self.scale == "one" else 2)

    @property
    def forward_products(self) -> int:
        """Multiply-adds of one sample's forward; the causal half of attention is not discounted."""
        length, width = self.prefix_tokens + self.chain, self.layer.width
        layer = length * self.layer.token_products + 2 * length**2 * width
        ends = self.chain * width * (self.features + self.outputs)
        return self.layers * layer + ends + self.prefix_tokens * self.prefix_width * width


class BlockCache:
    """What a block's layers remember of the chain so far, its condition included.

    The batch may hold other rows than the tokens' own, such as unconditional copies for guidance.
    """

    def __init__(self, layers: list[KeyValue], added: Tensor | None, prefix: int) -> None:
        self.layers, self.added, self._prefix = layers, added, prefix

    @property
    def inputs(self) -> int:
        """Inputs of the chain that count."""
        return self.layers[0].length - self._prefix

    def rewind(self, inputs: int) -> None:
        """Forget all but the first `inputs` of the chain."""
        for layer in self.layers:
            layer.length = self._prefix + inputs


class FlowBlock(nn.Module):
    """A block and its network.

    Parameters hold what published checkpoints hold, but the position table is stored in the order
    of the chain: a reversed block's table is the published one turned upside down. Rotary positions
    belong to places of the chain too, as published: they are not reversed.
    """

    turn: Tensor | None

    def __init__(self, shape: BlockShape) -> None:
        super().__init__()
        self.shape = shape
        width = shape.layer.width
        self.start = nn.Parameter(torch.empty(shape.features)) if shape.start_token else None
        self.project_in = nn.Linear(shape.features, width)
        learned = shape.rotary is None
        self.position = nn.Parameter(torch.empty(shape.tokens, width)) if learned else None
        self.label = nn.Parameter(torch.empty(shape.classes, width)) if shape.classes else None
        self.prefix = nn.Linear(shape.prefix_width, width) if shape.prefix_tokens else None
        self.layers = nn.ModuleList(CausalLayer(shape.layer) for _ in range(shape.layers))
        self.norm = RMSNorm(width, offset=1.0) if shape.final_norm else None
        self.project_out = nn.Linear(width, shape.outputs)
        size = (2, shape.prefix_tokens + shape.chain, shape.layer.head_width // 2)
        turn = None if learned else torch.empty(size)
        self.register_buffer("turn", turn, persistent=False)
        self.reset_buffers()

    def reset_buffers(self) -> None:
        """Fill the table of rotations in place; nothing to do on the meta device."""
        shape = self.shape
        if self.turn is not None and shape.rotary is not None and not self.turn.is_meta:
            head_width = shape.layer.head_width
            self.turn.copy_(shape.rotary.turn(head_width, shape.prefix_tokens, shape.chain))

    @property
    def conditional(self) -> bool:
        return self.label is not None or self.prefix is not None

    def forward(self, u: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor]:
        """Towards the prior: tokens (batch, tokens, features) in raster order -> (w, logdet).

        condition: (batch,) int64 labels for a block with a label table, (batch, prefix_tokens,
            prefix_width) for a block with a prefix; blocks without either ignore it
        returns w like u, and (batch,) log |det dw/du|; both float32
        """
        h = self.enter(u, condition)
        for layer in self.layers:
            h = self.layer(layer, h)
        return self.leave(u, h)

    def enter(self, u: Tensor, condition: Tensor | None) -> Tensor:
        """What the first layer reads: (batch, prefix_tokens + chain, width); see `forward`."""
        return self.embed(self.inputs(self.ordered(u.float())), condition)

    def embed(self, v: Tensor, condition: Tensor | None) -> Tensor:
        """Inputs v (batch, chain, features), behind the prefix, as the first layer reads them."""
        h = self.project_in(v.to(self.project_in.weight.dtype))
        # In place: the projection's gradient does not need its result.
        if self.position is not None:
            h += self.position[: self.shape.chain]
        if self.label is not None:
            assert condition is not None
            h += self._label_rows(condition)[:, None]
        if self.prefix is not None:
            assert condition is not None
            h = torch.cat((self.prefix(condition.to(self.prefix.weight.dtype)), h), dim=1)
        result: Tensor = h
        return result

    def layer(self, layer: nn.Module, h: Tensor) -> Tensor:
        """One of the block's layers, on prefix and chain: (batch, tokens, width), also returned."""
        result: Tensor = layer(h) if self.turn is None else layer(h, self.turn)
        return result

    def leave(self, u: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """The block's own input and its last layer's output -> what `forward` returns."""
        u = self.ordered(u.float())
        log_scale, shift = self._read(h[:, self.shape.prefix_tokens :])
        predicted = u[:, u.shape[1] - self.shape.chain :]
        if log_scale is None:
            w, logdet = predicted - shift, u.new_zeros(len(u))
        else:
            w, logdet = (predicted - shift) * torch.exp(-log_scale), -log_scale.sum(dim=(1, 2))
        if not self.shape.start_token:
            w = torch.cat((u[:, :1], w), dim=1)
        return self.ordered(w), logdet

    def ordered(self, tokens: Tensor) -> Tensor:
        """From raster order to the order of the chain, and back."""
        return tokens.flip(1) if self.shape.reverse else tokens

    def inputs(self, u: Tensor) -> Tensor:
        """Tokens u (batch, tokens, features) in chain order -> inputs v (batch, chain, features)."""
        if self.start is None:
            return u[:, :-1]
        return torch.cat((self.start.to(u.dtype).expand(len(u), 1, -1), u[:, :-1]), dim=1)

    def open(self, condition: Tensor | None, batch: int, sharpness: Tensor | None) -> BlockCache:
        """A cache for one pass over the chain, which has seen the prefix if there is one.

        condition: as in `forward`, for a batch of `batch`
        sharpness: see `KeyValue`
        """
        shape = self.shape
        capacity = shape.prefix_tokens + shape.chain
        like = self.project_in.weight
        layers = [
            KeyValue(shape.layer, batch, capacity, like, sharpness) for _ in range(shape.layers)
        ]
        added = None
        if self.label is not None:
            assert condition is not None
            added = self._label_rows(condition)[:, None]
        if self.prefix is not None:
            assert condition is not None
            self._run(self.prefix(condition.to(like.dtype)), 0, layers)
        return BlockCache(layers, added, shape.prefix_tokens)

    def predict(self, v: Tensor, cache: BlockCache) -> tuple[Tensor | None, Tensor]:
        """The next inputs v (batch, new, features) of the chain -> (log s, m) of the same shape.

        float32; log s is None if the block preserves volume. The cache then holds these inputs too.
        """
        first = cache.inputs
        h = project(self.project_in, v.to(self.project_in.weight.dtype))
        if self.position is not None:
            h = h + self.position[first : first + v.shape[1]]
        if cache.added is not None:
            h = h + cache.added
        return self._read(self._run(h, self.shape.prefix_tokens + first, cache.layers))

    def _run(self, h: Tensor, first: int, caches: list[KeyValue]) -> Tensor:
        """Tokens (batch, new, width) that stand at `first` of prefix and chain, through all layers."""
        turn = None if self.turn is None else self.turn[:, first : first + h.shape[1]]
        for layer, cache in zip(self.layers, caches, strict=True):
            h = layer(h, turn, cache)
        return h

    def _read(self, h: Tensor) -> tuple[Tensor | None, Tensor]:
        """The last layer's output -> (log s, m) in float32."""
        out = project(self.project_out, h if self.norm is None else self.norm(h)).float()
        clip = self.shape.clip
        if clip:
            out = clip * torch.tanh(out / clip)
        if self.shape.scale == "one":
            return None, out
        a, shift = out.chunk(2, dim=-1)
        log_scale = a if self.shape.scale == "exp" else F.softplus(a + SOFTPLUS_ONE).log()
        return log_scale, shift

    def _label_rows(self, label: Tensor) -> Tensor:
        """(batch,) -> (batch, width); the label `classes`, for none, is the mean of all rows."""
        assert self.label is not None
        rows = torch.cat((self.label, self.label.mean(dim=0, keepdim=True)))
        return F.embedding(label, rows)


def layers_of(blocks: nn.ModuleList) -> list[nn.Module]:
    """All transformer layers of a model's `flow_blocks`, in the order they run in."""
    return [layer for block in _typed(blocks) for layer in block.layers]


def regions_of(blocks: nn.ModuleList) -> list[Region]:
    """Where tokens may be divided: the layers of each of a model's `flow_blocks`, text and chain as one."""
    found = []
    for index, block in enumerate(_typed(blocks)):
        layers = tuple(f"flow_blocks.{index}.layers.{k}" for k in range(block.shape.layers))
        length = block.shape.prefix_tokens + block.shape.chain
        layer = block.shape.layer
        grouped = layer.kv_heads != layer.heads
        key = "model.kv_heads" if grouped else "model.width / model.head_width"
        found.append(
            Region(
                blocks=layers,
                after=(),
                ends=layers[-1:],
                vectors=(),
                parts={"tokens": length},
                heads={key: layer.kv_heads},
                causal=True,
            )
        )
    return found


def transform(blocks: nn.ModuleList, tokens: Tensor, condition: Tensor | None) -> FlowOutput:
    """Through all blocks, from data to the prior.

    tokens: (batch, tokens, features) in raster order
    condition: see `FlowBlock.forward`
    """
    u = tokens.float()
    logdet, power = u.new_zeros(len(u)), u.new_zeros(len(u))
    for block in _typed(blocks):
        power = power + u.square().mean(dim=(1, 2))
        u, change = block(u, condition)
        logdet = logdet + change
    return FlowOutput(u, logdet, power)


def chain_of(
    blocks: nn.ModuleList,
    tokens: Callable[[Tensor], Tensor],
    tell: Callable[[Mapping[str, Tensor], int], Told],
) -> Chain:
    """The links of a model's `flow_blocks`: for each its beginning, its layers and its end.

    Between blocks the stream is (tokens, logdet, power), see `FlowOutput`; within one, its layers' hidden
    states come last.

    tokens: the model's, from images
    tell: gives the `condition` of `FlowBlock.forward`
    """

    def enter(block: FlowBlock, first: bool, stream: Stream, told: Told) -> Stream:
        if first:
            u = tokens(stream[0]).float()
            stream = u, u.new_zeros(len(u)), u.new_zeros(len(u))
        u, logdet, power = stream
        power = power + u.square().mean(dim=(1, 2))
        return u, logdet, power, block.enter(u, told["condition"])

    def apply(block: FlowBlock, number: int, stream: Stream, _: Told) -> Stream:
        *rest, h = stream
        return *rest, block.layer(block.layers[number], h)

    def leave(block: FlowBlock, stream: Stream, _: Told) -> Stream:
        u, logdet, power, h = stream
        u, change = block.leave(u, h)
        return u, logdet + change, power

    links: list[Link] = []
    borders = []
    for index, block in enumerate(_typed(blocks)):
        name = f"flow_blocks.{index}"
        own = tuple(
            f"{name}.{part}" for part in ("start", "project_in.", "position", "label", "prefix.")
        )
        borders.append(len(links))
        links.append(Link(f"{name}.enter", own, partial(enter, block, index == 0)))
        links += [
            Link(f"{name}.layers.{k}", (f"{name}.layers.{k}.",), partial(apply, block, k))
            for k in range(len(block.layers))
        ]
        ends = (f"{name}.norm.", f"{name}.project_out.")
        links.append(Link(f"{name}.leave", ends, partial(leave, block)))
    return Chain(
        links=tuple(links),
        tell=tell,
        tells=(),
        end=lambda stream: FlowOutput(*stream),
        borders=tuple(borders),
    )


def block_rules(blocks: nn.ModuleList) -> dict[str, Rule]:
    """How the parameters of a model's `flow_blocks` start.

    As published, but with the last bias zero too, so that a fresh flow is the identity.
    """
    return {
        f"flow_blocks.{name}": _rule(name.partition(".")[2], blocks, name)
        for name, _ in blocks.named_parameters()
    }


def _typed(blocks: nn.ModuleList) -> list[FlowBlock]:
    return cast(list[FlowBlock], list(blocks))


def _rule(own: str, blocks: nn.ModuleList, name: str) -> Rule:
    """own: the parameter's name within its block; name: within all of them."""
    if own.startswith("project_out."):
        return Rule.constant(0.0)
    if own == "start":
        return Rule.normal(1.0)
    if own in ("position", "label"):
        return Rule.normal(TABLE_STD)
    owner = blocks.get_submodule(name.rpartition(".")[0])
    if isinstance(owner, nn.Linear):
        return Rule.uniform(1.0 / math.sqrt(owner.in_features))
    if isinstance(owner, RMSNorm):
        return Rule.constant(0.0)
    return Rule.constant({"weight": 1.0, "bias": 0.0, "alpha": 0.5}[name.rpartition(".")[2]])
