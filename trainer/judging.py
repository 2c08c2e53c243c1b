"""The newest checkpoint of a run, judged against real images."""

import torch
from torch import Tensor

from data_pipeline.loader import read_all
from data_pipeline.shards import expand
from flows.errors import UserError
from parallel.processes import choose_device
from trainer.evaluation import Evaluation, evaluate
from trainer.latents import open_reader, to_images
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
    train, heldout = (
        _images(recipe, shards) for shards in (recipe.data.train, recipe.data.heldout)
    )
    names = recipe.data.names
    return samples, evaluate(samples.images, samples.labels, train, heldout, names, recipe.seed)


def _images(recipe: Recipe, shards: str) -> tuple[Tensor, Tensor]:
    """All images and labels of `shards`, decoded as the training decodes them."""
    decoder = open_reader(recipe, expand(shards), torch.device("cpu"))
    try:
        images, labels = read_all(
            shards, decoder, classes=recipe.data.classes, limit=None, batch=DECODED_AT_ONCE
        )
    finally:
        decoder.close()
    return to_images(recipe, images, choose_device("auto", 0)), labels
