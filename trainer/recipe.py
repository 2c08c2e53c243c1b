"""The recipe: everything that decides a run, in one typed record; the only home of defaults.

A recipe is read from YAML, changed by `section.key=value` overrides, checked as a whole, and
written back, complete, into the run's folder. Nothing in the environment changes the mathematics.
"""

import difflib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import (
    Field,
    ValidationError,
    create_model,
    model_validator,
)

from flows.errors import UserError
from flows.models.family import Kind
from flows.models.zoo import FAMILIES
from trainer.data_sections import DataSection, check_latents
from trainer.flow_sections import InversionSection, LikelihoodSection, check_followed, follows
from trainer.model_section import ModelSection, chosen_family, section_of
from trainer.refusals import has_key, refusals
from trainer.run_sections import (
    CheckpointSection,
    OptimizerSection,
    ParallelSection,
    RunSection,
    TrackingSection,
    TrainSection,
)
from trainer.section import AnyObjective, AnySampling, Section, Text
from trainer.token_sections import DiscreteSection, JumpSection
from trainer.velocity_sections import ObjectiveSection, SampleSection
from trainer.yaml_text import parse_yaml, read_yaml


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
        check_latents(self.data, pictures=self.sample.every > 0)
        names, classes = self.data.class_names, self.data.classes
        if names is not None and len(names) != classes:
            raise ValueError(
                f"data.class_names lists {len(names)} names for data.classes = {classes} classes; "
                "give one for each"
            )
        check_followed(self.model.family, self.sample)
        if self.sample.guided and self.objective.label_drop == 0.0:
            raise ValueError(
                f"sample.guidance = {self.sample.guidance} needs a model that saw hidden labels; "
                "set objective.label_drop (0.1 is usual), or drop sample.guidance"
            )
        if self.sample.prompts and self.data.text is None:
            raise ValueError(
                "sample.prompts gives texts, and the recipe has no data.text: its model reads none; drop the "
                "prompts, or train a recipe that reads captions, such as mmdit_emoji"
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


def _owners(name: str) -> list[str]:
    """Families whose recipes have the key `name`, and can follow it."""
    return [one for one in FAMILIES if has_key(recipe_of(one), name) and follows(one, name)]


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
            f"{_origin(name, where, overrides)}: {line}"
            for name, line in refusals(error, kind, _owners)
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
