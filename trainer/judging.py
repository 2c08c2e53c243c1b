"""The newest checkpoint of a run, judged against real images."""

from collections.abc import Callable
from pathlib import Path

import torch

from data_pipeline.encoders.vision import vision_features
from data_pipeline.faults import read_past
from flows.errors import UserError
from flows.metrics.features import Features
from flows.metrics.inception import inception_features
from parallel.processes import Ranks
from trainer.bits import check_solved, heldout_bits, measured_objective, solved_bits
from trainer.drawing import Samples
from trainer.evaluation import Evaluation, evaluate
from trainer.latents import to_images
from trainer.real_images import read_real
from trainer.recipe import Recipe
from trainer.run_folder import RunFolder
from trainer.trained import draw_together, load_trained


def judge_run(
    run: RunFolder,
    recipe: Recipe,
    count: int,
    *,
    batch: int,
    ranks: Ranks,
    report: Callable[[int, int], None],
    features: Path | None = None,
    solved: int | None = None,
) -> tuple[Samples, Evaluation] | None:
    """`count` samples, classes in turn, beside the recipe's training and held-out images.

    A collective: ranks share the drawing, `batch` samples at a time, and the first one judges.

    features: see `open_features`
    solved: held-out images whose bits are found by a flow-matching model's differential equation
    report: called with how many of these are done, and how many there are

    Raises UserError if the recipe names no held-out shards, or prompts, or the run has no whole
    checkpoint.
    """
    if recipe.data.heldout is None:
        raise UserError(
            f"{run.recipe} has no data.heldout, and samples are judged against held-out images; "
            "give it data.heldout=SHARDS."
        )
    if recipe.sample.prompts:
        raise UserError(
            "sample.prompts ask for what no held-out image is beside; judge with sample.prompts=null."
        )
    if solved is not None:
        check_solved(recipe)
    # Shards that are missing are told of before anything is drawn; held-out ones may be named by hand.
    first = ranks.rank == 0
    own = open_features(features, ranks.device) if first and features is not None else None
    heldout = read_real(recipe, [recipe.data.heldout], None) if first else None
    trained = load_trained(run, recipe, ranks.device, batch=min(batch, count))
    sources = [url for url, _ in recipe.data.sources]
    train = read_real(recipe, sources, read_past(run.shards)) if first else None
    samples = draw_together(trained, count, batch=batch, ranks=ranks)
    if samples is None or train is None or heldout is None:
        return None
    objective = measured_objective(recipe)
    bits = None
    if objective is not None:
        variance = trained.shared.variance_on(ranks.device)
        bits = heldout_bits(trained.model, objective, train[0], heldout, recipe.seed, variance)
    elif solved is not None:
        bits = solved_bits(trained.model, recipe, train[0], heldout, solved, report)
    train, heldout = (
        (to_images(recipe, data, ranks.device), labels) for data, labels in (train, heldout)
    )
    names = recipe.data.names
    found = evaluate(samples.images, samples.labels, train, heldout, names, recipe.seed, bits, own)
    return samples, found


def open_features(path: Path, device: torch.device) -> Features:
    """Features of the trained network at `path`: a folder with a vision transformer, or a file with the
    weights of Inception v3.

    Raises UserError if it is neither.
    """
    if not path.exists():
        raise UserError(
            f"{path} is not there; --features takes a file with the weights of Inception v3, or the "
            "folder of a DINOv2, ViT or CLIP vision encoder."
        )
    return (vision_features if path.is_dir() else inception_features)(path, device=device)
