"""What all sections of a recipe are made of."""

from typing import Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Below1 = Annotated[float, Field(ge=0.0, lt=1.0)]
Positive = Annotated[int, Field(ge=1, lt=2**31)]
Text = Annotated[str, Field(min_length=1)]
Share = Annotated[float, Field(gt=0.0, le=1.0)]
Ratio = Annotated[float, Field(gt=0.0)]


class Section(BaseModel):
    """Unknown keys, infinite numbers and a yes or no for a number are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_yes_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML's yes, on and true would pass for the number 1."""
        wanted = cls.model_fields[str(info.field_name)].annotation
        parts = value if isinstance(value, list) else [value]
        if bool not in (wanted, *get_args(wanted)) and any(
            isinstance(part, bool) for part in parts
        ):
            raise PydanticCustomError("yes_or_no", "a yes or no")
        return value


class AnyObjective(Section):
    """What every objective has."""

    kind: str = ""
    label_drop: Fraction = Field(0.1, description="share of labels and texts hidden, for guidance")


class AnySampling(Section):
    """What every way of sampling has."""

    every: Annotated[int, Field(ge=0)] = Field(0, description="steps between sample grids; 0: none")
    count: Positive = Field(40, description="samples in a grid while training")
    guidance: Annotated[float, Field(ge=0)] = Field(1.0, description="1: none")
    prompts: Annotated[list[Text], Field(min_length=1)] | None = Field(
        None, description="texts to draw samples of, in turn; null: held-out captions, or classes"
    )

    def own_keys(self) -> dict[str, Any]:
        """The keys that say how a sample is drawn, and not which or how many."""
        return self.model_dump(exclude={*AnySampling.model_fields} - {"guidance"})

    @property
    def guided(self) -> bool:
        """Whether samples are drawn with guidance, which needs a model that saw hidden labels."""
        raise TypeError(f"{type(self).__name__} does not say what guidance is")

    @property
    def remedy(self) -> str:
        """What to do about samples that are not finite."""
        return "lower sample.guidance, or train for longer"

    def in_words(self) -> str:
        """How samples are drawn, as far as one line holds it."""
        raise TypeError(f"{type(self).__name__} does not say how it samples")
