"""Published sizes of DiT and SiT, which are one network, and smaller ones for small machines."""

from typing import Any

# name: (width, depth, heads)
BIG = {
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "XL": (1152, 28, 16),
}
SMALL = {
    "nano": (64, 3, 2),
    "micro": (128, 4, 4),
    "tiny": (192, 6, 3),
}
PATCHES = (1, 2, 4, 7, 8, 14, 16)


def _sizes() -> dict[str, dict[str, Any]]:
    """The published sizes have two outputs a channel."""
    return {
        f"{family}-{name}/{patch}": {
            "patch": patch,
            "width": width,
            "depth": depth,
            "heads": heads,
            "learn_sigma": name in BIG,
        }
        for family in ("SiT", "DiT")
        for name, (width, depth, heads) in (SMALL | BIG).items()
        for patch in PATCHES
    }


PUBLISHED = _sizes()
