"""`flowmill sample` and `evaluate` on any number of ranks, into a picture, files or shards."""

import io
import json
import signal
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import Dinov2Config, Dinov2Model

from tests.launch.conftest import SHORT, Flowmill, Refused, call, fingerprint
from tests.launch.test_processes import finish, start
from trainer.pictures import to_bytes
from trainer.run_folder import open_run
from trainer.trained import sample_checkpoint


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose products are long enough to be cut among threads."""
    folder = tmp_path_factory.mktemp("wide") / "run"
    # A few wild steps, for gates begin at zero, behind which nothing of a block would show.
    sizes = ("model.width=384", "model.heads=6", "optimizer.lr=0.03", "train.ema=[0.1]")
    assert call("train", "digits8", f"run.dir={folder}", *SHORT, *sizes) == 0
    return folder


def draw(run: Path | str, out: Path, *words: str, ranks: int = 1, threads: int = 1) -> Path:
    process = start(
        "sample", str(run), "--out", str(out), *words, "--ranks", str(ranks),
        OMP_NUM_THREADS=str(threads),
    )  # fmt: skip
    code, _, err = finish(process)
    assert code == 0, err
    return out


def test_any_number_of_ranks_and_threads_writes_the_same_bytes(wide: Path, tmp_path: Path) -> None:
    """Numbers, where rounding would show."""
    asked = ("--form", "shards", "--numbers", "--count", "10", "--per-shard", "2", "--batch", "2")
    alone = draw(wide, tmp_path / "alone", *asked, threads=2)
    shared = draw(wide, tmp_path / "shared", *asked, ranks=2)
    assert len(list(alone.glob("*.tar"))) == 5
    assert fingerprint(alone) == fingerprint(shared)


@pytest.mark.slow
@pytest.mark.parametrize("words", [("--form", "folder"), ("--form", "shards"), ()])
def test_every_form_is_the_same_on_three_ranks(
    wide: Path, tmp_path: Path, words: tuple[str, ...]
) -> None:
    for name, ranks in (("one", 1), ("three", 3)):
        (tmp_path / name).mkdir()
        out = tmp_path / name / ("out" if words else "out.png")
        draw(wide, out, *words, "--count", "50", "--batch", "8", ranks=ranks)
    assert fingerprint(tmp_path / "one") == fingerprint(tmp_path / "three")


def test_two_ranks_judge_as_one_does(flowmill: Flowmill, place: Path) -> None:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    Dinov2Model(Dinov2Config(**sizes, image_size=28, patch_size=14)).save_pretrained("encoder")
    asked = ("evaluate", "runs/kept", "--count", "40", "--batch", "8", "--json")
    asked += ("--features", "encoder", "--bits", "4")
    alone = flat(json.loads(flowmill(*asked).out))
    code, out, err = finish(start(*asked, "--ranks", "2"))
    assert code == 0, err
    assert json.loads(Path("runs/kept/evaluation.json").read_text()) == json.loads(out)
    shared = flat(json.loads(out))
    assert shared.keys() == alone.keys()
    for name, value in alone.items():
        # The samples are the same; float64 sums over them are cut among as many threads as there are.
        close = pytest.approx(value, rel=1e-9, abs=1e-12) if isinstance(value, float) else value
        assert shared[name] == close, name
    assert any("accuracy" in name for name in alone)
    assert alone[".bits.count"] == 4
    assert any(str(value).startswith("recall in dinov28-") for value in alone.values())


def flat(value: object, name: str = "") -> dict[str, object]:
    """Every number and word of plain data, by its path."""
    if isinstance(value, dict):
        parts = [flat(inner, f"{name}.{key}") for key, inner in value.items()]
    elif isinstance(value, list):
        parts = [flat(inner, f"{name}.{i}") for i, inner in enumerate(value)]
    else:
        return {name: value}
    return {key: inner for part in parts for key, inner in part.items()}


def test_shards_hold_the_samples(flowmill: Flowmill, place: Path) -> None:
    asked = ("sample", "runs/kept", "--count", "12", "--batch", "12", "--out", "made")
    ended = flowmill(*asked, "--form", "shards", "--per-shard", "5", "--json")
    result = json.loads(ended.out)
    expected = {"folder": "made", "samples": 12, "made": 12, "kept": 0, "step": 4, "seed": 0}
    assert result.items() >= (expected | {"network_calls": 2.0}).items()
    drawn = sample_checkpoint(*open_run("runs/kept"), 12)
    found = {}
    for path in sorted(Path("made").glob("*.tar")):
        with tarfile.open(path) as archive:
            for member in archive.getmembers():
                found[member.name] = archive.extractfile(member).read()
    assert len(found) == 3 * 12
    for i in range(12):
        key = f"{i:08d}"
        pixels = np.asarray(Image.open(io.BytesIO(found[f"{key}.png"])))
        # Batches of other sizes may round otherwise.
        assert np.abs(pixels.astype(int) - to_bytes(drawn.images[i])[0].numpy()).max() <= 1
        assert int(found[f"{key}.cls"]) == i % 10
        about = {"id": i, "label": i % 10, "class": str(i % 10), "network_calls": 2}
        assert json.loads(found[f"{key}.json"]) == about
    # They are a data set like any other.
    assert sorted(path.name for path in Path("made").iterdir() if path.suffix == ".json") == [
        "dataset.json", "samples.json",
    ]  # fmt: skip
    report = json.loads(flowmill("data", "verify", "made/*.tar", "--json").out)
    assert (report["samples"], report["problems"]) == (12, [])


def test_a_folder_of_pictures_can_be_packed(flowmill: Flowmill, place: Path) -> None:
    asked = ("sample", "runs/kept", "--count", "12", "--batch", "5", "--out", "made/")
    ended = flowmill(*asked, "--form", "folder")
    assert ended.code == 0
    said = (
        "12 samples of step 4 (euler, 1 steps, guidance 1.5, seed 0) at 2 network calls each: made"
    )
    assert ended.out.strip() == said
    assert ended.err == "rank 0: 3 of 3 parts\n"
    pictures = sorted(path.name for path in Path("made").glob("*.png"))
    assert pictures == [f"{i:08d}.png" for i in range(12)]
    rows = [json.loads(line) for line in Path("made/metadata.jsonl").read_text().splitlines()]
    assert [(row["file_name"], row["label"]) for row in rows] == [
        (name, i % 10) for i, name in enumerate(pictures)
    ]
    assert flowmill("data", "pack", "made", "packed", "--label-field", "label").code == 0


def test_numbers_are_what_the_model_made(flowmill: Flowmill, place: Path) -> None:
    asked = (
        "sample",
        "runs/kept",
        "--count",
        "3",
        "--out",
        "made",
        "--form",
        "folder",
        "--numbers",
    )
    assert flowmill(*asked).code == 0
    drawn = sample_checkpoint(*open_run("runs/kept"), 3)
    for i in range(3):
        np.testing.assert_array_equal(np.load(f"made/{i:08d}.npy"), drawn.images[i].numpy())


@pytest.mark.parametrize("form", ["shards", "folder"])
def test_what_is_there_is_left_alone_and_what_is_missing_is_made(
    flowmill: Flowmill, place: Path, form: str
) -> None:
    def asked(count: int, out: str) -> dict[str, object]:
        words = ("--per-shard", "4", "--batch", "4", "--json", "--form", form)
        ended = flowmill("sample", "runs/kept", *words, "--count", str(count), "--out", out)
        assert ended.code == 0, ended.err
        result: dict[str, object] = json.loads(ended.out)
        return result

    asked(18, "fresh")
    whole = fingerprint(Path("fresh"))
    asked(10, "made")
    # The last part of 10 had room for more.
    assert asked(18, "made").items() >= {"made": 10, "kept": 8}.items()
    assert fingerprint(Path("made")) == whole
    lost = "samples-000001.tar" if form == "shards" else "00000006.png"
    Path("made", lost).unlink()
    before = {path: path.stat().st_mtime_ns for path in Path("made").iterdir()}
    assert asked(18, "made").items() >= {"made": 4, "kept": 14}.items()
    assert fingerprint(Path("made")) == whole
    if form == "shards":
        touched = {path.name for path, at in before.items() if path.stat().st_mtime_ns != at}
        assert touched == {"dataset.json"}
    again = asked(18, "made")
    assert (again["made"], again["kept"], again["network_calls"]) == (0, 18, None)


@pytest.mark.slow
def test_a_command_that_was_killed_is_completed_by_the_same(place: Path) -> None:
    asked = (
        "sample", "runs/kept", "sample.steps=400", "--form", "shards", "--count", "400",
        "--per-shard", "20", "--ranks", "2",
    )  # fmt: skip
    process = start(*asked, "--out", "made")
    deadline = time.monotonic() + 120
    while len(list(Path("made").glob("*.tar"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    time.sleep(2)  # ranks notice within half a second that nobody waits for them
    there = len(list(Path("made").glob("*.tar")))
    assert 3 <= there < 20, "killed in the middle"
    assert not Path("made/dataset.json").exists()
    for out in ("made", "fresh"):
        code, _, err = finish(start(*asked, "--out", out))
        assert code == 0, err
    made = fingerprint(Path("made"))
    assert {name: made[name] for name in made if not name.startswith(".")} == fingerprint(
        Path("fresh")
    )


def test_what_cannot_be_written_is_refused(refused: Refused, place: Path) -> None:
    Path("file").write_text("here")
    Path("strange").mkdir()
    Path("strange/a.txt").write_text("here")
    for out in ("file", "file/inside"):
        asked = ("sample", "runs/kept", "--form", "shards", "--out", out)
        refused(*asked, says=(f"--out {place / out}", "is a file", "give another"))
    asked = ("sample", "runs/kept", "--form", "folder", "--out", "strange")
    refused(*asked, says=("strange holds files and no samples.json", "empty folder"))
    refused("sample", "runs/kept", "--numbers", says=("--numbers", "--form folder"))
    assert call("sample", "runs/kept", "--form", "folder", "--out", "made", "--count", "5") == 0
    asked = ("sample", "runs/kept", "--form", "folder", "--out", "made", "--count")
    refused(*asked, "4", says=("made is for 5 samples already, and 4", "name another folder"))
    refused(
        *asked, "5", "seed=3", "sample.steps=2",
        says=("made holds other samples", "seed was 0 and is now 3", "sample.steps was 1 and is now 2"),
    )  # fmt: skip
    Path("made/samples.json").write_text("{")
    refused(*asked, "5", says=("made/samples.json", "no record of samples"))


def test_steps_that_cannot_be_chosen_are_refused(
    refused: Refused, flowmill: Flowmill, place: Path
) -> None:
    asked = ("sample", "runs/kept", "--optimise-steps")
    says = ("--optimise-steps 101", "from a grid of 100; ask for 1 to 100")
    refused(*asked, "101", says=says)
    assert "trajectories" not in flowmill(*asked, "101").err, "they take long"
    says = ("sample.solver = dopri5", "drop --optimise-steps")
    refused(*asked, "3", "sample.solver=dopri5", says=says)
    says = ("--optimise-steps sets sample.times", "leave one of them out")
    refused(*asked, "3", "sample.times=[0,0.5,1]", says=says)


def test_more_ranks_than_the_launcher_started_are_refused(
    refused: Refused, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    for command in ("sample", "evaluate"):
        refused(command, "runs/kept", "--ranks", "2", says=("--ranks 2 contradicts", "started 1"))


def test_chosen_steps_are_drawn_with_and_named(flowmill: Flowmill, place: Path) -> None:
    asked = ("sample", "runs/kept", "--count", "10", "--json")
    result = json.loads(flowmill(*asked, "--optimise-steps", "3").out)
    times = result["sample"]["times"]
    assert len(times) == 4
    assert (times[0], times[-1], result["network_calls"]) == (0.0, 1.0, 6.0)
    assert all(round(100 * t) == pytest.approx(100 * t) for t in times), "of a grid of 100"
    picture = Path(result["picture"]).read_bytes()
    assert flowmill(*asked, f"sample.times={times}").code == 0
    assert Path(result["picture"]).read_bytes() == picture
    code, out, err = finish(start(*asked, "--optimise-steps", "3", "--ranks", "2"))
    assert code == 0, err
    assert json.loads(out)["sample"]["times"] == times
    assert "rank 0: 100 of 100 trajectories" in err


def test_samples_that_are_not_finite_are_named(
    flowmill: Flowmill, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few wild steps make a flow whose scales nothing bounds; a soft clip bounds them."""
    monkeypatch.chdir(tmp_path)
    wild = (
        "train.steps=6", "train.batch=8", "model.width=32", "optimizer.lr=0.3", "optimizer.warmup=1",
        "train.ema=[0.1]", "sample.every=6", "sample.count=10", "sample.guidance=0", "data.lanes=4",
        "objective.noise=0", "tracking.mlflow=false",
    )  # fmt: skip
    trained = flowmill("train", "tarflow_digits", "run.dir=wild", *wild)
    assert "of 10 samples of step 6 are not finite" in trained.err + trained.out
    asked = ("sample", "wild", "--count", "8", "--batch", "4", "--json")
    broken = json.loads(flowmill(*asked).out)["not_finite"]
    assert broken
    said = flowmill("sample", "wild", "--count", "8").err
    assert f"{len(broken)} of 8 samples, number {broken[0]}" in said
    made = json.loads(flowmill(*asked, "--form", "shards", "--out", "made").out)
    assert made["not_finite"] == broken
    with tarfile.open("made/samples-000000.tar") as archive:
        for i in range(8):
            about = json.load(archive.extractfile(f"{i:08d}.json"))
            assert about.get("finite", True) == (i not in broken)
    flowmill("train", "tarflow_digits", "run.dir=bounded", *wild, "model.clip=4")
    ended = flowmill("sample", "bounded", *asked[2:])
    assert json.loads(ended.out)["not_finite"] == []
