"""How the work on one sample may be divided: what a model says of it, as data. Nothing here divides.

Matrix products are divided as in Megatron-LM (Shoeybi et al. 2019): in a pair of layers, the first gives
each rank some of the outputs, whole heads among them, and the second takes each rank's as inputs, so that
one sum over the ranks is all that a pair needs. A module that holds such layers has a method `division`.

Tokens are divided between attentions, where each is treated by itself: a model's `regions` say where.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal


@dataclass(frozen=True)
class Linear:
    """One linear layer of a pair.

    kind: column: a rank has some outputs, rows of the weight; row: some inputs, columns of the weight,
        and the bias is added to the sum over ranks
    stretches: sizes of the runs of outputs (or inputs), such as queries, keys and values, of each of
        which a rank has an equal share
    """

    kind: Literal["column", "row"]
    stretches: tuple[int, ...]


@dataclass(frozen=True)
class Division:
    """How the matrix products of a module are divided.

    layers: name within the module -> its linear layer
    enters: modules ("" for the module itself) whose first argument all ranks read, each for its share
    attributes: those of the module that count what a rank has a share of: a number, or a list of them
    shared: modules within, whose weights every rank has whole and applies to its share, as norms of heads
    divisible: what the number of ranks must divide, in words -> how many there are
    """

    layers: Mapping[str, Linear] = field(default_factory=dict)
    enters: tuple[str, ...] = ()
    attributes: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    divisible: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Region:
    """A stretch of a model whose modules treat every token by itself, but for attention.

    Modules are named within the model.

    blocks: in the order they are called in. The first argument of the first, (batch, tokens, width), is
        where tokens are divided; arguments called `turn` (2, tokens, pairs), `mask` (batch, 1, 1,
        tokens) and `output_mask` (batch, tokens, slots) speak of the same tokens
    after: modules called on the tokens later, which still treat each by itself
    ends: modules whose results have all tokens again
    vectors: modules within, which make a vector for a sample that its tokens share: modulations
    parts: tokens of one sample by what says how many there are (keys of a recipe, for people), in their
        order; each part is divided by itself
    heads: of keys and values, by what says how many there are
    part_of: module within a block -> the only part that it sees
    lengths: `module.attribute` that counts the tokens of a part -> which
    causal: a token sees those before it alone, so that there may be padding behind the last
    """

    blocks: tuple[str, ...]
    after: tuple[str, ...]
    ends: tuple[str, ...]
    vectors: tuple[str, ...]
    parts: Mapping[str, int]
    heads: Mapping[str, int]
    part_of: Mapping[str, int] = field(default_factory=dict)
    lengths: Mapping[str, int] = field(default_factory=dict)
    causal: bool = False

    @property
    def sizes(self) -> tuple[int, ...]:
        """Tokens of each part."""
        return tuple(self.parts.values())

    def within(self, prefix: str) -> "Region":
        """The same region of a model that has this one under the name `prefix`."""

        def named(names: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(f"{prefix}.{name}" for name in names)

        return replace(
            self,
            blocks=named(self.blocks),
            after=named(self.after),
            ends=named(self.ends),
            vectors=named(self.vectors),
            part_of={f"{prefix}.{name}": part for name, part in self.part_of.items()},
            lengths={f"{prefix}.{name}": part for name, part in self.lengths.items()},
        )
