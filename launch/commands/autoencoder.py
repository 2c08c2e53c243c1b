"""`flowmill data autoencoder`: a small autoencoder fitted to one's own shards."""

import json
from pathlib import Path
from typing import Annotated

import typer

from flows.errors import UserError
from launch.console import plain

EVERYTHING = 100_000  # images held in memory at most


def autoencoder(
    shards: Annotated[str, typer.Argument(help="Shards of images, as a pattern.")],
    out: Annotated[Path, typer.Argument(help="Folder of the autoencoder, in diffusers' layout.")],
    image_size: Annotated[int, typer.Option(min=8, help="Side of the images.")] = 64,
    image_channels: Annotated[int, typer.Option(min=1, max=3, help="1 or 3.")] = 3,
    channels: Annotated[int, typer.Option(min=1, help="Channels of the latents.")] = 4,
    widths: Annotated[
        str,
        typer.Option(help="Channels of the network at each resolution, each half the one before."),
    ] = "32,64,96",
    steps: Annotated[int, typer.Option(min=1)] = 6000,
    batch: Annotated[int, typer.Option(min=1, help="Images a step.")] = 64,
    lr: Annotated[float, typer.Option(min=1e-8)] = 1e-3,
    divergence: Annotated[
        float, typer.Option(min=0, help="Weight of the divergence of latents from a normal.")
    ] = 1e-2,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Fit a small autoencoder, for `flowmill data encode --autoencoder`; all images are held in memory."""
    import torch

    from data_pipeline.decode.decoder import open_decoder
    from data_pipeline.encoders.fit import fit_autoencoder
    from data_pipeline.file_order import read_all
    from parallel.processes import alone
    from trainer.storage import reach_plain_storage

    resolutions = _widths(widths, image_size)
    reach_plain_storage()
    decoder = open_decoder("auto", channels=image_channels, threads=2, device=torch.device("cpu"))
    try:
        images, _ = read_all(
            [shards], decoder, size=(image_size, image_size), keep={}, classes=2**31, limit=EVERYTHING,
            batch=256,
        )  # fmt: skip
    finally:
        decoder.close()
    console = plain(stderr=True, soft_wrap=True)
    error = fit_autoencoder(
        images, out, widths=resolutions, channels=channels, steps=steps, batch=batch,
        learning_rate=lr, divergence=divergence, seed=seed, device=alone().device,
        note=lambda step, loss: console.print(f"step {step}  loss {loss:.4f}", highlight=False),
    )  # fmt: skip
    factor = 2 ** (len(resolutions) - 1)
    side = image_size // factor
    found = {
        "folder": str(out),
        "images": len(images),
        "latents": [channels, side, side],
        "error": error,
    }
    if as_json:
        typer.echo(json.dumps(found))
        return
    console.print(
        f"{out}: latents of {channels} x {side} x {side}; images come back with a mean error of "
        f"{error:.4f} in a range of 2",
        highlight=False,
    )


def _widths(text: str, image_size: int) -> tuple[int, ...]:
    """Raises UserError for what is no list of widths, or halves the side too often."""
    try:
        widths = tuple(int(part) for part in text.split(","))
    except ValueError:
        widths = ()
    if not widths or any(width < 16 or width % 16 for width in widths):
        raise UserError(f"--widths {text} is not a list of multiples of 16; write it as 32,64,96.")
    if image_size % 2 ** (len(widths) - 1):
        raise UserError(
            f"--widths {text} halves the image {len(widths) - 1} times, which --image-size {image_size} "
            "cannot be; give fewer widths or another size."
        )
    return widths
