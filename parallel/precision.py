"""Mixed precision: matrix products in bfloat16; weights, gradients, optimizer and loss in float32.

One mechanism decides the dtype of every operation, autocast, and it is the same in every layout.
FSDP only moves the cast of the weights before the gather, which halves its bytes (and rounds tables
too); it leaves the inputs alone, because flow times rounded to bfloat16 (8 bits) would be other
times.
"""

import importlib.util
from collections.abc import Iterable
from contextlib import AbstractContextManager
from importlib import import_module
from typing import Literal

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from flows.errors import UserError

Precision = Literal["fp32", "bf16"]

# The first of NVIDIA's devices that multiply float8, and what their kernels want sides to be multiples of.
FLOAT8_CAPABILITY, FLOAT8_SIDE = (8, 9), 16


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


def check_float8(device: torch.device) -> None:
    """Raises UserError where matrix products in float8 cannot be."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < FLOAT8_CAPABILITY:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"
        raise UserError(
            "train.float8 = true needs a device that multiplies float8 (NVIDIA's from Ada and Hopper on), "
            f"and this is {name}; use train.float8=false."
        )
    if importlib.util.find_spec("torchao") is None:
        raise UserError(
            "train.float8 = true multiplies by torchao, which is not installed; run pip install torchao, "
            "or use train.float8=false."
        )


def in_float8(module: nn.Module) -> bool:
    """Whether a layer's products may be in float8: plain ones of sides that the kernels take."""
    if type(module) is not nn.Linear:
        return False
    return module.in_features % FLOAT8_SIDE == 0 and module.out_features % FLOAT8_SIDE == 0


def multiply_in_float8(blocks: Iterable[nn.Module]) -> None:
    """Let the linear layers of blocks multiply in float8, forward and backward; weights stay float32."""
    torchao = import_module("torchao.float8")
    for block in blocks:
        torchao.convert_to_float8_training(
            block, module_filter_fn=lambda layer, _: in_float8(layer)
        )
