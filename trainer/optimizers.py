"""The optimizer of a run, and which parameters decay."""

from collections.abc import Mapping

import torch
from torch import Tensor

# Path components of lookup tables: rows that a batch does not touch must not shrink.
TABLES = frozenset({"embedding", "label", "position"})


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay holds for a parameter: for matrices; not biases, gains, tables."""
    return parameter.ndim >= 2 and TABLES.isdisjoint(name.split("."))


def build(
    named_parameters: Mapping[str, Tensor],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> torch.optim.AdamW:
    """AdamW over `named_parameters` (plain or DTensor), fused.

    Two groups, `decayed` and `undecayed`, each with its parameters in the order of their names,
    so that the grouping is the same under any layout. AdamW: Loshchilov and Hutter 2019,
    algorithm 2.
    """
    names = sorted(named_parameters)
    decayed = [name for name in names if decays(name, named_parameters[name])]
    undecayed = [name for name in names if not decays(name, named_parameters[name])]
    groups = [
        {
            "name": label,
            "names": members,
            "params": [named_parameters[name] for name in members],
            "weight_decay": decay,
        }
        for label, members, decay in (
            ("decayed", decayed, weight_decay),
            ("undecayed", undecayed, 0.0),
        )
        if members
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)
