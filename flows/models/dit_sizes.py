"""Published sizes of the DiT, and smaller ones for small machines.

DiT and SiT are one network. LightningDiT and REPA's SiT are it with some of its options.
"""

from typing import Any

# name: (width, depth, heads)
BIG = {
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "XL": (1152, 28, 16),
}
BIGGER = {
    "1.0B": (1536, 24, 24),
    "1.6B": (1792, 28, 28),
}
SMALL = {
    "nano": (64, 3, 2),
    "micro": (128, 4, 4),
    "tiny": (192, 6, 3),
}
PATCHES = (1, 2, 4, 7, 8, 14, 16)

LIGHTNING = {"norm": "rms", "norm_affine": True, "feedforward": "swiglu", "rope": True}
# The features of DINOv2-B, whose width is 768.
REPA = {"align_depth": 8, "align_width": 768}


def _size(shape: tuple[int, int, int], patch: int, **options: Any) -> dict[str, Any]:
    width, depth, heads = shape
    return {"patch": patch, "width": width, "depth": depth, "heads": heads} | options


def _plain() -> dict[str, dict[str, Any]]:
    """The published sizes have two outputs a channel."""
    return {
        f"{family}-{name}/{patch}": _size(shape, patch, learn_sigma=name in BIG)
        for family in ("SiT", "DiT")
        for name, shape in (SMALL | BIG).items()
        for patch in PATCHES
    }


def _lightning() -> dict[str, dict[str, Any]]:
    return {
        f"LightningDiT-{name}/{patch}": _size(shape, patch, **LIGHTNING)
        for name, shape in (SMALL | BIG | BIGGER).items()
        for patch in PATCHES
    }


def _repa() -> dict[str, dict[str, Any]]:
    """Of those deeper than the block that is aligned."""
    return {
        f"REPA-SiT-{name}/{patch}": _size(shape, patch, **REPA)
        for name, shape in BIG.items()
        for patch in PATCHES
    }


PUBLISHED = _plain() | _lightning() | _repa()
