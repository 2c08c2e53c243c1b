"""All families, and published names with what they mean in sizes."""

import difflib

from flows.errors import UserError
from flows.models import (
    dit,
    dit_moe,
    dit_moe_config,
    dit_moe_sizes,
    dit_sizes,
    jet,
    mmdit,
    mmdit_config,
    mmdit_sizes,
    starflow,
    tarflow,
    token_dit,
)
from flows.models.family import Family

DIT = Family("dit", "velocity", dit.DiTConfig, dit.DiT, dit.forward_flops, dit_sizes.PUBLISHED)
DIT_MOE = Family(
    "dit_moe",
    "velocity",
    dit_moe_config.DiTMoEConfig,
    dit_moe.DiTMoE,
    dit_moe.forward_flops,
    dit_moe_sizes.PUBLISHED,
)
MMDIT = Family(
    "mmdit",
    "velocity",
    mmdit_config.MMDiTConfig,
    mmdit.MMDiT,
    mmdit.forward_flops,
    mmdit_sizes.PUBLISHED,
)
TARFLOW = Family(
    "tarflow",
    "likelihood",
    tarflow.TarFlowConfig,
    tarflow.TarFlow,
    tarflow.forward_flops,
    tarflow.PUBLISHED,
)
STARFLOW = Family(
    "starflow",
    "likelihood",
    starflow.STARFlowConfig,
    starflow.STARFlow,
    tarflow.forward_flops,
    starflow.PUBLISHED,
)
JET = Family("jet", "likelihood", jet.JetConfig, jet.Jet, jet.forward_flops, jet.PUBLISHED)

TOKEN_DIT = Family(
    "token_dit", "tokens", token_dit.TokenDiTConfig, token_dit.TokenDiT, token_dit.forward_flops, {}
)

FAMILIES = {
    family.name: family for family in (DIT, DIT_MOE, MMDIT, TARFLOW, STARFLOW, JET, TOKEN_DIT)
}


def family_with(config: object) -> Family:
    """The family whose models have such configurations. Raises TypeError for what is none."""
    for family in FAMILIES.values():
        if type(config) is family.config:
            return family
    raise TypeError(f"{type(config).__name__} is the configuration of no family")


def names() -> dict[str, Family]:
    """Every published name, and the family it belongs to."""
    return {name: family for family in FAMILIES.values() for name in family.published}


def family_of(name: str) -> Family:
    """The family of a name such as `SiT-XL/2`; UserError with near names if there is none."""
    known = names()
    if name in known:
        return known[name]
    by_lower = {other.lower(): other for other in known}
    near = difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.0)
    raise UserError(
        f"model.name = {name!r} is not in the zoo; "
        f"use for instance {', '.join(by_lower[other] for other in near)}."
    )
