"""Samples into WebDataset shards; the same samples give the same bytes, whenever and wherever."""

import io
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline.description import UNFINISHED, Shard, write_description
from data_pipeline.headers import printable
from data_pipeline.index import PICKLES
from data_pipeline.order import fold, permute
from data_pipeline.samples import LABEL, parse_label
from data_pipeline.sources.archives import TarSource
from data_pipeline.sources.arrays import open_digits8, open_npz
from data_pipeline.sources.folders import FolderSource
from data_pipeline.sources.source import Sample, Source, check_name
from data_pipeline.sources.tables import TABLES, TableSource
from data_pipeline.storing import (
    names_in,
    remove_if_there,
    sha256_of,
    size_if_there,
    write_text,
    written_whole,
)
from flows.errors import UserError

DIGITS8 = "sklearn:digits"


@dataclass(frozen=True)
class Packed:
    """One shard that was written."""

    path: str
    samples: int
    bytes: int
    sha256: str


def open_source(
    name: str, *, label_field: str | None, caption_field: str | None, image_field: str
) -> Source:
    """What `flowmill data pack` reads, by its name.

    A folder of class folders; `x.csv`, `x.jsonl` or `x.parquet` (patterns, too); `x.npz`; tars by path
    or pattern; or `sklearn:digits`.

    Raises UserError for what is none of these, or holds no samples.
    """
    source = _open(name, label_field, caption_field, image_field)
    if len(source) == 0:
        raise UserError(
            f"{name}: holds no samples, so there is nothing to pack; name another source"
        )
    return source


def _open(
    name: str, label_field: str | None, caption_field: str | None, image_field: str
) -> Source:
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
    source: Source, folder: str, *, per_shard: int, heldout: int, shuffle: int | None
) -> list[Packed]:
    """Write `train-000000.tar`, ... and, from the last `heldout` samples, `heldout-000000.tar`, ...

    Beside them, `dataset.json` with their checksums and what the source says of itself.

    folder: its path or URL
    shuffle: a seed to shuffle all samples by first; None: as the source has them

    Raises UserError if nothing is left to train on, the folder holds such shards already, or a sample
    cannot be packed; then no shard is left there.
    """
    count = len(source)
    if not 0 <= heldout < count:
        raise UserError(f"{folder}: cannot hold out {heldout} of {count} samples; ask for fewer")
    order = np.arange(count)
    if shuffle is not None:
        order = permute(order, np.full(count, count), fold(shuffle))
    numbers = order.tolist()
    parts = {"train": numbers[: count - heldout], "heldout": numbers[count - heldout :]}
    shards = {
        f"{split}-{turn:06d}.tar": part[start : start + per_shard]
        for split, part in parts.items()
        for turn, start in enumerate(range(0, len(part), per_shard))
    }
    folder = folder.rstrip("/") or "/"
    _refuse_old(folder)
    mark = f"{folder}/{UNFINISHED}"
    write_text(mark, "Some of the shards here are missing: flowmill data pack has not ended.\n")
    try:
        written = _write_all(source, folder, shards)
    except BaseException:
        for url in (*(f"{folder}/{name}" for name in shards), mark):
            remove_if_there(url)
        raise
    remove_if_there(mark)
    return written


def _refuse_old(folder: str) -> None:
    """Raises UserError for shards that would be replaced or mixed with others."""
    if size_if_there(f"{folder}/{UNFINISHED}") is not None:
        raise UserError(
            f"{folder}: packing into it was interrupted, or goes on elsewhere; remove train-*.tar, "
            f"heldout-*.tar and {UNFINISHED} from it, or name another folder"
        )
    if old := [*names_in(folder, "train-*.tar"), *names_in(folder, "heldout-*.tar")]:
        raise UserError(
            f"{folder}/{old[0]}: shards are in the way; remove them or name another folder"
        )


def _write_all(source: Source, folder: str, shards: Mapping[str, Sequence[int]]) -> list[Packed]:
    """Shards, by name the numbers of their samples, and their description."""
    written = [
        _write_shard(f"{folder}/{name}", source, numbers) for name, numbers in shards.items()
    ]
    described = {
        name: Shard(samples=one.samples, bytes=one.bytes, sha256=one.sha256)
        for name, one in zip(shards, written, strict=True)
    }
    write_description(folder, source.about.model_copy(update={"shards": described}))
    return written


def _write_shard(url: str, source: Source, numbers: Sequence[int]) -> Packed:
    """One shard, whole or not at all."""
    with written_whole(url) as path:
        with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
            for number in numbers:
                add(archive, _checked(source[number]))
        return Packed(url, len(numbers), path.stat().st_size, sha256_of(str(path)))


def _checked(sample: Sample) -> Sample:
    """The sample; raises UserError for a name, a label or a caption that nobody could read again."""
    check_name(sample.key, "a sample's key")
    name = f"sample {sample.key}"
    if LABEL in sample.members:
        parse_label(sample.members[LABEL], name, None)
    try:
        sample.members.get("txt", b"").decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: its caption is not UTF-8 ({error}); correct it") from error
    return sample


def add(archive: tarfile.TarFile, sample: Sample) -> None:
    """Append a sample; the same sample gives the same bytes."""
    for extension in sorted(sample.members):
        if extension.rpartition(".")[2] in PICKLES:
            raise UserError(
                f"sample {printable(sample.key)}: .{extension} is a pickle and is not packed"
            )
        # TarInfo's own defaults name no owner, no machine and no time.
        member = tarfile.TarInfo(f"{sample.key}.{extension}")
        member.size = len(sample.members[extension])
        archive.addfile(member, io.BytesIO(sample.members[extension]))
