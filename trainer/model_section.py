"""The `model` section of a recipe: for each family the keys that its configuration has, no more.

The keys are read off the configurations in `flows.models`, so a shape is described in one place. A
key that is null keeps what the published name says, or the configuration's own default.
"""

from dataclasses import Field as DataclassField
from dataclasses import fields
from functools import lru_cache
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import Field, create_model

from flows.errors import UserError
from flows.models.family import Family
from flows.models.zoo import FAMILIES, family_of
from trainer.refusals import shown
from trainer.section import Section, Text

DEFAULT = "dit"


class ModelSection(Section):
    """A published name, or a size of your own; a name and a key together change that key alone."""

    name: Text | None = Field(None, description="a name of the zoo, e.g. SiT-S/2")
    family: str = Field(DEFAULT, description="implied by a name")

    def own_keys(self) -> dict[str, Any]:
        """The keys that are given, for the family's configuration."""
        return self.model_dump(exclude={"name", "family"}, exclude_none=True)

    def changed_of_name(self) -> str | None:
        """What keys that are given make other than the published name says, in a sentence, or None."""
        if self.name is None:
            return None
        family = FAMILIES[self.family]
        defaults = {field.name: field.default for field in fields(family.config)}
        named = defaults | dict(family.published[self.name])
        changed = [
            f"model.{key} = {shown(value)} and not {shown(named[key])}"
            for key, value in self.own_keys().items()
            if value != named[key]
        ]
        if not changed:
            return None
        return (
            f"model.name = {self.name} is changed by other keys of the recipe: {', '.join(changed)}"
        )


@lru_cache
def section_of(family: str) -> type[ModelSection]:
    """The section of one family. Keys that are whole numbers are at least 1, or `minimum`."""
    described = FAMILIES[family]
    keys = {field.name: _key(described, field) for field in fields(described.config)}
    own: dict[str, Any] = {name: keys[name] for name in described.own_keys()}
    own["family"] = (Literal[family], Field(family, description="implied by a name"))
    return create_model(f"{described.config.__name__}Section", __base__=ModelSection, **own)


def _key(family: Family, field: DataclassField[Any]) -> Any:
    """Type and default of a key. A configuration says more in `field(metadata=...)`."""
    hint = get_type_hints(family.config)[field.name]
    if hint is int:
        hint = Annotated[int, Field(ge=field.metadata.get("minimum", 1), lt=2**31)]
    return (hint | None, Field(None, description=field.metadata.get("description")))


def chosen_family(section: Any) -> str:
    """The family that a `model` section, as it stands in a file, speaks of: by name, or as said.

    Raises UserError, without where it is from, if it is not known.
    """
    if not isinstance(section, dict):
        return DEFAULT
    name, family = section.get("name"), section.get("family")
    named = family_of(name).name if isinstance(name, str) and name else None
    if isinstance(family, str) and family not in FAMILIES:
        raise UserError(f"model.family = {family!r} is not known; use {' or '.join(FAMILIES)}.")
    if named is not None and family not in (None, named):
        raise UserError(
            f"model.name = {name!r} is of the family {named}, and model.family = {family!r}; drop one "
            "of them."
        )
    return named or (family if isinstance(family, str) else DEFAULT)
