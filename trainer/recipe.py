"""The recipe: everything that decides a run, in one typed record; the only home of defaults.

A recipe is read from YAML, changed by `section.key=value` overrides, checked as a whole, and
written back, complete, into the run's folder. Nothing in the environment changes the mathematics.
"""

import difflib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    create_model,
    field_validator,
    model_validator,
)

from data_pipeline.credentials import check_address, check_options
from flows.errors import UserError
from flows.models.family import Kind
from flows.models.zoo import FAMILIES
from trainer.flow_sections import InversionSection, LikelihoodSection
from trainer.model_section import ModelSection, chosen_family, section_of
from trainer.refusals import refusals
from trainer.section import (
    AnyObjective,
    AnySampling,
    Below1,
    Fraction,
    Positive,
    Ratio,
    Section,
    Share,
    Text,
)
from trainer.token_sections import DiscreteSection, JumpSection
from trainer.velocity_sections import ObjectiveSection
from trainer.yaml_text import parse_yaml, read_yaml


def _scalar(value: object) -> object:
    if not isinstance(value, bool | int | float | str | None):
        raise ValueError(f"{value!r} is not text, a number, true, false or null; give one of these")
    return value


Scalar = Annotated[Any, AfterValidator(_scalar)]


class RunSection(Section):
    dir: Text = Field(description="folder of this run; a checkpoint in it is resumed")

    @field_validator("dir")
    @classmethod
    def _home(cls, value: str) -> str:
        """`~/` means the same here as it does to a shell, which does not look behind `run.dir=`."""
        return str(Path(value).expanduser()) if value.startswith("~/") else value


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


class OptimizerSection(Section):
    kind: Literal["adamw"] = "adamw"
    lr: Annotated[float, Field(gt=0)] = 1e-3
    betas: tuple[Below1, Below1] = (0.9, 0.99)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    warmup: Annotated[int, Field(ge=0)] = Field(100, description="steps of linear warm-up")
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    final_lr: Annotated[float, Field(ge=0)] = Field(
        0.0, description="learning rate of the last step"
    )
    clip: Annotated[float, Field(gt=0)] | None = Field(1.0, description="largest gradient norm")


class TrainSection(Section):
    steps: Annotated[int, Field(ge=0, lt=2**31)] = Field(
        0, description="0: the length is given in samples or epochs"
    )
    samples: Annotated[int, Field(ge=0, lt=2**63)] = Field(
        0, description="in place of steps; rounded up"
    )
    epochs: Annotated[float, Field(ge=0)] = Field(
        0.0, description="in place of steps: passes over the one data set; rounded up to a step"
    )
    batch: Positive = Field(description="samples a step over all ranks: the batch of the science")
    microbatch: Positive | None = Field(
        None, description="samples a forward on one rank; null: the rank's whole share"
    )
    precision: Literal["fp32", "bf16"] = "fp32"
    checkpoint_activations: Annotated[int, Field(ge=0)] = Field(
        0, description="recompute every n-th block in backward; 0: none, 1: all"
    )
    compile: bool = False
    deterministic: bool = False
    max_skipped: Annotated[int, Field(ge=0)] = Field(
        10, description="steps with a non-finite gradient in a row before training stops"
    )
    ema: list[Annotated[float, Field(gt=0, lt=1)]] = Field(
        [0.999], description="decays of the averaged weights; the first is used to sample"
    )
    log_every: Positive = Field(10, description="steps between progress lines")

    @model_validator(mode="after")
    def _one_length(self) -> "TrainSection":
        given = [name for name in ("steps", "samples", "epochs") if getattr(self, name)]
        if len(given) != 1:
            found = " and ".join(f"train.{name}" for name in given) or "nothing"
            raise ValueError(
                f"{found} says how long to train; give exactly one of train.steps, train.samples "
                "and train.epochs, and 0 for the others"
            )
        return self


class DeepSpeedSection(Section):
    """ZeRO. A key that is null is as the user's own JSON says, where there is one."""

    stage: Literal[0, 1, 2, 3] | None = Field(
        None, description="what is cut: 1 optimizer, 2 gradients too, 3 parameters too; null: 2"
    )
    offload_optimizer: bool | None = Field(None, description="keep the optimizer on the host")
    offload_parameters: bool | None = Field(None, description="and the parameters; stage 3 alone")
    config: Text | None = Field(
        None, description="path of a DeepSpeed JSON with further keys; what it repeats must agree"
    )


class ParallelSection(Section):
    engine: Literal["native", "deepspeed", "accelerate"] = Field(
        "native", description="what moves the model; none of them changes the mathematics"
    )
    strategy: Literal["none", "ddp", "fsdp", "hsdp"] | None = Field(
        None, description="null: none on one rank, fsdp on several"
    )
    replicate: Positive | None = Field(
        None, description="whole copies of the model; null: inferred"
    )
    shard: Positive | None = Field(None, description="ranks one copy is cut over; null: inferred")
    reshard_after_forward: bool = True
    timeout_seconds: Positive = Field(300, description="a collective that takes longer is an error")
    deepspeed: DeepSpeedSection = DeepSpeedSection()

    @model_validator(mode="after")
    def _keys_of_the_engine(self) -> "ParallelSection":
        """A key that another engine would follow must not be passed over in silence."""
        others = {
            "native": {"deepspeed"},
            "deepspeed": {"strategy", "replicate", "shard", "reshard_after_forward"},
            "accelerate": {"deepspeed", "replicate", "shard"},
        }[self.engine]
        for name in sorted(others):
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(
                    f"parallel.{name} is given, and parallel.engine = {self.engine} has no use for it; "
                    "drop it, or choose another engine"
                )
        return self


class CheckpointSection(Section):
    every: Positive = 500
    keep: Positive = Field(2, description="newest checkpoints kept")


class SampleSection(AnySampling):
    """Of a velocity model: solving its differential equation."""

    solver: Literal[
        "euler", "heun", "midpoint", "rk4", "pseudo_corrector", "dopri5", "sde", "sde_heun"
    ] = "euler"
    steps: Positive = Field(20, description="solver steps from noise to data")
    times: list[float] | None = Field(
        None, description="in place of steps and time_shift: times from 0, noise, to 1"
    )
    guidance_low: Fraction = Field(0.0, description="guided where low <= t < high")
    guidance_high: Fraction = 1.0
    guidance_channels: Positive | None = Field(
        None, description="guide the first channels alone, DiT the first 3; null: all"
    )
    guidance_cosine: Annotated[float, Field(ge=-1.0, le=1.0)] | None = Field(
        None, description="guide a sample until both velocities are this alike; null: to the end"
    )
    diffusion: Literal["constant", "sbdm", "sigma", "linear", "decreasing", "bump"] = "sigma"
    diffusion_scale: Annotated[float, Field(ge=0)] = 1.0
    diffusion_last: Literal["tweedie", "mean", "euler"] = Field(
        "tweedie",
        description="the last step, without noise: to the mean of the data, by the drift "
        "or by the velocity",
    )
    time_shift: Annotated[float, Field(gt=0)] = 1.0

    @property
    def guided(self) -> bool:
        return self.guidance != 1.0

    def in_words(self) -> str:
        return f"{self.solver}, {self.steps} steps, guidance {self.guidance:g}"

    @model_validator(mode="after")
    def _an_interval(self) -> "SampleSection":
        if self.guidance_low >= self.guidance_high:
            raise ValueError(
                f"sample.guidance_low = {self.guidance_low} is not below sample.guidance_high = "
                f"{self.guidance_high}; lower it, for guidance acts where low <= t < high"
            )
        return self


class TrackingSection(Section):
    mlflow: bool = True
    uri: Text | None = Field(
        None, description="null: sqlite file `mlflow.db` beside the run folder"
    )
    experiment: Text = "flowmill"


def _check_latents(data: DataSection, pictures: bool) -> None:
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


class Recipe(Section):
    """A whole run. Its model, objective and sampling have the keys of the model's family."""

    name: Text
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    run: RunSection
    data: DataSection
    model: ModelSection
    objective: AnyObjective = AnyObjective()
    optimizer: OptimizerSection = OptimizerSection()
    train: TrainSection
    parallel: ParallelSection = ParallelSection()
    checkpoint: CheckpointSection = CheckpointSection()
    sample: AnySampling = AnySampling()
    tracking: TrackingSection = TrackingSection()

    @model_validator(mode="after")
    def _consistent(self) -> "Recipe":
        """Rules between keys that need neither a machine nor the data."""
        _check_latents(self.data, pictures=self.sample.every > 0)
        names, classes = self.data.class_names, self.data.classes
        if names is not None and len(names) != classes:
            raise ValueError(
                f"data.class_names lists {len(names)} names for data.classes = {classes} classes; "
                "give one for each"
            )
        if self.sample.guided and self.objective.label_drop == 0.0:
            raise ValueError(
                f"sample.guidance = {self.sample.guidance} needs a model that saw hidden labels; "
                "set objective.label_drop (0.1 is usual), or drop sample.guidance"
            )
        if self.optimizer.final_lr > self.optimizer.lr:
            raise ValueError(
                f"optimizer.final_lr = {self.optimizer.final_lr} is above "
                f"optimizer.lr = {self.optimizer.lr}; lower it, for the schedule decays towards it"
            )
        if len(set(self.train.ema)) != len(self.train.ema):
            raise ValueError(f"train.ema = {self.train.ema} names a decay twice; list each once")
        if self.sample.every and not self.train.ema:
            raise ValueError(
                f"sample.every = {self.sample.every} draws from averaged weights and train.ema is "
                "empty; give train.ema a decay (0.999 is usual), or set sample.every=0"
            )
        return self


# Kind of a family -> the sections of its objective and its sampling.
KINDS: dict[Kind, tuple[type[AnyObjective], type[AnySampling]]] = {
    "velocity": (ObjectiveSection, SampleSection),
    "likelihood": (LikelihoodSection, InversionSection),
    "tokens": (DiscreteSection, JumpSection),
}


@lru_cache
def recipe_of(family: str) -> type[Recipe]:
    """The recipe of one family of models: what such a recipe may say, and no more."""
    objective, sample = KINDS[FAMILIES[family].kind]
    return create_model(
        "Recipe",
        __base__=Recipe,
        model=(section_of(family), ...),
        objective=(objective, objective()),
        sample=(sample, sample()),
    )


def load_recipe(source: str, overrides: list[str]) -> Recipe:
    """The recipe of a YAML file, or of a shipped name, with `section.key=value` changes.

    Raises UserError naming the file, or the override, and every key that is wrong.
    """
    data = read_yaml(find_recipe(source), source)
    if not isinstance(data, dict):
        raise UserError(
            f"{source} {'is empty' if data is None else 'holds no sections'}; begin from a recipe "
            f"that is shipped: {', '.join(shipped_recipes())}."
        )
    return _changed(data, overrides, source)


def override_recipe(recipe: Recipe, overrides: list[str]) -> Recipe:
    """`recipe` with `section.key=value` changes, checked anew."""
    return _changed(recipe.model_dump(mode="json"), overrides, "the changed recipe")


def _changed(data: dict[str, Any], overrides: list[str], where: str) -> Recipe:
    for override in overrides:
        _apply_override(data, override)
    return build_recipe(data, where, overrides)


def build_recipe(data: dict[str, Any], where: str, overrides: Sequence[str] = ()) -> Recipe:
    """The checked recipe of plain data. Raises UserError, a line for each wrong key.

    overrides: those that `data` came through; a key that one of them set is theirs, not the file's
    """
    try:
        kind = recipe_of(chosen_family(data.get("model")))
    except UserError as error:
        raise UserError(f"{_origin('model.name', where, overrides)}: {error}") from None
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        lines = [
            f"{_origin(name, where, overrides)}: {line}" for name, line in refusals(error, kind)
        ]
        raise UserError("\n".join(lines)) from None


def shipped_recipes() -> list[str]:
    """Names of the recipes inside the package."""
    return sorted(path.stem for path in _shipped_folder().glob("*.yaml"))


def find_recipe(source: str) -> Path:
    """A file path, or the name of a shipped recipe. Raises UserError naming the nearest one."""
    if not source:
        raise UserError(f"The recipe has no name; give a file, or {', '.join(shipped_recipes())}.")
    path = Path(source)
    if path.is_dir():
        raise UserError(
            f"{source} is a folder; give a recipe file, or one of: {', '.join(shipped_recipes())}."
        )
    if path.is_file():
        return path
    shipped = _shipped_folder() / f"{source.removesuffix('.yaml').removeprefix('recipes/')}.yaml"
    if shipped.is_file():
        return shipped
    near = difflib.get_close_matches(Path(source).stem, shipped_recipes(), 1)
    hint = f"did you mean {near[0]}?" if near else f"shipped are: {', '.join(shipped_recipes())}."
    raise UserError(f"There is no recipe {source}; {hint}")


def write_recipe(recipe: Recipe, path: Path) -> None:
    """The complete recipe as YAML: what ran, every default spelled out; whole or not at all."""
    text = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(
        f"# Resolved recipe of this run: every default spelled out.\n{text}", encoding="utf-8"
    )
    temporary.replace(path)


def _shipped_folder() -> Path:
    import recipes

    return Path(str(recipes.__file__)).parent


def _apply_override(data: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    *sections, key = name.split(".")
    if not equals or not all([*sections, key]):
        raise UserError(
            f"command line: {override!r} is not section.key=value; write it as in train.steps=100."
        )
    place = data
    for depth, section in enumerate(sections):
        inner = place.setdefault(section, {})
        if not isinstance(inner, dict):
            value = ".".join(sections[: depth + 1])
            raise UserError(
                f"command line: {override!r} sets a key in {value}, which is a value; "
                f"write {value}=VALUE."
            )
        place = inner
    place[key] = parse_yaml(text, f"command line: {override!r}")


def _origin(name: str, where: str, overrides: Sequence[str]) -> str:
    """Who set the key `name`; a rule between keys ("") may be broken by either of two."""
    if not name and overrides:
        return f"{where} with the changes of the command line"
    return "command line" if _overridden(name, overrides) else where


def _overridden(name: str, overrides: Sequence[str]) -> bool:
    """Whether an override set the key `name`, something in it, or the section it is in."""
    wrong = name.split(".")
    given = [override.partition("=")[0].split(".") for override in overrides]
    return name != "" and any(wrong[: len(keys)] == keys[: len(wrong)] for keys in given)
