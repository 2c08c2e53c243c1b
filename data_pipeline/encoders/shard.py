"""One shard: its samples are read and decoded a batch ahead, encoded, and written with their keys."""

import hashlib
import tarfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_pipeline.decode.decoder import decode_middle
from data_pipeline.description import Shard
from data_pipeline.encoders.autoencoder import Autoencoder
from data_pipeline.encoders.job import Done, Job
from data_pipeline.headers import sample_name
from data_pipeline.index import IMAGE_FILES, LATENT
from data_pipeline.latents import POOLED, TEXT, write_array
from data_pipeline.moments import Moments
from data_pipeline.pack import add
from data_pipeline.sources.archives import TarSource
from data_pipeline.sources.source import Sample
from data_pipeline.storing import sha256_of, written_whole
from flows.errors import UserError
from flows.randomness import Draw

CAPTION = "txt"

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Loaded:
    """A few samples, ready for the networks.

    names: "URL: sample KEY" of each, for messages
    images: (batch, channels, height, width) in [-1, 1]; None without an autoencoder
    dropped: why samples of the same batch are not among them
    """

    samples: list[Sample]
    names: list[str]
    images: Tensor | None
    dropped: list[str]


@dataclass
class Tally:
    """What accumulates over a shard."""

    samples: int = 0
    shape: tuple[int, ...] = ()
    moments: Moments = field(default_factory=Moments)
    captions_cut: int = 0
    dropped: list[str] = field(default_factory=list)


def encode_shard(job: Job, source: str, out: str, mark: str, checksum: str) -> Done:
    """Write the encoded shard of `source` to `out`, whole or not at all.

    mark, checksum: the source's change mark and sha256, for the record

    Raises UserError naming a sample that cannot be encoded, unless the job skips those.
    """
    samples = TarSource(source, label_field=None, caption_field=None)
    numbers = [
        range(start, min(start + job.batch, len(samples)))
        for start in range(0, len(samples), job.batch)
    ]
    tally = Tally()
    with written_whole(out) as path:
        with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
            for loaded in _ahead(lambda part: _load(job, source, samples.read(part)), numbers):
                for sample in _encode(job, loaded, tally):
                    add(archive, sample)
        shard = Shard(samples=tally.samples, bytes=path.stat().st_size, sha256=sha256_of(str(path)))
    samples.reader.close()
    return Done(
        key=job.key(checksum),
        made_by=job.made_by,
        source=source,
        source_sign=mark,
        source_sha256=checksum,
        shard=shard,
        shape=tally.shape,
        count=tally.moments.count,
        total=tuple(tally.moments.total.tolist()),
        squares=tuple(tally.moments.squares.tolist()),
        captions_cut=tally.captions_cut,
        dropped=tuple(tally.dropped),
    )


def _ahead(function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
    """function(item) of each item, in order, the next one worked out while this one is used."""
    with ThreadPoolExecutor(1, thread_name_prefix="encode") as thread:
        waiting = [thread.submit(function, item) for item in items[:1]]
        for item in items[1:]:
            waiting.append(thread.submit(function, item))
            yield waiting.pop(0).result()
        for last in waiting:
            yield last.result()


def _load(job: Job, source: str, samples: list[Sample]) -> Loaded:
    """Images of a batch; where one is bad, of each sample alone, without the bad ones."""
    names = [sample_name(source, sample.key) for sample in samples]
    try:
        for sample, name in zip(samples, names, strict=True):
            _require(job, sample, name)
        return Loaded(samples, names, _decode(job, samples, names), [])
    except UserError as error:
        if not job.skip_bad:
            raise
        if len(samples) == 1:
            return Loaded([], [], None, [str(error)])
    parts = [_load(job, source, [sample]) for sample in samples]
    images = [part.images for part in parts if part.images is not None]
    return Loaded(
        [sample for part in parts for sample in part.samples],
        [name for part in parts for name in part.names],
        torch.cat(images) if images else None,
        [reason for part in parts for reason in part.dropped],
    )


def _require(job: Job, sample: Sample, name: str) -> None:
    if job.autoencoder is not None and len(_images_of(sample)) != 1:
        raise UserError(
            f"{name} has {len(_images_of(sample)) or 'no'} image members and needs exactly one; pack "
            "the shard again"
        )
    if job.text is not None:
        if CAPTION not in sample.members:
            raise UserError(
                f"{name} has no caption (.{CAPTION}); add one, or encode without --text"
            )
        try:
            sample.members[CAPTION].decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{name}: its caption is not UTF-8 ({error}); correct it") from error


def _images_of(sample: Sample) -> list[str]:
    return [extension for extension in sample.members if extension in IMAGE_FILES]


def _decode(job: Job, samples: list[Sample], names: list[str]) -> Tensor | None:
    if job.decoder is None:
        return None
    encoded = [sample.members[_images_of(sample)[0]] for sample in samples]
    side = job.settings.image_size
    assert side is not None
    return decode_middle(job.decoder, encoded, names, (side, side))


def _encode(job: Job, loaded: Loaded, tally: Tally) -> list[Sample]:
    """The samples with their latents and embeddings in the place of their images."""
    tally.dropped += loaded.dropped
    tally.samples += len(loaded.samples)
    if not loaded.samples:
        return []
    made: list[dict[str, bytes]] = [{} for _ in loaded.samples]
    if job.autoencoder is not None and loaded.images is not None:
        latents = _stored(
            job, _latents(job, job.autoencoder, loaded.images, loaded.samples), loaded.names
        )
        tally.shape = latents.shape[1:]
        tally.moments.add(latents)
        _put(made, LATENT, latents)
    if job.text is not None:
        embedded = job.text.encode([s.members[CAPTION].decode() for s in loaded.samples])
        tally.captions_cut += embedded.cut
        _put(made, TEXT, [_stored(job, row, loaded.names) for row in embedded.tokens])
        if embedded.pooled is not None:
            _put(made, POOLED, _stored(job, embedded.pooled, loaded.names))
    dropped = () if job.autoencoder is None else (*IMAGE_FILES, LATENT)
    return [
        Sample(
            sample.key,
            {e: c for e, c in sample.members.items() if e not in dropped} | members,
        )
        for sample, members in zip(loaded.samples, made, strict=True)
    ]


def _latents(job: Job, autoencoder: Autoencoder, images: Tensor, samples: list[Sample]) -> Tensor:
    """(batch, channels, height, width) float32, as the autoencoder gives them."""
    mean, std = autoencoder.encode(images)
    if job.settings.posterior == "mean":
        return mean
    # Noise by key: the same wherever the sample lies, and whichever rank encodes it.
    hashes = [hashlib.sha256(sample.key.encode()).digest() for sample in samples]
    ids = torch.tensor([int.from_bytes(h[:8], "big") >> 1 for h in hashes], device=mean.device)
    return mean + std * Draw(0, 0, ids).normal("posterior", tuple(mean.shape[1:]))


def _put(
    made: list[dict[str, bytes]],
    extension: str,
    values: Sequence[NDArray[np.floating]] | NDArray[np.floating],
) -> None:
    for members, value in zip(made, values, strict=True):
        members[extension] = write_array(value)


def _stored(job: Job, values: Tensor, names: Sequence[str]) -> NDArray[np.floating]:
    """In the type of the shards; raises UserError if a number is not finite in it."""
    stored: NDArray[np.floating] = values.cpu().numpy().astype(job.settings.dtype)
    if not np.isfinite(stored).all():
        raise UserError(
            f"{names[0]}: this sample or one of the next {len(names) - 1} encodes to numbers that are "
            f"not finite in {job.settings.dtype}; use float32 and precision fp32"
        )
    return stored
