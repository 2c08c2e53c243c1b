"""`flowmill checkpoint inspect` and `diff` tell what is in a checkpoint and how two differ."""

import json

import pytest
import torch
from typer.testing import CliRunner

from flows.errors import UserError
from launch.commands.checkpoint import app
from trainer.checkpoints.contents import checkpoint_in, differences, read_tensors
from trainer.checkpoints.manifest import read_manifest
from trainer.checkpoints.store import save

from .test_checkpoints import SHARD, flip_byte


def tensors():
    return {
        "model.w": torch.arange(6.0).reshape(2, 3),
        "model.b": torch.tensor([1.0, float("nan")]),
        "count": torch.tensor(3),
    }


def saved(folder, step=1, **changes):
    state = {"step": step, "loader": {"position": 32 * step}, "layout": "deepspeed zero-2"}
    return save(folder, step=step, tensors=tensors() | changes, state=state, keep=9)


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_inspect_shows_tensors_files_and_where_the_run_stood(tmp_path):
    path = saved(tmp_path / "run" / "checkpoints", 7)
    shown = run("inspect", tmp_path / "run")
    assert shown.exit_code == 0
    for part in (
        "step       7",
        "position   224",
        "model.w",
        "F32",
        "2 x 3",
        "1 number",
        SHARD,
        "deepspeed zero-2",
    ):
        assert part in shown.output, part
    record = json.loads(run("inspect", path, "--json").output)
    manifest = read_manifest(path)
    assert record["files"][SHARD]["sha256"] == manifest.files[SHARD].sha256
    assert record["tensors"]["model.w"]["shape"] == [2, 3]
    assert record["state"]["loader"]["position"] == 224


def test_a_step_of_a_run_may_be_named(tmp_path):
    saved(tmp_path / "checkpoints", 7)
    saved(tmp_path / "checkpoints", 9)
    assert checkpoint_in(tmp_path).name == "step-00000009"
    assert checkpoint_in(tmp_path, 7).name == "step-00000007"
    with pytest.raises(UserError, match="no checkpoint of step 8; there is 7, 9"):
        checkpoint_in(tmp_path, 8)
    with pytest.raises(UserError, match="no such folder; name a run folder"):
        checkpoint_in(tmp_path / "elsewhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="has no checkpoints; name a run folder"):
        checkpoint_in(tmp_path / "empty")


def test_the_same_tensors_do_not_differ(tmp_path):
    one, other = saved(tmp_path / "a"), saved(tmp_path / "b", 2)
    assert list(differences(one, other)) == []
    told = run("diff", one, other)
    assert told.exit_code == 0
    assert "hold the same tensors" in told.output


def test_every_kind_of_difference_is_told(tmp_path):
    one = saved(tmp_path / "a", more=torch.ones(1))
    w = tensors()["model.w"]
    w[1, 2] += 0.5
    other = saved(
        tmp_path / "b", **{"model.w": w, "count": torch.tensor([3]), "new": torch.ones(1)}
    )
    found = {difference.name: difference for difference in differences(one, other)}
    assert found.keys() == {"model.w", "count", "more", "new"}
    assert found["model.w"].largest == 0.5
    assert found["model.w"].relative == pytest.approx(0.5 / 55**0.5)
    assert found["count"].what == "I64 [] and I64 [1]"
    assert (found["more"].what, found["new"].what) == ("in the first alone", "in the second alone")
    told = run("diff", one, other)
    assert told.exit_code == 1
    assert "other values" in told.output
    record = json.loads(run("diff", one, other, "--json").output)
    assert [line["name"] for line in record] == ["count", "model.w", "more", "new"]


def test_a_damaged_file_is_refused_by_name(tmp_path):
    path = saved(tmp_path)
    flip_byte(path / SHARD)
    for refused in (run("diff", path, path), run("diff", saved(tmp_path / "whole"), path)):
        assert f"{SHARD} does not match its checksum, so that" in str(refused.exception)
    flip_byte(path / SHARD)
    flip_byte(path / SHARD, at=20)
    with pytest.raises(UserError, match=SHARD):
        read_tensors(path, {"model.w": "w"})
    (path / SHARD).write_bytes(b"short")
    with pytest.raises(UserError, match=f"{SHARD} has 5 bytes instead of"):
        list(differences(path, path))
    assert f"{SHARD} has 5 bytes" in str(run("inspect", path).exception)
