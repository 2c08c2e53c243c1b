"""Evaluation in parts: each takes a share of the samples, and together they are one ordered set.

A metric is a function of whole sets of features in the order of their samples, so it does not matter
how many parts there were: what is gathered is put in order first.
"""

import torch
from torch import Tensor


def share_of(count: int, part: int, parts: int) -> Tensor:
    """(about count / parts,) int64 indices of the samples that one of `parts` takes."""
    return torch.arange(part, count, parts)


def in_order(index: Tensor, rows: Tensor, count: int) -> Tensor:
    """(count, ...) rows of samples 0, 1, ... count - 1.

    index: (n,) int64 sample of each row; a sample may come more than once (when parts are filled up
        to one size), and those at or beyond `count` are left out
    rows: (n, ...) what the parts found, in any order
    Raises ValueError naming a sample that is missing.
    """
    first = torch.full((count,), len(index), dtype=torch.int64, device=index.device)
    known = index < count
    place = torch.arange(len(index), device=index.device)[known]
    first.scatter_reduce_(0, index[known], place, "amin")
    missing = (first == len(index)).nonzero().flatten()
    if len(missing):
        raise ValueError(f"no part has sample {missing[0].item()} of {count}")
    return rows[first.to(rows.device)]
