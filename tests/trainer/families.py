"""A tiny recipe of every model family, on real digits."""

import shutil
from pathlib import Path
from typing import Any

from tests.trainer import runs
from trainer.recipe import Recipe, build_recipe

BATCH, STEPS = 8, 20
HALF = STEPS // 2

TINY: dict[str, dict[str, Any]] = {
    "dit": {"model": {"patch": 4, "width": 32, "depth": 2, "heads": 2}},
    "lightningdit": {
        "model": {
            "patch": 4, "width": 48, "depth": 2, "heads": 2, "qk_norm": True, "norm": "rms",
            "rope": True, "feedforward": "swiglu", "wo_shift": True,
        },
    },
    "dit_moe": {
        "model": {
            "family": "dit_moe", "patch": 4, "width": 32, "depth": 2, "heads": 2, "experts": 8,
            "expert_hidden": 32, "bias_rate": 0.001, "z_weight": 0.001, "recurrent": 8,
            "mask_outputs": 0.2,
        },
    },
    "tarflow": {
        "model": {
            "family": "tarflow", "patch": 4, "width": 32, "flow_blocks": 2, "layers": 1, "head_width": 16,
        },
        "objective": {"noise": 0.1, "dequantisation": "none"},
        "sample": {"guidance": 1.0, "strategy": "gs_jacobi", "group": 2, "tolerance": 0.0},
    },
    "volume-preserving": {
        "model": {
            "family": "tarflow", "patch": 4, "width": 32, "flow_blocks": 2, "layers": 1, "head_width": 16,
            "volume_preserving": True,
        },
        "objective": {"noise": 0.1, "dequantisation": "none"},
    },
    "mmdit": {
        "model": {
            "family": "mmdit", "patch": 2, "width": 32, "double_depth": 1, "single_depth": 1, "heads": 2,
        },
        "data": {
            "train": "embedded:emoji32-latents/train-{000000..000001}.tar",
            "heldout": "embedded:emoji32-latents/heldout-000000.tar",
            "latents": True, "autoencoder": "embedded:emoji32-autoencoder", "channels": 8, "classes": 9,
            "text": {"member": "text.npy", "tokens": 6, "width": 64},
        },
        "sample": {"steps": 3, "guidance": 2.0},
    },
    "starflow": {
        "model": {"family": "starflow", "patch": 4, "width": 48, "layers": [1, 2], "head_width": 24},
        "objective": {"power": 1e-4},
        "sample": {"guidance": 1.0, "form": "distribution"},
    },
    "jet": {
        "model": {
            "family": "jet", "patch": 4, "width": 32, "couplings": 5, "layers": 1, "heads": 2,
            "conditional": True,
        },
        "objective": {"bins": "above", "dequantisation": "variational"},
    },
}  # fmt: skip


def recipe(
    name: str,
    folder: Path,
    parallel: dict[str, Any] | None = None,
    own: dict[str, Any] | None = None,
) -> Recipe:
    """The recipe that trains `own`, or `TINY[name]`, in `folder`, and draws samples at its end."""
    own = TINY[name] if own is None else own
    data: dict[str, Any] = {
        "name": name,
        "run": {"dir": str(folder)},
        "data": {
            "train": "embedded:digits8/train-{000000..000001}.tar", "image_size": 8, "channels": 1,
            "classes": 10, "decoder": "pillow", "window": 16,
        } | own.get("data", {}),
        "model": own["model"],
        "objective": own.get("objective", {}),
        "optimizer": {"lr": 1e-3, "warmup": 5},
        "train": {"steps": STEPS, "batch": BATCH, "ema": [0.5]},
        "parallel": parallel or {},
        "checkpoint": {"every": STEPS},
        "sample": {"every": STEPS, "count": 6} | own.get("sample", {}),
        "tracking": {"mlflow": False},
    }  # fmt: skip
    return build_recipe(data, name)


def stopped(run: Path, place: Path) -> Path:
    """A copy of a run as it was at its half; its folder."""
    shutil.copytree(run, place)
    shutil.rmtree(place / "checkpoints" / f"step-{STEPS:08d}")
    assert list(runs.manifests(place)) == [HALF]
    return place
