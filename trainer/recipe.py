"""The recipe: everything that decides a run, in one typed record; the only home of defaults.

A recipe is read from YAML, changed by `section.key=value` overrides, checked as a whole, and
written back, complete, into the run's folder. Nothing in the environment changes the mathematics.
"""

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from flows.errors import UserError

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """Unknown keys are refused; values are what YAML says, never silently converted from text."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_yes_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML's yes, on and true would pass for the number 1."""
        field = cls.model_fields[str(info.field_name)]
        if isinstance(value, bool) and field.annotation is not bool:
            raise ValueError(f"{info.field_name} = {value} is a yes or no where a value is wanted")
        return value


class RunSection(Section):
    dir: str = Field(description="folder of this run; a checkpoint in it is resumed")


class SourceSection(Section):
    url: str = Field(description="shards: a path or URL with {00..07} braces or *")
    weight: Annotated[float, Field(gt=0)] = Field(1.0, description="how often it is drawn")


# One data set by its URL alone, or several mixed. The tags keep each one's errors to itself.
PATTERN, MIXTURE = "one data set", "a list of data sets"
Sources = Annotated[
    Annotated[str, Tag(PATTERN)]
    | Annotated[list[SourceSection], Field(min_length=1), Tag(MIXTURE)],
    Discriminator(lambda value: MIXTURE if isinstance(value, list) else PATTERN),
]


class DataSection(Section):
    train: Sources = Field(
        description="shards to train on: a path or URL with {00..07} braces or *, or several as a "
        "list of {url, weight}, each with epochs of its own"
    )
    keep: dict[str, Annotated[list[bool | int | float | str | None], Field(min_length=1)]] = Field(
        {}, description="train on samples alone whose label (cls) or .json field is one of these"
    )
    heldout: str | None = Field(None, description="shards kept for evaluation")
    image_size: Positive
    channels: Literal[1, 3] = 3
    classes: Positive
    class_names: list[str] | None = Field(None, description="for pictures and tables")
    flip: Fraction = Field(0.0, description="probability of a horizontal flip")
    lanes: Positive = Field(
        64, description="independent readers of the global order; fixes the order"
    )
    window: Positive = Field(256, description="samples shuffled together within a lane")
    decoder: Literal["auto", "dali", "pillow"] = "auto"
    prefetch: Positive = Field(2, description="batches decoded ahead of the step")
    threads: Positive = Field(2, description="decoding threads a rank")

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


class ModelSection(Section):
    """A published name, or a size of your own; a name and a key together change that key alone."""

    family: Literal["dit"] = "dit"
    name: str | None = Field(None, description="a name of the zoo, e.g. SiT-S/2")
    patch: Positive | None = None
    width: Positive | None = None
    depth: Positive | None = None
    heads: Positive | None = None
    learn_sigma: bool | None = Field(
        None, description="two outputs a channel, as DiT has (the second is unused); null: by name"
    )


class TimeSection(Section):
    kind: Literal["uniform", "logit_normal"] = "uniform"
    mean: float = 0.0
    std: Annotated[float, Field(gt=0)] = 1.0
    shift: Annotated[float, Field(gt=0)] = Field(
        1.0, description="< 1 moves times towards the noise"
    )


class ObjectiveSection(Section):
    kind: Literal["flow_matching"] = "flow_matching"
    path: Literal["linear", "gvp", "vp"] = "linear"
    prediction: Literal["velocity", "data", "noise"] = "velocity"
    weighting: Literal["none", "velocity"] = Field(
        "none", description="velocity: the loss of the velocity that the prediction implies"
    )
    label_drop: Fraction = Field(0.1, description="share of labels hidden, for guidance")
    time: TimeSection = TimeSection()


class OptimizerSection(Section):
    kind: Literal["adamw"] = "adamw"
    lr: Annotated[float, Field(gt=0)] = 1e-3
    betas: tuple[Fraction, Fraction] = (0.9, 0.99)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    warmup: Annotated[int, Field(ge=0)] = Field(100, description="steps of linear warm-up")
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    final_lr: Annotated[float, Field(ge=0)] = Field(
        0.0, description="learning rate of the last step"
    )
    clip: Annotated[float, Field(gt=0)] | None = Field(1.0, description="largest gradient norm")


class TrainSection(Section):
    steps: Annotated[int, Field(ge=0)] = Field(0, description="0: given as samples or epochs")
    samples: Annotated[int, Field(ge=0)] = Field(0, description="in place of steps; rounded up")
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
                "and train.epochs"
            )
        return self


class ParallelSection(Section):
    strategy: Literal["none", "ddp", "fsdp", "hsdp"] | None = Field(
        None, description="null: none on one rank, fsdp on several"
    )
    replicate: Positive | None = Field(
        None, description="whole copies of the model; null: inferred"
    )
    shard: Positive | None = Field(None, description="ranks one copy is cut over; null: inferred")
    reshard_after_forward: bool = True
    timeout_seconds: Positive = Field(300, description="a collective that takes longer is an error")


class CheckpointSection(Section):
    every: Positive = 500
    keep: Positive = Field(2, description="newest checkpoints kept")


class SampleSection(Section):
    every: Annotated[int, Field(ge=0)] = Field(0, description="steps between sample grids; 0: none")
    count: Positive = Field(40, description="samples in a grid while training")
    solver: Literal["euler", "heun", "midpoint", "dopri5", "sde"] = "euler"
    steps: Positive = Field(20, description="solver steps from noise to data")
    guidance: Annotated[float, Field(ge=0)] = Field(1.0, description="1: none")
    guidance_low: Fraction = Field(0.0, description="guided where low <= t < high")
    guidance_high: Fraction = 1.0
    diffusion: Literal["constant", "sbdm", "sigma", "linear", "decreasing", "bump"] = "sigma"
    diffusion_scale: Annotated[float, Field(ge=0)] = 1.0
    time_shift: Annotated[float, Field(gt=0)] = 1.0


class TrackingSection(Section):
    mlflow: bool = True
    uri: str | None = Field(None, description="null: sqlite file `mlflow.db` beside the run folder")
    experiment: str = "flowmill"


class Recipe(Section):
    name: str
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    run: RunSection
    data: DataSection
    model: ModelSection
    objective: ObjectiveSection = ObjectiveSection()
    optimizer: OptimizerSection = OptimizerSection()
    train: TrainSection
    parallel: ParallelSection = ParallelSection()
    checkpoint: CheckpointSection = CheckpointSection()
    sample: SampleSection = SampleSection()
    tracking: TrackingSection = TrackingSection()

    @model_validator(mode="after")
    def _consistent(self) -> "Recipe":
        """Rules between keys that need neither a machine nor the data."""
        names, classes = self.data.class_names, self.data.classes
        if names is not None and len(names) != classes:
            raise ValueError(
                f"data.class_names lists {len(names)} names for data.classes = {classes} classes; "
                "give one for each"
            )
        low, high = self.sample.guidance_low, self.sample.guidance_high
        if low >= high:
            raise ValueError(
                f"sample.guidance_low = {low} is not below sample.guidance_high = {high}; "
                "guidance acts where low <= t < high"
            )
        if self.sample.guidance != 1.0 and self.objective.label_drop == 0.0:
            raise ValueError(
                f"sample.guidance = {self.sample.guidance} needs a model that saw hidden labels; "
                "set objective.label_drop (0.1 is usual) or sample.guidance=1"
            )
        if self.optimizer.final_lr > self.optimizer.lr:
            raise ValueError(
                f"optimizer.final_lr = {self.optimizer.final_lr} is above "
                f"optimizer.lr = {self.optimizer.lr}; the schedule decays towards final_lr"
            )
        if len(set(self.train.ema)) != len(self.train.ema):
            raise ValueError(f"train.ema = {self.train.ema} names a decay twice; list each once")
        return self


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML without the trap that a key given twice keeps silently the last value."""


def _unique_mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node)
        if not isinstance(key, str):
            raise UserError(
                f"line {key_node.start_mark.line + 1}: key {key!r} is not a word; quote it."
            )
        if key in seen:
            raise UserError(f"line {key_node.start_mark.line + 1}: {key} is given twice; keep one.")
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_UniqueKeyLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping)


def parse_yaml(text: str, where: str) -> Any:
    """Plain data. Raises UserError with the line of a syntax error or of a doubled key."""
    try:
        return yaml.load(text, Loader=_UniqueKeyLoader)  # noqa: S506 - a SafeLoader
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "not YAML"
        raise UserError(
            f"{where}:{line} is not valid YAML ({problem}); check its indentation and quotes."
        ) from None


def load_recipe(source: str, overrides: list[str]) -> Recipe:
    """The recipe of a YAML file, or of a shipped name, with `section.key=value` changes.

    Raises UserError naming the file and every key that is wrong.
    """
    path = find_recipe(source)
    try:
        data = parse_yaml(path.read_text(encoding="utf-8"), source)
    except UnicodeDecodeError:
        raise UserError(f"{source} is not a text file; give a recipe written in YAML.") from None
    if not isinstance(data, dict):
        raise UserError(
            f"{source} holds no sections; begin from one of: {', '.join(shipped_recipes())}."
        )
    for override in overrides:
        _apply_override(data, override)
    return build_recipe(data, source)


def build_recipe(data: dict[str, Any], where: str) -> Recipe:
    """The checked recipe of plain data. Raises UserError, a line for each wrong key."""
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        lines = [_sentence(item) for item in error.errors(include_url=False, include_context=True)]
        raise UserError("\n".join(f"{where}: {line}" for line in lines)) from None


def shipped_recipes() -> list[str]:
    """Names of the recipes inside the package."""
    return sorted(path.stem for path in _shipped_folder().glob("*.yaml"))


def find_recipe(source: str) -> Path:
    """A file path, or the name of a shipped recipe. Raises UserError naming the nearest one."""
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
    """The complete recipe as YAML: what ran, every default spelled out."""
    text = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)
    path.write_text(
        f"# Resolved recipe of this run: every default spelled out.\n{text}", encoding="utf-8"
    )


def _shipped_folder() -> Path:
    import recipes

    return Path(str(recipes.__file__)).parent


def _apply_override(data: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise UserError(
            f"Override {override!r} is not section.key=value, for example train.steps=100."
        )
    *sections, key = name.split(".")
    place = data
    for section in sections:
        inner = place.setdefault(section, {})
        if not isinstance(inner, dict):
            raise UserError(f"Override {override!r}: {section} is a value, not a section.")
        place = inner
    place[key] = parse_yaml(text, f"override {override!r}")


def _sentence(error: Any) -> str:
    """One pydantic error as a sentence that names the key and the remedy."""
    location = [str(part) for part in error["loc"] if part not in (PATTERN, MIXTURE)]
    name = ".".join(location)
    kind, message = error["type"], str(error["msg"])
    if kind == "extra_forbidden":
        valid = _keys_at(location[:-1])
        near = difflib.get_close_matches(location[-1], valid, 1, cutoff=0.5)
        hint = (
            f"did you mean {'.'.join([*location[:-1], near[0]])}?"
            if near
            else f"valid are: {', '.join(valid)}."
        )
        return f"{name} is not a key of a recipe; {hint}"
    if kind == "missing":
        return f"{name} is missing; it has no default, so give it a value."
    if kind == "value_error":
        prefix = f"{name}: " if name else ""
        return prefix + message.removeprefix("Value error, ") + "."
    return f"{name} = {error['input']!r} is refused: {message[0].lower()}{message[1:]}."


def _keys_at(location: list[str]) -> list[str]:
    model: type[BaseModel] = Recipe
    for part in location:
        if part in model.model_fields:
            model = _section_in(model.model_fields[part].annotation) or model
    return list(model.model_fields)


def _section_in(annotation: Any) -> type[BaseModel] | None:
    """The section that a key's type names: itself, or the items of a list of them."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _section_in(part))), None)


def override_recipe(recipe: Recipe, overrides: list[str]) -> Recipe:
    """`recipe` with `section.key=value` changes, checked anew."""
    data = recipe.model_dump(mode="json")
    for override in overrides:
        _apply_override(data, override)
    return build_recipe(data, "the changed recipe")
