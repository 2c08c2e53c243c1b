"""SiT, DiT and FLUX as diffusers keeps them: `config.json` and one file, under names of its own.

Told and answered as the published programs are: time and sign are those of `sit`, `dit`, `repa` and
`flux` files. DiTTransformer2DModel computes its 128 frequencies of time as 10000^(-j / 127), where the
networks were trained with 10000^(-j / 128). For times in [0, 1] the first layer after them is refitted,
which is exact to rounding; for the 1,000 steps of `dit` nothing fits, and the weights stay as they are,
as in the checkpoints of DiT that are published for diffusers.
"""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flows.errors import UserError
from flows.models.dit import DiTConfig
from flows.models.embeddings import BASE, TimeEmbedding
from flows.models.mmdit_config import MMDiTConfig
from flows.models.zoo import family_with
from trainer.checkpoints.foreign import dit, flux
from trainer.checkpoints.foreign.conversion import to_foreign
from trainer.checkpoints.foreign.moves import State, to_theirs

WEIGHTS = "diffusion_pytorch_model.safetensors"
EPSILON = 1e-6
# Smallest singular value that counts, of the largest: the fit is then good to 1e-8, with weights that
# are no larger than they were.
CUT = 1e-8


class Layout(NamedTuple):
    """state: names and tensors of the file; settings: the content of config.json"""

    state: State
    settings: dict[str, Any]


def export(config: Any, state: Mapping[str, Tensor]) -> Layout:
    """A state dictionary of ours in diffusers' layout. UserError where it has no such model."""
    if isinstance(config, DiTConfig):
        return _export_dit(config, state)
    if isinstance(config, MMDiTConfig):
        return _export_flux(config, to_foreign(config, state, flux.FLUX.name))
    raise UserError(
        f"diffusers has no model of the family {family_with(config).name}; export it as flowmill, or in the "
        "format of the program it comes from."
    )


def _export_dit(config: DiTConfig, state: Mapping[str, Tensor]) -> Layout:
    """Without a projector, which is for training alone."""
    dit.check(config, name="diffusers", time=config.time, plain=dit.LIGHTNING_KEYS)
    sign = -1 if config.time == "reversed" else 1
    theirs = to_theirs(dit.moves(config, sign=sign), state)
    found = {f"pos_embed.proj.{p}": theirs[f"x_embedder.proj.{p}"] for p in ("weight", "bias")}
    for part in ("weight", "bias"):
        found[f"proj_out_1.{part}"] = theirs[f"final_layer.adaLN_modulation.1.{part}"]
        found[f"proj_out_2.{part}"] = theirs[f"final_layer.linear.{part}"]
    time = theirs["t_embedder.mlp.0.weight"]
    if config.time != "steps":
        time = (time.double() @ refit()).to(time.dtype)
    for index in range(config.depth):
        block, name = f"blocks.{index}", f"transformer_blocks.{index}"
        # Every block has the whole embedding of time and label, always the same.
        embedding = f"{name}.norm1.emb"
        found[f"{embedding}.class_embedder.embedding_table.weight"] = theirs[
            "y_embedder.embedding_table.weight"
        ].clone()
        found[f"{embedding}.timestep_embedder.linear_1.weight"] = time.clone()
        found[f"{embedding}.timestep_embedder.linear_1.bias"] = theirs[
            "t_embedder.mlp.0.bias"
        ].clone()
        for part in ("weight", "bias"):
            found[f"{embedding}.timestep_embedder.linear_2.{part}"] = theirs[
                f"t_embedder.mlp.2.{part}"
            ].clone()
            found[f"{name}.norm1.linear.{part}"] = theirs[f"{block}.adaLN_modulation.1.{part}"]
            found |= _apart(theirs, f"{block}.attn.qkv.{part}", f"{name}.attn1.to_{{}}.{part}")
            found[f"{name}.attn1.to_out.0.{part}"] = theirs[f"{block}.attn.proj.{part}"]
            found[f"{name}.ff.net.0.proj.{part}"] = theirs[f"{block}.mlp.fc1.{part}"]
            found[f"{name}.ff.net.2.{part}"] = theirs[f"{block}.mlp.fc2.{part}"]
    settings = {
        "_class_name": "DiTTransformer2DModel",
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "attention_head_dim": config.width // config.heads,
        "in_channels": config.channels,
        "norm_elementwise_affine": False,
        "norm_eps": EPSILON,
        "norm_type": "ada_norm_zero",
        "num_attention_heads": config.heads,
        "num_embeds_ada_norm": config.classes,
        "num_layers": config.depth,
        "out_channels": config.outputs,
        "patch_size": config.patch,
        "sample_size": config.image_size,
    }
    return Layout(found, settings)


def _export_flux(config: MMDiTConfig, theirs: State) -> Layout:
    found: State = {}
    names = {"img_in": "x_embedder", "txt_in": "context_embedder", "final_layer.linear": "proj_out"}
    for short, long in (("time", "timestep"), ("guidance", "guidance"), ("vector", "text")):
        if f"{short}_in.in_layer.weight" in theirs:
            embedder = f"time_text_embed.{long}_embedder"
            names[f"{short}_in.in_layer"] = f"{embedder}.linear_1"
            names[f"{short}_in.out_layer"] = f"{embedder}.linear_2"
    for index in range(config.double_depth):
        names |= _double_names(f"double_blocks.{index}", f"transformer_blocks.{index}")
    for index in range(config.single_depth):
        theirs_block, block = f"single_blocks.{index}", f"single_transformer_blocks.{index}"
        names[f"{theirs_block}.modulation.lin"] = f"{block}.norm.linear"
        names[f"{theirs_block}.linear2"] = f"{block}.proj_out"
    for part in ("weight", "bias"):
        found |= {f"{new}.{part}": theirs[f"{old}.{part}"] for old, new in names.items()}
        shift, scale = theirs[f"final_layer.adaLN_modulation.1.{part}"].chunk(2)
        found[f"norm_out.linear.{part}"] = torch.cat((scale, shift))
        for index in range(config.double_depth):
            attention = f"transformer_blocks.{index}.attn"
            block = f"double_blocks.{index}"
            found |= _apart(theirs, f"{block}.img_attn.qkv.{part}", f"{attention}.to_{{}}.{part}")
            found |= _apart(
                theirs, f"{block}.txt_attn.qkv.{part}", f"{attention}.add_{{}}_proj.{part}"
            )
        for index in range(config.single_depth):
            block = f"single_transformer_blocks.{index}"
            up = theirs[f"single_blocks.{index}.linear1.{part}"]
            qkv, hidden = up[: 3 * config.width], up[3 * config.width :]
            found |= _apart({"": qkv}, "", f"{block}.attn.to_{{}}.{part}")
            found[f"{block}.proj_mlp.{part}"] = hidden.clone()
    found |= _head_norms(config, theirs)
    axes = [2 * pairs for pairs in config.pairs]
    features = config.patch**2 * config.channels
    settings = {
        "_class_name": "FluxTransformer2DModel",
        "attention_head_dim": config.head_width,
        "axes_dims_rope": axes,
        "guidance_embeds": config.guidance > 0,
        "in_channels": features,
        "joint_attention_dim": config.text_width,
        "num_attention_heads": config.heads,
        "num_layers": config.double_depth,
        "num_single_layers": config.single_depth,
        "patch_size": 1,
        "pooled_projection_dim": config.vector_width,
    }
    return Layout(found, settings)


def _double_names(old: str, new: str) -> dict[str, str]:
    return {
        f"{old}.img_mod.lin": f"{new}.norm1.linear",
        f"{old}.txt_mod.lin": f"{new}.norm1_context.linear",
        f"{old}.img_attn.proj": f"{new}.attn.to_out.0",
        f"{old}.txt_attn.proj": f"{new}.attn.to_add_out",
        f"{old}.img_mlp.0": f"{new}.ff.net.0.proj",
        f"{old}.img_mlp.2": f"{new}.ff.net.2",
        f"{old}.txt_mlp.0": f"{new}.ff_context.net.0.proj",
        f"{old}.txt_mlp.2": f"{new}.ff_context.net.2",
    }


def _head_norms(config: MMDiTConfig, theirs: State) -> State:
    found: State = {}
    for own, part in (("query", "q"), ("key", "k")):
        for index in range(config.double_depth):
            block, attention = f"double_blocks.{index}", f"transformer_blocks.{index}.attn"
            found[f"{attention}.norm_{part}.weight"] = theirs[
                f"{block}.img_attn.norm.{own}_norm.weight"
            ]
            found[f"{attention}.norm_added_{part}.weight"] = theirs[
                f"{block}.txt_attn.norm.{own}_norm.weight"
            ]
        for index in range(config.single_depth):
            found[f"single_transformer_blocks.{index}.attn.norm_{part}.weight"] = theirs[
                f"single_blocks.{index}.norm.{own}_norm.weight"
            ]
    return found


def _apart(state: Mapping[str, Tensor], fused: str, pattern: str) -> State:
    """Queries, keys and values under a name each."""
    parts = zip("qkv", state[fused].chunk(3), strict=True)
    return {pattern.format(part): value.clone() for part, value in parts}


@lru_cache(maxsize=1)
def refit() -> Tensor:
    """(256, 256) float64 M with features(t) = M others(t) for t in [0, 1], of least squares.

    others: the features of time as diffusers has them
    """
    t = torch.linspace(0, 1, 2001, dtype=torch.float64)
    half = TimeEmbedding.features // 2

    def features(last: int) -> Tensor:
        place = torch.arange(half, dtype=torch.float64)
        angle = t[:, None] * BASE ** (-place / last)
        return torch.cat((angle.cos(), angle.sin()), dim=1)

    solved = torch.linalg.lstsq(features(half - 1), features(half), rcond=CUT, driver="gelsd")
    transposed: Tensor = solved.solution
    return transposed.T
