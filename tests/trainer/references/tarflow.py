"""TarFlow and STARFlow, from data to the prior."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .parts import State, attend, dense, frequencies, join_heads, rms_norm, split_heads, turn_pairs


@dataclass(frozen=True)
class Known:
    """What the files do not tell.

    first_reversed: block 0 reads backwards, and every other one after it
    lattice: side of the grid and length of the text, for rotary positions
    """

    head_width: int
    softplus: bool
    clip: float
    first_reversed: bool
    lattice: tuple[int, int] | None = None


def tarflow_tokens(x: Tensor, patch: int) -> Tensor:
    """Raster order, features (channel, row, column)."""
    return F.unfold(x, patch, stride=patch).mT


def starflow_tokens(x: Tensor, patch: int) -> Tensor:
    """Raster order, features (row, column, channel)."""
    return tarflow_tokens(x, patch).unflatten(-1, (x.shape[1], -1)).mT.flatten(-2)


def forward(
    state: State, u: Tensor, known: Known, label: Tensor | None = None, text: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Tokens (batch, tokens, features) -> z and the sum of all log-determinants (batch,).

    label: -1 for none; text: (batch, words, width)
    """
    total = torch.zeros(len(u))
    index = 0
    while f"blocks.{index}.proj_in.weight" in state:
        block = {
            name.removeprefix(f"blocks.{index}."): value
            for name, value in state.items()
            if name.startswith(f"blocks.{index}.")
        }
        backwards = (index % 2 == 0) == known.first_reversed
        u, logdet = flow_block(block, u, known, backwards, label, text)
        total = total + logdet
        index += 1
    return u, total


def flow_block(
    block: State,
    u: Tensor,
    known: Known,
    backwards: bool,
    label: Tensor | None,
    text: Tensor | None,
) -> tuple[Tensor, Tensor]:
    order = torch.arange(u.shape[1]).flip(0) if backwards else torch.arange(u.shape[1])
    u = u[:, order]
    start = "sos_embed" in block
    inputs = torch.cat((block["sos_embed"].expand(len(u), -1, -1), u[:, :-1]), 1) if start else u
    h = dense(block, "proj_in", inputs)
    if "pos_embed" in block:
        h = h + block["pos_embed"][order]
    if "class_embed" in block:
        rows = block["class_embed"]
        assert label is not None
        h = h + torch.where((label < 0)[:, None, None], rows.mean(0), rows[label])
    words = 0
    if "proj_txt.weight" in block:
        assert text is not None
        words = text.shape[1]
        h = torch.cat((dense(block, "proj_txt", text), h), 1)
    angles = None if known.lattice is None else rotations(known, words, u.shape[1])
    layer = 0
    while f"attn_blocks.{layer}.attention.qkv.weight" in block:
        h = transformer_layer(block, f"attn_blocks.{layer}", h, known.head_width, angles)
        layer += 1
    h = h[:, words:]
    if "final_norm.weight" in block:
        h = rms_norm(h, 1 + block["final_norm.weight"])
    out = dense(block, "proj_out", h)
    if not start:
        out = torch.cat((torch.zeros_like(out[:, :1]), out[:, :-1]), 1)
    if known.clip:
        out = known.clip * torch.tanh(out / known.clip)
    d = u.shape[-1]
    scale, shift = (torch.zeros_like(out), out) if out.shape[-1] == d else out.split(d, -1)
    log_scale = F.softplus(scale + math.log(math.e - 1)).log() if known.softplus else scale
    w = (u - shift) * torch.exp(-log_scale)
    return w[:, order.argsort()], -log_scale.sum((1, 2))


def rotations(known: Known, words: int, tokens: int) -> Tensor:
    """(words + tokens, head_width / 2) angles of places in the sequence.

    A model with text has three axes in all blocks; a model without, two.
    """
    assert known.lattice is not None
    side, length = known.lattice
    axis = known.head_width // 2 - (8 if length else 0)  # features of row, and of column
    place = torch.arange(tokens)
    row = (place // side)[:, None] * frequencies(axis // 2)
    column = (place % side)[:, None] * frequencies(axis // 2)
    image = torch.cat((row, column), 1)
    if not length:
        return image
    image = torch.cat((image, torch.zeros(tokens, 8)), 1)
    read = (torch.arange(words) / max(words, 1) * side)[:, None] * frequencies(8)
    return torch.cat((torch.cat((torch.zeros(words, axis), read), 1), image))


def transformer_layer(
    block: State, name: str, h: Tensor, head_width: int, angles: Tensor | None
) -> Tensor:
    h = h + after(
        block, f"{name}.attention", attention(block, f"{name}.attention", h, head_width, angles)
    )
    return h + after(
        block, f"{name}.mlp", mlp(block, f"{name}.mlp", norm(block, f"{name}.mlp.norm", h))
    )


def attention(block: State, name: str, h: Tensor, head_width: int, angles: Tensor | None) -> Tensor:
    width = h.shape[-1]
    qkv = dense(block, f"{name}.qkv", norm(block, f"{name}.norm", h))
    kv_width = (qkv.shape[-1] - width) // 2
    q, k, v = (
        split_heads(part, part.shape[-1] // head_width)
        for part in qkv.split((width, kv_width, kv_width), -1)
    )
    if f"{name}.query_norm.weight" in block:
        q = rms_norm(q, 1 + block[f"{name}.query_norm.weight"])
        k = rms_norm(k, 1 + block[f"{name}.key_norm.weight"])
    if angles is not None:
        q, k = turn_pairs(q, angles), turn_pairs(k, angles)
    shared = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
    causal = torch.ones(h.shape[1], h.shape[1], dtype=torch.bool).tril()
    return dense(block, f"{name}.proj", join_heads(attend(q, k, v, causal)))


def mlp(block: State, name: str, h: Tensor) -> Tensor:
    if f"{name}.gate_proj.weight" in block:
        gate = F.gelu(dense(block, f"{name}.gate_proj", h), approximate="tanh")
        return dense(block, f"{name}.down_proj", gate * dense(block, f"{name}.up_proj", h))
    return dense(block, f"{name}.main.2", F.gelu(dense(block, f"{name}.main.0", h)))


def norm(block: State, name: str, h: Tensor) -> Tensor:
    weight, bias = block[f"{name}.weight"], block.get(f"{name}.bias")
    if bias is None:
        return rms_norm(h, 1 + weight)
    return F.layer_norm(h, weight.shape, weight, bias, 1e-5)


def after(block: State, name: str, update: Tensor) -> Tensor:
    weight = block.get(f"{name}.post_norm.weight")
    return update if weight is None else rms_norm(update, 1 + weight)
