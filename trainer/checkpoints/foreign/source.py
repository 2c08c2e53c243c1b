"""What a published format is, and how the facts that its files leave out are told.

A state dictionary tells most of a configuration by names and shapes. `Contents` reads them, and says
in a sentence what it looked for in vain; `Findings` is what came out: facts that follow, facts that the
program fixes, and what to say of those that are still missing.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, get_type_hints

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from flows.errors import UserError
from flows.models.family import DATA_KEYS, Family
from trainer.checkpoints.foreign.moves import Move, State

Told = Mapping[str, Any]


class Contents:
    """A state dictionary, asked for what its format says must be there."""

    def __init__(self, source: str, state: Mapping[str, Tensor]) -> None:
        self.source, self.state = source, state

    def __contains__(self, name: str) -> bool:
        return name in self.state

    def tensor(self, name: str, dims: int) -> Tensor:
        """A tensor; UserError if it is missing or has not `dims` dimensions."""
        value = self.state.get(name)
        if value is None:
            raise UserError(
                f"there is no tensor {name}, so these are not weights of {self.source}; "
                f"{self._hint()}."
            )
        if value.ndim != dims:
            raise UserError(
                f"tensor {name} is {list(value.shape)}, and {self.source} has {dims} dimensions there; "
                "choose the format that wrote the file."
            )
        return value

    def shape(self, name: str, dims: int) -> tuple[int, ...]:
        """The shape of a tensor, refused like it."""
        return tuple(self.tensor(name, dims).shape)

    def count(self, pattern: str) -> int:
        """How many of `pattern`, with 0, 1, 2, ... for its {}, are there without a gap; at least 1."""
        count = 0
        while pattern.format(count) in self.state:
            count += 1
        if not count:
            self.tensor(pattern.format(0), 0)
        return count

    def _hint(self) -> str:
        some = ", ".join(list(self.state)[:3])
        return (
            f"they begin with {some}: choose the format that wrote them"
            if some
            else "none are there"
        )


@dataclass(frozen=True)
class Findings:
    """What a file tells of a configuration.

    found: keys that follow from names and shapes
    usual: keys that the program, or all published files of its kind, have fixed; may be told otherwise
    hints: key -> how to know it, for keys that may be missing
    """

    found: dict[str, Any]
    usual: dict[str, Any] = field(default_factory=dict)
    hints: dict[str, str] = field(default_factory=dict)


def unwrapped(state: State) -> State:
    """Names without what wrappers (DistributedDataParallel, torch.compile) put before all of them."""
    for wrapper in ("module.", "_orig_mod."):
        if state and all(name.startswith(wrapper) for name in state):
            return unwrapped({name.removeprefix(wrapper): v for name, v in state.items()})
    return state


@dataclass(frozen=True)
class Source:
    """One published format.

    read: (contents, what was told) -> what is known of the configuration
    moves: a configuration -> the moves between its names and ours
    tables: a configuration -> tensors of the file that are computed, not learned
    check: raises UserError for a configuration of the family that the program has no place for
    recipe: a configuration -> sections of a recipe, but those of model and data
    renamed: a state dictionary as files have it -> under the names that `moves` knows
    assumed: keys of `recipe` that trainings with the program differ in and no file tells
    """

    name: str
    family: Family
    read: Callable[[Contents, Told], Findings]
    moves: Callable[[Any], Sequence[Move]]
    tables: Callable[[Any], State]
    check: Callable[[Any], None]
    recipe: Callable[[Any], dict[str, Any]]
    renamed: Callable[[State], State] = unwrapped
    assumed: tuple[str, ...] = ()


def key_in_recipe(key: str) -> str:
    """How a recipe calls a key of a configuration: `heads` is `model.heads`."""
    if key in ("text_width", "text_tokens"):
        return "data.text." + key.removeprefix("text_")
    return f"data.{key}" if key in DATA_KEYS else f"model.{key}"


def checked_facts(family: Family, told: Told) -> dict[str, Any]:
    """What was told, in the types of the configuration's keys. UserError for what is no such thing."""
    hints = get_type_hints(family.config)
    known = {item.name: item for item in fields(family.config)}
    facts: dict[str, Any] = {}
    for key, value in told.items():
        if key not in known:
            raise UserError(
                f"{key_in_recipe(key)} is no key of a model of the family {family.name}; it has "
                f"{', '.join(map(key_in_recipe, known))}."
            )
        if isinstance(value, bool) and hints[key] in (int, float):
            raise UserError(f"{key_in_recipe(key)} = {value}: is a yes or no; give a number.")
        try:
            facts[key] = TypeAdapter(hints[key]).validate_python(value)
        except ValidationError as error:
            reason = error.errors()[0]["msg"]
            raise UserError(
                f"{key_in_recipe(key)} = {value!r}: {reason[0].lower()}{reason[1:]}; "
                "give a value of that kind."
            ) from None
        # What may be missing is 0 where it is; all other whole numbers count something.
        least = known[key].metadata.get("minimum", 0 if known[key].default == 0 else 1)
        parts = facts[key] if isinstance(facts[key], tuple) else (facts[key],)
        if any(type(part) is int and part < least for part in parts):
            raise UserError(
                f"{key_in_recipe(key)} = {_shown(facts[key])} must be at least {least}; give the value "
                "that the model was trained with."
            )
    return facts


def configured(source: Source, findings: Findings, told: Told) -> Any:
    """The configuration. UserError where what was told contradicts the file, or a fact is missing."""
    for key, value in told.items():
        if key in findings.found and findings.found[key] != value:
            raise UserError(
                f"{key_in_recipe(key)} = {_shown(value)} was told, and the tensors say "
                f"{_shown(findings.found[key])}; drop it."
            )
    keys = {**findings.usual, **told, **findings.found}
    needed = [item.name for item in fields(source.family.config) if item.default is MISSING]
    if missing := [key for key in (*findings.hints, *needed) if key not in keys]:
        hint = findings.hints.get(missing[0], "as the model was trained")
        raise UserError(
            f"{key_in_recipe(missing[0])} does not follow from names and shapes in {source.name} "
            f"files; give {key_in_recipe(missing[0])}=..., {hint}."
        )
    return source.family.config(**keys)


def square_side(tokens: int, name: str) -> int:
    """Side of a square grid of `tokens`; UserError naming the tensor that has so many rows."""
    side = math.isqrt(tokens)
    if side**2 != tokens:
        raise UserError(
            f"tensor {name} has {tokens} tokens, and no square has; only models of square images can "
            "be imported."
        )
    return side


def heads_of(width: int, head_width: int, name: str) -> int:
    """Heads of a model; UserError naming the tensor that is as wide as one, if no number of them fits."""
    if width % head_width:
        raise UserError(
            f"tensor {name} is that of heads of {head_width}, and the model's width of {width} is no "
            "multiple of it; restore the file."
        )
    return width // head_width


def finite(value: Tensor) -> bool:
    """Whether a tensor holds neither infinities nor NaN."""
    # Floats of one byte have no test of their own.
    tested = value.float() if value.element_size() == 1 else value
    return bool(tested.isfinite().all())


def differs(table: Tensor, value: Tensor) -> bool:
    """Whether a tensor of a file is not the table it should be, to the rounding of its dtype."""
    if table.shape != value.shape:
        return True
    precision = torch.finfo(value.dtype).eps if value.is_floating_point() else 0.0
    return not torch.allclose(value.double(), table.double(), rtol=0.0, atol=8 * precision)


def _shown(value: Any) -> str:
    return str(list(value)) if isinstance(value, tuple) else str(value)
