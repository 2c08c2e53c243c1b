"""Samples that depend on each other are coupled over the global batch, wherever they lie.

A pairing made of the samples of one rank would change with the number of ranks, and be worse: the fewer
samples, the farther a partner.
"""

from flows.batch import Batch
from flows.objectives.objective import Objective
from parallel.engines.engine import Engine


def coupled(engine: Engine, objective: Objective, batch: Batch, seed: int, step: int) -> Batch:
    """`batch` with what the objective makes of all samples of the step; a collective where it does."""
    if objective.couple is None:
        return batch
    return objective.couple(batch, whole_batch(engine, batch), seed, step)


def whole_batch(engine: Engine, batch: Batch) -> Batch:
    """All samples of the step in the order of their positions, on every rank: a collective.

    Without extras: the embedded text of a whole batch would not fit where its images do.
    """
    gather = engine.gather_over_data
    whole = Batch(gather(batch.image), gather(batch.label), gather(batch.position))
    return whole.take(whole.position.argsort())
