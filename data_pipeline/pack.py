"""Samples into WebDataset shards; the same samples give the same bytes, whenever and wherever."""

import io
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline.description import Shard, write_description
from data_pipeline.index import PICKLES
from data_pipeline.order import fold, permute
from data_pipeline.sources.archives import TarSource
from data_pipeline.sources.arrays import open_digits8, open_npz
from data_pipeline.sources.folders import FolderSource
from data_pipeline.sources.source import Sample, Source
from data_pipeline.sources.tables import TABLES, TableSource
from data_pipeline.storing import sha256_of
from flows.errors import UserError

DIGITS8 = "sklearn:digits"


@dataclass(frozen=True)
class Packed:
    """One shard that was written."""

    path: Path
    samples: int
    bytes: int
    sha256: str


def open_source(
    name: str, *, label_field: str | None, caption_field: str | None, image_field: str
) -> Source:
    """What `flowmill data pack` reads, by its name.

    A folder of class folders; `x.csv`, `x.jsonl` or `x.parquet` (patterns, too); `x.npz`; tars by path
    or pattern; or `sklearn:digits`.
    """
    if name == DIGITS8:
        return open_digits8()
    if name.endswith(".npz"):
        return open_npz(name)
    if name.endswith(".tar"):
        return TarSource(name, label_field=label_field, caption_field=caption_field)
    if name.endswith(TABLES):
        return TableSource(
            name, image_field=image_field, label_field=label_field, caption_field=caption_field
        )
    if Path(name).is_dir():
        return FolderSource(Path(name), label_field=label_field, caption_field=caption_field)
    raise UserError(
        f"{name}: cannot be packed; give a folder of images, a table ({', '.join(TABLES)}), an .npz "
        f"file, .tar shards or {DIGITS8}"
    )


def pack(
    source: Source, folder: Path, *, per_shard: int, heldout: int, shuffle: int | None
) -> list[Packed]:
    """Write `train-000000.tar`, ... and, from the last `heldout` samples, `heldout-000000.tar`, ...

    Beside them, `dataset.json` with their checksums and what the source says of itself.

    shuffle: a seed to shuffle all samples by first; None: as the source has them

    Raises UserError if nothing is left to train on, or the folder holds such shards already.
    """
    count = len(source)
    if not 0 <= heldout < count:
        raise UserError(f"{folder}: cannot hold out {heldout} of {count} samples; ask for fewer")
    order = np.arange(count)
    if shuffle is not None:
        order = permute(order, np.full(count, count), fold(shuffle))
    folder.mkdir(parents=True, exist_ok=True)
    if old := sorted([*folder.glob("train-*.tar"), *folder.glob("heldout-*.tar")]):
        raise UserError(f"{old[0]}: shards are in the way; remove them or name another folder")
    written = []
    numbers = order.tolist()
    for split, part in (
        ("train", numbers[: count - heldout]),
        ("heldout", numbers[count - heldout :]),
    ):
        for turn, start in enumerate(range(0, len(part), per_shard)):
            path = folder / f"{split}-{turn:06d}.tar"
            written.append(_write_shard(path, source, part[start : start + per_shard]))
    shards = {
        one.path.name: Shard(samples=one.samples, bytes=one.bytes, sha256=one.sha256)
        for one in written
    }
    write_description(str(folder), source.about.model_copy(update={"shards": shards}))
    return written


def _write_shard(path: Path, source: Source, numbers: Sequence[int]) -> Packed:
    """One shard, whole or not at all."""
    temporary = path.with_suffix(".tar.tmp")
    try:
        with tarfile.open(temporary, "w", format=tarfile.PAX_FORMAT) as archive:
            for number in numbers:
                add(archive, source[number])
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return Packed(path, len(numbers), path.stat().st_size, sha256_of(str(path)))


def add(archive: tarfile.TarFile, sample: Sample) -> None:
    """Append a sample; the same sample gives the same bytes."""
    for extension in sorted(sample.members):
        if extension.rpartition(".")[2] in PICKLES:
            raise UserError(f"sample {sample.key}: .{extension} is a pickle and is not packed")
        # TarInfo's own defaults name no owner, no machine and no time.
        member = tarfile.TarInfo(f"{sample.key}.{extension}")
        member.size = len(sample.members[extension])
        archive.addfile(member, io.BytesIO(sample.members[extension]))
