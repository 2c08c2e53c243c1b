"""A trained run, ready to be sampled, by one process or by ranks that share the samples.

Sample `id` is a function of (seed, id, what it is asked to be). The samples of a call are cut into
batches by their ids alone, so that the numbers come out the same to the last bit on any number of ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from flows.errors import UserError
from flows.models.family import persistent_buffers
from parallel.processes import Ranks, choose_device, gather
from trainer.assembly import model_architecture
from trainer.checkpoints.manifest import MANIFEST, file_sha256
from trainer.checkpoints.store import latest_whole, load
from trainer.drawing import Samples, Shared, draw_samples, find_shared
from trainer.recipe import Recipe
from trainer.run_folder import RunFolder

BATCH = 32  # samples in one network call where nobody says otherwise


@dataclass(frozen=True)
class Trained:
    """The averaged weights of a run's newest whole checkpoint; the weights themselves without averages.

    step: of the checkpoint
    checkpoint: sha256 of its manifest, and by that of all in it
    shared: see `trainer.drawing.Shared`
    """

    model: nn.Module
    recipe: Recipe
    device: torch.device
    step: int
    checkpoint: str
    shared: Shared

    @torch.no_grad()
    def draw(self, ids: range, *, as_images: bool) -> Samples:
        """Samples of these ids, classes in turn, in one batch.

        as_images: of latents, what their autoencoder makes of them; else the latents
        """
        drawn = draw_samples(
            self.model,
            self.recipe,
            torch.arange(ids.start, ids.stop),
            self.device,
            batch=len(ids),
            as_images=as_images,
            shared=self.shared,
        )
        return replace(drawn, step=self.step)


def load_trained(run: RunFolder, recipe: Recipe, device: torch.device, *, batch: int) -> Trained:
    """The newest whole checkpoint of a run, to be drawn from `batch` samples at a time.

    A collective where ranks have joined.

    Raises UserError if there is none.
    """
    newest = latest_whole(run.checkpoints)
    if newest is None:
        raise UserError(f"{run.root} has no whole checkpoint yet; train it first.")
    model = model_architecture(recipe).build().to(device).eval()
    prefix = f"ema.{recipe.train.ema[0]}." if recipe.train.ema else "model."
    weights = {f"{prefix}{name}": weight.data for name, weight in model.named_parameters()}
    state = load(newest, weights, prefix=prefix)
    buffers = {f"buffer.{name}": value for name, value in persistent_buffers(model).items()}
    load(newest, buffers, prefix="buffer.")
    with torch.no_grad():
        shared = find_shared(model, recipe, device, batch=batch)
    manifest = file_sha256(newest / MANIFEST)
    return Trained(model, recipe, device, int(state["step"]), manifest, shared)


def batches(ids: range, size: int) -> list[range]:
    """`ids` in order, `size` at a time."""
    return [ids[start : start + size] for start in range(0, len(ids), size)]


def draw_together(trained: Trained, count: int, *, batch: int, ranks: Ranks) -> Samples | None:
    """Images of ids 0 to count - 1, on the first rank; each rank draws every n-th batch."""
    parts = batches(range(count), batch)
    own = [trained.draw(part, as_images=True) for part in parts[ranks.rank :: ranks.world_size]]
    drawn = gather(own)
    if drawn is None:
        return None
    return _joined([drawn[i % len(drawn)][i // len(drawn)] for i in range(len(parts))])


def sample_checkpoint(run: RunFolder, recipe: Recipe, count: int) -> Samples:
    """`count` samples, classes in turn, from the newest whole checkpoint, by this process alone."""
    batch = min(BATCH, count)
    trained = load_trained(run, recipe, choose_device("auto", 0), batch=batch)
    return _joined([trained.draw(part, as_images=True) for part in batches(range(count), batch)])


def _joined(parts: Sequence[Samples]) -> Samples:
    return Samples(
        torch.cat([part.images for part in parts]),
        torch.cat([part.labels for part in parts]),
        torch.cat([part.network_calls for part in parts]),
        parts[0].step,
    )
