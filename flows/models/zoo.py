"""Published names and what they mean in sizes."""

import difflib
from dataclasses import dataclass

from flows.errors import UserError
from flows.models.dit import DiTConfig


@dataclass(frozen=True)
class DiTSize:
    """A DiT without its data: the keys that a name stands for."""

    patch: int
    width: int
    depth: int
    heads: int
    learn_sigma: bool


# name: (width, depth, heads)
PUBLISHED = {
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


def _sizes() -> dict[str, DiTSize]:
    """SiT and DiT are one network; the published sizes have two outputs a channel."""
    sizes = {}
    for family in ("SiT", "DiT"):
        for name, (width, depth, heads) in (SMALL | PUBLISHED).items():
            learn_sigma = name in PUBLISHED
            for patch in PATCHES:
                sizes[f"{family}-{name}/{patch}"] = DiTSize(patch, width, depth, heads, learn_sigma)
    return sizes


SIZES = _sizes()


def dit_size(name: str) -> DiTSize:
    """The size behind a name such as `SiT-XL/2`; UserError with near names if there is none."""
    if name in SIZES:
        return SIZES[name]
    by_lower = {known.lower(): known for known in SIZES}
    near = difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.0)
    raise UserError(
        f"model.name = {name!r} is not in the zoo; "
        f"use for instance {', '.join(by_lower[known] for known in near)}."
    )


def dit_config(
    *,
    name: str | None,
    patch: int | None,
    width: int | None,
    depth: int | None,
    heads: int | None,
    learn_sigma: bool | None,
    image_size: int,
    channels: int,
    classes: int,
) -> DiTConfig:
    """A named size changed by the keys that are not None, or a whole shape without a name."""
    shape = {"patch": patch, "width": width, "depth": depth, "heads": heads}
    named = {} if name is None else vars(dit_size(name))
    chosen = named | {key: value for key, value in shape.items() if value is not None}
    if missing := [f"model.{key}" for key in shape if key not in chosen]:
        raise UserError(
            f"the model's size is incomplete: {', '.join(missing)} not set; "
            "give them all, or a name of the zoo such as model.name = SiT-S/2."
        )
    if learn_sigma is None:
        learn_sigma = bool(named.get("learn_sigma", False))
    return DiTConfig(
        image_size=image_size,
        channels=channels,
        classes=classes,
        learn_sigma=learn_sigma,
        patch=chosen["patch"],
        width=chosen["width"],
        depth=chosen["depth"],
        heads=chosen["heads"],
    )
