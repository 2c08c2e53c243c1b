"""JPEG shards for loader benchmarks, the same wherever made: embedded pictures, enlarged and noisy."""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data_pipeline.description import Description
from data_pipeline.pack import pack
from data_pipeline.samples import Samples
from data_pipeline.sources.source import Sample

PICTURES = "embedded:emoji64/train-*.tar"
# So many pictures are encoded; samples beyond take them again, for decoding costs the same.
DISTINCT = 256
QUALITY = 90
# Noise makes the files as large as photographs of this size and quality: about 27 kB at 256 x 256.
NOISE = 16.0


@dataclass(frozen=True)
class Shards:
    """Shards in a folder: sample n has the n-th JPEG, its number as label, and n as key.

    jpegs: the distinct files, taken in turn
    """

    folder: Path
    tars: list[str]
    samples: int
    size: int
    jpegs: list[bytes]

    @property
    def pattern(self) -> str:
        return str(self.folder / "train-*.tar")

    def decoded(self, number: int) -> Tensor:
        """(3, size, size) float32 in [-1, 1] of sample `number`, as pillow decodes it."""
        image = Image.open(io.BytesIO(self.jpegs[number % len(self.jpegs)]))
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        return pixels.float().div_(127.5).sub_(1.0)


class Numbered:
    """A source for `pack`: JPEGs in turn, each sample labelled with its number."""

    about = Description()

    def __init__(self, jpegs: list[bytes], samples: int) -> None:
        self.jpegs, self.samples = jpegs, samples

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, number: int) -> Sample:
        content = self.jpegs[number % len(self.jpegs)]
        return Sample(f"{number:07d}", {"jpg": content, "cls": str(number).encode()})


def make_shards(folder: Path, *, samples: int, size: int, shards: int) -> Shards:
    """Write `samples` JPEGs of `size` x `size` pixels into about `shards` tars in `folder`."""
    jpegs = draw_jpegs(min(samples, DISTINCT), size)
    per_shard = -(-samples // shards)
    written = pack(
        Numbered(jpegs, samples), str(folder), per_shard=per_shard, heldout=0, shuffle=None
    )
    return Shards(folder, [shard.path for shard in written], samples, size, jpegs)


def draw_jpegs(count: int, size: int) -> list[bytes]:
    """`count` JPEG files of `size` x `size` pixels."""
    pictures = Samples(PICTURES, classes=None)
    first = np.arange(count)
    ends = np.cumsum(pictures.sizes)
    shard = np.searchsorted(ends, first, side="right")
    encoded = pictures.read(shard, first - (ends[shard] - np.array(pictures.sizes)[shard]))
    pictures.close()
    random = np.random.default_rng(0)
    files = []
    for content in encoded.images:
        image = Image.open(io.BytesIO(content)).convert("RGB")
        pixels = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC), np.float64)
        noisy = np.clip(pixels + random.normal(0.0, NOISE, pixels.shape), 0, 255)
        buffer = io.BytesIO()
        Image.fromarray(noisy.astype(np.uint8)).save(buffer, "JPEG", quality=QUALITY)
        files.append(buffer.getvalue())
    return files
