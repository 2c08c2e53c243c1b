"""Published weights become runs that are sampled, trained and exported like any other."""

import argparse
import json
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from flows.errors import UserError
from flows.models.zoo import FAMILIES
from launch.commands.checkpoint import FORMATS, app
from trainer.assembly import model_architecture
from trainer.checkpoints.contents import checkpoint_in, read_tensors
from trainer.checkpoints.foreign import SOURCES, convert, diffusers_layout, to_foreign
from trainer.checkpoints.manifest import read_manifest
from trainer.checkpoints.store import save
from trainer.interchange import export_run, import_run
from trainer.recipe import load_recipe, override_recipe, shipped_recipes
from trainer.run_folder import open_run
from trainer.sampling import with_overrides
from trainer.trained import sample_checkpoint

from . import families, runs
from .references import dit as reference
from .references.parts import State, random_state
from .test_foreign_dit import lightning, repa, sit
from .test_foreign_flows import jet, starflow, tarflow
from .test_foreign_flux import flux
from .test_foreign_moe import moe

# What files of these formats leave out.
FACTS = {
    "ml-tarflow": [],
    "ml-starflow": ["data.image_size=4", "data.text.tokens=6"],
    "sit": ["model.heads=4"],
    "dit": ["model.heads=4"],
    "repa": ["model.heads=2", "model.align_depth=1"],
    "lightningdit": [],
    "dit-moe": ["model.heads=2"],
    "flux": ["data.image_size=8", "data.text.tokens=5"],
    "jet": [],
}
STATES = {
    "ml-tarflow": tarflow,
    "ml-starflow": starflow,
    "sit": sit,
    "dit": sit,
    "repa": repa,
    "lightningdit": lightning,
    "dit-moe": moe,
    "flux": flux,
    "jet": jet,
}


def on_digits() -> State:
    """A SiT for the 8x8 digits, with two outputs for one channel."""
    shapes = reference.shapes(
        tokens=16, width=32, patch=2, channels=1, outputs=2, classes=10, depth=2
    )
    return random_state(shapes, seed=1) | {"pos_embed": reference.table(4, 32)}


def written(folder: Path, state: State, **beside: object) -> Path:
    path = folder / "weights.pt"
    torch.save({"ema": state, **beside} if beside else state, path)
    return path


def imported(folder: Path, *changes: str) -> Path:
    """A run of `on_digits`, whose raw weights are one more than its averages."""
    raw = {n: v if n == "pos_embed" else v + 1 for n, v in on_digits().items()}
    args = argparse.Namespace(model="SiT")
    file = written(folder, on_digits(), model=raw, opt={}, args=args)
    import_run(file, "sit", folder / "run", None, ["model.heads=2", *changes])
    return folder / "run"


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize("source", FORMATS)
def test_a_file_becomes_a_run_and_the_run_the_file(source: str, tmp_path: Path) -> None:
    state = STATES[source]()
    save_file(state, tmp_path / "file.safetensors")
    options = ["--from", source, "--run", tmp_path / "a"]
    made = run("import", tmp_path / "file.safetensors", *FACTS[source], *options)
    assert made.exit_code == 0, made.exception
    _, recipe = open_run(str(tmp_path / "a"))
    assert recipe.model.family == SOURCES[source].family.name
    done = run("export", tmp_path / "a", tmp_path / "back.safetensors", "--as", source)
    assert done.exit_code == 0, done.exception
    back = load_file(tmp_path / "back.safetensors")
    tables = {name for name in state if name.startswith("feat_rope.")}  # see their own test
    assert back.keys() == state.keys()
    assert [n for n in state.keys() - tables if not torch.equal(back[n], state[n])] == []


def test_the_documentation_says_how_shipped_recipes_are_exported() -> None:
    text = (Path(__file__).parents[2] / "docs" / "interchange.md").read_text()
    rows = [line.split("|")[1:3] for line in text.splitlines() if line.startswith("| `")]
    for name in shipped_recipes():
        (said,) = [formats for recipes, formats in rows if f"`{name}`" in recipes]
        config = model_architecture(load_recipe(name, [])).config
        architecture = next(f for f in FAMILIES.values() if f.config is type(config))
        with torch.device("meta"):
            state = dict(architecture.build(config).state_dict())
        found = set()
        for target in (*SOURCES, "diffusers"):
            try:
                if target == "diffusers":
                    diffusers_layout.export(config, state)
                else:
                    to_foreign(config, state, target)
            except UserError:
                continue
            found.add(target)
        assert found == set(re.findall("`([a-z-]+)`", said.partition(":")[0])), name


def test_every_format_is_offered() -> None:
    assert set(FORMATS) == SOURCES.keys()


def test_a_jet_comes_from_numpy_arrays(tmp_path: Path) -> None:
    np.savez(tmp_path / "jet.npz", **{name: value.numpy() for name, value in jet().items()})
    made = import_run(tmp_path / "jet.npz", "jet", tmp_path / "run", None, [])
    checkpoint = checkpoint_in(tmp_path / "run")
    orders = {f"buffer.order_{index}": f"order_{index}" for index in range(7)}
    _, ours = convert(jet(), source="jet")
    found = read_tensors(checkpoint, orders)
    assert all(torch.equal(found[name], ours[name]) for name in found)
    drawn = sample_checkpoint(made.run, made.recipe, 2)
    assert drawn.images.shape == (2, 3, 8, 8)


def test_a_run_is_named_after_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path, on_digits())
    told = run("import", "--from", "sit", "weights.pt", "model.heads=2", "--json")
    assert json.loads(told.output)["run"] == "runs/weights"
    assert json.loads(told.output)["model"]["heads"] == 2
    assert (tmp_path / "runs" / "weights" / "recipe.yaml").is_file()


def test_the_averaged_weights_are_preferred(tmp_path: Path) -> None:
    checkpoint = checkpoint_in(imported(tmp_path))
    names = {"model.patches.bias": "raw", "ema.0.9999.patches.bias": "ema"}
    for value in read_tensors(checkpoint, names).values():
        assert torch.equal(value, on_digits()["x_embedder.proj.bias"])
    import_run(tmp_path / "weights.pt", "sit", tmp_path / "raw", "raw", ["model.heads=2"])
    raw = read_tensors(checkpoint_in(tmp_path / "raw"), names)["raw"]
    assert torch.equal(raw, on_digits()["x_embedder.proj.bias"] + 1)
    origin = read_manifest(checkpoint).state["imported"]
    assert origin["source"] == "sit"
    assert "from" in run("inspect", checkpoint).output


def test_the_recipe_describes_the_model_and_takes_any_change(tmp_path: Path) -> None:
    folder = imported(tmp_path, "name=mine", "train.batch=16", "sample.guidance=2")
    _, recipe = open_run(str(folder))
    assert (recipe.name, recipe.train.batch, recipe.sample.guidance) == ("mine", 16, 2.0)
    assert (recipe.data.image_size, recipe.data.channels, recipe.data.classes) == (8, 1, 10)
    assert recipe.model.own_keys()["learn_sigma"] is True
    save_file(sit(), tmp_path / "dit.safetensors")
    import_run(tmp_path / "dit.safetensors", "dit", tmp_path / "dit", None, ["model.heads=4"])
    _, recipe = open_run(str(tmp_path / "dit"))
    described = recipe.model_dump()
    assert described["objective"]["path"] == "vp"
    assert described["objective"]["prediction"] == "noise"
    assert described["data"]["latents"] is True


def test_an_imported_run_is_sampled_and_trained(tmp_path: Path) -> None:
    """Training begins at its weights, with an optimizer of its own, and goes on from there."""
    folder = imported(tmp_path, "train.batch=16", "train.ema=[0.5]", "data.window=16")
    made, recipe = open_run(str(folder))
    drawn = sample_checkpoint(made, with_overrides(recipe, ["sample.steps=2"]), 3)
    assert drawn.step == 0
    assert drawn.images.shape == (3, 1, 8, 8)
    changes = [
        "data.train=embedded:digits8/train-{000000..000001}.tar",
        "tracking.mlflow=false",
        "optimizer.lr=1e-12",
        "data.decoder=pillow",
        "checkpoint.every=1",
    ]
    again = load_recipe(str(folder / "recipe.yaml"), [*changes, "train.steps=1"])
    assert runs.train_here(again).steps == 1
    after = read_tensors(checkpoint_in(folder, 1), {"model.patches.bias": "now"})["now"]
    # A step of 1e-12 moves nothing that float32 can tell from weights of 0.1.
    assert torch.equal(after, on_digits()["x_embedder.proj.bias"])
    longer = load_recipe(str(folder / "recipe.yaml"), [*changes, "train.steps=2"])
    assert runs.train_here(longer).steps == 2
    assert [line["step"] for line in runs.lines(folder)] == [1, 2]
    with pytest.raises(UserError, match=r"model\.width was 32 and is now 64"):
        runs.train_here(load_recipe(str(folder / "recipe.yaml"), [*changes, "model.width=64"]))


def test_exports_are_averaged_or_raw_and_of_any_step(tmp_path: Path) -> None:
    folder = runs.recipe(tmp_path / "run", "train.steps=2", "checkpoint.every=1")
    runs.train_here(folder)
    found = {}
    for weights in ("ema", "raw"):
        for step in (1, 2):
            out = tmp_path / f"{weights}{step}.safetensors"
            told = run("export", tmp_path / "run", out, "--weights", weights, "--step", step)
            assert told.exit_code == 0, told.exception
            found[weights, step] = load_file(out)
    prefix = {"ema": "ema.0.5.", "raw": "model."}
    for (weights, step), state in found.items():
        names = {f"{prefix[weights]}{name}": name for name in state}
        checkpoint = checkpoint_in(tmp_path / "run", step)
        kept = read_tensors(checkpoint, names)
        assert all(torch.equal(kept[name], state[name]) for name in state)
        total = sum(n.startswith(prefix[weights]) for n in read_manifest(checkpoint).tensors)
        assert total == len(state)
    with safe_open(tmp_path / "ema2.safetensors", framework="pt") as file:
        about = file.metadata()
    assert (about["step"], about["weights"]) == ("2", "ema")
    assert json.loads(about["model"])["width"] == 32


def test_a_jet_keeps_its_orders_and_leaves_its_dequantiser_at_home(tmp_path: Path) -> None:
    recipe = families.recipe("jet", tmp_path / "run")
    changes = ["model.conditional=false", "train.steps=1", "sample.every=0", "checkpoint.every=1"]
    runs.train_here(override_recipe(recipe, changes))
    assert run("export", tmp_path / "run", tmp_path / "whole.safetensors").exit_code == 0
    whole = load_file(tmp_path / "whole.safetensors")
    assert {"flow.order_0", "flow.blocks.0.up.weight"} <= whole.keys()
    # A run goes on with the orders of its checkpoint, not with those that a fresh model draws.
    checkpoint = checkpoint_in(tmp_path / "run")
    names = dict.fromkeys(read_manifest(checkpoint).tensors)
    held = read_tensors(checkpoint, {name: name for name in names})
    held["buffer.flow.order_0"] = held["buffer.flow.order_0"].flip(0)
    save(checkpoint.parent, step=1, tensors=held, state=read_manifest(checkpoint).state, keep=1)
    runs.train_here(override_recipe(recipe, [*changes, "train.steps=2"]))
    done = run("export", tmp_path / "run", tmp_path / "jet.safetensors", "--as", "jet")
    assert done.exit_code == 0, done.exception
    config, state = convert(load_file(tmp_path / "jet.safetensors"), source="jet", channels=1)
    assert config.image_size == 8
    assert torch.equal(state["order_0"], whole["flow.order_0"].flip(0))
    assert not any(name.startswith("flow.") for name in state)


def test_half_precision_and_diffusers(tmp_path: Path) -> None:
    folder = imported(tmp_path)
    out = tmp_path / "half.safetensors"
    export_run(folder, out, target="sit", weights="ema", precision="bf16", step=None)
    half = load_file(out)
    assert all(torch.equal(half[n], value.bfloat16()) for n, value in on_digits().items())
    told = run("export", folder, tmp_path / "diffusers", "--as", "diffusers")
    assert told.exit_code == 0, told.exception
    settings = json.loads((tmp_path / "diffusers" / "config.json").read_text())
    assert settings["_class_name"] == "DiTTransformer2DModel"
    assert (tmp_path / "diffusers" / "diffusion_pytorch_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("changes", "source", "sentence"),
    [
        ([], "sit", r"weights\.pt: model\.heads does not follow"),
        (["model.heads=many"], "sit", r"model\.heads = 'many'"),
        (["model.heads=2", "model.colour=red"], "sit", r"model\.colour"),
        (["model.heads=2", "train.batch"], "sit", r"'train\.batch' is not section\.key=value"),
        (["model.heads=2", "train.steps=-1"], "sit", r"train\.steps"),
        (["model.heads=2", "run.dir=elsewhere"], "sit", r"run\.dir = elsewhere .* use --run to"),
        (["model.heads=2"], "png", "there is no format 'png'"),
        (["model.heads=2"], "dit-moe", r"there is no tensor blocks\.0\.moe\.gate\.weight"),
    ],
)
def test_what_cannot_be_imported_leaves_nothing(changes, source, sentence, tmp_path: Path) -> None:
    file = written(tmp_path, on_digits())
    with pytest.raises(UserError, match=sentence):
        import_run(file, source, tmp_path / "run", None, changes)
    assert not (tmp_path / "run").exists()


def test_numbers_that_float32_does_not_have_are_not_imported(tmp_path: Path) -> None:
    state = on_digits()
    state["x_embedder.proj.bias"] = torch.full((32,), 1e39, dtype=torch.float64)
    with pytest.raises(UserError, match=r"patches\.bias holds numbers .* not finite in float32"):
        import_run(written(tmp_path, state), "sit", tmp_path / "run", None, ["model.heads=2"])
    assert not (tmp_path / "run").exists()


def test_numbers_that_a_precision_does_not_have_are_not_exported(tmp_path: Path) -> None:
    state = on_digits()
    state["t_embedder.mlp.0.weight"] = torch.full((32, 256), 6e4)
    state["x_embedder.proj.bias"] = torch.full((32,), 7e4)
    folder = tmp_path / "run"
    import_run(written(tmp_path, state), "sit", folder, None, ["model.heads=2"])
    out = tmp_path / "out.safetensors"  # a folder, for diffusers

    def export(precision: str, target: str = "flowmill") -> None:
        export_run(folder, out, target=target, weights="raw", precision=precision, step=None)

    with pytest.raises(UserError, match=r"tensor patches\.bias .* fp16, .* --precision fp32"):
        export("fp16")
    checkpoint = checkpoint_in(folder)
    manifest = read_manifest(checkpoint)
    held = read_tensors(checkpoint, {name: name for name in manifest.tensors})

    def put(number: float) -> None:
        held["model.patches.bias"] = torch.full((32,), number)
        save(checkpoint.parent, step=0, tensors=held, state=manifest.state, keep=1)

    put(0.0)  # the layer after the features of time is refitted, and grows
    with pytest.raises(UserError, match=r"linear_1\.weight .* fp16, .* --precision fp32"):
        export("fp16", "diffusers")
    put(torch.nan)
    with pytest.raises(
        UserError, match=r"tensor patches\.bias .* at .*step-.*; export another step"
    ):
        export("fp32")
    assert not out.exists()


def flow(folder: Path, *changes: str, source: str = "ml-tarflow"):
    """Imports a flow, and gives what the command says."""
    save_file(STATES[source](), folder / "flow.safetensors")
    told = ["--from", source, *FACTS[source], *changes, "--run", folder / "run"]
    return run("import", folder / "flow.safetensors", *told)


def test_what_a_file_does_not_tell_is_said(tmp_path: Path) -> None:
    for name, source, noise in (("a", "ml-tarflow", 0.05), ("b", "ml-starflow", 0.3)):
        (tmp_path / name).mkdir()
        said = flow(tmp_path / name, source=source).output
        assert f"assumed: objective.noise = {noise}, which the file does not tell" in said
    _, recipe = open_run(str(tmp_path / "b" / "run"))
    assert recipe.model_dump()["sample"]["form"] == "distribution"
    (tmp_path / "c").mkdir()
    assert "assumed" not in flow(tmp_path / "c", "objective.noise=0.15").output
    (tmp_path / "d").mkdir()
    assert json.loads(flow(tmp_path / "d", "--json").output)["assumed"] == {"objective.noise": 0.05}


def test_a_change_of_the_model_is_refused(tmp_path: Path) -> None:
    told = flow(tmp_path, "objective.dequantisation=variational", "train.batch=8")
    assert isinstance(told.exception, UserError)
    sentence = (
        "objective.dequantisation=variational: this makes another model than that of the file"
    )
    assert str(told.exception).startswith(sentence)
    assert not (tmp_path / "run").exists()


def test_a_file_of_shapes_alone_is_refused(tmp_path: Path) -> None:
    for lost in ("pos_embed", "x_embedder.proj.bias"):
        shapes = on_digits() | {lost: on_digits()[lost].to("meta")}
        with pytest.raises(UserError, match=rf"tensor {lost} was saved without its values"):
            import_run(written(tmp_path, shapes), "sit", tmp_path / "run", None, ["model.heads=2"])
    assert not (tmp_path / "run").exists()


def test_a_quantized_table_is_refused_without_a_warning(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table = torch.quantize_per_tensor(on_digits()["pos_embed"], 0.1, 0, torch.quint8)
        file = written(tmp_path, on_digits() | {"pos_embed": table})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserError, match="tensor pos_embed holds numbers of the kind quint8"):
            import_run(file, "sit", tmp_path / "run", None, ["model.heads=2"])


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    folder = imported(tmp_path)
    with pytest.raises(UserError, match="exists already; choose another folder"):
        import_run(tmp_path / "weights.pt", "sit", folder, None, ["model.heads=2"])


def test_what_cannot_be_exported_is_said(tmp_path: Path) -> None:
    folder = imported(tmp_path, "train.ema=[]")

    def export(out: Path, **options: object) -> None:
        given = {"target": "flowmill", "weights": "raw", "precision": "fp32", "step": None}
        export_run(folder, out, **{**given, **options})

    out = tmp_path / "out.safetensors"
    cases = [
        (out, {"weights": "ema"}, "has no averaged weights"),
        (out, {"target": "png"}, "there is no format 'png'"),
        (out, {"target": "flux"}, "flux files hold models of the family mmdit, .* family dit;"),
        (out, {"step": 7}, "has no checkpoint of step 7; there is 0"),
        (tmp_path / "out.pt", {}, r"out\.pt is not the name of a \.safetensors file"),
        (tmp_path / "no" / "out.safetensors", {}, "there is no folder"),
        (tmp_path / "weights.pt", {}, "exists already; give another name"),
        (Path("/proc/out.safetensors"), {}, "cannot be written .*; choose another place"),
        (Path("/proc/out"), {"target": "diffusers"}, "cannot be written .*; choose another place"),
    ]
    for path, options, sentence in cases:
        with pytest.raises(UserError, match=sentence):
            export(path, **options)
    shard = checkpoint_in(folder) / "shard-00000.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(UserError, match="does not match its checksum"):
        export(out)
    assert not out.exists()
