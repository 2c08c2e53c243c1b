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
from flows.models.choice import expert_places
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
        if _leaves_out(dense):
            raise UserError(
                f"model.capacity = {dense.capacity:g} leaves tokens out, and no mixture leaves out the same; "
                "choose a run with model.capacity=0."
            )
        if dense.gate == "sigmoid" and not dense.renormalise:
            raise UserError(
                "model.gate = sigmoid weights the one expert by each token's score, which no mixture begins "
                "with; choose a run with model.gate=softmax or model.renormalise=true."
            )
        own = {"expert": dense.expert, "expert_hidden": dense.hidden, "shared_hidden": dense.shared}
        # A weight of one, renormalised or a softmax of one score, is what renormalised weights sum to.
        return keys | own | {"gate_scale": dense.gate_scale}
    for key, value in PLAIN.items():
        if getattr(dense, key) != value:
            raise UserError(
                f"model.{key} = {getattr(dense, key)} is no option of the blocks of a DiT-MoE, which have "
                f"{value}; a mixture cannot be made of this network."
            )
    return keys | {"expert": "gelu", "expert_hidden": 4 * dense.width, "shared_hidden": 0}


def changed_from(dense: DiTConfig | DiTMoEConfig, config: DiTMoEConfig) -> list[str]:
    """The keys by which a mixture need not begin as the dense network that it is made of, with values.

    It does where every token goes to experts whose weights sum to one, or to the dense network's scale.
    """
    found = []
    scale = dense.gate_scale if isinstance(dense, DiTMoEConfig) else 1.0
    if config.gate_scale != scale:
        found.append(f"model.gate_scale = {config.gate_scale:g}")
    all_chosen = config.chosen == config.experts and config.gate == "softmax"
    if not config.renormalise and not all_chosen:
        found.append("model.renormalise = false")
    if _leaves_out(config):
        by_tokens = config.chooser == "tokens"
        found.append(
            f"model.capacity = {config.capacity:g}" if by_tokens else "model.chooser = experts"
        )
    return found


def _leaves_out(config: DiTMoEConfig) -> bool:
    """Whether an expert has places for some tokens of a sample alone."""
    limited = config.chooser == "experts" or config.capacity > 0
    return limited and expert_places(config.routing, config.tokens) < config.tokens


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
