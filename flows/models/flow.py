"""What a normalizing flow says of its input: where it goes, and by how much volume changes."""

from typing import NamedTuple

from torch import Tensor


class FlowOutput(NamedTuple):
    """One pass from data to the prior, in float32 whatever the network computed in.

    z: (batch, tokens, features) in the prior's space, its tokens in raster order
    logdet: (batch,) log |det dz / dx|, a sum over all dimensions
    power: (batch,) sum over the input and every flow block's output but the last of its mean square
        (STARFlow's regulariser of latents)
    """

    z: Tensor
    logdet: Tensor
    power: Tensor
