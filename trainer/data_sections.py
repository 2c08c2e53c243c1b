"""What a recipe says of its data."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag, field_validator

from data_pipeline.credentials import check_address, check_options
from trainer.section import Fraction, Positive, Ratio, Section, Share, Text


def _scalar(value: object) -> object:
    if not isinstance(value, bool | int | float | str | None):
        raise ValueError(f"{value!r} is not text, a number, true, false or null; give one of these")
    return value


Scalar = Annotated[Any, AfterValidator(_scalar)]


class StorageSection(Section):
    """How shards are reached. Credentials come from the environment: no recipe holds a secret."""

    options: dict[str, dict[str, Any]] = Field(
        {},
        description="protocol -> options of its fsspec driver, as s3: {endpoint_url: ...}; what may "
        "be secret is written env:VARIABLE",
    )
    timeout_seconds: Annotated[float, Field(gt=0)] = Field(
        60.0, description="a request that takes longer is sent again"
    )
    attempts: Positive = Field(6, description="times a request is sent, with growing pauses")
    requests: Positive = Field(16, description="requests in flight a rank")

    @field_validator("options", mode="before")
    @classmethod
    def _no_secrets(cls, options: Any) -> Any:
        """Checked first, and by itself, for other messages would show the value."""
        if not isinstance(options, dict) or not all(isinstance(o, dict) for o in options.values()):
            raise ValueError("not options by protocol; write s3: {endpoint_url: ...} or the like")
        check_options(options)
        return options


class AugmentSection(Section):
    """How training images may be changed; all of it is decided by seed and place in the stream."""

    crop: Literal["centre", "random"] = Field(
        "centre", description="centre: all that fits of each image; random: a part of it"
    )
    scale: tuple[Share, Share] = Field(
        (0.5, 1.0), description="random: smallest and largest share of the image's area"
    )
    aspect: tuple[Ratio, Ratio] = Field(
        (0.75, 1.3333), description="random: smallest and largest width over height"
    )
    flip: Fraction = Field(0.0, description="probability of a horizontal flip")

    @field_validator("scale", "aspect")
    @classmethod
    def _ascending(cls, bounds: tuple[float, float]) -> tuple[float, float]:
        if bounds[0] > bounds[1]:
            raise ValueError(
                "the larger of its two numbers comes first; write the smaller one first"
            )
        return bounds


class SourceSection(Section):
    url: Text = Field(description="shards: a path or URL with {00..07} braces or *")
    weight: Annotated[float, Field(gt=0)] = Field(1.0, description="how often it is drawn")

    @field_validator("url")
    @classmethod
    def _no_secrets_in_address(cls, address: str) -> str:
        check_address(address)
        return address


# One data set by its URL alone, or several mixed.
PATTERN, MIXTURE = "(one)", "(several)"
Sources = Annotated[
    Annotated[Text, Tag(PATTERN)]
    | Annotated[list[SourceSection], Field(min_length=1), Tag(MIXTURE)],
    Discriminator(lambda value: MIXTURE if isinstance(value, list) else PATTERN),
]


class TextSection(Section):
    """Embedded captions, made by `flowmill data encode`."""

    member: Text = Field(
        description="extension of the shards' member that holds them, e.g. text.npy"
    )
    tokens: Positive = Field(
        description="words a sample; longer texts are cut, shorter ones padded"
    )
    width: Positive = Field(description="numbers a word")
    encoder: Text | None = Field(
        None,
        description="what embedded them, to embed prompts alike: hashed:WIDTH, or a local folder",
    )


class DataSection(Section):
    train: Sources = Field(
        description="shards to train on: a path or URL with {00..07} braces or *, or several as a "
        "list of {url, weight}, each with epochs of its own"
    )
    keep: dict[str, Annotated[list[Scalar], Field(min_length=1)]] = Field(
        {}, description="train on samples alone whose label (cls) or .json field is one of these"
    )
    heldout: Text | None = Field(None, description="shards kept for evaluation")
    image_size: Positive = Field(
        description="side of the squares the model sees, in pixels or latents"
    )
    channels: Positive = Field(3, description="1 or 3 of images; of latents, the autoencoder's")
    latents: bool = Field(
        False, description="train on the latents that `flowmill data encode` put in the shards"
    )
    autoencoder: Text | None = Field(
        None, description="local folder of the latents' autoencoder, to make pictures of samples"
    )
    text: TextSection | None = Field(None, description="condition on embedded captions, too")
    classes: Positive
    class_names: list[str] | None = Field(None, description="for pictures and tables")
    augment: AugmentSection = AugmentSection()
    lanes: Positive = Field(
        64, description="independent readers of the global order; fixes the order"
    )
    window: Positive = Field(256, description="samples shuffled together within a lane")
    decoder: Literal["auto", "dali", "pillow"] = "auto"
    prefetch: Positive = Field(
        2, description="batches read, and as many decoded, ahead of the step"
    )
    threads: Positive = Field(2, description="decoding threads a rank")
    storage: StorageSection = StorageSection()
    cache_dir: str | None = Field(
        None, description="local folder for blocks of remote shards, shared by a machine's ranks"
    )
    cache_bytes: Annotated[int, Field(ge=1)] = Field(
        64 * 2**30, description="most that data.cache_dir holds"
    )
    max_bad_fraction: Fraction = Field(
        0.0, description="bad samples an epoch, and shards, that are replaced or left out; 0: none"
    )

    @field_validator("train", "heldout")
    @classmethod
    def _no_secrets_in_addresses(cls, address: Any) -> Any:
        if isinstance(address, str):
            check_address(address)
        return address

    @property
    def sources(self) -> list[tuple[str, float]]:
        """Shards and weight of each data set trained on."""
        if isinstance(self.train, str):
            return [(self.train, 1.0)]
        return [(source.url, source.weight) for source in self.train]

    @property
    def names(self) -> list[str]:
        """A name for each class, its number where the recipe gives none."""
        return self.class_names or [str(label) for label in range(self.classes)]


def check_latents(data: DataSection, pictures: bool) -> None:
    """Raises ValueError for keys of the data that do not go with images, or not with latents."""
    if not data.latents:
        if data.channels not in (1, 3):
            raise ValueError(
                f"data.channels = {data.channels}, and images have 1 or 3; set one of them, or "
                "data.latents=true for shards of latents"
            )
        if data.autoencoder is not None:
            raise ValueError(
                "data.autoencoder is given, and the model is trained on images; set data.latents=true "
                "or drop it"
            )
    elif data.augment.flip:
        raise ValueError(
            f"data.augment.flip = {data.augment.flip}, and the mirror image of a latent is not the latent "
            "of the mirror image; set data.augment.flip=0"
        )
    elif data.augment.crop == "random":
        raise ValueError(
            "data.augment.crop = random, and a part of a latent is not the latent of a part of the "
            "image; set data.augment.crop=centre"
        )
    elif pictures and data.autoencoder is None:
        raise ValueError(
            "sample.every asks for pictures, which latents become by their autoencoder alone; set "
            "data.autoencoder to its folder, or sample.every=0"
        )
