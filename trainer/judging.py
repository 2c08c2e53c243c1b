"""The newest checkpoint of a run, judged against real images."""

import torch
from torch import Tensor

from data_pipeline.decode.decoder import open_decoder
from data_pipeline.loader import read_all
from flows.errors import UserError
from trainer.evaluation import Evaluation, evaluate
from trainer.recipe import Recipe
from trainer.run_folder import RunFolder
from trainer.sampling import Samples, sample_checkpoint

DECODED_AT_ONCE = 256


def judge_run(run: RunFolder, recipe: Recipe, count: int) -> tuple[Samples, Evaluation]:
    """`count` samples, classes in turn, beside the recipe's training and held-out images.

    Raises UserError if the recipe names no held-out shards, or the run has no whole checkpoint.
    """
    if recipe.data.heldout is None:
        raise UserError(
            f"{run.recipe} has no data.heldout, and samples are judged against held-out images; "
            "give it data.heldout=SHARDS."
        )
    samples = sample_checkpoint(run, recipe, count)
    train = _images(recipe, [url for url, _ in recipe.data.sources])
    heldout = _images(recipe, [recipe.data.heldout])
    names = recipe.data.names
    return samples, evaluate(samples.images, samples.labels, train, heldout, names, recipe.seed)


def _images(recipe: Recipe, shards: list[str]) -> tuple[Tensor, Tensor]:
    """All images and labels of `shards`, decoded as the training decodes them."""
    data = recipe.data
    decoder = open_decoder(
        data.decoder,
        image_size=data.image_size,
        channels=data.channels,
        threads=data.threads,
        device=torch.device("cpu"),
    )
    try:
        return read_all(
            shards,
            decoder,
            keep=data.keep,
            classes=data.classes,
            limit=None,
            batch=DECODED_AT_ONCE,
        )
    finally:
        decoder.close()
