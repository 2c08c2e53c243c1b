"""`flowmill bench`: measurements anyone can repeat, as a table or as JSON."""

import json
import os
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from flows.errors import UserError

if TYPE_CHECKING:
    from benchmarks.loader import Comparison
    from benchmarks.sampling import SamplingCost

RecipeArgument = Annotated[str, typer.Argument(help="A recipe file, or the name of a shipped one.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Changes to it, as section.key=value.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]

app = typer.Typer(no_args_is_help=True, help="Measure this machine and this trainer.")


@app.callback()
def bench() -> None:
    """Measure this machine and this trainer."""


@app.command()
def overhead(
    recipe: RecipeArgument = "digits",
    overrides: Overrides = None,
    pairs: Annotated[int, typer.Option(min=10, help="Steps of either side.")] = 200,
    as_json: AsJson = False,
) -> None:
    """The trainer's step against a hand-written loop: same arithmetic, same tensors, in turn, one rank."""
    from benchmarks.overhead import measure
    from trainer.recipe import load_recipe

    result = measure(load_recipe(recipe, overrides or []), pairs, warm_up=20)
    if as_json:
        typer.echo(json.dumps(asdict(result)))
        return
    table = Table("", "median step", title=f"{recipe}, {pairs} paired steps, one rank")
    table.add_row("flowmill", f"{result.trainer_seconds * 1e3:.2f} ms")
    table.add_row("hand-written loop", f"{result.loop_seconds * 1e3:.2f} ms")
    table.add_row("median of paired ratios", f"{result.ratio:.4f}")
    table.add_row("weights apart after the warm-up", f"{result.weight_difference:.1e}")
    Console().print(table)


@app.command()
def engines(
    recipe: RecipeArgument = "digits",
    overrides: Overrides = None,
    rounds: Annotated[int, typer.Option(min=10, help="Steps of every side.")] = 100,
    as_json: AsJson = False,
) -> None:
    """Every engine against bare PyTorch loops: two ranks, same tensors, step by step in turn."""
    from launch.ranks import joined_by_launcher, run_ranks
    from trainer.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    if not joined_by_launcher():
        with tempfile.TemporaryDirectory() as logs:
            sys.exit(run_ranks(sys.argv[1:], 2, Path(logs)))
    from benchmarks.engines import measure

    result = measure(loaded, rounds, warm_up=20)
    if os.environ["RANK"] != "0":
        return
    if as_json:
        goals = [{"side": name, "speed": speed, "met": met} for name, speed, met in result.goals]
        typer.echo(json.dumps(asdict(result) | {"goals": goals}))
        return
    title = (
        f"{recipe}, {result.parameters / 1e6:.1f} M parameters, batch {result.batch} over {result.ranks} "
        f"ranks, {result.rounds} rounds"
    )
    table = Table("side", "median step", "speed", "of", "weights apart", title=title)
    for row in result.rows:
        if row.seconds is None or row.speed is None:
            table.add_row(row.name, "not installed")
            continue
        apart = f"{row.difference:.1e}"
        table.add_row(
            row.name, f"{row.seconds * 1e3:.1f} ms", f"{row.speed:.3f}x", row.against, apart
        )
    Console().print(table)


@app.command()
def step(
    recipe: RecipeArgument = "digits",
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(min=3, help="Steps to measure.")] = 20,
    as_json: AsJson = False,
) -> None:
    """Where a training step's time goes, beside bare matrix products of the same run."""
    from benchmarks.step import measure
    from trainer.recipe import load_recipe

    result = measure(load_recipe(recipe, overrides or []), steps)
    if as_json:
        typer.echo(json.dumps(asdict(result) | {"of_peak": result.of_peak}))
        return
    where = (
        f"{result.device}, {result.threads} threads" if result.device == "cpu" else result.device
    )
    table = Table("", "", title=f"a training step of {recipe}, {where}, median of {steps}")
    table.add_row("step", f"{result.seconds * 1e3:.1f} ms")
    table.add_row("matrix products in it", f"{result.flops / 1e9:.1f} GFLOP")
    table.add_row("bare matrix products", f"{result.peak / 1e9:.1f} GFLOP/s")
    table.add_row("step as a fraction of that", f"{result.of_peak:.3f}")
    for kind, share in sorted(result.shares.items(), key=lambda item: -item[1]):
        table.add_row(f"profiled time: {kind}", f"{share:.1%}")
    Console().print(table)


@app.command()
def memory(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    ranks: Annotated[int, typer.Option(min=1, help="Ranks of the run; none is started.")] = 1,
    as_json: AsJson = False,
) -> None:
    """What each of many ranks would hold of a model: nothing is allocated, no data is read."""
    from benchmarks.memory import HELD, measure
    from trainer.recipe import load_recipe

    found = measure(load_recipe(recipe, overrides or []), ranks)
    if as_json:
        typer.echo(json.dumps(asdict(found) | {"total": found.total}))
        return
    where = ", state on the host" if found.offloaded else ""
    title = (
        f"{found.whole:,} parameters on {ranks} ranks ({found.layout or 'whole'}){where}, a rank"
    )
    table = Table("", "MiB", title=title)
    for name in (*HELD, "total"):
        table.add_row(name, f"{getattr(found, name) / 2**20:,.1f}")
    Console().print(table)


@app.command()
def loader(
    batch: Annotated[int, typer.Option(min=1, help="Samples a batch.")] = 64,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Threads or processes that decode; as many as cores.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of every side.")] = 5,
    resume_samples: Annotated[
        int, typer.Option(min=0, help="Samples of the epoch to go on in at 90 %; 0: do not.")
    ] = 100_000,
    as_json: AsJson = False,
) -> None:
    """Our loader against others on this machine: samples a second, and going on late in an epoch."""
    from benchmarks.loader import compare
    from benchmarks.loader_sides import Setting

    console = Console(stderr=True)
    result = compare(
        Setting(batch, workers or os.cpu_count() or 1),
        rounds=rounds,
        resume_samples=resume_samples,
        note=lambda text: console.print(text, highlight=False, markup=False),
    )
    if as_json:
        goals = [asdict(goal) | {"met": goal.met} for goal in result.goals]
        typer.echo(json.dumps(asdict(result) | {"goals": goals}))
        return
    _print_comparison(result)


@app.command()
def papers(
    only: Annotated[
        list[str] | None, typer.Argument(help="Checks to run; all if none is named.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of weights, data and noise.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Claims of papers on eight Gaussians: what was asked for, what was found. Minutes on one core."""
    import torch

    from benchmarks.papers import CHECKS, measure

    if unknown := sorted(set(only or []) - CHECKS.keys()):
        raise UserError(f"there is no check {unknown[0]}; use {', '.join(CHECKS)}.")
    torch.set_num_threads(1)  # of so small a network a second thread only waits
    console = Console(stderr=True)

    def note(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    rows = measure(only or list(CHECKS), seed, note)
    if as_json:
        typer.echo(json.dumps([asdict(row) for row in rows]))
        return
    table = Table("paper", "claim", "gate", "measured", "", title=f"eight Gaussians, seed {seed}")
    for row in rows:
        table.add_row(row.paper, row.claim, row.gate, row.measured, "met" if row.met else "missed")
    Console().print(table)


@app.command()
def sampling(
    recipe: Annotated[
        str, typer.Argument(help="A recipe of a TarFlow or a STARFlow, to be trained first.")
    ] = "tarflow_digits",
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Changes to it; where none are given, 64 tokens and 600 steps."),
    ] = None,
    run: Annotated[str | None, typer.Option(help="The folder of a trained run instead.")] = None,
    batch: Annotated[list[int], typer.Option(min=1, help="Samples a batch.")] = [1, 4, 16, 64],  # noqa: B006
    rounds: Annotated[int, typer.Option(min=1, help="Turns of every way.")] = 5,
    samples: Annotated[int, typer.Option(min=2, help="Samples to judge a way by.")] = 512,
    group: Annotated[int, typer.Option(min=2, help="Tokens of a group of GS-Jacobi.")] = 16,
    tolerance: Annotated[float, typer.Option(min=0, help="Of parallel iterations.")] = 0.03,
    as_json: AsJson = False,
) -> None:
    """Ways to sample a flow: token by token, by parallel iterations, and the automatic choice of these."""
    from benchmarks.sampling import measure_run, train_and_measure
    from trainer.recipe import load_recipe

    console = Console(stderr=True)
    how = {"batches": batch, "rounds": rounds, "samples": samples, "group": group}

    def note(text: str) -> None:
        console.print(text, highlight=False, markup=False)

    if run is not None:
        result = measure_run(run, note, **how, tolerance=tolerance)
    else:
        chosen = load_recipe(recipe, overrides or ["model.patch=2", "train.steps=600"])
        result = train_and_measure(chosen, note, **how, tolerance=tolerance)
    if as_json:
        typer.echo(json.dumps(asdict(result)))
        return
    _print_sampling(result)


def _print_sampling(result: "SamplingCost") -> None:
    batches = list(result.ways[0].seconds)
    title = f"{result.model} on {result.device}, {result.threads} threads; {result.samples} samples judged"
    table = Table(
        "way",
        *(f"batch {size}" for size in batches),
        "calls",
        "difference",
        "distance",
        title=title,
    )
    for way in result.ways:
        times = (
            f"{way.seconds[size] * 1e3:.0f} ms, {result.speedup(way.name, size):.2f}x"
            for size in batches
        )
        judged = f"{way.network_calls:.1f}", f"{way.difference:.1e}", f"{way.distance:.4f}"
        table.add_row(way.name, *times, *judged)
    choices = Table("batch", "tokens of a group, the top block first (1: sequential)")
    for size, found in result.choices.items():
        choices.add_row(str(size), ", ".join(str(choice.strategy.group) for choice in found))
    Console().print(table, choices)


@app.command()
def pipeline(
    only: Annotated[
        list[str] | None, typer.Argument(help="Schedules to run; all if none is named.")
    ] = None,
    ranks: Annotated[int, typer.Option(min=2, max=16, help="Ranks that the pipeline lies on.")] = 4,
    microbatches: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Microbatches of a step; 4 and 8 if none is named."),
    ] = None,
    milliseconds: Annotated[
        float, typer.Option(min=1, help="Of a forward of one rank's share of the model.")
    ] = 80.0,
    rounds: Annotated[int, typer.Option(min=1, help="Steps of every schedule.")] = 3,
    as_json: AsJson = False,
) -> None:
    """Pipeline schedules on real ranks whose work is a sleep: how long they wait, and what was predicted."""
    from launch.ranks import joined_by_launcher, run_ranks
    from parallel.pipeline.catalog import NAMES, make_schedule

    microbatches, names = microbatches or [4, 8], only or list(NAMES)
    if not joined_by_launcher():
        from benchmarks.pipeline import WORDS

        for number in microbatches:  # refused once, not by every rank
            for name in names:
                if name != "dualpipev":
                    make_schedule(name, ranks, number, None, WORDS)
        with tempfile.TemporaryDirectory() as logs:
            sys.exit(run_ranks(sys.argv[1:], ranks, Path(logs)))
    from benchmarks.pipeline import GAIN, gains, measure
    from parallel.processes import start, stop

    joined = start("cpu", 120.0)
    try:
        rows = measure(joined, names, microbatches, milliseconds / 1e3, rounds)
    finally:
        stop()
    if not joined.is_first:
        return
    found = gains(rows)
    if as_json:
        sides = [asdict(row) | {"met": row.met} for row in rows]
        typer.echo(json.dumps({"rows": sides, "gains": found}))
        return
    title = (
        f"{ranks} ranks, {milliseconds:g} ms a forward of a rank's share, best of {rounds} steps"
    )
    table = Table("schedule", "microbatches", "step", "idle", "predicted", "", title=title)
    for row in rows:
        shares = f"{row.idle:.1%}", f"{row.predicted:.1%}", "met" if row.met else "missed"
        table.add_row(row.name, str(row.microbatches), f"{row.seconds * 1e3:.0f} ms", *shares)
    goal = Table("microbatches", "BitPipe over interleaved 1F1B", "goal", "")
    for number, gain in found.items():
        met = "met" if GAIN[0] <= gain <= GAIN[1] else "missed"
        goal.add_row(str(number), f"{gain:.3f}x", f"{GAIN[0]} to {GAIN[1]}x", met)
    Console().print(table, goal)


@app.command()
def experts(
    count: Annotated[list[int], typer.Option(min=2, help="Numbers of experts.")] = [8, 16, 64],  # noqa: B006
    rounds: Annotated[int, typer.Option(min=1, help="Turns of either way.")] = 10,
    as_json: AsJson = False,
) -> None:
    """A mixture of experts against a loop over its experts: forward and backward, one thread of a CPU."""
    import torch

    from benchmarks.experts import CHOSEN, SIZES, measure

    torch.set_num_threads(1)
    found = [measure(size, experts, rounds) for size in SIZES for experts in count]
    if as_json:
        rows = [asdict(one) | {"ratio": one.ratio, "bound": one.bound} for one in found]
        typer.echo(json.dumps(rows))
        return
    columns = ("layer of", "experts", "tokens/s", "loop's", "ratio", "products alone", "apart")
    table = Table(*columns, title=f"{CHOSEN} experts a token, one thread, median of {rounds}")
    for one in found:
        speeds = (f"{one.tokens / seconds:,.0f}" for seconds in (one.mixture, one.loop))
        ratios = f"{one.ratio:.2f}x", f"{one.bound:.2f}x", f"{one.difference:.1e}"
        table.add_row(one.size, str(one.experts), *speeds, *ratios)
    Console().print(table)


@app.command()
def wait(
    recipe: RecipeArgument = "digits",
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps that are measured.")] = 200,
    device_ms: Annotated[
        float, typer.Option(min=0, help="What a step of a device takes, in milliseconds.")
    ] = 50.0,
    batch: Annotated[int, typer.Option(min=1, help="JPEGs that such a step asks for.")] = 64,
    as_json: AsJson = False,
) -> None:
    """How long steps wait for data: of a recipe as it trains here, and of JPEGs for a device."""
    from benchmarks.loader_sides import Setting
    from benchmarks.loader_wait import beside_a_device, in_training

    setting = Setting(batch, os.cpu_count() or 1)
    found = [
        in_training(recipe, overrides or [], steps=steps, warm_up=20),
        beside_a_device(setting, step=device_ms / 1e3, steps=steps, warm_up=20),
    ]
    if as_json:
        typer.echo(json.dumps([asdict(one) for one in found]))
        return
    table = Table("", "median step", "waits for data", "longest wait", title=f"{steps} steps each")
    for one in found:
        step, longest = (f"{s * 1e3:.1f} ms" for s in (one.step_seconds, one.longest_seconds))
        table.add_row(one.what, step, f"{one.share:.2%} of the time", longest)
    Console().print(table)


def _print_comparison(result: "Comparison") -> None:
    title = (
        f"JPEG 256 x 256, batches of {result.setting.batch}, {result.setting.workers} workers, median of "
        f"{result.rounds} rounds; going on at sample {result.resumed_at:,}"
    )
    table = Table("loader", "samples/s", "goes on in", "differs by", title=title)
    for row in result.rows:
        if row.speed is None:
            table.add_row(row.name, f"not installed: {row.install}")
            continue
        resume = f"{row.resume_seconds:.3f} s" if row.resume_seconds else ""
        table.add_row(row.name, f"{row.speed:,.0f}", resume, f"{row.difference:.1e}")
    goals = Table("goal", "wanted", "found", "")
    for goal in result.goals:
        found = "not measured" if goal.found is None else f"{goal.found:.2f}x"
        goals.add_row(goal.what, f"{goal.wanted:g}x", found, "met" if goal.met else "missed")
    Console().print(table, goals)
