"""Published sizes of the MMDiT, and smaller ones for small machines.

The published ones are for latents of 16 channels, texts of T5-XXL (width 4096) and a pooled vector of
CLIP. Of SD3 the paper gives widths and depths; its 2B has no norms of queries and keys, as released.
"""

from typing import Any

PATCHES = (1, 2, 4, 8)
FLUX: dict[str, Any] = {
    "patch": 2,
    "width": 3072,
    "heads": 24,
    "double_depth": 19,
    "single_depth": 38,
    "mask_text": False,
    "vector_width": 768,
    "time": "reversed",
}
SD3: dict[str, Any] = {
    "patch": 2,
    "rope": False,
    "mask_text": False,
    "vector_width": 2048,
    "time": "reversed",
}
# name: (width, heads, double blocks, single blocks), of networks for small machines
SMALL = {
    "nano": (64, 2, 2, 1),
    "micro": (96, 3, 2, 2),
    "tiny": (192, 6, 3, 6),
}


def _small() -> dict[str, dict[str, Any]]:
    return {
        f"MMDiT-{name}/{patch}": {
            "patch": patch,
            "width": width,
            "heads": heads,
            "double_depth": doubles,
            "single_depth": singles,
            "pool_text": True,
        }
        for name, (width, heads, doubles, singles) in SMALL.items()
        for patch in PATCHES
    }


PUBLISHED: dict[str, dict[str, Any]] = {
    "FLUX": FLUX,
    "FLUX-dev": FLUX | {"guidance": 3.5},
    "FLUX-debug": FLUX | {"width": 1536, "heads": 12, "double_depth": 2, "single_depth": 2},
    "SD3-2B": SD3 | {"width": 1536, "heads": 24, "double_depth": 24, "qk_norm": False},
    "SD3-8B": SD3 | {"width": 2432, "heads": 38, "double_depth": 38},
} | _small()
