"""What encoding is asked to do, and the record of what it did to one shard."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from data_pipeline.decode.decoder import Decoder
from data_pipeline.description import Record, Shard
from data_pipeline.encoders.autoencoder import Autoencoder
from data_pipeline.encoders.hashed import HashedWords
from data_pipeline.encoders.texts import TextEncoder

# Raised whenever the same inputs would give other bytes.
VERSION = 1


class Settings(Record):
    """All that decides the bytes of encoded shards, beside the source and the networks.

    image_size, decoder: how images are read; without an autoencoder they are not
    posterior: keep the mean of each latent's distribution, or one sample drawn by the sample's key
    """

    image_size: int | None
    decoder: Literal["auto", "dali", "pillow"]
    dtype: Literal["float32", "float16"]
    precision: Literal["fp32", "bf16"]
    posterior: Literal["mean", "sample"]
    max_tokens: int


class Done(Record):
    """How one shard was made.

    key: hash of source content, networks and settings; made_by: of networks and settings alone
    source_sign: the source's size and change mark when its sha256 was taken
    count, total, squares: numbers a channel, their sum and the sum of their squares, each channel
    captions_cut: captions longer than the text encoder reads
    dropped: bad samples left out, one sentence each
    """

    key: str
    made_by: str
    source: str
    source_sign: str
    source_sha256: str
    shard: Shard
    shape: tuple[int, ...] = ()
    count: int = 0
    total: tuple[float, ...] = ()
    squares: tuple[float, ...] = ()
    captions_cut: int = 0
    dropped: tuple[str, ...] = ()


@dataclass(frozen=True)
class Job:
    """What is to be encoded, where to, and by what; the same on every rank.

    sources: shards, by URL
    out: folder of the encoded shards, on any storage
    batch: samples a call of the networks; changes nothing but rounding
    skip_bad: leave samples out whose image or caption is bad, in place of stopping
    """

    sources: Sequence[str]
    out: str
    settings: Settings
    autoencoder: Autoencoder | None
    text: TextEncoder | HashedWords | None
    decoder: Decoder | None
    batch: int
    skip_bad: bool

    @property
    def made_by(self) -> str:
        """Hash of networks and settings."""
        networks = [net and net.fingerprint for net in (self.autoencoder, self.text)]
        return digest(VERSION, *networks, self.settings.model_dump())

    def key(self, source_sha256: str) -> str:
        """Names the encoded shard of a source with this content."""
        return digest(source_sha256, self.made_by)


def digest(*facts: Any) -> str:
    """Hash of plain data."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
