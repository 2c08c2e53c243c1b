"""A part of a model: some links of its chain, with the weights that these alone use, and no others."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, cast

from torch import Tensor, nn

from flows.initialise import Initialisable
from flows.models.chain import Chain, Stream


class Chainable(Initialisable, Protocol):
    """A model that says how its forward may be cut."""

    @property
    def blocks(self) -> Sequence[nn.Module]: ...

    def chain(self) -> Chain: ...


class Part(nn.Module):
    """Links begin ... end - 1 of a model, called with the stream and with the model's inputs but for `x`.

    What the links are told is computed here from these inputs, by weights that all parts on a rank share.

    model: the whole model without the parameters of other links
    undivided: modules whose backward is done at once, see `parallel.pipeline.deferred`
    """

    def __init__(
        self,
        model: nn.Module,
        begin: int,
        end: int,
        computing: Callable[[], AbstractContextManager[None]],
    ) -> None:
        """model: on the meta device; it is changed in place, and is to be given to no other part
        computing: makes the context of a forward
        """
        super().__init__()
        self.model = model
        self._chain, self._computing = cast(Chainable, model).chain(), computing
        self._links = self._chain.links[begin:end]
        self._last = end == len(self._chain.links)
        holds = tuple(prefix for link in self._links for prefix in link.holds)
        _keep_only(model, (*holds, *self._chain.tells))

    @property
    def told(self) -> dict[str, nn.Module]:
        """The modules that compute what links are told, by name."""
        found = {prefix.rstrip("."): self.model for prefix in self._chain.tells}
        named = {name: getattr(model, name) for name, model in found.items()}
        return {name: module for name, module in named.items() if module is not None}

    @property
    def undivided(self) -> set[nn.Module]:
        return {part for module in self.told.values() for part in module.modules()}

    def share(self, other: "Part") -> None:
        """Compute what links are told by the weights of another part."""
        for name, module in other.told.items():
            setattr(self.model, name, module)

    @property
    def blocks(self) -> list[nn.Module]:
        """Those of the model's blocks that are here."""
        blocks = cast(Chainable, self.model).blocks
        return [block for block in blocks if next(block.parameters(), None) is not None]

    def forward(self, *stream: Tensor, **inputs: Tensor) -> Any:
        """The stream that comes in -> the one that goes out, or what the model returns."""
        with self._computing():
            told = self._chain.tell(inputs, len(stream[0]))
            flowing: Stream = stream
            for link in self._links:
                flowing = link.run(flowing, told)
        return self._chain.end(flowing) if self._last else flowing


def _keep_only(model: nn.Module, prefixes: tuple[str, ...]) -> None:
    """Take away all parameters of `model` but those whose names begin with one of the prefixes."""
    for path, module in model.named_modules():
        for own in list(module._parameters):
            name = f"{path}.{own}" if path else own
            if not name.startswith(prefixes):
                module._parameters[own] = None
