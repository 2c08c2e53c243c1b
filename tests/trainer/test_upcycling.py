"""A mixture begins as the dense network it was made of, and trains from there."""

from pathlib import Path

import pytest
import torch

from flows.errors import UserError
from flows.models.dit_moe import DiTMoE
from flows.models.dit_moe_config import DiTMoEConfig
from flows.models.upcycling import changed_from, mixture_keys, upcycled
from launch.cli import main
from tests.trainer import families, runs
from trainer.recipe import override_recipe, write_recipe
from trainer.run_folder import RunFolder, open_run
from trainer.trained import load_trained
from trainer.upcycling import upcycle_run

QUIET = ["sample.every=0", "train.steps=6", "checkpoint.every=6", "optimizer.lr=0.01"]


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dense") / "run"
    runs.train_here(override_recipe(families.recipe("dit", folder), QUIET))
    return folder


def network(recipe, run):
    return load_trained(run, recipe, torch.device("cpu"), batch=4).model.eval()


def inputs():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 1, 8, 8, generator=generator)
    return x, torch.rand(4, generator=generator), torch.tensor([0, 3, 10, 9])


@pytest.mark.parametrize("chosen", [1, 2, 3])
def test_the_mixture_begins_as_the_dense_network(dense, tmp_path, chosen) -> None:
    made = upcycle_run(dense, tmp_path / "run", ["model.experts=4", f"model.chosen={chosen}"])
    before = override_recipe(families.recipe("dit", dense), QUIET)
    expected = network(before, RunFolder(dense))(*inputs())
    assert expected.std() > 1e-3
    mixture = network(made.recipe, made.run)
    assert isinstance(mixture, DiTMoE)
    assert torch.allclose(mixture(*inputs()), expected, atol=1e-6)
    gates = mixture.blocks[0].mixture.router.gate.weight
    assert 0.01 < gates.std() < 0.03


def test_it_trains_from_there_and_experts_part(dense, tmp_path) -> None:
    made = upcycle_run(dense, tmp_path / "run", ["model.experts=4", "train.steps=3"])
    assert runs.train_here(made.recipe).finished
    state = runs.manifests(tmp_path / "run")[3].state
    assert (state["step"], state["imported"]["file"]) == (3, str(dense))
    longer = override_recipe(made.recipe, ["train.steps=4"])
    heard = runs.Silence()
    assert runs.train_here(longer, heard).finished
    assert any("from step 3" in line for line in heard.heard), "not begun anew"
    assert runs.manifests(tmp_path / "run")[4].state["imported"] == state["imported"]
    held = runs.tensors(tmp_path / "run")
    up = held["model.blocks.0.mixture.experts.up"]
    assert not torch.equal(up[0], up[1])
    first, last = runs.series(dense, "loss")[-1], runs.series(tmp_path / "run", "loss")[0]
    assert float(last) < 1.5 * float(first)


SIZES = {
    "image_size": 8, "channels": 1, "classes": 3, "patch": 4, "width": 16, "depth": 2, "heads": 2,
}  # fmt: skip


@pytest.mark.parametrize(
    "routing",
    [
        {"renormalise": True},
        {"gate_scale": 2.5},
        {"gate": "sigmoid", "renormalise": True, "gate_scale": 0.5},
        {"chooser": "experts"},
    ],
)
def test_one_expert_becomes_many(routing) -> None:
    one = DiTMoE(DiTMoEConfig(**SIZES, **routing, experts=1, chosen=1))
    generator = torch.Generator().manual_seed(1)
    for weight in one.parameters():
        torch.nn.init.normal_(weight, 0.0, 0.2, generator=generator)
    keys = mixture_keys(one.config) | {"renormalise": True}
    many = DiTMoE(DiTMoEConfig(**SIZES | keys, experts=8))
    assert changed_from(one.config, many.config) == []
    many.load_state_dict(upcycled(one.state_dict(), many.config, seed=0))
    x, t, label = inputs()
    label = label % 4
    assert torch.allclose(many.eval()(x, t, label), one.eval()(x, t, label), atol=1e-6)


@pytest.mark.parametrize(
    ("routing", "sentence"),
    [
        ({"gate": "sigmoid"}, r"model\.gate = sigmoid weights the one expert"),
        ({"capacity": 0.5}, r"model\.capacity = 0\.5 leaves tokens out"),
        ({"capacity": 0.5, "chooser": "experts"}, r"model\.capacity = 0\.5 leaves tokens out"),
    ],
)
def test_one_expert_that_is_no_dense_network_is_refused(routing, sentence) -> None:
    with pytest.raises(UserError, match=sentence):
        mixture_keys(DiTMoEConfig(**SIZES, **routing, experts=1, chosen=1))


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ("model.gate_scale=2.0", False),
        ("model.capacity=1.0", False),
        ("model.capacity=4.0", True),
        ("model.chooser=experts", False),
        ("model.renormalise=false", False),
        ("model.gate=sigmoid", True),
    ],
)
def test_the_command_says_where_the_mixture_begins_as_another(
    dense, tmp_path, change, same, capsys, monkeypatch
) -> None:
    key, _, value = change.partition("=")
    run = tmp_path / "run"
    asked = [str(dense), str(run), "model.experts=4", "model.chosen=1", change]
    monkeypatch.setattr("sys.argv", ["flowmill", "checkpoint", "upcycle", *asked])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code in (0, None)
    line = f"{run} need not begin as {dense} did: {key} = {value.removesuffix('.0')}."
    assert (line in capsys.readouterr().out) != same
    made = override_recipe(families.recipe("dit", dense), QUIET)
    expected = network(made, RunFolder(dense))(*inputs())
    mixture = network(*open_run(str(run))[::-1])(*inputs())
    assert torch.allclose(mixture, expected, atol=1e-6) == same


def test_the_command_says_how_many_ranks_experts_need(dense, tmp_path, capsys, monkeypatch) -> None:
    for degree, ranks in ((1, ""), (2, " --ranks 2")):
        run = tmp_path / f"run{degree}"
        asked = [str(dense), str(run), "model.experts=4", f"parallel.ep={degree}"]
        monkeypatch.setattr("sys.argv", ["flowmill", "checkpoint", "upcycle", *asked])
        with pytest.raises(SystemExit):
            main()
        said = capsys.readouterr().out
        assert f"flowmill train {run / 'recipe.yaml'}{ranks}\n" in said


@pytest.mark.parametrize(
    ("name", "changes", "sentence"),
    [
        ("dit", [], r"model\.experts is not set; say how many"),
        (
            "dit",
            ["model.experts=4", "model.width=64"],
            r"model\.width = 64 is not that of the dense",
        ),
        ("dit", ["model.experts=4", "model.expert_hidden=64"], r"model\.expert_hidden = 64 is not"),
        ("dit", ["model.experts=4", "run.dir=other"], r"run\.dir = other is not .* argument RUN"),
        ("lightningdit", ["model.experts=4"], r"model\.norm = rms is no option of the blocks"),
        (
            "dit",
            ["model.experts=1000000000"],
            r"model\.experts = 1,000,000,000 makes weights of [\d,]+ GiB, more than the",
        ),
        (
            "dit",
            ["model.experts=4", "parallel.ep=4", "train.batch=6"],
            r"train\.batch = 6 does not divide over 4 ranks",
        ),
        (
            "dit",
            ["model.experts=6", "parallel.ep=4", "train.batch=8"],
            r"parallel\.ep = 4 does not divide model\.experts = 6",
        ),
        ("tarflow", ["model.experts=4"], r"family tarflow, and mixtures are made of dit"),
        ("dit_moe", ["model.experts=4"], r"model\.experts = 8: only a dense network"),
    ],
)
def test_what_cannot_be_made_is_refused(name, changes, sentence, tmp_path) -> None:
    folder = tmp_path / "dense"
    folder.mkdir()
    write_recipe(families.recipe(name, folder), folder / "recipe.yaml")
    with pytest.raises(UserError, match=sentence):
        upcycle_run(folder, tmp_path / "run", changes)
    assert not (tmp_path / "run" / "recipe.yaml").exists()
