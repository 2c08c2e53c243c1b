"""Activation checkpointing: forget what a block computed, compute it again in the backward.

Memory for the activations of a checkpointed block falls to its input, for one more forward of that block;
or to its input and the results of its matrix products and attention, for what lies between them, which
is cheap to compute and most of what is kept (Korthikanti et al. 2022, "Reducing Activation Recomputation",
selective recomputation). The recomputed numbers are the same ones, so the gradients are too.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    checkpoint_wrapper,
)
from torch.utils.checkpoint import (
    SAC_IGNORED_OPS,
    CheckpointPolicy,
    create_selective_checkpoint_contexts,
)

from flows.models.grouped import GROUPED_PRODUCT

Keep = Literal["nothing", "products"]

aten = torch.ops.aten
# Names for profilers: FSDP gives more of them in a recomputation, whose operators are counted.
NAMES = frozenset(
    {
        torch.ops.profiler._record_function_enter_new.default,
        torch.ops.profiler._record_function_exit._RecordFunction,
    }
)
# What takes the time of a block: its results are kept.
PRODUCTS = frozenset(
    {
        aten.mm.default,
        aten.addmm.default,
        aten.bmm.default,
        aten.baddbmm.default,
        GROUPED_PRODUCT,
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
    }
)


@dataclass(frozen=True)
class Recompute:
    """Which blocks are recomputed, and what of them is not.

    every: 0: none, 1: all, 2: the first, third, fifth...
    keep: products: results of matrix products and attention stay
    """

    every: int
    keep: Keep = "nothing"


def checkpoint_blocks(model: nn.Module, blocks: Sequence[nn.Module], recompute: Recompute) -> None:
    """Wrap the chosen blocks of `model` in place.

    blocks: modules of `model`, wherever they are in it
    """
    if recompute.every == 0:
        return
    options: dict[str, Any] = {}
    if recompute.keep == "products":
        # A policy is asked after operators are counted, and torch 2.13 knows no exception but this.
        SAC_IGNORED_OPS.update(NAMES)
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    chosen = set(blocks[:: recompute.every])
    for name, module in list(model.named_modules()):
        if module in chosen:
            parent, _, own = name.rpartition(".")
            holder = model.get_submodule(parent)
            wrapped = checkpoint_wrapper(module, CheckpointImpl.NO_REENTRANT, **options)
            # Containers are reached by attribute as well, under the name of the place.
            holder.register_module(own, wrapped)


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:  # noqa: ARG001
    if operator in PRODUCTS:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
