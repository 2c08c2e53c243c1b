"""Every sample of some shards looked at: what they hold, and all that is wrong with them."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_pipeline.decode.images import load, read_picture
from data_pipeline.description import (
    Description,
    folder_of,
    read_description,
    refuse_unfinished,
)
from data_pipeline.headers import sample_name
from data_pipeline.index import IMAGE_FILES, LATENT
from data_pipeline.indexes import in_threads
from data_pipeline.keep import RECORD, parse_record
from data_pipeline.latents import POOLED, TEXT, read_array
from data_pipeline.moments import Moments
from data_pipeline.samples import LABEL, parse_label
from data_pipeline.shards import expand
from data_pipeline.sources.archives import TarSource
from data_pipeline.sources.source import Sample
from data_pipeline.storing import sha256_of, size_if_there
from flows.errors import UserError

# Tiles a side, and pixels a tile: what one looks at to see whether these are the right images.
GRID, TILE, GAP = 12, 64, 2
READ_AT_ONCE = 64
CAPTION = "txt"
# Latents within this many deviations of their mean get colours of their own.
SPREAD = 2.0


@dataclass
class Report:
    """What some shards hold.

    checksums: shards whose sha256 is the one in their `dataset.json`
    bytes: of the image files alone; captions: samples with one
    labels: class -> samples; sizes: "MODE WIDTHxHEIGHT" -> images
    shorter_sides: power of two that the shorter side of an image reaches -> images
    moments: image mode, or member of numbers -> mean and deviation of each channel; of images, in
        [-1, 1]; of embeddings, of all their numbers together
    problems: one sentence each; a bad shard is not looked into further, nor are those
        of a folder whose `dataset.json` is damaged
    """

    shards: int = 0
    checksums: int = 0
    samples: int = 0
    bytes: int = 0
    captions: int = 0
    labels: Counter[int] = field(default_factory=Counter)
    sizes: Counter[str] = field(default_factory=Counter)
    shorter_sides: Counter[int] = field(default_factory=Counter)
    moments: defaultdict[str, Moments] = field(default_factory=lambda: defaultdict(Moments))
    problems: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        moments = {name: {"mean": m.mean, "std": m.std} for name, m in self.moments.items()}
        return {**vars(self), "moments": moments}


def verify(pattern: str, *, classes: int | None) -> Report:
    """Read, check and decode every sample.

    Raises UserError if the pattern names no shard; what is wrong inside shards is reported.
    """
    report = Report()
    seen: dict[str, str] = {}
    urls = expand(pattern)
    described = {
        folder: _describe(folder, urls, report) for folder in dict.fromkeys(map(folder_of, urls))
    }
    for url in urls:
        report.shards += 1
        if (about := described[folder_of(url)]) is None:
            continue
        try:
            source = open_shard(url)
        except UserError as error:
            report.problems.append(str(error))
            continue
        if len(source) == 0:
            report.problems.append(f"{url}: holds no samples; pack it again or remove it")
        _check_sum(url, about, len(source), report)
        for sample in _samples(source, url, report):
            name = sample_name(url, sample.key)
            if sample.key in seen:
                # A key in two shards is one sample trained on twice.
                other = seen[sample.key]
                report.problems.append(f"{name} is also in {other}; remove one")
            seen[sample.key] = url
            _look(sample, name, about, classes, report)
        source.reader.close()
    return report


def _describe(folder: str, urls: Sequence[str], report: Report) -> Description | None:
    """What is said of a folder's shards, None if it cannot be read; problems of the whole folder are
    noted, and the shards it names that are not there."""
    try:
        about = read_description(folder) or Description()
    except UserError as error:
        report.problems.append(str(error))
        return None
    try:
        refuse_unfinished(folder)
    except UserError as error:
        report.problems.append(str(error))
        return about
    there = {url.rpartition("/")[2] for url in urls if folder_of(url) == folder}
    unseen = [name for name in about.shards if name not in there]
    sizes = in_threads(lambda name: size_if_there(f"{folder}/{name}"), unseen)
    report.problems += [
        f"{folder}/{name}: is in dataset.json and there is no such shard; put it back or pack again"
        for name, size in zip(unseen, sizes, strict=True)
        if size is None
    ]
    return about


def open_shard(pattern: str) -> TarSource:
    return TarSource(pattern, label_field=None, caption_field=None)


def _check_sum(url: str, about: Description, samples: int, report: Report) -> None:
    known = about.shards.get(url.rpartition("/")[2])
    if known is None:
        return
    if known.sha256 != sha256_of(url):
        report.problems.append(
            f"{url}: its content is not what dataset.json says (sha256); copy or make it again"
        )
    elif known.samples != samples:
        report.problems.append(
            f"{url}: has {samples} samples and dataset.json says {known.samples}; make it again"
        )
    else:
        report.checksums += 1


def _samples(source: TarSource, url: str, report: Report) -> Iterator[Sample]:
    for start in range(0, len(source), READ_AT_ONCE):
        part = range(start, min(start + READ_AT_ONCE, len(source)))
        try:
            yield from source.read(part)
        except UserError as error:
            report.problems.append(f"{url}: samples {part.start} to {part.stop - 1}: {error}")


def _look(
    sample: Sample, name: str, about: Description, classes: int | None, report: Report
) -> None:
    """Everything in one sample, each problem noted."""
    report.samples += 1
    images = [extension for extension in sample.members if extension in IMAGE_FILES]
    report.bytes += sum(len(sample.members[extension]) for extension in images)
    count = len(images) + (LATENT in sample.members)
    if count != 1:
        report.problems.append(
            f"{name} has {count or 'no'} image members and needs exactly one; pack the shard again"
        )
    for check in (
        _look_at_label, _look_at_caption, _look_at_record, _look_at_images, _look_at_arrays,
    ):  # fmt: skip
        try:
            check(sample, name, about, classes, report)
        except UserError as error:
            report.problems.append(str(error))


def _look_at_label(
    sample: Sample, name: str, _about: Description, classes: int | None, report: Report
) -> None:
    if LABEL not in sample.members:
        raise UserError(f"{name} has no label member (.{LABEL}); pack the shard again")
    report.labels[parse_label(sample.members[LABEL], name, classes)] += 1


def _look_at_caption(
    sample: Sample, name: str, _about: Description, _classes: int | None, report: Report
) -> None:
    if CAPTION not in sample.members:
        return
    report.captions += 1
    try:
        sample.members[CAPTION].decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: its caption is not UTF-8 ({error}); correct it") from error


def _look_at_record(
    sample: Sample, name: str, _about: Description, _classes: int | None, _report: Report
) -> None:
    if RECORD in sample.members:
        parse_record(sample.members[RECORD], name)


def _look_at_images(
    sample: Sample, name: str, _about: Description, _classes: int | None, report: Report
) -> None:
    for extension in IMAGE_FILES:
        if extension not in sample.members:
            continue
        image = load(read_picture(sample.members[extension], name))
        report.sizes[f"{image.mode} {image.width}x{image.height}"] += 1
        report.shorter_sides[1 << (min(image.size).bit_length() - 1)] += 1
        pixels = np.asarray(image, np.float64).reshape(image.height, image.width, -1)
        report.moments[image.mode].add(pixels.transpose(2, 0, 1)[None] / 127.5 - 1)


def _look_at_arrays(
    sample: Sample, name: str, about: Description, _classes: int | None, report: Report
) -> None:
    for member in (LATENT, TEXT, POOLED):
        if member not in sample.members:
            continue
        values = read_array(sample.members[member], f"{name}: {member}")
        if not np.isfinite(values).all():
            raise UserError(f"{name}: {member} has numbers that are not finite; encode it again")
        if not _fits(member, values.shape, about):
            raise UserError(
                f"{name}: {member} has shape {values.shape}, which dataset.json does not describe; "
                "encode its shard again"
            )
        channels = values[None] if member == LATENT else values.reshape(1, 1, -1)
        report.moments[member].add(channels)


def _fits(member: str, shape: tuple[int, ...], about: Description) -> bool:
    """Whether an array is of the shape that the description of its folder says."""
    latents, texts = about.latents, about.texts
    if member == LATENT:
        return latents is not None and shape == latents.shape
    if texts is None or len(shape) == 0:
        return False
    if member == POOLED:
        return shape == (texts.pooled,)
    return len(shape) == 2 and shape[0] <= texts.max_tokens and shape[1] == texts.width


def draw_grid(pattern: str, path: Path) -> None:
    """A picture of samples, evenly spaced through the shards; latents in colours of no meaning."""
    source = open_shard(pattern)
    shown = min(len(source), GRID * GRID)
    numbers = (np.arange(shown) * len(source) // max(shown, 1)).tolist()
    samples = source.read(numbers)
    source.reader.close()
    step = TILE + GAP
    side = (min(shown, GRID) * step + GAP, -(-shown // GRID) * step + GAP)
    grid = Image.new("RGB", side, "white")
    for number, sample in enumerate(samples):
        tile = _tile(sample).convert("RGB").resize((TILE, TILE), Image.Resampling.NEAREST)
        row, column = divmod(number, GRID)
        grid.paste(tile, (GAP + column * step, GAP + row * step))
    grid.save(path)


def _tile(sample: Sample) -> Image.Image:
    for extension in IMAGE_FILES:
        if extension in sample.members:
            return load(read_picture(sample.members[extension], sample.key))
    return _false_colours(read_array(sample.members[LATENT], sample.key))


def _false_colours(latent: NDArray[np.floating]) -> Image.Image:
    """The first three channels as red, green and blue, each spread over its range."""
    colours = np.resize(latent.astype(np.float64), (3, *latent.shape[1:]))
    mean, std = (f(colours, axis=(1, 2), keepdims=True) for f in (np.mean, np.std))
    spread = (colours - mean) / np.maximum(std, 1e-9) / SPREAD
    pixels = ((spread.clip(-1, 1) + 1) * 127.5).astype(np.uint8)
    return Image.fromarray(pixels.transpose(1, 2, 0))
