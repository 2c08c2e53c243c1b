"""The objective and the sampling of models over discrete tokens, in a recipe."""

from typing import Annotated, Literal

from pydantic import Field

from trainer.section import AnyObjective, AnySampling, Positive
from trainer.velocity_sections import TimeSection

NO_GUIDANCE = 1.0


class DiscreteSection(AnyObjective):
    """Discrete flow matching, for models that predict the tokens of the data."""

    kind: Literal["discrete_flow_matching"] = "discrete_flow_matching"
    source: Literal["mask", "uniform"] = Field("mask", description="what tokens are at t = 0")
    exponent: Annotated[float, Field(ge=1.0)] = Field(
        1.0, description="a token is data with probability t^exponent"
    )
    loss: Literal["cross_entropy", "kullback_leibler"] = Field(
        "cross_entropy", description="kullback_leibler: of the rates of jumps"
    )
    time: TimeSection = TimeSection()


class JumpSection(AnySampling):
    """Of a model over tokens: jumps from source tokens to data tokens."""

    guidance: Annotated[float, Field(ge=0)] = Field(NO_GUIDANCE, description="1: none")
    steps: Positive = Field(32, description="network calls from source to data")
    corrector: Annotated[float, Field(ge=0)] = Field(
        0.0, description="rate of jumps that mend earlier ones; 0: none"
    )

    @property
    def guided(self) -> bool:
        return self.guidance != NO_GUIDANCE

    def in_words(self) -> str:
        return f"{self.steps} steps of jumps, guidance {self.guidance:g}"
