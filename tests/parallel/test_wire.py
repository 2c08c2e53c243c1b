"""What ranks send in a step is what the formulas of `docs/layouts.md` say, to the byte."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import nn

from parallel.mesh import resolve_layout
from parallel.processes import Ranks
from parallel.wire import SentBytes, ddp_bytes, fsdp_bytes, padded, share, zero_bytes
from tests.distributed.harness import run_ranks
from tests.parallel import scenario

STEADY = 2  # steps after which nothing is being set up any more


def sent(ranks: Ranks) -> dict[str, float]:
    """Engine -> bytes of a steady step: forward, backward, norm, optimizer, and the sum of losses."""
    size = ranks.world_size
    layouts = {name: resolve_layout(name, None, None, size) for name in ("ddp", "fsdp")}
    if size == 4:
        layouts["hsdp"] = resolve_layout("hsdp", 2, 2, size)
    engines: dict[str, Callable[[], Any]] = {
        name: (lambda layout=layout: scenario.build(layout)) for name, layout in layouts.items()
    }
    if size == 2:
        engines |= {f"zero-{n}": (lambda n=n: scenario.build_zero(n)) for n in (1, 2, 3)}
    engines["fsdp, microbatches"] = engines["fsdp"]
    found = {}
    for name, build in engines.items():
        engine = build()
        # Half a rank's share, or all of it.
        microbatch = scenario.GLOBAL_BATCH // size // (2 if "micro" in name else 1)
        for step in range(STEADY + 1):
            with SentBytes() as counted:
                scenario.backward(engine, step, microbatch)
                engine.clip_gradients(scenario.MAX_NORM)
                engine.step(scenario.LEARNING_RATE, torch.zeros(()))
        found[name] = float(counted.total)
        if name.startswith("zero"):
            engine._inner.destroy()
    return found


@pytest.fixture(scope="module")
def found() -> dict[int, list[dict[str, float]]]:
    pytest.importorskip("deepspeed")
    return {size: run_ranks(sent, size, timeout=280.0) for size in (2, 4)}


MODEL = scenario.single_device_model()
ALL = list(MODEL.parameters())
BLOCKS = list(MODEL.blocks.parameters())
REST = [p for name, p in MODEL.named_parameters() if not name.startswith("blocks.")]


def numbers(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def flat(size: int) -> int:
    """Each parameter as a line, filled up."""
    return sum(size * -(-parameter.numel() // size) for parameter in ALL)


# (ranks, engine) -> the formula, and the sums of single numbers beside it: the loss over data ranks, and the
# norm over the ranks that hold parts. DeepSpeed's own are a norm or an overflow more, and two broadcasts.
CASES = {
    (2, "ddp"): (ddp_bytes(numbers(ALL), 2), 2 * share(4, 2)),
    (4, "ddp"): (ddp_bytes(numbers(ALL), 4), 2 * share(4, 4)),
    (2, "fsdp"): (fsdp_bytes(padded(BLOCKS, 2), padded(REST, 2), 2, 1), 4 * share(4, 2)),
    (4, "fsdp"): (fsdp_bytes(padded(BLOCKS, 4), padded(REST, 4), 4, 1), 4 * share(4, 4)),
    (2, "fsdp, microbatches"): (
        fsdp_bytes(padded(BLOCKS, 2), padded(REST, 2), 2, 1, microbatches=2),
        4 * share(4, 2),
    ),
    (4, "hsdp"): (fsdp_bytes(padded(BLOCKS, 2), padded(REST, 2), 2, 2), 6 * share(4, 2)),
    (2, "zero-1"): (zero_bytes(1, numbers(ALL), 2), 4 * share(4, 2)),
    (2, "zero-2"): (zero_bytes(2, numbers(ALL), 2), 4 * share(4, 2)),
    (2, "zero-3"): (zero_bytes(3, flat(2), 2), 6 * share(4, 2) + 2 * share(4, 2)),
}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_step_sends_what_its_formula_says(found, case):
    size, engine = case
    formula, single = CASES[case]
    for rank in found[size]:
        assert rank[engine] == float(formula + single)


def test_a_collective_that_is_not_known_is_not_passed_over():
    counter = SentBytes()
    with pytest.raises(NotImplementedError, match="gather_"):
        counter._count("gather_", (), {})
