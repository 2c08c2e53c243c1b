"""Activation checkpointing: forget what a block computed, compute it again in the backward.

Memory for the activations of every n-th block falls to its input, for one more forward of that
block. The recomputed numbers are the same ones, so the gradients are too.
"""

from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    checkpoint_wrapper,
)


def checkpoint_blocks(blocks: nn.ModuleList, every: int) -> None:
    """Wrap every n-th block in place; 0: none, 1: all, 2: the first, third, fifth..."""
    if every == 0:
        return
    for index in range(0, len(blocks), every):
        blocks[index] = checkpoint_wrapper(blocks[index], CheckpointImpl.NO_REENTRANT)
