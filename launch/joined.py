"""Commands whose work ranks may share: those of --ranks, those of torchrun, or this process alone."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from flows.errors import UserError
from launch.ranks import (
    as_rank,
    die_with_parent,
    joined_by_launcher,
    run_ranks,
    world_size_from_launcher,
)

if TYPE_CHECKING:
    from parallel.processes import Ranks
    from trainer.run_folder import RunFolder

# Ranks wait for the slowest; whoever started them notices one that has died.
TIMEOUT_SECONDS = 24 * 3600

# How many threads share a matrix product changes its last bits, unless MKL is told that it may not; it
# reads this when it is first asked for one.
SAME_ON_ANY_THREADS = {"MKL_CBWR": "AUTO,STRICT"}

RanksOption = Annotated[
    int | None,
    typer.Option("--ranks", min=1, help="Local ranks to start, which share the samples."),
]


def start_ranks(run: "RunFolder", ranks: int | None) -> None:
    """Where several ranks are asked for, and this is none yet: start them, and end as they do.

    Call it before anything is computed: from then on results do not depend on the number of threads.

    Raises UserError for more ranks than there are accelerators, or than the launcher started.
    """
    os.environ.update(SAME_ON_ANY_THREADS)
    if joined_by_launcher():
        started = world_size_from_launcher()
        if ranks is not None and ranks != started:
            raise UserError(
                f"--ranks {ranks} contradicts the launcher, which started {started}; leave it out."
            )
        return
    if ranks is None or ranks == 1:
        return
    from parallel.processes import choose_device
    from trainer.run_folder import check_writable

    check_writable(run)
    choose_device("auto", ranks - 1)
    sys.exit(run_ranks(sys.argv[1:], ranks, run.logs / "sample"))


@contextmanager
def joined() -> Iterator["Ranks"]:
    """This process's place among the ranks, in whose collectives it takes part; alone without any."""
    from parallel.processes import alone, start, stop

    if not joined_by_launcher():
        yield alone()
        return
    die_with_parent()
    with as_rank():
        try:
            yield start("auto", TIMEOUT_SECONDS)
        finally:
            stop()
