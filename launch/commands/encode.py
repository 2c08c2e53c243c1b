"""`flowmill data encode`: latents and text embeddings, made once, by any number of ranks."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.table import Table

from flows.errors import UserError
from launch.console import plain
from launch.ranks import die_with_parent, joined_by_launcher, place_from_launcher, run_ranks

if TYPE_CHECKING:
    import torch

    from data_pipeline.encode import Outcome
    from data_pipeline.encoders.job import Job

SHOWN_DROPPED = 20

Source = Annotated[
    str,
    typer.Argument(help="Shards, as a pattern; or a recipe, whose train and heldout are encoded."),
]
Out = Annotated[str, typer.Argument(help="Folder or URL of the encoded shards.")]
AutoencoderFolder = Annotated[
    Path | None, typer.Option(help="Local folder of a diffusers AutoencoderKL.")
]
TextEncoderName = Annotated[
    str | None,
    typer.Option(
        help="Local folder of a T5 or CLIP text encoder and tokenizer; or hashed:WIDTH, a random vector "
        "a word."
    ),
]
ImageSize = Annotated[
    int | None, typer.Option(min=1, help="Side of the images to encode; a recipe gives its own.")
]
Dtype = Annotated[Literal["float32", "float16"], typer.Option(help="Of the stored numbers.")]
Posterior = Annotated[
    Literal["mean", "sample"],
    typer.Option(help="Store the mean latent, or one drawn by the sample's key."),
]
Precision = Annotated[Literal["fp32", "bf16"], typer.Option(help="Of the networks.")]
MaxTokens = Annotated[int, typer.Option(min=1, help="Longer captions are cut.")]
SkipBad = Annotated[
    bool, typer.Option("--skip-bad", help="Leave bad samples out and list them; else they stop it.")
]
Batch = Annotated[int, typer.Option(min=1, help="Samples in one call of the networks.")]
Threads = Annotated[int, typer.Option(min=1, help="Decoding threads a rank.")]
DecoderKind = Annotated[Literal["auto", "dali", "pillow"], typer.Option(help="Of the images.")]
Ranks = Annotated[int | None, typer.Option(min=1, help="Local ranks to start.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]


def encode(
    source: Source,
    out: Out,
    autoencoder: AutoencoderFolder = None,
    text: TextEncoderName = None,
    image_size: ImageSize = None,
    dtype: Dtype = "float32",
    posterior: Posterior = "mean",
    precision: Precision = "fp32",
    max_tokens: MaxTokens = 77,
    skip_bad: SkipBad = False,
    batch: Batch = 32,
    threads: Threads = 2,
    decoder: DecoderKind = "auto",
    ranks: Ranks = None,
    as_json: Json = False,
) -> None:
    """Turn images into latents and captions into embeddings, shard by shard.

    What is there already, of the same content by the same networks and options, is left alone: run it
    again after a crash, or when shards were added. Ranks (of --ranks or torchrun) share the shards.
    """
    joined = joined_by_launcher()
    if not joined and (ranks or 1) > 1:
        _start_ranks(ranks or 1, out)
    else:
        from data_pipeline.encode import open_job
        from data_pipeline.encoders.job import Settings

        die_with_parent()
        patterns, side = _what(source, image_size)
        settings = Settings(
            image_size=side, decoder=decoder, dtype=dtype, precision=precision,
            posterior=posterior, max_tokens=max_tokens,
        )  # fmt: skip
        rank, local_rank, world_size = place_from_launcher() if joined else (0, 0, 1)
        job = open_job(
            patterns, out, settings, autoencoder=autoencoder, text=text, threads=threads, batch=batch,
            skip_bad=skip_bad, device=_device(local_rank),
        )  # fmt: skip
        _work(job, rank, world_size)
    if not joined:
        _print_summary(out, text, as_json)


def _start_ranks(ranks: int, out: str) -> None:
    from data_pipeline.storage import resolve

    logs = Path(out if resolve(out).local else ".") / "logs"
    if code := run_ranks(sys.argv[1:], ranks, logs):
        sys.exit(code)


def _device(local_rank: int) -> "torch.device":
    from parallel.processes import choose_device

    return choose_device("auto", local_rank)


def _what(source: str, image_size: int | None) -> tuple[list[str], int | None]:
    """The patterns of the shards, and the side of the images; a recipe gives both."""
    from trainer.recipe import load_recipe, shipped_recipes
    from trainer.storage import reach_plain_storage, reach_storage

    reach_plain_storage()
    if not source.endswith((".yaml", ".yml")) and source not in shipped_recipes():
        return [source], image_size
    recipe = load_recipe(source, [])
    reach_storage(recipe)
    data = recipe.data
    if data.latents:
        raise UserError(
            f"{source} trains on latents, which cannot be encoded; give the recipe or the shards of its "
            "images"
        )
    patterns = [pattern for pattern, _ in data.sources]
    if data.heldout is not None:
        patterns.append(data.heldout)
    return patterns, image_size or data.image_size


def _work(job: "Job", rank: int, world_size: int) -> None:
    """This rank's shards, with a line about each on stderr: stdout is for the summary."""
    from data_pipeline.encode import encode as run

    console = plain(stderr=True, soft_wrap=True)
    shards = len(job.sources[rank::world_size])

    def report(name: str, outcome: "Outcome") -> None:
        made, kept = len(outcome.made), len(outcome.kept)
        line = f"rank {rank}: {name}, {made + kept} of {shards} shards ({made} made, {kept} kept)"
        console.print(line, highlight=False)

    run(job, rank=rank, ranks=world_size, report=report)


def _print_summary(out: str, encoder: str | None, as_json: bool) -> None:
    """What the folder holds now.

    encoder: of its captions
    """
    from data_pipeline.encode import read_records

    description, records = read_records(out)
    dropped = [reason for record in records for reason in record.dropped]
    cut = sum(record.captions_cut for record in records)
    if as_json:
        facts = description.model_dump(mode="json") | {"captions_cut": cut, "dropped": dropped}
        typer.echo(json.dumps(facts))
        return
    table = Table("what", "value", title=out)
    shards = description.shards.values()
    table.add_row("shards", f"{len(shards):,}")
    table.add_row("samples", f"{sum(shard.samples for shard in shards):,}")
    table.add_row("MB", f"{sum(shard.bytes for shard in shards) / 1e6:,.1f}")
    latents, texts = description.latents, description.texts
    if latents is not None:
        channels, side, _ = latents.shape
        table.add_row("latents", f"{latents.shape} {latents.dtype}, {latents.posterior}")
        table.add_row("scale", f"{latents.scale:g}, shift {latents.shift:g}")
        for name, values in (("mean", latents.mean), ("std", latents.std)):
            table.add_row(f"{name} of channels", " ".join(f"{value:.4g}" for value in values))
        keys = (
            f"data.latents=true data.channels={channels} data.image_size={side} data.augment.flip=0"
        )
        table.add_row("train with", f"data.train='{out}/...' {keys}")
    if texts is not None:
        table.add_row("text", f"{texts.kind}, width {texts.width}, {texts.dtype}, {cut:,} cut")
        shape = f"tokens: {texts.max_tokens}, width: {texts.width}"
        text = f"{{member: text.npy, {shape}, encoder: {encoder!r}}}"
        table.add_row("condition on it with", f'data.text="{text}"')
    table.add_row("samples left out", f"{len(dropped):,}")
    console = plain()
    console.print(table)
    for reason in dropped[:SHOWN_DROPPED]:
        console.print(reason, style="red", highlight=False)
