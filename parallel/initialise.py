"""First values of the weights, drawn shard by shard: a weight does not depend on who holds it.

The model is built on the meta device and cut there, so no rank ever holds the whole of it. Each
rank then fills what it holds; element (i, j) of parameter `name` is a function of (seed, name, i,
j) alone, so the bits are those of one device whatever the layout.
"""

from collections.abc import Mapping

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from flows.initialise import Rule, fill_


def fill_parameters(parameters: Mapping[str, Tensor], rules: Mapping[str, Rule], seed: int) -> None:
    """Draw every parameter's local part in place.

    parameters: canonical name -> parameter, materialised; a DTensor where it is cut
    rules: canonical name -> how it is drawn
    """
    for name, parameter in parameters.items():
        fill_(
            local_part(parameter.detach()),
            rules[name],
            seed=seed,
            name=name,
            global_shape=tuple(parameter.shape),
            offset=global_offset(parameter),
        )


def local_part(tensor: Tensor) -> Tensor:
    """This rank's own memory of a tensor, without its padding; may have no elements."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def global_offset(tensor: Tensor) -> tuple[int, ...]:
    """Where the local part begins in the whole tensor, one index a dimension."""
    if not isinstance(tensor, DTensor):
        return (0,) * tensor.dim()
    _, offset = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    return tuple(int(index) for index in offset)
