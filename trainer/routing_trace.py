"""`routing.jsonl`: who sent tokens to whom, a line for each traced step of a run of experts but skipped ones.

    {"step": 20, "load": [[...], ...], "flow": [[[...], ...], ...]}

All are whole numbers over the whole batch: `load[l][e]`, slots of layer l that asked for its expert e, and
`flow[l][i][j]`, how often a token that asked for expert i of layer l asked for expert j of layer l + 1. A
token of k experts a layer is counted k^2 times from one layer to the next. Lines are written and cut off as
those of `metrics.jsonl`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flows.errors import UserError
from trainer import metrics_log
from trainer.routing import RoutingSums

Counts = NDArray[np.int64]
EXACT = 2**53  # float64 has every whole number up to here
EXACT_SUMS = 2**24  # and float32, in which a step's slots are added up
ROUNDING = 1e-4  # of float32 sums above it, in whatever order
ADVICE = "restore the file, or trace the run anew."


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


def read_trace(
    path: Path, layers: int, experts: int, since: int = 0, *, chosen: int | None
) -> Trace:
    """The trace of a run with so many layers of so many experts, of the steps after `since`.

    chosen: experts that each token asks for; None where experts choose, so that tokens have any number

    Raises UserError if there is none, if it is of another network, or if it is damaged: counts are whole
    numbers that float64 adds up exactly and that agree with each other, and a step is there once, since a
    run that goes on cuts its trace.
    """
    lines = _numbered(path, since)
    if not lines:
        after = f" after step {since}" if path.exists() and since else ""
        raise UserError(
            f"{path} traces no step{after}; train with train.trace_experts=10, say, which writes every "
            "tenth step's routing there."
        )
    shapes = {"load": (layers, experts), "flow": (layers - 1, experts, experts)}
    load, flow = (_summed(path, lines, key, shape) for key, shape in shapes.items())
    for number, line in lines.items():
        if (wrong := _contradiction(np.array(line["load"]), line["flow"], chosen)) is not None:
            raise UserError(f"{path}, line {number}: step {line['step']} has {wrong}; {ADVICE}")
    if not load.any():
        raise UserError(f"{path} counts no token: all loads are 0; {ADVICE}")
    return Trace(tuple(line["step"] for line in lines.values()), load, flow)


def _numbered(path: Path, since: int) -> dict[int, dict[str, Any]]:
    """Number of a line -> what it says, of the steps after `since`."""
    found: dict[int, dict[str, Any]] = {}
    steps: dict[int, int] = {}
    for number, line in enumerate(metrics_log.read(path), start=1):
        step = line["step"]
        if type(step) is not int or step < 0:
            raise UserError(
                f"{path}, line {number}: `step` is not a whole number from 0 on; {ADVICE}"
            )
        if step in steps:
            raise UserError(
                f"{path}, line {number}: step {step} is there already, in line {steps[step]}; remove one of "
                "the two, or trace the run anew."
            )
        steps[step] = number
        if step > since:
            found[number] = line
    return found


def _contradiction(load: Counts, flow: Any, chosen: int | None) -> str | None:
    """What two counts of one step say against each other, in words.

    Slots are counted as they are asked for, whether they are dropped or not: every layer has as many, and a
    token that asks for an expert asks for `chosen` of the layer after and of the layer before.
    """
    totals: list[int] = load.sum(1).tolist()
    for layer, total in enumerate(totals):
        if not _alike(total, totals[0]):
            return f"{total:,} slots in layer {layer} and {totals[0]:,} in layer 0 in its `load`"
    if chosen is None:
        return None
    for layer, pairs in enumerate(flow):
        counts = np.array(pairs)
        for side, at, summed in ((layer, "from", counts.sum(1)), (layer + 1, "to", counts.sum(0))):
            for expert, found in enumerate(summed.tolist()):
                wanted = chosen * int(load[side, expert])
                if not _alike(found, wanted):
                    return (
                        f"{found:,} pairs {at} expert {expert} of layer {side} in its `flow`, where its "
                        f"`load` and {chosen} experts a token make {wanted:,}"
                    )
    return None


def _alike(one: int, other: int) -> bool:
    most = max(one, other)
    return abs(one - other) <= (ROUNDING * most if most > EXACT_SUMS else 0)


def _summed(
    path: Path, lines: Mapping[int, dict[str, Any]], key: str, shape: tuple[int, ...]
) -> Counts:
    total, tokens = np.zeros(shape, dtype=np.int64), 0
    for number, line in lines.items():
        counts = _counts(line.get(key), shape)
        tokens += 0 if counts is None else sum(counts.ravel().tolist())
        if counts is None or tokens >= EXACT:
            raise UserError(
                f"{path}, line {number}: `{key}` of step {line['step']} is not "
                f"{' x '.join(map(str, shape))} counts, as the run's recipe has layers and experts, each a "
                f"whole number from 0 on and all lines together below 2^53; {ADVICE}"
            )
        total += counts.astype(np.int64)
    return total


def _counts(told: Any, shape: tuple[int, ...]) -> NDArray[np.object_] | None:
    """Lists as an array of this shape; None if they are not that, or not of whole numbers from 0 on."""
    try:
        counts = np.array(told, dtype=object)
    except ValueError:  # lists of several lengths
        return None
    if not shape[0] and counts.shape == (0,):
        counts = counts.reshape(shape)
    # A type, since true is an int too.
    if counts.shape != shape or not {type(count) for count in counts.flat} <= {int}:
        return None
    return None if (counts < 0).any() else counts
