"""The objective and the sampling of normalizing flows, in a recipe."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from trainer.refusals import shown
from trainer.section import AnyObjective, AnySampling, Positive, Section

NO_GUIDANCE = 0.0
COUPLINGS = (
    "jet"  # the family whose flows are undone in one pass, with nothing to solve or to guide
)


class DequantiserSection(Section):
    """The small flow that learns which noise fills the bins, see `flows.models.dequantised`."""

    patch: Positive = 2
    width: Positive = 64
    couplings: Positive = 4
    layers: Positive = 1
    heads: Positive = 2


class LikelihoodSection(AnyObjective):
    """Maximum likelihood, for models that carry data to a prior."""

    kind: Literal["likelihood"] = "likelihood"
    noise: Annotated[float, Field(ge=0)] = Field(
        0.0, description="standard deviation of normal noise on the data; samples carry it"
    )
    dequantisation: Literal["none", "uniform", "variational"] = Field(
        "uniform",
        description="what fills the bins of pixels, so that a density bounds probabilities; latents have "
        "none, and uniform leaves them as they are",
    )
    levels: Annotated[int, Field(ge=2, le=2**16)] = Field(
        256, description="brightnesses of a pixel"
    )
    bins: Literal["inside", "above", "around"] = Field(
        "inside", description="which bin a level stands for: TarFlow's, Jet's, or one around it"
    )
    dequantiser: DequantiserSection = DequantiserSection()
    power: Annotated[float, Field(ge=0)] = Field(
        0.0, description="weight of the mean square of what lies between blocks (STARFlow: 1e-4)"
    )


class InversionSection(AnySampling):
    """Of a normalizing flow: carrying noise back to data."""

    guidance: Annotated[float, Field(ge=0)] = Field(NO_GUIDANCE, description="0: none")
    form: Literal["linear", "distribution"] = Field(
        "linear", description="linear: TarFlow's guidance; distribution: STARFlow's"
    )
    parts: Literal["both", "scale", "shift"] = Field(
        "both", description="what linear guidance acts on"
    )
    annealed: bool = Field(False, description="guidance grows along the tokens, to its full weight")
    temperature: Annotated[float, Field(gt=0)] = Field(
        1.0,
        description="of the attention that guidance leads away from, where sample.guidance is not 0; not 1: "
        "models without classes are guided, too",
    )
    strategy: Literal["sequential", "jacobi", "gs_jacobi", "sliding", "auto"] = Field(
        "sequential",
        description="how tokens are solved for, see `flows.samplers.inversion`; auto: what is fastest on "
        "this machine for batches of this size, tried first",
    )
    accuracy: Annotated[float, Field(gt=0)] = Field(
        1e-3, description="auto: largest relative error of a block that is put up with"
    )
    group: Annotated[int, Field(ge=2, lt=2**31)] = Field(
        16, description="gs_jacobi, sliding: tokens solved for together"
    )
    iterations: Positive | None = Field(
        None, description="most network calls for a group; null: until it settles"
    )
    tolerance: Annotated[float, Field(ge=0)] = Field(
        1e-3, description="a token settles when it changes by no more than this"
    )
    clamp: Annotated[float, Field(gt=0)] | None = Field(
        None, description="iterates are kept within +- this; null: as they are"
    )
    denoise: Annotated[float, Field(ge=0, le=4)] = Field(
        1.0, description="share of objective.noise that a last step takes out of samples"
    )

    @property
    def guided(self) -> bool:
        return self.guidance != NO_GUIDANCE

    @property
    def remedy(self) -> str:
        return "see docs/models.md on model.clip"

    def in_words(self) -> str:
        return f"{self.strategy}, guidance {self.guidance:g}"

    @model_validator(mode="after")
    def _one_form(self) -> "InversionSection":
        if self.form == "distribution" and self.parts != "both":
            raise ValueError(
                f"sample.parts = {self.parts} is for linear guidance, and sample.form = distribution "
                "guides scale and shift together; set sample.parts=both"
            )
        return self


def follows(family: str, name: str) -> bool:
    """Whether samples of a family can follow the key `name` (section.key), where its recipe has it."""
    section, _, key = name.partition(".")
    every = {*AnySampling.model_fields} - {"guidance"}
    return family != COUPLINGS or section != "sample" or key in every | {"denoise"}


def check_followed(family: str, section: AnySampling) -> None:
    """ValueError for a key that is set and that samples of the family cannot follow."""
    for key, value in section.own_keys().items():
        default = type(section).model_fields[key].default
        if value != default and not follows(family, f"sample.{key}"):
            raise ValueError(
                f"sample.{key} = {shown(value)} is for flows that are solved token by token, and the "
                f"family {family} is undone in one pass, without guidance or strategy; drop "
                f"sample.{key} (or set it to {shown(default)}), or choose model.family=tarflow"
            )
