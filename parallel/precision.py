"""Mixed precision: matrix products in bfloat16; weights, gradients, optimizer and loss in float32.

One mechanism decides the dtype of every operation, autocast, and it is the same in every layout.
FSDP only moves the cast of the weights before the gather, which halves its bytes (and rounds tables
too); it leaves the inputs alone, because flow times rounded to bfloat16 (8 bits) would be other
times.
"""

from contextlib import AbstractContextManager
from typing import Literal

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy

Precision = Literal["fp32", "bf16"]


def computing(precision: Precision, device: torch.device) -> AbstractContextManager[None]:
    """The context of a forward."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def gather_policy(precision: Precision) -> MixedPrecisionPolicy:
    """What FSDP gathers (bfloat16 copies under bf16) and reduces (always float32)."""
    return MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if precision == "bf16" else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
