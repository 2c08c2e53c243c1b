"""The objective and the sampling of normalizing flows, in a recipe."""

from typing import Annotated, Literal

from pydantic import Field

from trainer.section import AnyObjective, AnySampling, Positive, Section

NO_GUIDANCE = 0.0


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
        description="what fills the bins of pixels, so that a density bounds probabilities",
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
    rule: Literal["linear", "product"] = Field(
        "linear",
        description="linear: TarFlow's guidance; product: STARFlow's, of mean and variance",
    )
    guided_part: Literal["both", "scale", "shift"] = Field(
        "both", description="what linear guidance acts on"
    )
    anneal: bool = Field(False, description="guidance grows with the place of the token")
    temperature: Annotated[float, Field(gt=0)] = Field(
        1.0,
        description="of the attention of the branch guided away from; for models without classes",
    )
    strategy: Literal["auto", "sequential", "jacobi", "gs_jacobi"] = Field(
        "sequential", description="how tokens are inverted; auto: whatever is fastest here"
    )
    groups: Positive = Field(8, description="gs_jacobi: groups of tokens, one after another")
    tolerance: Annotated[float, Field(ge=0)] = Field(
        1e-6, description="jacobi, gs_jacobi: change of a token below which iterations end"
    )
    denoise: Annotated[float, Field(ge=0, le=4)] = Field(
        1.0, description="share of the noise of objective.noise that a last step takes away"
    )

    @property
    def guided(self) -> bool:
        return self.guidance != NO_GUIDANCE

    def in_words(self) -> str:
        return f"{self.strategy}, guidance {self.guidance:g}"
