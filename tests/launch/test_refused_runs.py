"""Damaged checkpoints, folders that cannot serve, launchers that contradict: one sentence each."""

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.launch.conftest import SHORT, Flowmill, Refused
from trainer import judging

LONGER = (*SHORT, "train.steps=6")


def resume(*more: str) -> tuple[str, ...]:
    return ("train", "digits8", "run.dir=runs/kept", *LONGER, *more)


def damage_flip(checkpoint: Path) -> str:
    """One bit of the largest file; its name."""
    path = max(checkpoint.iterdir(), key=lambda file: file.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return path.name


def damage_cut(checkpoint: Path) -> str:
    path = max(checkpoint.iterdir(), key=lambda file: file.stat().st_size)
    path.write_bytes(path.read_bytes()[:-1])
    return path.name


def damage_remove(checkpoint: Path) -> str:
    path = max(checkpoint.iterdir(), key=lambda file: file.stat().st_size)
    path.unlink()
    return path.name


def damage_edit_manifest(checkpoint: Path) -> str:
    path = checkpoint / "manifest.json"
    path.write_text(path.read_text().replace('"step": ', '"step": 1', 1))
    return path.name


def damage_manifest(checkpoint: Path) -> str:
    (checkpoint / "manifest.json").write_text("{")
    return "manifest.json"


DAMAGES = [damage_flip, damage_cut, damage_remove, damage_edit_manifest, damage_manifest]


def checkpoints(run: str = "runs/kept") -> list[Path]:
    return sorted(Path(run, "checkpoints").iterdir())


@pytest.mark.parametrize("damage", DAMAGES)
def test_where_no_checkpoint_is_whole_nothing_begins(refused: Refused, damage) -> None:
    name = [damage(checkpoint) for checkpoint in checkpoints()][-1]
    says = ("runs/kept/checkpoints", "none of the 2", name, "restore one")
    refused(*resume(), says=says)
    refused(*resume("optimizer.lr=0.5"), says=says)
    refused("sample", "runs/kept", says=says)
    refused("evaluate", "runs/kept", says=says)


@pytest.mark.parametrize("damage", [damage_flip, damage_edit_manifest])
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(
    flowmill: Flowmill, place: Path, damage, caplog: pytest.LogCaptureFixture
) -> None:
    name = damage(checkpoints()[-1])
    ended = flowmill(*resume())
    assert ended.code == 0
    assert "resuming runs/kept from step 2" in ended.err
    assert name in caplog.text
    assert "step-00000004" in caplog.text


@pytest.mark.parametrize("damage", DAMAGES)
def test_verify_names_the_damage(flowmill: Flowmill, place: Path, damage) -> None:
    name = damage(checkpoints()[-1])
    for target in ("runs/kept", str(checkpoints()[-1])):
        ended = flowmill("checkpoint", "verify", target, "--json")
        assert ended.code == 1
        assert name in ended.out
        assert "Traceback" not in ended.err


def test_a_checkpoint_of_another_model(refused: Refused, flowmill: Flowmill, place: Path) -> None:
    other = ("train", "digits8", "run.dir=runs/other", *SHORT, "model.depth=2")
    assert flowmill(*other).code == 0
    shutil.rmtree("runs/kept/checkpoints")
    shutil.copytree("runs/other/checkpoints", "runs/kept/checkpoints")
    says = ("runs/kept/checkpoints/step-00000004", "tensor", "the recipe that wrote")
    refused(*resume("checkpoint.every=3"), says=says)
    refused("sample", "runs/kept", says=says)


def test_a_run_folder_of_another_recipe(refused: Refused) -> None:
    says = ("run.dir = runs/kept", "model.width was 8 and is now 16", "choose another run.dir")
    refused(*resume("model.width=16"), says=says)
    refused(*resume("model.width=16", "--dry-run"), says=says)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty; restore it"),
        (b"\xff\xfe\x00", "is not a text file"),
        (b"name: [", "is not valid YAML"),
        (b"name: x\nrum: {}\n", "did you mean run?"),
    ],
)
def test_a_damaged_recipe_in_the_run_folder(refused: Refused, content: bytes, says: str) -> None:
    Path("runs/kept/recipe.yaml").write_bytes(content)
    sentences = 5 if b"rum" in content else 1
    for command in (resume(), ("sample", "runs/kept"), ("evaluate", "runs/kept")):
        refused(*command, says=("runs/kept/recipe.yaml", says), sentences=sentences)


def test_a_run_folder_that_is_a_file(refused: Refused) -> None:
    Path("runs/file").write_text("hello")
    for folder in ("runs/file", "runs/file/below"):
        train = ("train", "digits8", f"run.dir={folder}", *SHORT)
        for more in ((), ("--dry-run",), ("--ranks", "2")):
            refused(*train, *more, says=(f"run.dir = {folder}", "is a file; choose another"))


@contextlib.contextmanager
def without_rights() -> Iterator[None]:
    """Root may write anywhere; nobody may not."""
    if os.geteuid():
        yield
        return
    os.setresuid(65534, 65534, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


def test_a_run_folder_that_cannot_be_written(
    flowmill: Flowmill, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        shutil.copytree(trained, f"{folder}/kept")
        Path(folder, "kept").chmod(0o555)
        monkeypatch.chdir(folder)
        refused = Refused(flowmill, Path(folder))
        try:
            with without_rights():
                says = ("run.dir = kept cannot be written", "choose another folder")
                refused("train", "digits8", "run.dir=kept", *LONGER, says=says)
                refused("train", "digits8", "run.dir=kept", *LONGER, "--dry-run", says=says)
                refused("evaluate", "kept", says=says)
                refused("sample", "kept", says=("kept/samples/final.png cannot be written",))
                refused("sample", "kept", "--out", "x.png", says=("--out x.png cannot be written",))
        finally:
            Path(folder, "kept").chmod(0o755)


def test_another_process_training_there(refused: Refused) -> None:
    with Path("runs/kept/.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for more in ((), ("--ranks", "2"), ("--dry-run",)):
            says = ("Another process is training in run.dir = runs/kept", "choose another")
            refused(*resume(*more), says=says)


def test_ranks_of_one_run_do_not_take_each_other_for_another(
    refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 alone looks at the lock: a second rank comes as far as meeting it."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with Path("runs/kept/.lock").open("r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused(*resume(), says=("MASTER_ADDR is not set",))


@pytest.mark.parametrize("command", ["sample", "evaluate"])
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nowhere"], ("nowhere is not a run folder", "give the run.dir of a training")),
        (["digits8"], ("digits8 is not a run folder",)),
        (
            ["runs/kept", "model.width=16"],
            ("'model.width=16'", "change sample.*, seed, data.heldout, data.autoencoder or"),
        ),
        (
            ["runs/kept", "sample=3"],
            ("'sample=3'", "change sample.*, seed, data.heldout, data.autoencoder or"),
        ),
        (["runs/kept", "sample.stepz=3"], ("sample.stepz", "did you mean sample.steps?")),
        (["runs/kept", "sample.steps=0"], ("sample.steps = 0 must be at least 1",)),
        (["runs/kept", "seed=x"], ("seed = 'x' must be a whole number",)),
        (["runs/kept", "sample.steps"], ("'sample.steps' is not section.key=value",)),
    ],
)
def test_what_cannot_be_sampled(
    refused: Refused, command: str, arguments: list[str], says: tuple[str, ...]
) -> None:
    refused(command, *arguments, says=says)


def test_a_run_without_a_checkpoint(refused: Refused) -> None:
    shutil.rmtree("runs/kept/checkpoints")
    refused("sample", "runs/kept", says=("runs/kept has no whole checkpoint", "train it first"))
    refused("evaluate", "runs/kept", says=("runs/kept has no whole checkpoint", "train it first"))
    refused(
        "checkpoint", "list", "runs/kept", says=("runs/kept has no checkpoints yet", "train it")
    )
    refused("checkpoint", "list", "runs", says=("runs: not a run folder", "run.dir"))
    refused("checkpoint", "verify", "nowhere", says=("nowhere", "no such folder", "run.dir"))
    refused("checkpoint", "verify", "runs/kept/step-9", says=("step-9", "no such checkpoint"))


@pytest.mark.parametrize(
    ("out", "says"),
    [
        ("x.jpg", "--out x.jpg is not the name of a .png file"),
        ("runs", "--out runs is not the name of a .png file"),
        ("folder.png", "--out folder.png is not the name"),
        ("no/x.png", "there is no folder no; make it first"),
    ],
)
def test_a_picture_that_cannot_be_written(refused: Refused, out: str, says: str) -> None:
    Path("folder.png").mkdir()
    refused("sample", "runs/kept", "--out", out, says=(says,))


def test_a_verdict_that_cannot_be_written(refused: Refused) -> None:
    Path("runs/kept/evaluation.json").mkdir()
    refused("evaluate", "runs/kept", says=("evaluation.json cannot be written", "move it"))


def test_what_a_dry_run_finds_at_once(refused: Refused, flowmill: Flowmill) -> None:
    says = ("nowhere/x.tar", "no shard")
    refused(*resume("data.heldout=nowhere/x.tar", "--dry-run"), says=says)
    newest = checkpoints()[-1]
    damage_cut(newest)
    found = json.loads(flowmill(*resume("--dry-run", "--json")).out)[-1]["found"]
    assert found.startswith("resumes from step 2; step 4 is damaged; changed: train.steps")
    damage_remove(checkpoints()[0])
    refused(*resume("--dry-run"), says=("none of the 2 checkpoints is whole",))


def test_nothing_to_judge_against(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Path("runs/kept/recipe.yaml")
    named = recipe.read_text()
    recipe.write_text(
        named.replace("heldout: embedded:digits8/heldout-000000.tar", "heldout: null")
    )
    refused("evaluate", "runs/kept", says=("recipe.yaml has no data.heldout", "give it"))
    wrong = "data.heldout=nowhere/*.tar"
    refused("evaluate", "runs/kept", wrong, says=("nowhere/*.tar", "no shard"))
    recipe.write_text(named.replace("heldout: embedded:digits8/", "heldout: nowhere/"))

    def too_late(*_: object, **__: object) -> None:
        raise AssertionError("samples are drawn before the shards are looked for")

    monkeypatch.setattr(judging, "draw_together", too_late)
    refused("evaluate", "runs/kept", says=("nowhere/heldout-000000.tar", "no shard"))
    for path, says in {
        "nothing": "nothing is not there",
        "runs": "runs: is no folder with a config",
    }.items():
        refused("evaluate", "runs/kept", "--features", path, says=(says,))


@pytest.mark.parametrize(
    ("rank", "world_size", "more", "says"),
    [
        ("0", "many", (), ("WORLD_SIZE = 'many'", "start with torchrun or --ranks")),
        ("0", "-1", (), ("WORLD_SIZE = '-1'", "torchrun")),
        ("0", "0", (), ("WORLD_SIZE = '0'", "torchrun")),
        ("x", "2", (), ("RANK", "'x'", "torchrun")),
        ("2", "2", (), ("RANK is 2 but WORLD_SIZE is 2", "torchrun")),
        ("0", "2", (), ("MASTER_ADDR is not set", "--ranks 2")),
        ("0", "2", ("--ranks", "3"), ("--ranks 3 contradicts the launcher", "leave it out")),
        ("0", "3", (), ("train.batch = 8 does not divide over 3 ranks", "multiple of 3")),
        ("0", None, (), ("RANK is set", "unset RANK")),
        (None, "2", (), ("WORLD_SIZE is set", "torchrun")),
    ],
)
def test_a_launcher_that_makes_no_sense(
    refused: Refused,
    monkeypatch: pytest.MonkeyPatch,
    rank: str | None,
    world_size: str | None,
    more: tuple[str, ...],
    says: tuple[str, ...],
) -> None:
    for name, value in (("RANK", rank), ("WORLD_SIZE", world_size)):
        if value is not None:
            monkeypatch.setenv(name, value)
    refused(*resume(*more), says=says)


@pytest.mark.parametrize("uri", ["nonsense", "/tmp/mlruns", "ftp://host/x", "file:///tmp/mlruns"])
def test_a_store_that_mlflow_does_not_serve(refused: Refused, uri: str) -> None:
    changes = ("tracking.mlflow=true", f"tracking.uri={uri}")
    for more in ((), ("--dry-run",), ("--ranks", "2")):
        refused(*resume(*changes, *more), says=(f"tracking.uri = {uri}", "use sqlite:///"))


def test_no_secret_of_an_address_is_printed(refused: Refused) -> None:
    changes = ("tracking.mlflow=true", "tracking.uri=ftp://me:hush@host/x")
    assert "hush" not in refused(*resume(*changes), says=("tracking.uri",))


@pytest.mark.gpu
def test_more_ranks_than_accelerators(refused: Refused, place: Path) -> None:
    ranks = torch.cuda.device_count() + 1
    train = ("train", "digits8", "run.dir=fresh", *SHORT, f"train.batch={8 * ranks}")
    says = ("has no CUDA device of its own", f"start at most {ranks - 1} ranks")
    refused(*train, "--ranks", str(ranks), says=says)
    assert not (place / "fresh").exists()
