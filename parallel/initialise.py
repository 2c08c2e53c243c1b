"""First values of the weights, drawn shard by shard: a weight does not depend on who holds it.

The model is built on the meta device and cut there, so no rank ever holds the whole of it. Each
rank then fills what it holds; element (i, j) of parameter `name` is a function of (seed, name, i,
j) alone, so the bits are those of one device whatever the layout.
"""

from collections.abc import Mapping

from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from flows.initialise import Rule, fill_
from parallel.pieces import FlatPiece, Held, local_part


def fill_parameters(parameters: Mapping[str, Held], rules: Mapping[str, Rule], seed: int) -> None:
    """Draw every parameter's local part in place.

    parameters: canonical name -> parameter, materialised; a DTensor or a piece where it is cut
    rules: canonical name -> how it is drawn
    """
    for name, parameter in parameters.items():
        shape, offset = tuple(parameter.shape), global_offset(parameter)
        if isinstance(parameter, FlatPiece):  # a value depends on its number in the whole alone
            shape = (parameter.shape.numel(),)
        fill_(
            local_part(parameter.detach()),
            rules[name],
            seed=seed,
            name=name,
            global_shape=shape,
            offset=offset,
        )


def global_offset(tensor: Held) -> tuple[int, ...]:
    """Where the local part begins in the whole tensor, one index a dimension; one for a piece."""
    if isinstance(tensor, FlatPiece):
        return (tensor.start,)
    if not isinstance(tensor, DTensor):
        return (0,) * tensor.dim()
    _, offset = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    return tuple(int(index) for index in offset)
