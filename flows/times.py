"""Where on the path a sample is trained: from a uniform number to a time, 0 noise and 1 data."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class TimeDistribution:
    """How training times are spread.

    kind: `uniform`, or `logit_normal`: t = sigmoid(mean + std n), n standard normal (Esser et al.
        2024, "Scaling rectified flow transformers", section 3.1)
    shift: see `shift_time`; < 1 moves times towards the noise
    """

    kind: Literal["uniform", "logit_normal"]
    mean: float
    std: float
    shift: float

    def __call__(self, uniform: Tensor) -> Tensor:
        """(batch,) times in [0, 1] from (batch,) uniform numbers in (0, 1), in the same dtype.

        Computed in float64 and rounded once: float32 functions would depend on where in the batch a
        sample lies.
        """
        t = uniform.to(torch.float64)
        if self.kind == "logit_normal":
            t = torch.sigmoid(self.mean + self.std * torch.special.ndtri(t))
        return shift_time(t, self.shift).to(uniform.dtype)


def shift_time(t: Tensor, shift: float) -> Tensor:
    """t' = s t / (1 + (s - 1) t): logit t' = logit t + log s (ibid., section 5.3.2).

    Shifts compose by multiplication, and s = 1 is the identity. Large images need more of the noisy
    end: s < 1 where t = 0 is noise.
    """
    return shift * t / (1 + (shift - 1) * t)
