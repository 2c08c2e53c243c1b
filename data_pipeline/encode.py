"""Shards of images and captions to shards of latents and text embeddings, made once.

Each shard becomes one of the same name with the same keys in the same order, so that a run sees the
same samples at the same positions whichever it reads. Beside the shards:

- `.encoded/NAME.json`, written after its shard: what the shard was made of and by. Its key is a hash
  of the source's content, the networks' weights and the settings; a shard whose key is the one asked
  for is left alone, so a run that was cut short, or a source that changed, costs what is missing.
- `dataset.json`, written by whichever rank finds every shard done, and taken away while one is made
  anew: training finds either whole shards of one kind, or is told that there are none yet.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from pydantic import ValidationError

from data_pipeline.decode.decoder import open_decoder
from data_pipeline.description import (
    NAME,
    Description,
    Latents,
    Texts,
    folder_of,
    read_description,
    refuse_unfinished,
    write_description,
)
from data_pipeline.encoders.autoencoder import Autoencoder
from data_pipeline.encoders.job import Done, Job, Settings
from data_pipeline.encoders.shard import encode_shard
from data_pipeline.encoders.texts import open_text_encoder
from data_pipeline.index import look_at, signature_of
from data_pipeline.moments import Moments
from data_pipeline.shards import expand
from data_pipeline.storing import (
    names_in,
    read_if_there,
    remove_if_there,
    same_file,
    sha256_of,
    size_if_there,
    write_text,
)
from flows.errors import UserError

RECORDS = ".encoded"


def open_job(
    patterns: Sequence[str],
    out: str,
    settings: Settings,
    *,
    autoencoder: Path | None,
    text: str | None,
    threads: int,
    batch: int,
    skip_bad: bool,
    device: torch.device,
) -> Job:
    """Everything loaded that a job needs; the shards are those of all patterns.

    autoencoder: local folder of the network; text: see `open_text_encoder`; at least one

    Raises UserError for a network that cannot be loaded, or a size that it does not encode.
    """
    if autoencoder is None and text is None:
        raise UserError("nothing to encode by; give --autoencoder, --text, or both")
    sources = [url for pattern in patterns for url in expand(pattern)]
    for folder in {folder_of(source) for source in sources}:
        refuse_unfinished(folder)
    images = decoder = captions = None
    if autoencoder is not None:
        images = Autoencoder(autoencoder, precision=settings.precision, device=device)
        side = settings.image_size
        if side is None or side % images.factor:
            raise UserError(
                f"--image-size {side} does not divide into latents, each of {images.factor} pixels a "
                f"side; give a multiple of {images.factor}"
            )
        decoder = open_decoder(
            settings.decoder, channels=images.image_channels, threads=threads, device=device
        )  # fmt: skip
        settings = settings.model_copy(update={"decoder": decoder.name})
    if text is not None:
        captions = open_text_encoder(
            text, max_tokens=settings.max_tokens, precision=settings.precision, device=device
        )
    return Job(sources, out.rstrip("/"), settings, images, captions, decoder, batch, skip_bad)


@dataclass(frozen=True)
class Outcome:
    """A rank's shards: those that it made, and those that it found made."""

    made: list[Done]
    kept: list[Done]


def encode(job: Job, *, rank: int, ranks: int, report: Callable[[str, Outcome], None]) -> Outcome:
    """Encode shards `rank`, `rank + ranks`, ...; then describe the whole if it is complete.

    report: told of each shard's name when it is done, and of all that is done by then

    Raises UserError for samples that cannot be encoded and for a folder with shards of another kind.
    """
    _check(job)
    outcome = Outcome([], [])
    for source in job.sources[rank::ranks]:
        record = _current(job, source)
        if record is None:
            record = _make(job, source)
            outcome.made.append(record)
        else:
            outcome.kept.append(record)
        report(name_of(source), outcome)
    describe(job)
    return outcome


def name_of(source: str) -> str:
    """The file name of a shard, which its encoded shard has, too."""
    return source.rpartition("/")[2]


def read_done(out: str, name: str) -> Done | None:
    """How a shard was made; None if it is not finished, or its record is damaged."""
    content = read_if_there(f"{out}/{RECORDS}/{name}.json")
    try:
        return None if content is None else Done.model_validate_json(content)
    except ValidationError:
        return None


def read_records(out: str) -> tuple[Description, list[Done]]:
    """The description of encoded shards, and how each was made.

    Raises UserError if they are not complete.
    """
    description = read_description(out)
    if description is None:
        raise UserError(f"{out}: some shards are not encoded yet; run the same command again")
    records = [read_done(out, name) for name in description.shards]
    return description, [record for record in records if record is not None]


def describe(job: Job) -> Description | None:
    """Write `dataset.json` if all shards asked for are done; None if some are not yet."""
    records = {name: read_done(job.out, name) for name in _names_done(job)}
    asked = {name_of(source) for source in job.sources}
    done = {name: record for name, record in records.items() if record is not None}
    if not asked <= done.keys() or any(record.made_by != job.made_by for record in done.values()):
        return None
    known = read_description(folder_of(job.sources[0]))
    description = Description(
        class_names=known.class_names if known else (),
        shards={name: done[name].shard for name in sorted(done)},
        latents=_describe_latents(job, [done[name] for name in sorted(done)]),
        texts=_describe_texts(job),
    )
    if read_description(job.out) != description:
        write_description(job.out, description)
    return description


def _check(job: Job) -> None:
    """Raises UserError for two shards of one name, others of another kind, or a source in the way."""
    names = Counter(name_of(source) for source in job.sources)
    name, count = names.most_common(1)[0]
    if count > 1:
        raise UserError(
            f"{count} of the shards are called {name}; encode them into several folders"
        )
    for source in job.sources:
        if same_file(source, f"{job.out}/{name_of(source)}"):
            raise UserError(
                f"{source}: lies in the folder that is to hold encoded shards and would be replaced; name "
                "another folder"
            )
    for name in sorted(_names_done(job) - names.keys()):
        record = read_done(job.out, name)
        if record is not None and record.made_by != job.made_by:
            raise UserError(
                f"{job.out}/{name}: was encoded by other networks or options; encode its source anew, "
                "too, or name another folder"
            )


def _names_done(job: Job) -> set[str]:
    return {name.removesuffix(".json") for name in names_in(f"{job.out}/{RECORDS}", "*.json")}


def _current(job: Job, source: str) -> Done | None:
    """The record of a shard that need not be made again, else None."""
    old = read_done(job.out, name_of(source))
    if old is None or old.made_by != job.made_by or not _is_there(job, source, old):
        return None
    mark = signature_of(look_at(source))
    if (old.source, old.source_sign) == (source, mark):
        return old
    # The same bytes may have moved, or only been touched.
    checksum = sha256_of(source)
    if old.key != job.key(checksum):
        return None
    record = old.model_copy(update={"source": source, "source_sign": mark})
    write_text(_record_of(job, source), record.model_dump_json(indent=1) + "\n")
    return record


def _is_there(job: Job, source: str, old: Done) -> bool:
    return size_if_there(f"{job.out}/{name_of(source)}") == old.shard.bytes


def _make(job: Job, source: str) -> Done:
    """Encode a shard. Nothing says that it is there until it is, whole."""
    for url in (_record_of(job, source), f"{job.out}/{NAME}"):
        remove_if_there(url)
    mark = signature_of(look_at(source))
    checksum = sha256_of(source)
    record = encode_shard(job, source, f"{job.out}/{name_of(source)}", mark, checksum)
    write_text(_record_of(job, source), record.model_dump_json(indent=1) + "\n")
    return record


def _record_of(job: Job, source: str) -> str:
    return f"{job.out}/{RECORDS}/{name_of(source)}.json"


def _describe_latents(job: Job, done: list[Done]) -> Latents | None:
    """With mean and deviation of each channel over all shards."""
    encoded = [record for record in done if record.count]
    side = job.settings.image_size
    if job.autoencoder is None or side is None or not encoded:
        return None
    moments = Moments()
    for record in encoded:
        moments.join(Moments(record.count, np.array(record.total), np.array(record.squares)))
    channels, height, width = encoded[0].shape
    return Latents(
        autoencoder=job.autoencoder.fingerprint,
        image_size=side,
        decoder=job.settings.decoder,
        shape=(channels, height, width),
        dtype=job.settings.dtype,
        posterior=job.settings.posterior,
        shift=job.autoencoder.shift,
        scale=job.autoencoder.scale,
        mean=tuple(moments.mean),
        std=tuple(moments.std),
    )


def _describe_texts(job: Job) -> Texts | None:
    if job.text is None:
        return None
    return Texts(
        encoder=job.text.fingerprint,
        kind=job.text.kind,
        width=job.text.width,
        pooled=job.text.pooled,
        max_tokens=job.text.max_tokens,
        dtype=job.settings.dtype,
    )
