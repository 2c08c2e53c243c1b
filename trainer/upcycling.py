"""A run of experts from a run of a dense network: the same recipe with another model, from step 0 on."""

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from flows.errors import UserError
from flows.models.dit import DiTConfig
from flows.models.dit_moe_config import DiTMoEConfig
from flows.models.family import DATA_KEYS, parameter_count
from flows.models.upcycling import changed_from, mixture_keys, upcycled
from trainer.assembly import check_layout, model_architecture
from trainer.checkpoints.contents import checkpoint_in
from trainer.checkpoints.foreign.files import Weights
from trainer.checkpoints.manifest import read_manifest
from trainer.checkpoints.store import save
from trainer.engines import fewest_ranks, native_layout
from trainer.interchange import Imported, check_new, checkpoint_of, override_new, state_of
from trainer.recipe import Recipe, build_recipe, write_recipe
from trainer.run_folder import RunFolder, locked, open_run, science


def upcycle_run(dense: Path, folder: Path, changes: Sequence[str]) -> Imported:
    """Make the run folder `folder` of the averaged weights of the dense run `dense`.

    changes: `section.key=value`, `model.experts` among them; weights of a token's experts sum to one
        unless `model.renormalise` says otherwise, so that the mixture begins as the dense network

    Raises UserError for a network that no mixture can be made of, weights that are more than the machine's
    memory, a folder that holds something, or a run that the native engine could train on no number of ranks.
    """
    run = check_new(folder)
    of, recipe = open_run(str(dense))
    before = model_architecture(recipe).config
    if not isinstance(before, DiTConfig | DiTMoEConfig):
        raise UserError(
            f"{dense} is a run of the family {recipe.model.family}, and mixtures are made of dit; choose "
            "such a run."
        )
    made = _recipe(recipe, mixture_keys(before), run, changes)
    config = model_architecture(made).config
    _check_same(mixture_keys(before), config)
    _check_memory(made)
    _check_ranks(made)
    checkpoint = checkpoint_in(of.root)
    weights: Weights = "ema" if recipe.train.ema else "raw"
    dense_state = state_of(checkpoint, recipe, weights)
    state: dict[str, Tensor] = upcycled(dense_state, config, made.seed)
    origin = {
        "file": str(dense.resolve()),
        "source": f"dense run, step {read_manifest(checkpoint).step}",
        "weights": weights,
    }
    record = {"step": 0, "science": science(made), "imported": origin}
    with locked(run):
        save(run.checkpoints, step=0, tensors=checkpoint_of(made, state), state=record, keep=1)
        write_recipe(made, run.recipe)
    parameters = sum(value.numel() for value in state.values())
    return Imported(run, made, parameters, changed=tuple(changed_from(before, config)))


def _recipe(
    dense: Recipe, keys: Mapping[str, Any], run: RunFolder, changes: Sequence[str]
) -> Recipe:
    """The recipe of the dense run with the model of a mixture, changed."""
    data = dense.model_dump(mode="json")
    own = {key: value for key, value in keys.items() if key not in DATA_KEYS}
    data["model"] = {"family": "dit_moe", "renormalise": True, **own}
    data["run"] = {"dir": str(run.root)}
    data["name"] = f"{dense.name}-experts"
    missing = [change for change in changes if change.startswith("model.experts=")]
    if not missing:
        raise UserError("model.experts is not set; say how many, as in model.experts=8.")
    data["model"]["experts"] = 2  # until `changes` say it
    return override_new(
        build_recipe(data, "the recipe of the mixture"), changes, run, "the argument RUN"
    )


def _check_same(keys: Mapping[str, Any], config: DiTMoEConfig) -> None:
    """UserError for a change of what follows from the dense network."""
    shape = {field.name: getattr(config, field.name) for field in fields(config)}
    shape |= {"expert_hidden": config.hidden, "shared_hidden": config.shared}
    for key, value in keys.items():
        if shape[key] != value:
            section = "data" if key in DATA_KEYS else "model"
            raise UserError(
                f"{section}.{key} = {shape[key]} is not that of the dense network, {value}; drop the change."
            )


def _check_ranks(made: Recipe) -> None:
    """UserError for what the native engine refuses on the fewest ranks that it could have."""
    if made.parallel.engine == "native":
        ranks = fewest_ranks(made.parallel)
        check_layout(made, native_layout(made.parallel, ranks), model_architecture(made))


def _check_memory(made: Recipe) -> None:
    """UserError for weights that are more than the machine's memory; any number of experts is counted."""
    model = model_architecture(made)
    sizes = []
    for experts in (model.config.chosen, model.config.chosen + 1):
        with torch.device("meta"):
            # Few experts do not have the places that a capacity of many asks for.
            config = replace(model.config, experts=experts, capacity=0.0)
            few = replace(model, config=config).build()
        sizes.append(parameter_count(few))
    more = model.config.experts - model.config.chosen
    needed = 4 * (sizes[0] + more * (sizes[1] - sizes[0]))
    there = psutil.virtual_memory().total
    if needed > there:
        raise UserError(
            f"model.experts = {model.config.experts:,} makes weights of {needed >> 30:,} GiB, more than the "
            f"{there / 2**30:,.0f} GiB of memory of this machine; lower model.experts."
        )
