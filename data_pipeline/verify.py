"""Every sample of some shards looked at: what they hold, and all that is wrong with them."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipeline.decode.images import load, read_picture
from data_pipeline.samples import Encoded, Samples
from data_pipeline.shards import expand
from flows.errors import UserError

# Tiles a side, and pixels a tile: what one looks at to see whether these are the right images.
GRID, TILE, GAP = 12, 64, 2


@dataclass
class Report:
    """What some shards hold.

    labels: class -> samples; sizes: "MODE WIDTHxHEIGHT" -> images; bytes: of the image files alone
    problems: one sentence each; a bad shard is not looked into further
    """

    shards: int = 0
    samples: int = 0
    bytes: int = 0
    labels: Counter[int] = field(default_factory=Counter)
    sizes: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)


def verify(pattern: str, *, classes: int | None) -> Report:
    """Read, check and decode every sample.

    Raises UserError if the pattern names no shard; what is wrong inside shards is reported.
    """
    report = Report()
    seen: dict[str, str] = {}
    for url in expand(pattern):
        report.shards += 1
        try:
            contents = Samples(url, classes=classes)
        except UserError as error:
            report.problems.append(str(error))
            continue
        _note_duplicates(contents, seen, report)
        for encoded in _one_by_one(contents, report):
            _note(encoded, report)
        contents.close()
    return report


def _note_duplicates(contents: Samples, seen: dict[str, str], report: Report) -> None:
    """A key in two shards is one sample trained on twice; within a shard keys are unique."""
    count = contents.sizes[0]
    url = contents.urls[0]
    for name in contents.keys(np.zeros(count, np.int64), np.arange(count)):
        key = name.removeprefix(f"{contents.names[0]}/")
        if key in seen:
            report.problems.append(f"{url}: sample {key} is also in {seen[key]}; remove one")
        seen[key] = url


def _one_by_one(contents: Samples, report: Report) -> Iterator[Encoded]:
    for number in range(len(contents)):
        report.samples += 1
        try:
            yield contents.read(np.zeros(1, np.int64), np.array([number]))
        except UserError as error:
            report.problems.append(str(error))


def _note(encoded: Encoded, report: Report) -> None:
    report.labels.update(encoded.labels.tolist())
    report.bytes += len(encoded.images[0])
    try:
        image = load(read_picture(encoded.images[0], encoded.names[0]))
    except UserError as error:
        report.problems.append(str(error))
        return
    report.sizes[f"{image.mode} {image.width}x{image.height}"] += 1


def draw_grid(pattern: str, path: Path) -> None:
    """A picture of samples, evenly spaced through the shards."""
    contents = Samples(pattern, classes=None)
    shown = min(len(contents), GRID * GRID)
    starts = np.cumsum((0, *contents.sizes))
    places = np.arange(shown) * len(contents) // shown
    shard = np.searchsorted(starts, places, side="right") - 1
    encoded = contents.read(shard, places - starts[shard])
    contents.close()
    step = TILE + GAP
    side = (min(shown, GRID) * step + GAP, -(-shown // GRID) * step + GAP)
    grid = Image.new("RGB", side, "white")
    for number, (content, name) in enumerate(zip(encoded.images, encoded.names, strict=True)):
        tile = (
            load(read_picture(content, name))
            .convert("RGB")
            .resize((TILE, TILE), Image.Resampling.NEAREST)
        )
        row, column = divmod(number, GRID)
        grid.paste(tile, (GAP + column * step, GAP + row * step))
    grid.save(path)
