"""`dataset.json` beside the shards: what a data set holds, and the checksums of its shards."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from data_pipeline.storing import read_if_there, size_if_there, write_text
from flows.errors import UserError

NAME = "dataset.json"
# Lies beside shards while they are packed.
UNFINISHED = "unfinished.txt"


class Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Shard(Record):
    """sha256: of the whole file"""

    samples: int
    bytes: int
    sha256: str


class Latents(Record):
    """What the `.latent.npy` members are: an autoencoder's codes as it gave them, not yet scaled.

    autoencoder: hash of its configuration and weights
    image_size: side of the square images that were encoded
    shape: (channels, height, width) of every latent
    posterior: whether the mean was kept, or one sample by the sample's key
    shift, scale: the model is trained on (latent - shift) * scale
    mean, std: of each channel over all shards, before shift and scale
    """

    autoencoder: str
    image_size: int
    decoder: str
    shape: tuple[int, int, int]
    dtype: Literal["float32", "float16"]
    posterior: Literal["mean", "sample"]
    shift: float
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]


class Texts(Record):
    """What the `.text.npy` members are: (tokens, width) last hidden states of a text encoder, or its words.

    encoder: hash of its configuration, weights and tokenizer
    kind: t5, clip or hashed
    pooled: width of the `.pooled.npy` members, where the encoder gives one vector a caption
    """

    encoder: str
    kind: str
    width: int
    pooled: int | None
    max_tokens: int
    dtype: Literal["float32", "float16"]


class Description(Record):
    """shards: by file name; class_names: what classes 0, 1, ... are called, where that is known"""

    version: Literal[1] = 1
    class_names: tuple[str, ...] = ()
    shards: dict[str, Shard] = {}
    latents: Latents | None = None
    texts: Texts | None = None


def folder_of(url: str) -> str:
    """The folder a shard lies in."""
    return url.rpartition("/")[0] or "."


def read_description(folder: str) -> Description | None:
    """The description in a folder, None if there is none; raises UserError if it is damaged."""
    content = read_if_there(f"{folder}/{NAME}")
    if content is None:
        return None
    try:
        return Description.model_validate_json(content)
    except ValidationError as error:
        count = error.error_count()
        errors = "1 error" if count == 1 else f"{count} errors"
        raise UserError(
            f"{folder}/{NAME}: is not a description of shards ({errors}, the first: "
            f"{error.errors()[0]['msg']}); make it anew"
        ) from error


def refuse_unfinished(folder: str) -> None:
    """Raises UserError for a folder that is being packed, or whose packing was interrupted."""
    try:
        size = size_if_there(f"{folder}/{UNFINISHED}")
    except UserError:
        return  # some storages forbid to ask for what is not there
    if size is not None:
        raise UserError(
            f"{folder}: flowmill data pack has not ended here, and shards are missing; empty the folder "
            "and pack again"
        )


def write_description(folder: str, description: Description) -> None:
    """Write `dataset.json`; the same description gives the same bytes."""
    write_text(f"{folder}/{NAME}", description.model_dump_json(indent=1) + "\n")
