"""DiT-MoE: a DiT whose experts stand one by one in the file, and stacked here.

Its rectified flow counts time from data to noise and predicts noise - data, so that the network is told
1 - t and the last layer changes its sign. What balances our routers from step to step is in no file: it
begins anew.
"""

from typing import Any

import torch
from torch import Tensor

from flows.errors import UserError
from flows.models.dit_moe_config import DiTMoEConfig
from flows.models.dit_moe_sizes import SHAPES
from flows.models.embeddings import sincos_positions
from flows.models.zoo import FAMILIES
from trainer.checkpoints.foreign.dit import POSITION, final_moves, first_moves, read_plain
from trainer.checkpoints.foreign.moves import Move, State, linear, same
from trainer.checkpoints.foreign.source import Contents, Findings, Source, Told

HEADS = {(width, depth): heads for width, depth, heads in SHAPES.values()}
# What the program's router does, by the keys of ours.
FIXED = {
    "expert": "swiglu",
    "chooser": "tokens",
    "gate": "softmax",
    "gate_scale": 1.0,
    "capacity": 0.0,
    "bias_rate": 0.0,
    "recurrent": 0,
    "time": "reversed",
}


def read(contents: Contents, told: Told) -> Findings:
    plain = read_plain(contents, told, time="reversed")
    first = "blocks.0.moe."
    shared = f"{first}shared_experts.gate_proj.weight"
    found = {
        "experts": contents.shape(f"{first}gate.weight", 2)[0],
        "expert_hidden": contents.shape(f"{first}experts.0.gate_proj.weight", 2)[0],
        "shared_hidden": contents.shape(shared, 2)[0] if shared in contents else 0,
    }
    shape = plain.found["width"], plain.found["depth"]
    heads = {"heads": HEADS[shape]} if shape in HEADS else {}
    usual = plain.usual | heads | FIXED | {"chosen": 2, "renormalise": False}
    return Findings(plain.found | found, usual, plain.hints)


def moves(config: DiTMoEConfig) -> list[Move]:
    return [
        *first_moves(config.patch),
        *(move for index in range(config.depth) for move in _block(config, f"blocks.{index}")),
        *final_moves(sign=-1),
    ]


def _block(config: DiTMoEConfig, block: str) -> list[Move]:
    theirs, ours = f"{block}.moe", f"{block}.mixture"
    one = [f"{theirs}.experts.{index}" for index in range(config.experts)]
    pairs = tuple(f"{expert}.{name}.weight" for expert in one for name in ("gate_proj", "up_proj"))
    downs = tuple(f"{expert}.down_proj.weight" for expert in one)
    found = [
        *linear(f"{block}.adaLN_modulation.1", f"{block}.modulation"),
        *linear(f"{block}.attn.qkv", f"{block}.attention.qkv"),
        *linear(f"{block}.attn.proj", f"{block}.attention.out"),
        same(f"{theirs}.gate.weight", f"{ours}.router.gate.weight"),
        Move(pairs, (f"{ours}.experts.up",), _stacked_pairs, _pairs),
        Move(downs, (f"{ours}.experts.down",), lambda t: [torch.stack(t)], lambda t: list(t[0])),
    ]
    if config.shared:
        shared = f"{theirs}.shared_experts"
        halves = (f"{shared}.gate_proj.weight", f"{shared}.up_proj.weight")
        found += [
            Move(halves, (f"{ours}.shared.up.weight",), _joined, lambda t: t[0].chunk(2)),
            same(f"{shared}.down_proj.weight", f"{ours}.shared.down.weight"),
        ]
    if config.routing.balance == "previous":
        fresh = torch.full((config.experts,), 1.0 / config.experts)
        found.append(Move((), (f"{ours}.router.share",), lambda _: [fresh], lambda _: []))
    return found


def _joined(tensors: list[Tensor]) -> list[Tensor]:
    return [torch.cat(tensors)]


def _stacked_pairs(tensors: list[Tensor]) -> list[Tensor]:
    """Gate and value of one expert after the other -> (experts, 2 * hidden, width)."""
    return [torch.stack([torch.cat(tensors[i : i + 2]) for i in range(0, len(tensors), 2)])]


def _pairs(tensors: list[Tensor]) -> list[Tensor]:
    return [half for expert in tensors[0] for half in expert.chunk(2)]


def tables(config: DiTMoEConfig) -> State:
    """The frozen positions."""
    return {POSITION: sincos_positions(config.image_size // config.patch, config.width)[None]}


def check(config: DiTMoEConfig) -> None:
    """UserError for the first option that the program does not know."""
    for key, value in FIXED.items():
        if getattr(config, key) != value:
            raise UserError(
                f"model.{key} = {getattr(config, key)} has no place in a dit-moe file, whose models have "
                f"{value}; choose another format."
            )


def _recipe(config: Any) -> dict[str, Any]:  # noqa: ARG001
    time = {"kind": "logit_normal"}
    return {"objective": {"path": "linear", "prediction": "velocity", "time": time}}


DIT_MOE = Source("dit-moe", FAMILIES["dit_moe"], read, moves, tables, check, _recipe)
