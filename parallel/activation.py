"""Activation checkpointing: forget what a block computed, compute it again in the backward.

Memory for the activations of every n-th block falls to its input, for one more forward of that
block. The recomputed numbers are the same ones, so the gradients are too.
"""

from collections.abc import Sequence

from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    checkpoint_wrapper,
)


def checkpoint_blocks(model: nn.Module, blocks: Sequence[nn.Module], every: int) -> None:
    """Wrap every n-th block of `model` in place; 0: none, 1: all, 2: the first, third, fifth...

    blocks: modules of `model`, wherever they are in it
    """
    if every == 0:
        return
    chosen = set(blocks[::every])
    for name, module in list(model.named_modules()):
        if module in chosen:
            parent, _, own = name.rpartition(".")
            holder = model.get_submodule(parent)
            wrapped = checkpoint_wrapper(module, CheckpointImpl.NO_REENTRANT)
            # Containers are reached by attribute as well, under the name of the place.
            holder.register_module(own, wrapped)
