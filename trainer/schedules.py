"""The learning rate as a pure function of the step: a resumed run needs no scheduler state."""

import math
from typing import Literal

Schedule = Literal["cosine", "linear", "constant"]


def learning_rate(
    step: int, *, lr: float, warmup: int, steps: int, schedule: Schedule, final_lr: float
) -> float:
    """Learning rate of `step`, counted from 0.

    Linear warm-up over `warmup` steps, the last of which has `lr`; from there a cosine or a line
    to `final_lr`, which the last step, `steps - 1`, has; `constant` stays at `lr`. Steps after
    the last one keep its rate.
    """
    if step < warmup:
        return lr * (step + 1) / warmup
    peak = max(warmup - 1, 0)
    decay_steps = steps - 1 - peak
    if schedule == "constant" or decay_steps <= 0:
        return lr
    progress = min((step - peak) / decay_steps, 1.0)
    remaining = 1.0 - progress if schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return final_lr + (lr - final_lr) * remaining
