"""A mixture of experts from a trained dense network (Komatsuzaki et al. 2023, "Sparse upcycling").

Every expert begins as a copy of the dense feed-forward, and routers begin near equal scores. Where the
weights of a token's experts sum to one, the mixture computes at first what the dense network computes.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from flows.errors import UserError
from flows.initialise import Rule, fill_
from flows.models.dit import DiTConfig
from flows.models.dit_moe import DiTMoE
from flows.models.dit_moe_config import DiTMoEConfig
from flows.models.routers import routers_of

GATE_STD = 0.02
# Keys that a dense network and the mixture made of it have in common.
COMMON = (
    "image_size",
    "channels",
    "classes",
    "patch",
    "width",
    "depth",
    "heads",
    "learn_sigma",
    "time",
)
# What a DiT must be, for its blocks to be those of a DiT-MoE but for the feed-forward.
PLAIN: dict[str, Any] = {
    "norm": "layer",
    "norm_affine": False,
    "norm_placement": "pre",
    "qk_norm": False,
    "rope": False,
    "feedforward": "gelu",
    "wo_shift": False,
    "align_depth": 0,
    "text_width": 0,
}


def mixture_keys(dense: DiTConfig | DiTMoEConfig) -> dict[str, Any]:
    """The keys of a mixture that follow from the dense network it is made of.

    dense: a DiT, or a DiT-MoE of one expert
    Raises UserError for a network that no mixture here can be made of.
    """
    keys = {key: getattr(dense, key) for key in COMMON}
    if isinstance(dense, DiTMoEConfig):
        if dense.experts != 1:
            raise UserError(
                f"model.experts = {dense.experts}: only a dense network is made a mixture of experts, or one "
                "with model.experts = 1; choose such a run."
            )
        own = {"expert": dense.expert, "expert_hidden": dense.hidden, "shared_hidden": dense.shared}
        return keys | own
    for key, value in PLAIN.items():
        if getattr(dense, key) != value:
            raise UserError(
                f"model.{key} = {getattr(dense, key)} is no option of the blocks of a DiT-MoE, which have "
                f"{value}; a mixture cannot be made of this network."
            )
    return keys | {"expert": "gelu", "expert_hidden": 4 * dense.width, "shared_hidden": 0}


def upcycled(state: Mapping[str, Tensor], config: DiTMoEConfig, seed: int) -> dict[str, Tensor]:
    """The state dictionary of a mixture, from that of the dense network that `mixture_keys` was asked of.

    seed: of the weights of the routers
    """
    with torch.device("meta"):
        model = DiTMoE(config)
    made = {}
    for name, shape in ((name, weight.shape) for name, weight in model.named_parameters()):
        if ".router." in name or name.startswith("cell."):
            made[name] = _drawn(model, name, shape, seed)
        elif ".mixture.experts." in name:
            made[name] = _dense_weight(state, name).expand(shape).clone()
        else:
            made[name] = state[name].clone()
    model.to_empty(device="cpu")
    for router in routers_of(model):
        router.reset_buffers()
    buffers = {n: v for n, v in model.state_dict().items() if n not in made}
    return made | buffers


def _dense_weight(state: Mapping[str, Tensor], name: str) -> Tensor:
    """The weight (..., of one expert) that all experts of `name` begin as."""
    if name in state:
        return state[name]
    block, _, part = name.partition(".mixture.experts.")
    layer, bias = part.removesuffix("_bias"), part.endswith("_bias")
    return state[f"{block}.feedforward.{layer}.{'bias' if bias else 'weight'}"].unsqueeze(0)


def _drawn(model: DiTMoE, name: str, shape: torch.Size, seed: int) -> Tensor:
    weight = torch.empty(shape)
    rule = Rule.normal(GATE_STD) if name.endswith("gate.weight") else model.init_rules()[name]
    origin = (0,) * len(shape)
    fill_(weight, rule, seed=seed, name=name, global_shape=tuple(shape), offset=origin)
    return weight
