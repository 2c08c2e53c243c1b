"""Runs from published weights, and published weights from runs.

An imported run is a run folder like any other: a recipe that describes the model, and a checkpoint of
step 0 that holds weights and averages but no optimizer, from which sampling and training begin.
"""

import json
import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from flows.errors import UserError
from flows.models.family import DATA_KEYS, Family
from trainer.assembly import model_architecture
from trainer.checkpoints.contents import checkpoint_in, read_tensors
from trainer.checkpoints.foreign import convert, diffusers_layout, source_named, to_foreign
from trainer.checkpoints.foreign.files import Weights, read_weights
from trainer.checkpoints.foreign.source import finite
from trainer.checkpoints.manifest import damaged_contents, read_manifest
from trainer.checkpoints.store import save
from trainer.recipe import Recipe, build_recipe, override_recipe, write_recipe
from trainer.run_folder import RunFolder, check_writable, locked, open_run, science
from trainer.yaml_text import parse_yaml

# Where the shards are is not in a file of weights: training says it.
NO_SHARDS = "shards-of-your-own-*.tar"
DECAY, BATCH = 0.9999, 256  # of the published trainings of SiT and DiT
IMAGE_CHANNELS = (1, 3)
TEXT_MEMBER = "text.npy"

FLOWMILL, DIFFUSERS = "flowmill", "diffusers"
Precision = Literal["fp32", "bf16", "fp16"]
PRECISIONS: dict[Precision, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


@dataclass(frozen=True)
class Imported:
    """run: the new run folder; recipe: what is in it; parameters: numbers in its weights

    assumed: keys of the recipe that neither file nor user told -> their values
    changed: keys by which it need not begin as the function it was made of, in words
    """

    run: RunFolder
    recipe: Recipe
    parameters: int
    assumed: dict[str, Any] = field(default_factory=dict)
    changed: tuple[str, ...] = ()


def import_run(
    file: Path, source: str, folder: Path, weights: Weights | None, changes: Sequence[str]
) -> Imported:
    """Make the run folder `folder` of the weights in `file`, of the format `source`.

    weights: averaged or raw, where the file has both; None: averaged if it has any
    changes: `section.key=value`; those of the model's shape are facts that the file may leave out

    Raises UserError for a file that cannot be read or converted, a fact that is missing, or a folder
    that holds something already.
    """
    format_ = source_named(source)
    run = check_new(folder)
    facts, rest = _facts(format_.family, changes)
    content = read_weights(file, source, weights)
    try:
        config, state = convert(content, source=source, **facts)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    recipe = _recipe(format_.family, config, format_.recipe(config), run, file.stem)
    recipe = override_new(recipe, rest, run, "--run")
    _check_same_model(recipe, config, state.keys(), rest)
    tensors = checkpoint_of(recipe, state)
    origin = {"file": str(file.resolve()), "source": source, "weights": weights}
    record = {"step": 0, "science": science(recipe), "imported": origin}
    with locked(run):
        save(run.checkpoints, step=0, tensors=tensors, state=record, keep=1)
        write_recipe(recipe, run.recipe)
    parameters = sum(value.numel() for value in state.values())
    return Imported(run, recipe, parameters, _assumed(recipe, format_.assumed, rest))


def check_new(folder: Path) -> RunFolder:
    """The run folder to be; UserError if it holds something already, or cannot be written."""
    run = RunFolder(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists already; choose another folder for the new run.")
    check_writable(run)
    return run


def override_new(recipe: Recipe, changes: Sequence[str], run: RunFolder, place: str) -> Recipe:
    """The changed recipe of a run that is made; `place`: where the command takes the folder.

    Raises UserError for a change that is wrong, or that names another folder.
    """
    recipe = override_recipe(recipe, list(changes))
    if recipe.run.dir != str(run.root):
        raise UserError(
            f"run.dir = {recipe.run.dir} is not the folder of the new run, {run.root}; drop it, and use "
            f"{place} to name another."
        )
    return recipe


def _check_same_model(recipe: Recipe, config: Any, held: Set[str], changes: Sequence[str]) -> None:
    """UserError where a change asks for another model, or for tensors beside those that are held."""
    names = _names(recipe)
    if model_architecture(recipe).config != config or {*names.parameters, *names.buffers} != held:
        asked = [c for c in changes if re.split(r"[.=]", c)[0] in ("model", "data", "objective")]
        raise UserError(
            f"{', '.join(asked)}: this makes another model than that of the file; drop it, or train such a "
            "model from the beginning."
        )


def _assumed(recipe: Recipe, keys: Sequence[str], changes: Sequence[str]) -> dict[str, Any]:
    """What the keys (section.key) of the recipe are, without those that a change set."""
    told = {change.partition("=")[0] for change in changes}
    sections, found = recipe.model_dump(mode="json"), {}
    for name in keys:
        section, _, key = name.partition(".")
        if not told & {section, name}:
            found[name] = sections[section][key]
    return found


def _facts(family: Family, changes: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """What of the changes is about the model's shape, by the configuration's keys, and the rest."""
    known = {field.name for field in fields(family.config)}
    facts, rest = {}, []
    for change in changes:
        name, equals, text = change.partition("=")
        section, _, key = name.partition(".")
        key = key.replace(".", "_")  # data.text.tokens is text_tokens
        data = section == "data" and key in DATA_KEYS
        if equals and key in known and (data or section == "model"):
            facts[key] = parse_yaml(text, f"command line: {change!r}")
        else:
            rest.append(change)
    return facts, rest


def _recipe(
    family: Family, config: Any, sections: dict[str, Any], run: RunFolder, name: str
) -> Recipe:
    keys = {field.name: getattr(config, field.name) for field in fields(config)}
    text = {
        "member": TEXT_MEMBER,
        "tokens": keys.get("text_tokens"),
        "width": keys.get("text_width"),
    }
    data = {
        "train": NO_SHARDS,
        "image_size": keys["image_size"],
        "channels": keys["channels"],
        "classes": keys["classes"],
        "latents": keys["channels"] not in IMAGE_CHANNELS,
        "text": text if keys.get("text_tokens") else None,
    }
    own = {key: keys[key] for key in family.own_keys()}
    return build_recipe(
        {
            "name": name,
            "run": {"dir": str(run.root)},
            "data": data,
            "model": {"family": family.name, **_plain(own)},
            "train": {"steps": 1, "batch": BATCH, "ema": [DECAY]},
            **sections,
        },
        "the recipe of the imported model",
    )


def _plain(keys: Mapping[str, Any]) -> dict[str, Any]:
    """As a YAML file would have them."""
    return {key: list(v) if isinstance(v, tuple) else v for key, v in keys.items()}


def checkpoint_of(recipe: Recipe, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The checkpoint's tensors: the weights, and as many averages that begin there.

    Raises UserError for weights that are not finite in float32.
    """
    names = _names(recipe)
    weights = {f"model.{name}": state[name].float() for name in names.parameters}
    _check_finite(weights, "in float32, as which weights are kept; take another checkpoint")
    averages = {
        f"ema.{decay}.{name}": weights[f"model.{name}"]
        for decay in recipe.train.ema
        for name in names.parameters
    }
    return {**weights, **averages, **{f"buffer.{name}": state[name] for name in names.buffers}}


@dataclass(frozen=True)
class _Names:
    parameters: list[str]
    buffers: list[str]


def _names(recipe: Recipe) -> _Names:
    """Of what a checkpoint of the recipe's model holds."""
    with torch.device("meta"):
        model = model_architecture(recipe).build()
    parameters = [name for name, _ in model.named_parameters()]
    return _Names(parameters, sorted(model.state_dict().keys() - set(parameters)))


def export_run(
    folder: Path,
    out: Path,
    *,
    target: str,
    weights: Weights,
    precision: Precision,
    step: int | None,
) -> Path:
    """Write the weights of a run for other programs; the file, or the folder for diffusers.

    out: a .safetensors file, for diffusers a folder; must not exist
    target: `flowmill` for our own names, a format of `convert`, or `diffusers`
    weights: averaged (with the first decay of the recipe) or raw

    Raises UserError where the run has no such checkpoint, the format no place for such a model, or
    numbers are not finite.
    """
    _check_out(out, target)
    run, recipe = open_run(str(folder))
    checkpoint = checkpoint_in(run.root, step)
    state = state_of(checkpoint, recipe, weights)
    _check_finite(state, f"at {checkpoint}; export another step (--step)")
    state = {
        n: v.to(PRECISIONS[precision]) if v.is_floating_point() else v for n, v in state.items()
    }
    config = model_architecture(recipe).config
    too_large = f"in {precision}, which has none so large; use --precision fp32"
    if target == DIFFUSERS:
        content, settings = diffusers_layout.export(config, _flow_alone(state))
        _check_finite(content, too_large)
        _write_folder(out, content, settings)
        return out
    if target != FLOWMILL:
        state = to_foreign(config, _flow_alone(state), target)
    _check_finite(state, too_large)
    model = json.dumps({"family": recipe.model.family, **_plain(vars(config))})
    about = {"format": "pt", "run": recipe.name, "weights": weights, "model": model}
    _write_file(out, state, about | {"step": str(read_manifest(checkpoint).step)})
    return out


def state_of(checkpoint: Path, recipe: Recipe, weights: Weights) -> dict[str, Tensor]:
    """The model's state dictionary, from a checkpoint that is whole to the last byte."""
    manifest = read_manifest(checkpoint)
    if (damage := damaged_contents(checkpoint, manifest, manifest.files)) is not None:
        raise UserError(f"{damage}; export another step (--step), or restore it from a copy.")
    if weights == "ema" and not recipe.train.ema:
        raise UserError(
            f"{checkpoint} has no averaged weights (train.ema is empty); export its raw ones."
        )
    prefix = f"ema.{recipe.train.ema[0]}." if weights == "ema" else "model."
    names = _names(recipe)
    wanted = {f"{prefix}{name}": name for name in names.parameters}
    return read_tensors(checkpoint, wanted | {f"buffer.{name}": name for name in names.buffers})


def _check_finite(state: Mapping[str, Tensor], where: str) -> None:
    """UserError for the first tensor with an infinity or NaN; `where`: and what to do."""
    for name, value in state.items():
        if value.is_floating_point() and not finite(value):
            raise UserError(f"tensor {name} holds numbers that are not finite {where}.")


def _flow_alone(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without a dequantiser that was trained beside a flow, which no other program knows."""
    flow = {n.removeprefix("flow."): v for n, v in state.items() if n.startswith("flow.")}
    return flow or state


def _check_out(out: Path, target: str) -> None:
    if target not in (FLOWMILL, DIFFUSERS):
        source_named(target)
    if out.exists():
        raise UserError(f"{out} exists already; give another name.")
    if target != DIFFUSERS and out.suffix != ".safetensors":
        raise UserError(f"{out} is not the name of a .safetensors file; give one.")
    if not out.resolve().parent.is_dir():
        raise UserError(f"{out}: there is no folder {out.parent}; make it first.")


def _write_file(path: Path, state: Mapping[str, Tensor], about: dict[str, str]) -> None:
    """Whole or not at all."""
    temporary = path.with_name(f".{path.name}.writing")
    try:
        save_file(dict(state), temporary, metadata=about)
        temporary.replace(path)
    except (OSError, SafetensorError) as error:  # the latter is what its writer makes of the former
        raise UserError(f"{path} cannot be written ({error}); choose another place.") from None
    finally:
        temporary.unlink(missing_ok=True)


def _write_folder(path: Path, state: Mapping[str, Tensor], settings: dict[str, Any]) -> None:
    """As diffusers' `from_pretrained` reads it."""
    try:
        path.mkdir()
        text = json.dumps(settings, indent=2) + "\n"
        (path / "config.json").write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}); choose another place."
        ) from None
    _write_file(path / diffusers_layout.WEIGHTS, state, {"format": "pt"})
