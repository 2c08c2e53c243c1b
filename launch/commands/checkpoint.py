"""`flowmill checkpoint`: what checkpoints a run has, what is in them, and whether they are whole."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from flows.errors import UserError
from trainer.checkpoints.commit import committed
from trainer.checkpoints.manifest import MANIFEST

if TYPE_CHECKING:
    from trainer.checkpoints.store import Checkpoint

app = typer.Typer(no_args_is_help=True)

# Named here, for the formats themselves know models, and torch takes seconds to import.
FORMATS = (
    "ml-tarflow",
    "ml-starflow",
    "sit",
    "dit",
    "repa",
    "lightningdit",
    "dit-moe",
    "flux",
    "jet",
)


Weights = Literal["ema", "raw"]
Precision = Literal["fp32", "bf16", "fp16"]
Json = Annotated[bool, typer.Option("--json", help="For programs: a list of records.")]


@app.command("list")
def list_command(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    as_json: Json = False,
) -> None:
    """List the checkpoints of a run; checks manifests and file sizes, not contents."""
    # torch takes seconds to import: `flowmill --help` should not.
    from trainer.checkpoints.store import list_checkpoints

    _report(list_checkpoints(_checkpoints_folder(run)), as_json)


@app.command("verify")
def verify(
    target: Annotated[Path, typer.Argument(help="Run folder, or one checkpoint in it.")],
    as_json: Json = False,
) -> None:
    """Read every byte of a run's checkpoints, or of one, and compare checksums."""
    from trainer.checkpoints.store import inspect, list_checkpoints

    if not target.name.startswith("step-") and not (target / MANIFEST).is_file():
        _report(list_checkpoints(_checkpoints_folder(target), checksums=True), as_json)
    else:
        _report([inspect(target, checksums=True)], as_json)


@app.command("inspect")
def inspect_command(
    target: Annotated[Path, typer.Argument(help="Run folder (its newest), or a checkpoint.")],
    step: Annotated[int | None, typer.Option(help="Which checkpoint of a run.")] = None,
    as_json: Json = False,
) -> None:
    """Show what is in one checkpoint: tensors, files, and where the run stood."""
    from trainer.checkpoints.contents import checkpoint_in, whole_manifest

    path = checkpoint_in(target, step)
    manifest = whole_manifest(path)
    if as_json:
        typer.echo(json.dumps({"path": str(path), **asdict(manifest)}, indent=2))
        return
    console = Console()
    facts = {
        "checkpoint": str(path),
        "step": str(manifest.step),
        "written": f"{manifest.time} by {manifest.layout}, torch {manifest.torch}",
        "layout": manifest.state.get("layout"),
        "imported": _imported(manifest.state.get("imported")),
        "placed": _placed(manifest.state.get("placed")),
        "position": str(manifest.state.get("loader", {}).get("position", "")),
    }
    for name, value in facts.items():
        if value:
            console.print(f"{name:<11}{value}", highlight=False, markup=False, soft_wrap=True)
    files = Table("file", "bytes", "sha256")
    for name, file in manifest.files.items():
        files.add_row(escape(name), f"{file.size:,}", file.sha256)
    tensors = Table("tensor", "dtype", "shape", "pieces")
    for name, tensor in sorted(manifest.tensors.items()):
        shape = " x ".join(map(str, tensor.shape)) or "1 number"
        tensors.add_row(escape(name), tensor.dtype, shape, str(len(tensor.chunks)))
    console.print(files)
    console.print(tensors)
    console.print(
        "Checksums are those of the time of writing; flowmill checkpoint verify compares them.",
        highlight=False,
        soft_wrap=True,
    )


def _imported(origin: "dict[str, Any] | None") -> str:
    return "" if origin is None else f"from {origin['file']} ({origin['source']})"


def _placed(origin: "dict[str, Any] | None") -> str:
    return "" if origin is None else f"experts over {origin['ranks']} ranks, from {origin['run']}"


@app.command("diff")
def diff(
    first: Annotated[Path, typer.Argument(help="Run folder (its newest), or a checkpoint.")],
    second: Annotated[Path, typer.Argument(help="The other one.")],
    as_json: Json = False,
) -> None:
    """Compare two checkpoints tensor by tensor, bit by bit; exit code 1 where they differ.

    Damaged ones are not compared.
    """
    from trainer.checkpoints.contents import checkpoint_in, differences
    from trainer.checkpoints.store import damage

    one, other = checkpoint_in(first), checkpoint_in(second)
    for path in (one, other):
        if (wrong := damage(path)) is not None:
            raise UserError(
                f"{wrong}, so that there is nothing to compare; use another checkpoint."
            )
    found = list(differences(one, other))
    if as_json:
        typer.echo(json.dumps([asdict(difference) for difference in found], indent=2))
    elif not found:
        Console().print(f"{one} and {other} hold the same tensors.", markup=False, soft_wrap=True)
    else:
        table = Table("tensor", "difference", "largest", "relative")
        for difference in found:
            numbers = (difference.largest, difference.relative)
            shown = ["" if number is None else f"{number:.3g}" for number in numbers]
            table.add_row(escape(difference.name), escape(difference.what), *shown)
        Console().print(table)
    if found:
        raise typer.Exit(1)


@app.command("import")
def import_command(
    file: Annotated[Path, typer.Argument(help="Published weights: torch, safetensors or .npz.")],
    source: Annotated[str, typer.Option("--from", help=f"Who wrote it: {', '.join(FORMATS)}.")],
    changes: Annotated[
        list[str] | None,
        typer.Argument(
            help="section.key=value: what the file leaves out, and all else of a recipe."
        ),
    ] = None,
    run: Annotated[
        Path | None, typer.Option(help="The new run folder; default: runs/NAME of the file.")
    ] = None,
    weights: Annotated[
        Weights | None, typer.Option(help="Where it has both; default: averaged.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs: one record.")] = False,
) -> None:
    """Make a run folder of a public program's weights: a recipe and a checkpoint."""
    from trainer.interchange import import_run

    run = run or Path("runs") / file.stem
    made = import_run(file, source, run, weights, changes or [])
    if as_json:
        record = {"run": str(run), "parameters": made.parameters, "assumed": made.assumed}
        typer.echo(json.dumps({**record, "model": made.recipe.model.model_dump(mode="json")}))
        return
    lines = [
        f"{file}: {made.parameters:,} numbers of the family {made.recipe.model.family} into {run}; "
        f"flowmill sample {run}, or flowmill train {made.run.recipe} data.train=SHARDS"
    ]
    lines += [
        f"assumed: {key} = {value}, which the file does not tell; override it with {key}=..."
        for key, value in made.assumed.items()
    ]
    Console(soft_wrap=True).print("\n".join(lines), highlight=False, markup=False)


@app.command("upcycle")
def upcycle_command(
    dense: Annotated[Path, typer.Argument(help="Run folder of a dense network.")],
    run: Annotated[Path, typer.Argument(help="The new run folder.")],
    changes: Annotated[
        list[str] | None,
        typer.Argument(help="section.key=value: model.experts, and all else of a recipe."),
    ] = None,
) -> None:
    """Make a run of a mixture of experts, each a copy of the feed-forwards of a dense network."""
    from trainer.engines import fewest_ranks
    from trainer.upcycling import upcycle_run

    made = upcycle_run(dense, run, changes or [])
    ranks = fewest_ranks(made.recipe.parallel)
    lines = [
        f"{dense}: {made.parameters:,} numbers of the family {made.recipe.model.family} into {run}; "
        f"flowmill train {made.run.recipe}{f' --ranks {ranks}' if ranks > 1 else ''}"
    ]
    if made.changed:
        lines.append(f"{run} need not begin as {dense} did: {', '.join(made.changed)}.")
    Console(soft_wrap=True).print("\n".join(lines), highlight=False, markup=False)


@app.command("export")
def export_command(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    out: Annotated[Path, typer.Argument(help="A .safetensors file; for diffusers a folder.")],
    target: Annotated[
        str, typer.Option("--as", help=f"flowmill, diffusers, {', '.join(FORMATS)}.")
    ] = "flowmill",
    weights: Annotated[Weights, typer.Option(help="Averaged or raw.")] = "ema",
    precision: Annotated[Precision, typer.Option(help="Of floats.")] = "fp32",
    step: Annotated[int | None, typer.Option(help="Which checkpoint; default: the newest.")] = None,
) -> None:
    """Write the weights of a run under our names, those of a public program, or for diffusers."""
    from trainer.interchange import export_run

    written = export_run(run, out, target=target, weights=weights, precision=precision, step=step)
    Console(soft_wrap=True).print(str(written), highlight=False, markup=False)


def _checkpoints_folder(run: Path) -> Path:
    """Where the checkpoints of `run` are; `run` may be that folder itself."""
    for folder in (run / "checkpoints", run):
        if committed(folder):
            return folder
    if (run / "recipe.yaml").is_file():
        raise UserError(f"{run} has no checkpoints yet; train it first.")
    state = "not a run folder" if run.exists() else "no such folder"
    raise UserError(f"{run}: {state}; name the run.dir of a training.")


def _report(checkpoints: "list[Checkpoint]", as_json: bool) -> None:
    """Print `checkpoints`; exit code 1 where one is damaged."""
    if as_json:
        typer.echo(json.dumps([_record(checkpoint) for checkpoint in checkpoints], indent=2))
    else:
        parent = checkpoints[0].path.parent
        table = Table("step", "size", "state", "folder", title=escape(str(parent)))
        for checkpoint in checkpoints:
            state = "[green]whole"
            if checkpoint.damage is not None:
                state = f"[red]{escape(checkpoint.damage)}"
            size = f"{checkpoint.size / 2**20:.1f} MiB"
            table.add_row(str(checkpoint.step), size, state, checkpoint.path.name)
        Console().print(table)
    if any(checkpoint.damage for checkpoint in checkpoints):
        raise typer.Exit(1)


def _record(checkpoint: "Checkpoint") -> dict[str, object]:
    return {
        "step": checkpoint.step,
        "path": str(checkpoint.path),
        "size": checkpoint.size,
        "whole": checkpoint.damage is None,
        "damage": checkpoint.damage,
    }
