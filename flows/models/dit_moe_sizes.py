"""Published sizes of the DiT-MoE: patches of 2, two experts a token, and smaller ones."""

from typing import Any

from flows.models.dit_sizes import BIG, SMALL

# name: (width, depth, heads)
SHAPES = SMALL | BIG | {"G": (1408, 40, 16)}
EXPERTS = (8, 16)


def _size(shape: tuple[int, int, int], experts: int, *, learn_sigma: bool) -> dict[str, Any]:
    width, depth, heads = shape
    sizes = {"patch": 2, "width": width, "depth": depth, "heads": heads}
    return sizes | {"experts": experts, "chosen": 2, "learn_sigma": learn_sigma}


PUBLISHED = {
    f"DiT-MoE-{name}/2-{experts}E2A": _size(shape, experts, learn_sigma=name not in SMALL)
    for name, shape in SHAPES.items()
    for experts in EXPERTS
}
