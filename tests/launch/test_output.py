"""What programs read from the command line, and what a log file gets of its progress."""

import fcntl
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from launch.cli import app
from tests.data_pipeline.conftest import grey, sample, write_tar
from tests.launch.conftest import SHORT, Flowmill, environment
from trainer.recipe import load_recipe


def test_json_of_a_dry_run(flowmill: Flowmill, place: Path) -> None:
    ended = flowmill("train", "digits8", "run.dir=fresh", *SHORT, "--dry-run", "--json")
    checks = {check["what"]: check["found"] for check in json.loads(ended.out)}
    assert checks["shards"] == "2 shards, 1,500 samples, 0.0 epochs"
    assert checks["batch"] == "8 = 1 rank x 8, microbatch 8"
    assert checks["run folder"] == "new"
    assert (ended.code, ended.err) == (0, "")
    assert not Path("fresh").exists()
    ended = flowmill("train", "digits8", "run.dir=runs/kept", *SHORT, "--dry-run", "--json")
    assert json.loads(ended.out)[-1]["found"] == "resumes from step 4"


def test_json_of_checkpoints(flowmill: Flowmill, place: Path) -> None:
    for command in ("list", "verify"):
        found = json.loads(flowmill("checkpoint", command, "runs/kept", "--json").out)
        assert [(record["step"], record["whole"]) for record in found] == [(2, True), (4, True)]
        assert all(Path(record["path"]).is_dir() and record["size"] > 0 for record in found)
    next(Path(found[1]["path"]).glob("*.safetensors")).unlink()
    ended = flowmill("checkpoint", "list", "runs/kept", "--json")
    assert [record["whole"] for record in json.loads(ended.out)] == [True, False]
    assert ended.code == 1


def test_json_of_data(flowmill: Flowmill, place: Path) -> None:
    shard = write_tar(place / "a.tar", [*sample("0000", 1, 3), *sample("0001", 2, 4)])
    found = json.loads(flowmill("data", "index", shard, "--json").out)
    assert (found["made"], found["kept"], found["problems"]) == (1, 0, [])
    assert [Path(file).parent for file in found["files"]] == [place]
    report = json.loads(flowmill("data", "verify", shard, "--json").out)
    assert (report["samples"], report["labels"]) == (2, {"3": 1, "4": 1})
    write_tar(place / "b.tar", [("0.png", grey(1)[:50]), ("0.cls", b"0")])
    ended = flowmill("data", "verify", f"{place}/b.tar", "--json")
    assert len(json.loads(ended.out)["problems"]) == 1
    assert ended.code == 1
    packed = json.loads(flowmill("data", "pack", shard, "packed", "--json").out)
    assert packed[0]["samples"] == 2


def test_json_of_samples(flowmill: Flowmill, place: Path) -> None:
    ended = flowmill("sample", "runs/kept", "sample.steps=2", "--count", "10", "--json")
    result = json.loads(ended.out)
    drawn = {"picture": "runs/kept/samples/final.png", "samples": 10, "step": 4, "network_calls": 4}
    assert result.items() >= (drawn | {"seed": 0}).items()
    assert (result["sample"]["steps"], result["sample"]["solver"]) == (2, "euler")
    assert Path(result["picture"]).read_bytes().startswith(b"\x89PNG")
    assert flowmill("sample", "runs/kept", "--count", "1", "--out", "a.PNG", "--json").code == 0
    assert Path("a.PNG").exists()


def test_samples_beside_a_training_leave_its_records_alone(flowmill: Flowmill, place: Path) -> None:
    recipe = Path("runs/kept/recipe.yaml")
    recipe.write_text(recipe.read_text().replace("mlflow: false", "mlflow: true"))
    with Path("runs/kept/.lock").open("r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        ended = flowmill("sample", "runs/kept", "--count", "10")
    assert ended.code == 0
    assert "was not sent to MLflow, for a training goes on in runs/kept" in ended.err
    assert not list(Path("runs/kept").glob("mlflow*"))
    assert "10 samples of step 4 (euler, 1 steps, guidance 1.5, seed 0)" in ended.out


def test_json_of_an_evaluation(flowmill: Flowmill, place: Path) -> None:
    ended = flowmill("evaluate", "runs/kept", "--count", "20", "--json")
    result = json.loads(ended.out)
    assert (result["network_calls"], result["step"], result["seed"]) == (2, 4, 0)
    assert result["sample"]["guidance"] == 1.5
    assert result.pop("bits") is None, "a velocity has no likelihood of its own"
    assert all(isinstance(value, (int, float, dict, list, str)) for value in result.values())
    assert json.loads(Path("runs/kept/evaluation.json").read_text()) == result | {"bits": None}


def test_brackets_and_colons_of_names_are_printed_as_they_are(
    flowmill: Flowmill, place: Path
) -> None:
    """No markup: neither in lines nor in the titles and cells of tables."""
    odd = Path("q[/b] [red] :smile:")
    odd.mkdir(parents=True)
    Path("runs/kept").rename(odd / "kept")
    picture = f"{odd}/a[x].png"
    ended = flowmill("sample", str(odd / "kept"), "--count", "2", "--out", picture)
    assert (ended.code, ended.out.rstrip().endswith(f": {picture}")) == (0, True)
    ended = flowmill("evaluate", str(odd / "kept"), "--count", "10")
    assert ended.code == 0
    assert f"{odd}/kept, step 4, 10 samples" in " ".join(ended.out.split())
    Path("a[").mkdir()
    shard = write_tar(Path("a[/b].tar"), [*sample("0000", 1, 3), *sample("0001", 2, 4)])
    for command in (("verify", shard), ("pack", shard, "packed[/b]")):
        ended = flowmill("data", *command)
        assert (ended.code, "a[/b].tar" in ended.out) == (0, True), ended


def test_a_published_name_that_is_changed_is_told_of(flowmill: Flowmill, place: Path) -> None:
    train = ("train", "starflow_emoji", "run.dir=fresh", "--dry-run")
    assert flowmill(*train).err == ""
    said = flowmill(*train, "model.name=STARFlow-3B").err
    assert said.startswith("warning: model.name = STARFlow-3B is changed by other keys of the rec")
    assert said.count("\n") == 1
    assert "model.width = 128 and not 3072, model.layers = [1, 1, 1, 3] and not [2, " in said
    assert "model.patch" not in said, "1 by the name, too"
    own = [f"model.{key}=null" for key in ("width", "layers", "head_width")]
    recipe = load_recipe("starflow_emoji", ["model.name=STARFlow-3B", *own])
    assert recipe.model.changed_of_name() is None


def test_tables_are_for_people(flowmill: Flowmill, place: Path) -> None:
    for command in (
        ("train", "digits8", *SHORT, "run.dir=fresh", "--dry-run"),
        ("checkpoint", "list", "runs/kept"),
        ("data", "verify", "embedded:digits8/heldout-000000.tar"),
    ):
        ended = flowmill(*command)
        assert ended.code == 0
        assert not ended.out.lstrip().startswith(("{", "["))


def test_progress_off_a_terminal_is_lines(flowmill: Flowmill, place: Path) -> None:
    ended = flowmill(
        "train", "digits8", "run.dir=fresh", *SHORT, "train.steps=7", "train.log_every=3"
    )
    assert (ended.code, ended.out) == (0, "")
    assert "\r" not in ended.err
    assert "\x1b" not in ended.err
    steps = re.findall(
        r"^step (\d+)/7  loss \d+\.\d{4}  \d+ samples/s  data wait \d+\.\d%  ETA (?:-|\d+:\d\d)$",
        ended.err,
        re.MULTILINE,
    )
    assert steps == ["3", "6", "7"]


@pytest.mark.parametrize(
    "command", [[], *([name] for name in typer.main.get_command(app).commands)]
)
def test_help_needs_no_torch(command: list[str], tmp_path: Path) -> None:
    """CPU time, for another process may have the cores; pytest's own imports are not counted."""
    code = (
        "import sys; sys.argv = ['flowmill', *sys.argv[1:], '--help']\n"
        "from launch.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code\n"
        "heavy = {'torch', 'numpy', 'mlflow', 'sklearn', 'matplotlib', 'nvidia.dali'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, *command], env=environment(), cwd=tmp_path,
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    text = process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    assert status == 0
    assert "Usage:" in text
    assert used.ru_utime + used.ru_stime < 1.5


def test_the_recipes_of_the_package_pass_a_dry_run(flowmill: Flowmill, place: Path) -> None:
    for name in ("digits", "digits8", "sit_emoji"):
        assert flowmill("train", name, "run.dir=fresh", "--dry-run", "--ranks", "2").code == 0
