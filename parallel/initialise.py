"""First values of the weights, drawn shard by shard: a weight does not depend on who holds it.

The model is built on the meta device and cut there, so no rank ever holds the whole of it. Each
rank then fills what it holds; element (i, j) of parameter `name` is a function of (seed, name, i,
j) alone, so the bits are those of one device whatever the layout.
"""

from collections.abc import Mapping

from flows.initialise import Rule, fill_
from parallel.pieces import Held, boxes_of


def fill_parameters(parameters: Mapping[str, Held], rules: Mapping[str, Rule], seed: int) -> None:
    """Draw every parameter's local part in place.

    parameters: canonical name -> parameter, materialised; a DTensor or a piece where it is cut
    rules: canonical name -> how it is drawn
    """
    for name, parameter in parameters.items():
        for offset, box in boxes_of(parameter.detach()):
            fill_(
                box,
                rules[name],
                seed=seed,
                name=name,
                global_shape=tuple(parameter.shape),
                offset=offset,
            )
