"""The layout never changes the mathematics: one recipe, real processes, any layout, the same run."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from flows.batch import Batch
from flows.initialise import initialise
from flows.randomness import Draw
from tests.trainer import runs
from trainer.assembly import build_objective, plan
from trainer.running import open_loader

pytestmark = pytest.mark.timeout(900)

EXACT = 1e-5
STEPS = 20
CHANGES = (
    f"train.steps={STEPS}",
    "checkpoint.every=1000",
    "data.augment={crop: random, flip: 0.5}",
)
LAYOUTS = {
    "fsdp x4": (4, ["parallel.strategy=fsdp"]),
    "hsdp 2x2": (4, ["parallel.strategy=hsdp", "parallel.replicate=2"]),
    "ddp x2": (2, ["parallel.strategy=ddp"]),
    "fsdp x2": (2, ["parallel.strategy=fsdp"]),
    "zero-3 x2": (2, ["parallel.engine=deepspeed", "parallel.deepspeed.stage=3"]),
    "accelerate fsdp x2": (2, ["parallel.engine=accelerate"]),
    "accumulated": (1, ["train.microbatch=5"]),
    "recomputed": (1, ["train.checkpoint_activations=1"]),
}
MORE_LAYOUTS = {
    **{
        f"zero-{stage} x2": (2, ["parallel.engine=deepspeed", f"parallel.deepspeed.stage={stage}"])
        for stage in (0, 1, 2)
    },
    "zero-3 x2 on the host accumulated recomputed": (
        2,
        [
            "parallel.engine=deepspeed",
            "parallel.deepspeed={stage: 3, offload_optimizer: true, offload_parameters: true}",
            "train.microbatch=3",
            "train.checkpoint_activations=1",
        ],
    ),
    "zero-1 x4": (4, ["parallel.engine=deepspeed", "parallel.deepspeed.stage=1"]),
    "accelerate ddp x2": (2, ["parallel.engine=accelerate", "parallel.strategy=ddp"]),
    "fsdp x1": (1, ["parallel.strategy=fsdp"]),
    "fsdp x2 accumulated recomputed": (2, ["train.microbatch=3", "train.checkpoint_activations=2"]),
    "fsdp x2 kept": (2, ["parallel.reshard_after_forward=false"]),
    "fsdp x2 on the host": (2, ["parallel.offload=true"]),
    "ddp x2 accumulated": (2, ["parallel.strategy=ddp", "train.microbatch=1"]),
    "ddp x4 recomputed": (4, ["parallel.strategy=ddp", "train.checkpoint_activations=1"]),
    "fsdp x2 recomputed but for products": (
        2,
        ["train.checkpoint_activations=1", "train.checkpoint_keeps=products"],
    ),
    "hsdp 2x2 accumulated recomputed": (
        4,
        [
            "parallel.strategy=hsdp",
            "parallel.shard=2",
            "train.microbatch=3",
            "train.checkpoint_activations=1",
        ],
    ),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every layout trained once, and another seed."""
    return trained(tmp_path_factory.mktemp("layouts"), LAYOUTS | {"seed": (1, ["seed=1"])})


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one rank, which all others are held against."""
    return runs.train(tmp_path_factory.mktemp("one") / "run", *CHANGES)


@pytest.fixture(scope="module")
def more_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return trained(tmp_path_factory.mktemp("more"), MORE_LAYOUTS)


def trained(parent: Path, layouts: dict[str, tuple[int, list[str]]]) -> dict[str, Path]:
    """Several ranks as `flowmill train --ranks N`, two layouts at a time; one rank here."""
    folders = {name: parent / name.replace(" ", "-") for name in layouts}

    def train(name: str) -> Path:
        ranks, changes = layouts[name]
        return runs.train(folders[name], *CHANGES, *changes, ranks=ranks)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(train, [name for name, (ranks, _) in layouts.items() if ranks > 1]))
    for name, (ranks, changes) in layouts.items():
        if ranks == 1:
            assert runs.train_here(runs.recipe(folders[name], *CHANGES, *changes)).finished
    return folders


def hold(folder: Path, one: Path) -> None:
    """The law: every loss, every gradient norm, and all that the last checkpoint holds."""
    ours, theirs = runs.tensors(folder), runs.tensors(one)
    errors = {key: runs.relative(runs.series(folder, key), runs.series(one, key))
              for key in ("loss", "grad_norm")}  # fmt: skip
    parts = ("model.", "ema.0.5.", "ema.0.99.", "optimizer.")
    errors |= {part: runs.distance(ours, theirs, part) for part in parts}
    assert max(errors.values()) <= EXACT, errors


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_trains_what_one_rank_trains(folders, one, name):
    hold(folders[name], one)


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE_LAYOUTS)
def test_more_layouts_train_what_one_rank_trains(more_folders, one, name):
    hold(more_folders[name], one)


def test_every_layout_logs_the_same_steps_and_times(folders, one):
    for name, folder in folders.items():
        assert [line["step"] for line in runs.lines(folder)] == list(range(1, STEPS + 1))
        if name != "seed":
            for ours, theirs in zip(runs.lines(folder), runs.lines(one), strict=True):
                empty = [value is None for value in theirs["loss_by_time"]]
                assert [value is None for value in ours["loss_by_time"]] == empty
                assert ours["lr"] == theirs["lr"]


def test_checkpoints_were_written_by_the_layouts_they_name(folders, one):
    """Otherwise all of the above would compare one rank with itself."""
    written = {name: runs.manifests(folder)[STEPS].layout for name, folder in folders.items()}
    for name, degrees in {
        "fsdp x4": ("4 ranks", "shard=4"),
        "hsdp 2x2": ("4 ranks", "replicate=2", "shard=2"),
        "ddp x2": ("2 ranks",),
        "fsdp x2": ("2 ranks", "shard=2"),
        "zero-3 x2": ("2 ranks, cut flat",),
    }.items():
        assert all(degree in written[name] for degree in degrees), written[name]
    assert runs.manifests(one)[STEPS].layout == written["accumulated"] == "1 rank"


def test_the_law_can_be_broken(folders, one):
    """Another seed is another run by far, and the weights have left their first values."""
    seed = folders["seed"]
    for key in ("loss", "grad_norm"):
        assert runs.relative(runs.series(seed, key), runs.series(one, key)) > 1e3 * EXACT
    final = runs.tensors(one)
    assert runs.distance(runs.tensors(seed), final, "model.") > 1e3 * EXACT
    assert runs.distance(final | first_weights(one), final, "model.") > 1e3 * EXACT
    assert (runs.series(one, "grad_norm") > 1.0).any(), "clipping is never active"


def first_weights(folder: Path) -> dict[str, torch.Tensor]:
    made = plan(runs.recipe(folder), 1)
    model = made.model.build()
    initialise(model, made.recipe.seed)
    return {f"model.{name}": weight.detach() for name, weight in model.named_parameters()}


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("microbatch", [1, 3, 16])
def test_noise_time_and_label_drop_of_a_sample_are_bit_equal_on_any_rank(
    tmp_path, ranks, microbatch
):
    made = plan(runs.recipe(tmp_path, *CHANGES), ranks)
    alone = [randomness(made, batch, step) for step, batch in enumerate(batches(made, 0, 1, 3))]
    shares = [batches(made, rank, ranks, 3) for rank in range(ranks)]
    for step, whole in enumerate(alone):
        parts = [
            randomness(made, part, step)
            for rank in range(ranks)
            for part in shares[rank][step].split(microbatch)
        ]
        for name, value in whole.items():
            together = torch.cat([part[name] for part in parts])
            assert torch.equal(together, value), name
    assert not torch.equal(alone[0]["noise"], alone[1]["noise"])


def batches(made, rank: int, ranks: int, steps: int) -> list[Batch]:
    with open_loader(made, rank, ranks, torch.device("cpu")) as loader:
        return [next(loader) for _ in range(steps)]


def randomness(made, batch: Batch, step: int) -> dict[str, torch.Tensor]:
    """What the objective draws for each sample, with the sample itself, flipped or not."""
    draw = Draw(made.recipe.seed, step, batch.position)
    prepared = build_objective(made.recipe).prepare(batch, draw)
    assert prepared.time is not None
    return {
        "position": batch.position,
        "image": batch.image,
        "noise": draw.normal("noise", tuple(batch.image.shape[1:])),
        "time": prepared.time,
        "label": prepared.inputs["label"],
    }
