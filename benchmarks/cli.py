"""`flowmill bench`: measurements anyone can repeat, as a table or as JSON."""

import typer

from benchmarks.cli_loading import loader, wait
from benchmarks.cli_models import experts, papers, placement, sampling
from benchmarks.cli_training import engines, memory, overhead, pipeline, step

app = typer.Typer(no_args_is_help=True, help="Measure this machine and this trainer.")


@app.callback()
def bench() -> None:
    """Measure this machine and this trainer."""


for command in (
    overhead,
    engines,
    step,
    memory,
    loader,
    papers,
    sampling,
    pipeline,
    experts,
    placement,
    wait,
):
    app.command()(command)
