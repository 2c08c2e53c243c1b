"""What transformers with adaptive norms (adaLN-Zero) share: time as told, first weights, a region."""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from flows.initialise import Rule, xavier_uniform
from flows.models.division import Region
from flows.models.norms import DYT_ALPHA

EMBEDDING_STD = 0.02
DIFFUSION_STEPS = 1000

# How a network counts time: as flows do, or as the programs whose weights it may have.
TimeKind = Literal["flow", "reversed", "steps"]


def block_region(
    depth: int, after: tuple[str, ...], parts: Mapping[str, int], heads: int
) -> Region:
    """The region of `depth` blocks and of what is called on tokens after them, `final` among it."""
    blocks = tuple(f"blocks.{index}" for index in range(depth))
    return Region(
        blocks=blocks,
        after=after,
        ends=after,
        vectors=tuple(f"{name}.modulation" for name in (*blocks, "final")),
        parts=parts,
        heads={"model.heads": heads},
    )


def told_time(t: Tensor, kind: TimeKind) -> Tensor:
    """Flow time t (0 noise, 1 data) as a network counts it; float32 whatever it computes in.

    steps: of a diffusion from data to noise, 0 ... 999. Step k has seen k + 1 of 1,000 parts of the
        noise of the variance-preserving path, which is what its schedule is a discretisation of.
    """
    if kind == "flow":
        return t
    backwards = 1 - t.float()
    return backwards if kind == "reversed" else DIFFUSION_STEPS * backwards - 1


def adaln_zero(name: str, shape: torch.Size, embeddings: tuple[str, ...]) -> Rule:
    """adaLN-Zero: modulations and last layer zero, embeddings normal, all other weights Xavier.

    embeddings: beginnings of the names of embeddings' parameters
    """
    if name.endswith("alpha"):
        return Rule.constant(DYT_ALPHA)
    if "norm" in name and name.endswith("weight"):
        return Rule.constant(1.0)
    if name.endswith("bias") or ".modulation." in name or name.startswith("final."):
        return Rule.constant(0.0)
    if name.startswith(embeddings):
        return Rule.normal(EMBEDDING_STD)
    outputs, inputs = shape
    return xavier_uniform(inputs, outputs)
