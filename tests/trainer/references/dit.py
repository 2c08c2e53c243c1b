"""SiT, DiT, REPA, LightningDiT and DiT-MoE."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.trainer.references.parts import (
    State,
    attend,
    dense,
    frequencies,
    join_heads,
    plain_norm,
    rms_norm,
    sinusoid,
    split_heads,
    turn_pairs,
)


def table(side: int, width: int) -> Tensor:
    """(1, side * side, width): the column, then the row, each as sines and cosines."""
    angle = torch.arange(side)[:, None].double() * 10_000.0 ** (
        -torch.arange(width // 4).double() / (width // 4)
    )
    axis = torch.cat((angle.sin(), angle.cos()), dim=1)
    return torch.cat((axis.repeat(side, 1), axis.repeat_interleave(side, 0)), 1).float()[None]


def rotations(side: int, head_width: int) -> Tensor:
    """(tokens, head_width / 2) angles: a quarter of the features turns by row, a quarter by column."""
    place = torch.arange(side).float()
    angle = place[:, None] * frequencies(head_width // 4)
    return torch.cat((angle.repeat_interleave(side, 0), angle.repeat(side, 1)), dim=1)


def shapes(
    *, tokens: int, width: int, patch: int, channels: int, outputs: int, classes: int, depth: int
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a SiT file."""
    square = patch * patch
    found = {
        "pos_embed": (1, tokens, width),
        "x_embedder.proj.weight": (width, channels, patch, patch),
        "x_embedder.proj.bias": (width,),
        **layer("t_embedder.mlp.0", width, 256),
        **layer("t_embedder.mlp.2", width, width),
        "y_embedder.embedding_table.weight": (classes + 1, width),
        **layer("final_layer.linear", square * outputs, width),
        **layer("final_layer.adaLN_modulation.1", 2 * width, width),
    }
    for block in (f"blocks.{index}" for index in range(depth)):
        found |= layer(f"{block}.attn.qkv", 3 * width, width)
        found |= layer(f"{block}.attn.proj", width, width)
        found |= layer(f"{block}.mlp.fc1", 4 * width, width)
        found |= layer(f"{block}.mlp.fc2", width, 4 * width)
        found |= layer(f"{block}.adaLN_modulation.1", 6 * width, width)
    return found


def layer(name: str, outputs: int, inputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def forward(
    state: State, x: Tensor, t: Tensor, label: Tensor, *, heads: int, align_depth: int = 0
) -> tuple[Tensor, Tensor | None]:
    """All output channels (the second half is learned sigma), and REPA's projection.

    x (batch, channels, side, side), t (batch,) in the program's own count, label (batch,)
    """
    kernel = state["x_embedder.proj.weight"]
    patch = kernel.shape[-1]
    h = F.conv2d(x, kernel, state["x_embedder.proj.bias"], stride=patch).flatten(2).mT
    h = h + state["pos_embed"]
    c = dense(state, "t_embedder.mlp.2", F.silu(dense(state, "t_embedder.mlp.0", sinusoid(t))))
    c = F.silu(c + state["y_embedder.embedding_table.weight"][label])
    projection = None
    depth = 0
    while f"blocks.{depth}.attn.qkv.weight" in state:
        h = block(state, f"blocks.{depth}", h, c, heads)
        depth += 1
        if depth == align_depth:
            p = F.silu(dense(state, "projectors.0.0", h))
            p = F.silu(dense(state, "projectors.0.2", p))
            projection = dense(state, "projectors.0.4", p)
    shift, scale = dense(state, "final_layer.adaLN_modulation.1", c)[:, None].chunk(2, -1)
    h = norm(state, "final_layer.norm_final", h) * (1 + scale) + shift
    h = dense(state, "final_layer.linear", h)
    side = x.shape[-1] // patch
    image = h.unflatten(1, (side, side)).unflatten(-1, (patch, patch, -1))
    return torch.einsum("nhwpqc->nchpwq", image).flatten(4, 5).flatten(2, 3), projection


def block(state: State, name: str, h: Tensor, c: Tensor, heads: int) -> Tensor:
    vectors = dense(state, f"{name}.adaLN_modulation.1", c)[:, None].split(h.shape[-1], -1)
    if len(vectors) == 4:  # LightningDiT without shifts
        zero = torch.zeros_like(vectors[0])
        vectors = (zero, *vectors[:2], zero, *vectors[2:])
    shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = vectors
    h = h + gate_1 * attention(
        state, f"{name}.attn", norm(state, f"{name}.norm1", h) * (1 + scale_1) + shift_1, heads
    )
    inner = norm(state, f"{name}.norm2", h) * (1 + scale_2) + shift_2
    if f"{name}.moe.gate.weight" in state:
        return h + gate_2 * mixture(state, f"{name}.moe", inner)
    return h + gate_2 * mlp(state, f"{name}.mlp", inner)


def norm(state: State, name: str, h: Tensor) -> Tensor:
    gain = state.get(f"{name}.weight")
    return plain_norm(h) if gain is None else rms_norm(h, gain)


def attention(state: State, name: str, h: Tensor, heads: int) -> Tensor:
    q, k, v = (split_heads(part, heads) for part in dense(state, f"{name}.qkv", h).chunk(3, -1))
    if f"{name}.q_norm.weight" in state:
        q = rms_norm(q, state[f"{name}.q_norm.weight"])
        k = rms_norm(k, state[f"{name}.k_norm.weight"])
    if "feat_rope.freqs_cos" in state:
        angles = rotations(round(h.shape[1] ** 0.5), q.shape[-1])
        q, k = turn_pairs(q, angles), turn_pairs(k, angles)
    return dense(state, f"{name}.proj", join_heads(attend(q, k, v)))


def mlp(state: State, name: str, h: Tensor) -> Tensor:
    if f"{name}.w12.weight" in state:
        a, b = dense(state, f"{name}.w12", h).chunk(2, -1)
        return dense(state, f"{name}.w3", F.silu(a) * b)
    hidden = F.gelu(dense(state, f"{name}.fc1", h), approximate="tanh")
    return dense(state, f"{name}.fc2", hidden)


def mixture(state: State, name: str, h: Tensor, chosen: int = 2) -> Tensor:
    """Every expert computes every token; those that a token did not choose count for nothing."""
    share = dense(state, f"{name}.gate", h).softmax(-1)
    least = share.sort(-1, descending=True).values[..., chosen - 1 : chosen]
    weight = torch.where(share >= least, share, 0.0)
    total = gated(state, f"{name}.shared_experts", h)
    for expert in range(share.shape[-1]):
        total = total + weight[..., expert, None] * gated(state, f"{name}.experts.{expert}", h)
    return total


def gated(state: State, name: str, h: Tensor) -> Tensor:
    hidden = F.silu(dense(state, f"{name}.gate_proj", h)) * dense(state, f"{name}.up_proj", h)
    return dense(state, f"{name}.down_proj", hidden)
