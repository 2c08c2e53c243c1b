"""A mixture begins as the dense network it was made of, and trains from there."""

from pathlib import Path

import pytest
import torch

from flows.errors import UserError
from flows.models.dit_moe import DiTMoE
from flows.models.dit_moe_config import DiTMoEConfig
from flows.models.upcycling import upcycled
from tests.trainer import families, runs
from trainer.recipe import override_recipe, write_recipe
from trainer.run_folder import RunFolder
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
    held = runs.tensors(tmp_path / "run")
    up = held["model.blocks.0.mixture.experts.up"]
    assert not torch.equal(up[0], up[1])
    first, last = runs.series(dense, "loss")[-1], runs.series(tmp_path / "run", "loss")[0]
    assert float(last) < 1.5 * float(first)


def test_one_expert_becomes_many() -> None:
    sizes = {
        "image_size": 8, "channels": 1, "classes": 3, "patch": 4, "width": 16, "depth": 2, "heads": 2,
        "renormalise": True,
    }  # fmt: skip
    one = DiTMoE(DiTMoEConfig(**sizes, experts=1, chosen=1))
    generator = torch.Generator().manual_seed(1)
    for weight in one.parameters():
        torch.nn.init.normal_(weight, 0.0, 0.2, generator=generator)
    many = DiTMoE(DiTMoEConfig(**sizes, experts=8))
    many.load_state_dict(upcycled(one.state_dict(), many.config, seed=0))
    x, t, label = inputs()
    label = label % 4
    assert torch.allclose(many.eval()(x, t, label), one.eval()(x, t, label), atol=1e-6)


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
