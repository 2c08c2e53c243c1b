"""A model family: what the rest of the house must know to build, cost and train one."""

from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, Literal

from torch import Tensor, nn

from flows.errors import UserError

# velocity: v(x, t, condition), trained by flow matching; likelihood: an invertible map to the prior,
# trained by its density; tokens: p(data | x_t) over discrete tokens, trained by discrete flow matching
Kind = Literal["velocity", "likelihood", "tokens"]

# What the data decides of a shape; the other keys of a configuration are the model's own.
DATA_KEYS = ("image_size", "channels", "classes", "text_width", "text_tokens")


@dataclass(frozen=True)
class Family:
    """One family of models.

    config: the frozen dataclass of everything that decides the shape of one
    build: a configuration -> the module
    forward_flops: a configuration -> floating point operations of the forward of one sample, two for
        each multiply-add of matrix products
    published: name -> the model's own keys of its configuration
    """

    name: str
    kind: Kind
    config: type
    build: Callable[[Any], nn.Module]
    forward_flops: Callable[[Any], int]
    published: Mapping[str, Mapping[str, Any]]

    def own_keys(self) -> list[str]:
        """The keys of a configuration that a recipe's `model` section may set."""
        return [field.name for field in fields(self.config) if field.name not in DATA_KEYS]


@dataclass(frozen=True)
class Architecture:
    """A family and the sizes of one model of it."""

    family: Family
    config: Any

    def build(self) -> nn.Module:
        """A fresh module, on the current default device (`torch.device("meta")` costs nothing)."""
        return self.family.build(self.config)

    @property
    def train_flops(self) -> int:
        """Operations of forward and backward of one sample; recomputed ones are not counted."""
        return 3 * self.family.forward_flops(self.config)


def architecture(
    family: Family, name: str | None, keys: Mapping[str, Any], data: Mapping[str, int]
) -> Architecture:
    """A published size changed by `keys`, or a whole shape without a name.

    keys: the model's own keys that are given
    data: the keys that the data decides, text_width and text_tokens 0 where there is no text
    Raises UserError for a size that is not whole, or cannot be.
    """
    chosen = {**(family.published[name] if name is not None else {}), **keys}
    known = {field.name: field for field in fields(family.config)}
    needed = [
        key
        for key, field in known.items()
        if key not in DATA_KEYS and field.default is MISSING and field.default_factory is MISSING
    ]
    if missing := [f"model.{key}" for key in needed if key not in chosen]:
        example = next(iter(family.published), None)
        hint = f", or a name of the zoo such as model.name = {example}" if example else ""
        raise UserError(
            f"the model's size is incomplete: {', '.join(missing)} not set; give them all{hint}."
        )
    if data["text_tokens"] and "text_tokens" not in known:
        raise UserError(
            f"data.text is given, and the family {family.name} takes no text; drop data.text, or choose "
            "another model.family."
        )
    given = {key: value for key, value in data.items() if key in known}
    return Architecture(family, family.config(**given, **chosen))


def parameter_count(model: nn.Module) -> int:
    """Trainable numbers in a model."""
    return sum(weight.numel() for weight in model.parameters())


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """What is part of a model's state and not learned, such as the orders that a Jet splits by.

    By the names of the state, which wrappers of blocks do not change. The buffers themselves, not copies.
    """
    state = model.state_dict(keep_vars=True)
    return {name: held for name, held in state.items() if not isinstance(held, nn.Parameter)}
