"""`flowmill data`: tables for people, JSON for programs, every problem of the data by name."""

import json
import os
import subprocess
import sys
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from typer.testing import CliRunner

from data_pipeline.catalog import NAME
from data_pipeline.description import Description, Shard, write_description
from data_pipeline.samples import Samples
from flows.errors import UserError
from launch.commands.data import app
from tests.data_pipeline.conftest import grey, sample, write_tar
from trainer.assembly import plan
from trainer.recipe import load_recipe
from trainer.running import open_loader


def run(*words: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, list(words))
    if isinstance(result.exception, UserError):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.stdout


def test_pack_index_verify(tmp_path):
    folder = str(tmp_path / "out")
    words = ("--per-shard", "800", "--heldout", "97", "--shuffle", "1")
    written = json.loads(run("pack", "sklearn:digits", folder, *words, "--json"))
    assert [shard["samples"] for shard in written] == [800, 800, 100, 97]
    assert all(Path(shard["path"]).stat().st_size == shard["bytes"] for shard in written)
    indexed = json.loads(run("index", f"{folder}/*.tar", "--json"))
    assert indexed == {"files": [f"{folder}/{NAME}"], "made": 4, "kept": 0, "problems": []}
    assert json.loads(run("index", f"{folder}/*.tar", "--json"))["kept"] == 4
    picture = tmp_path / "grid.png"
    report = json.loads(
        run("verify", f"{folder}/*.tar", "--classes", "10", "--json", "--picture", str(picture))
    )
    assert (report["shards"], report["samples"], report["problems"]) == (4, 1797, [])
    assert report["checksums"] == 4
    assert report["sizes"] == {"L 8x8": 1797}
    assert report["shorter_sides"] == {"8": 1797}
    pixels = np.rint(load_digits().images * (255 / 16)) / 127.5 - 1
    assert report["moments"]["L"]["mean"] == pytest.approx([pixels.mean()])
    assert report["moments"]["L"]["std"] == pytest.approx([pixels.std()])
    assert sum(report["labels"].values()) == 1797
    assert sorted(report["labels"]) == [str(n) for n in range(10)]
    pixels = np.asarray(Image.open(picture))
    assert pixels.std() > 30
    for command in (("index", f"{folder}/*.tar"), ("verify", f"{folder}/*.tar")):
        assert "{" not in run(*command)


def test_verify_finds_every_problem_and_goes_on(tmp_path):
    write_tar(tmp_path / "a.tar", [*sample("0000", 1, 3), *sample("0001", 1, "cat")])
    corrupt = [("0002.png", grey(1)[:50]), ("0002.cls", b"0")]
    write_tar(tmp_path / "b.tar", [*sample("0000", 1, 12), *corrupt, *sample("0003", 1)])
    whole = Path(write_tar(tmp_path / "c.tar", sample("0004", 1))).read_bytes()
    (tmp_path / "c.tar").write_bytes(whole[:1000])
    write_tar(tmp_path / "d.tar", [*sample("0005", 1, 3), ("0005.json", b"{")])
    write_tar(tmp_path / "e.tar", [])
    write_tar(tmp_path / "f.tar", [("\udcff.png", grey(1))])
    gone = Shard(samples=1, bytes=1, sha256="")
    write_description(str(tmp_path), Description(shards={"a.tar": gone, "g.tar": gone}))
    report = json.loads(run("verify", f"{tmp_path}/*.tar", "--classes", "10", "--json", code=1))
    expected = [
        ("g.tar", "is in dataset.json and there is no such shard"),
        ("a.tar", "its content is not what dataset.json says"),
        ("a.tar", "sample 0001: label b'cat' is not an integer"),
        ("b.tar", "sample 0000 is also in"),
        ("b.tar", "sample 0000: label 12 must lie in 0 .. 9"),
        ("b.tar", "sample 0002: its image"),
        ("c.tar", "not a whole uncompressed tar"),
        ("d.tar", "sample 0005: its .json is broken"),
        ("e.tar", "holds no samples"),
        ("f.tar", r"member \udcff.png has a name that is not UTF-8"),
    ]
    assert len(report["problems"]) == len(expected)
    for problem, (shard, words) in zip(report["problems"], expected, strict=True):
        assert shard in problem
        assert words in problem
    assert report["samples"] == 6
    assert report["labels"] == {"3": 2, "0": 2}


def test_bad_input_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="no shard"):
        run("verify", f"{tmp_path}/*.tar")
    with pytest.raises(UserError, match=r"x\.zip: cannot be packed"):
        run("pack", "x.zip", str(tmp_path))


@pytest.mark.parametrize(
    "words",
    [
        ("order", "digits8", "--from", str(2**53 + 1)),
        ("pack", "sklearn:digits", "x", "--shuffle", str(2**63)),
    ],
)
def test_numbers_beyond_the_range_are_usage_errors(words):
    run(*words, code=2)


def test_order_goes_as_far_as_it_says():
    (batch,) = json.loads(run("order", *TINY_RECIPE, "--from", str(2**53), "--json"))
    assert (batch["position"], len(batch["ranks"][0])) == (2**53, 12)


def test_asking_for_help_loads_nothing_heavy():
    """Half a second of imports before a usage line is half a second too much."""
    code = (
        "import sys, launch.commands.data;"
        "print([m for m in ('torch', 'sklearn', 'nvidia.dali', 'numpy') if m in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == "[]"


def test_a_loader_left_open_does_not_hold_the_interpreter():
    code = """
import torch
from data_pipeline.augment import Augment
from data_pipeline.decode.decoder import open_decoder
from data_pipeline.loader import Loader
from data_pipeline.share import Share
from data_pipeline.stream import open_stream
sources = [("embedded:digits8/train-*.tar", 1.0)]
stream = open_stream(sources, keep={}, classes=10, seed=0, lanes=4, window=8)
decoder = open_decoder("auto", channels=1, threads=2, device=torch.device("cpu"))
augment = Augment("random", (0.5, 1.0), (0.8, 1.25), 0.5)
share = Share(stream, decoder, size=(8, 8), augment=augment, seed=0, batch=32, rank=0, ranks=1,
              device=torch.device("cpu"))
print(len(next(Loader(share, prefetch=2))))
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, check=False, timeout=200
    )
    assert (done.returncode, done.stdout.strip()) == (0, "32"), done.stderr
    assert not done.stderr


TINY_RECIPE = ("digits8", "train.batch=12", "data.decoder=pillow")


def test_order_lists_what_each_rank_of_each_batch_reads():
    words = ("--from", "1488", "--batches", "3", "--json")
    alone, four = (
        json.loads(run("order", *TINY_RECIPE, *words, "--ranks", ranks)) for ranks in ("1", "4")
    )
    assert [one["position"] for one in four] == [1488, 1500, 1512]
    assert [[len(keys) for keys in one["ranks"]] for one in four] == [[3] * 4] * 3
    for whole, shared in zip(alone, four, strict=True):
        assert whole["ranks"] == [list(chain(*shared["ranks"]))]
    made = plan(load_recipe("digits8", list(TINY_RECIPE[1:])), 4)
    for rank in range(4):
        with open_loader(made, rank, 4, torch.device("cpu")) as batches:
            batches.load_state_dict(made.stream.state_at(1488))
            for one in four:
                assert made.stream.keys(next(batches).position) == one["ranks"][rank]


def test_order_of_a_mixture_names_the_set_and_the_table_shows_every_rank():
    mixture = "[{url: 'embedded:digits8/train-*.tar', weight: 5}, {url: 'embedded:digits8/heldout-*.tar'}]"
    words = ("order", *TINY_RECIPE, f"data.train={mixture}", "data.keep={cls: [1]}", "--ranks", "2")
    (batch,) = json.loads(run(*words, "--json"))
    keys = list(chain(*batch["ranks"]))
    assert sorted(key.partition(":")[0] for key in keys) == ["0"] * 10 + ["1"] * 2
    table = run(*words)
    assert all(key in table for key in keys)


def test_order_refuses_more_than_memory_may_hold():
    with pytest.raises(UserError, match=r"--batches 100000000000 .* at most 1,000,000 are listed"):
        run("order", *TINY_RECIPE, "--batches", str(10**11))


def test_verify_reports_a_damaged_description_once(tmp_path):
    for shard in "ab":
        write_tar(tmp_path / f"{shard}.tar", sample(shard, 1))
    (tmp_path / "dataset.json").write_text("[]")
    report = json.loads(run("verify", f"{tmp_path}/*.tar", "--json", code=1))
    (problem,) = report["problems"]
    assert "dataset.json: is not a description of shards (1 error, the first: " in problem
    assert (report["shards"], report["samples"]) == (2, 0)


def test_control_characters_of_keys_do_not_reach_the_terminal(tmp_path):
    write_tar(tmp_path / "a.tar", sample("a\x1b[31mb\n", 1, "cat"))
    report = json.loads(run("verify", f"{tmp_path}/a.tar", "--json", code=1))
    (problem,) = report["problems"]
    assert r"a.tar: sample a\x1b[31mb\n: label b'cat' is not an integer" in problem
    write_tar(tmp_path / "a.tar", sample("a\x1b[31mb\n", 1))
    assert Samples(str(tmp_path / "a.tar"), classes=1).index(str(tmp_path / "a.tar")).keys == [
        "a\x1b[31mb\n"
    ]
    table = run("order", *TINY_RECIPE, f"data.train={tmp_path}/a.tar")
    assert "\x1b" not in table
    assert r"a\x1b[31mb\n" in table


def test_order_refuses_ranks_that_training_would_refuse():
    with pytest.raises(UserError, match=r"train\.batch = 12 does not divide over --ranks 5"):
        run("order", *TINY_RECIPE, "--ranks", "5")
