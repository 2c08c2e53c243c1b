"""`routing.jsonl`: who sent tokens to whom, a line for each traced step of a run of experts.

    {"step": 20, "load": [[...], ...], "flow": [[[...], ...], ...]}

All are whole numbers over the whole batch: `load[l][e]`, slots of layer l that asked for its expert e, and
`flow[l][i][j]`, how often a token that asked for expert i of layer l asked for expert j of layer l + 1. A
token of k experts a layer is counted k^2 times from one layer to the next. Lines are written and cut off as
those of `metrics.jsonl`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flows.errors import UserError
from trainer import metrics_log
from trainer.routing import RoutingSums

Counts = NDArray[np.int64]


@dataclass(frozen=True)
class Trace:
    """What was recorded, summed over steps.

    steps: those that are in it
    load: (layers, experts) slots
    flow: (layers - 1, experts, experts) from each layer's experts to the next one's
    """

    steps: tuple[int, ...]
    load: Counts
    flow: Counts


def traced_line(sums: RoutingSums) -> dict[str, Any] | None:
    """What is written of a step, without its number; None for a step that is not traced."""
    if not len(sums.flow):
        return None
    load, flow = sums.load.sum(1), sums.flow[1:]
    return {"load": load.long().tolist(), "flow": flow.long().tolist()}


def read_trace(path: Path, layers: int, experts: int, since: int = 0) -> Trace:
    """The trace of a run with so many layers of so many experts, of the steps after `since`.

    Raises UserError if there is none, or if it is of another network.
    """
    lines = [line for line in metrics_log.read(path) if int(line["step"]) > since]
    if not lines:
        after = f" after step {since}" if path.exists() and since else ""
        raise UserError(
            f"{path} traces no step{after}; train with train.trace_experts=10, say, which writes every "
            "tenth step's routing there."
        )
    shapes = {"load": (layers, experts), "flow": (layers - 1, experts, experts)}
    load, flow = (_summed(path, lines, key, shape) for key, shape in shapes.items())
    return Trace(tuple(int(line["step"]) for line in lines), load, flow)


def _summed(
    path: Path, lines: Sequence[dict[str, Any]], key: str, shape: tuple[int, ...]
) -> Counts:
    total = np.zeros(shape, dtype=np.int64)
    for line in lines:
        try:
            counts = np.array(line[key], dtype=np.int64).reshape(-1, *shape[1:])
        except (KeyError, ValueError, TypeError):
            counts = np.zeros(0, dtype=np.int64)
        if counts.shape != shape or (counts < 0).any():
            raise UserError(
                f"{path}: `{key}` of step {line['step']} is not {' x '.join(map(str, shape))} counts, as the "
                "run's recipe has layers and experts; restore the file, or trace the run anew."
            )
        total += counts
    return total
