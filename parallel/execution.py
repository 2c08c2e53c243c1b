"""How steps are computed, whichever engine moves the model and wherever it lies."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from parallel.activation import Recompute, checkpoint_blocks
from parallel.precision import Precision


@dataclass(frozen=True)
class Execution:
    """What a step's time and memory hang on; of its numbers, their rounding alone.

    recompute: which blocks are computed again in the backward
    compile: whether blocks are, one by one
    reshard_after_forward: whether FSDP gathers a block's weights once more for its backward
    offload: whether FSDP's shards lie on the host between their uses
    """

    precision: Precision
    recompute: Recompute
    compile: bool
    reshard_after_forward: bool
    offload: bool


def prepare_blocks(model: nn.Module, blocks: Sequence[nn.Module], execution: Execution) -> None:
    """Recompute and compile blocks of `model`, in place.

    Recomputing goes inside compiling, so that the compiler sees both.
    """
    checkpoint_blocks(model, blocks, execution.recompute)
    if execution.compile:
        for block in blocks:
            block.compile(fullgraph=True)
