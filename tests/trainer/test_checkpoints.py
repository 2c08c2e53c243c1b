"""A checkpoint is whole or absent, for one process: damage is named, nothing is mixed or lost."""

import json
import logging
import multiprocessing
import os
import random
import re
import signal
import time

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from flows.errors import UserError
from launch.commands.checkpoint import app
from trainer.checkpoints.manifest import MANIFEST, read_manifest
from trainer.checkpoints.store import latest_whole, list_checkpoints, load, save

SHARD = "shard-00000.safetensors"


def tensors(fill=1.0):
    return {
        "model.w": torch.full((5, 3), fill),
        "model.b": torch.arange(4, dtype=torch.float32) * fill,
        "ema.0.999.w": torch.full((5, 3), -fill),
        "optimizer.w.step": torch.tensor(fill),
        "count": torch.arange(3),
    }


def saved(folder, *steps, keep=10, refused=()):
    for step in steps:
        values, state = tensors(float(step)), {"position": step}
        save(folder, step=step, tensors=values, state=state, keep=keep, refused=refused)
    return folder


def steps(folder):
    return [checkpoint.step for checkpoint in list_checkpoints(folder)]


def zeros():
    return {name: torch.zeros_like(tensor) for name, tensor in tensors().items()}


def flip_byte(path, at=-1):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_every_bit_comes_back_in_place(tmp_path):
    odd = torch.tensor([float("nan"), -0.0, float("inf"), 1e-45])
    values = {
        "odd": odd,
        "half": odd.bfloat16(),
        "flags": torch.tensor([True, False]),
        "large": torch.tensor(2**62),
        "none": torch.zeros(0, 3),
        "strided": torch.arange(12.0).view(3, 4).T,
    }
    state = {"loader": {"position": 2**60}, "losses": [0.1, 1e-300], "name": "ä"}
    path = save(tmp_path / "new", step=7, tensors=values, state=state, keep=1)
    targets = {name: torch.ones_like(value) for name, value in values.items()}
    places = {name: target.data_ptr() for name, target in targets.items()}
    assert load(path, targets) == state
    for name, value in values.items():
        bits = value.contiguous().reshape(-1).view(torch.uint8)
        assert torch.equal(targets[name].contiguous().reshape(-1).view(torch.uint8), bits), name
        assert targets[name].data_ptr() == places[name]
    assert read_manifest(path).layout == "1 rank"


def test_files_are_plain_safetensors_and_json(tmp_path):
    saved(tmp_path, 3)
    path = latest_whole(tmp_path)
    assert sorted(file.name for file in path.iterdir()) == [MANIFEST, SHARD]
    plain = load_file(path / SHARD)
    assert all(torch.equal(plain[name], value) for name, value in tensors(3.0).items())


def truncate(path):
    os.truncate(path / SHARD, (path / SHARD).stat().st_size - 1)


def edit_manifest(path):
    body = json.loads((path / MANIFEST).read_text())
    body["state"]["position"] = 99
    (path / MANIFEST).write_text(json.dumps(body))


DAMAGES = {
    "flipped": (lambda path: flip_byte(path / SHARD), f"{SHARD} does not match its checksum"),
    "truncated": (truncate, rf"{SHARD} has \d+ bytes instead of \d+"),
    "missing": (lambda path: (path / SHARD).unlink(), f"{SHARD} is missing"),
    "edited": (edit_manifest, f"{MANIFEST}: does not match its own checksum"),
    "cut": (lambda path: os.truncate(path / MANIFEST, 100), f"{MANIFEST}: not valid JSON"),
    "gone": (lambda path: (path / MANIFEST).unlink(), f"{MANIFEST}: missing"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_checkpoint_is_refused_by_name_and_the_one_before_used(tmp_path, caplog, kind):
    damage, sentence = DAMAGES[kind]
    saved(tmp_path, 1, 2)
    damage(tmp_path / "step-00000002")
    with caplog.at_level(logging.WARNING):
        path = latest_whole(tmp_path)
    assert path == tmp_path / "step-00000001"
    assert "step-00000002" in caplog.text
    targets = zeros()
    assert load(path, targets) == {"position": 1}
    assert all(torch.equal(targets[name], value) for name, value in tensors(1.0).items())
    whole, damaged = list_checkpoints(tmp_path, checksums=True)
    assert (whole.step, whole.damage, damaged.step) == (1, None, 2)
    assert re.search(sentence, damaged.damage)
    damage(tmp_path / "step-00000001")
    with pytest.raises(UserError, match=f"none of the 2 checkpoints is whole .*{sentence}"):
        latest_whole(tmp_path)


def test_no_byte_of_a_manifest_can_change_unnoticed(tmp_path):
    path = tmp_path / "step-00000001"
    saved(tmp_path, 1)
    length = (path / MANIFEST).stat().st_size
    for at in random.Random(0).sample(range(length), 200):
        flip_byte(path / MANIFEST, at)
        with pytest.raises(UserError, match=MANIFEST):
            read_manifest(path)
        flip_byte(path / MANIFEST, at)
    read_manifest(path)


def test_nothing_yet_is_none(tmp_path):
    assert latest_whole(tmp_path / "absent") is None
    assert list_checkpoints(tmp_path) == []


def test_the_newest_whole_ones_are_kept(tmp_path):
    assert steps(saved(tmp_path, 1, 2, 3, 4, keep=2)) == [3, 4]
    (tmp_path / "step-00000004" / SHARD).unlink()
    assert steps(saved(tmp_path, 5, keep=2)) == [3, 4, 5]  # 4 is not whole and saves nobody
    assert steps(saved(tmp_path, 6, keep=2)) == [5, 6]
    with pytest.raises(ValueError, match="keep = 0"):
        saved(tmp_path, 7, keep=0)


def test_resuming_before_a_damaged_newest_one_keeps_what_is_written_next(tmp_path):
    saved(tmp_path, 1, 5, keep=1)
    flip_byte(tmp_path / "step-00000005" / SHARD)
    assert steps(saved(tmp_path, 3, keep=1)) == [3, 5]
    assert latest_whole(tmp_path) == tmp_path / "step-00000003"
    assert steps(saved(tmp_path, 5, keep=1)) == [5]
    assert latest_whole(tmp_path) == tmp_path / "step-00000005"


def test_what_was_refused_on_resuming_is_not_kept_in_the_place_of_a_whole_one(tmp_path):
    saved(tmp_path, 2, 4, keep=2)
    flip_byte(tmp_path / "step-00000004" / SHARD)
    assert latest_whole(tmp_path) == tmp_path / "step-00000002"
    assert steps(saved(tmp_path, 5, keep=2, refused={4})) == [2, 4, 5]
    assert steps(saved(tmp_path, 6, keep=2, refused={4})) == [5, 6]


def test_saving_a_step_again_replaces_it(tmp_path):
    saved(tmp_path, 1, 2)
    save(tmp_path, step=2, tensors=tensors(20.0), state={"position": 20}, keep=2)
    targets = zeros()
    assert load(latest_whole(tmp_path), targets) == {"position": 20}
    assert torch.equal(targets["model.w"], tensors(20.0)["model.w"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]


def test_a_step_killed_while_it_is_replaced_is_still_there(tmp_path):
    """Between the two renames the old one stands aside, and is listed."""
    saved(tmp_path, 1)
    (tmp_path / "step-00000001").rename(tmp_path / "step-00000001.replaced")
    assert load(latest_whole(tmp_path), zeros()) == {"position": 1}
    saved(tmp_path, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_leftovers_are_never_listed_and_swept_away_by_the_next_save(tmp_path):
    saved(tmp_path, 1)
    for name in (".writing-00000002", ".deleting-step-00000000"):
        (tmp_path / "step-00000001").rename(tmp_path / name)
        assert list_checkpoints(tmp_path) == []
        saved(tmp_path, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def changed(**changes):
    return {**zeros(), **changes}


REFUSALS = {
    "shape": (
        lambda: changed(**{"model.w": torch.zeros(5, 4)}),
        r"tensor model\.w is F32 \[5, 3\] and the model wants F32 \[5, 4\]",
    ),
    "dtype": (
        lambda: changed(**{"model.w": torch.zeros(5, 3).bfloat16()}),
        r"tensor model\.w is F32 \[5, 3\] and the model wants BF16 \[5, 3\]",
    ),
    "missing": (lambda: changed(extra=torch.zeros(1)), r"tensor extra is missing"),
    "unexpected": (
        lambda: {name: t for name, t in zeros().items() if name != "model.b"},
        r"tensor model\.b is in the checkpoint and not in this model \(1 such\)",
    ),
}


@pytest.mark.parametrize("kind", REFUSALS)
def test_other_tensors_are_refused_before_any_is_written(tmp_path, kind):
    make, sentence = REFUSALS[kind]
    saved(tmp_path, 1)
    targets = make()
    with pytest.raises(UserError, match=sentence):
        load(tmp_path / "step-00000001", targets)
    assert all(not target.any() for target in targets.values())


def test_a_prefix_loads_a_part_and_is_as_strict(tmp_path):
    path = saved(tmp_path, 4) / "step-00000004"
    part = {"ema.0.999.w": torch.zeros(5, 3)}
    assert load(path, part, prefix="ema.0.999.") == {"position": 4}
    assert torch.equal(part["ema.0.999.w"], torch.full((5, 3), -4.0))
    with pytest.raises(UserError, match=r"ema\.0\.999\.w is in the checkpoint"):
        load(path, {}, prefix="ema.0.999.")
    with pytest.raises(UserError, match=r"model\.w is missing"):
        load(path, {**part, "model.w": torch.zeros(5, 3)}, prefix="ema.")


def test_a_checkpoint_that_is_none_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"manifest\.json: missing"):
        load(tmp_path, zeros())


def save_for_ever(folder):
    """Each step saved twice, each tensor of step s filled with s."""
    step = 1
    while True:
        values = {f"t{i}": torch.full((1 << 18,), float(step)) for i in range(4)}
        for _ in range(2):
            save(folder, step=step, tensors=values, state={"step": step}, keep=2)
        step += 1


def test_killed_at_any_moment_the_folder_lists_whole_checkpoints_alone(tmp_path):
    """Real processes, killed while they write: what is listed is whole and of one save."""
    context = multiprocessing.get_context("fork")
    generator = random.Random(1)
    halfway = 0
    for kill in range(12):
        folder = tmp_path / str(kill)
        process = context.Process(target=save_for_ever, args=(folder,), daemon=True)
        process.start()
        deadline = time.monotonic() + 30
        while not (folder / "step-00000001").is_dir() and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(generator.uniform(0.0, 0.15))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        halfway += any(folder.glob(".writing-*"))
        listed = list_checkpoints(folder, checksums=True)
        assert 1 <= len(listed) <= 3
        assert all(checkpoint.damage is None for checkpoint in listed)
        targets = {f"t{i}": torch.zeros(1 << 18) for i in range(4)}
        step = load(latest_whole(folder), targets)["step"]
        assert step == listed[-1].step
        assert all(bool((target == step).all()) for target in targets.values())
        # A resumed run saves into the same folder.
        save(folder, step=step, tensors=targets, state={"step": step}, keep=1)
        assert [path.name for path in folder.iterdir()] == [f"step-{step:08d}"]
    assert halfway >= 3, "hardly any kill fell into a write: the test has lost its power"


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_command_line_lists_and_verifies(tmp_path):
    run = tmp_path / "run"
    saved(run / "checkpoints", 1, 2)
    listed = invoke("list", run)
    assert listed.exit_code == 0
    assert listed.output.count("whole") == 2
    flip_byte(run / "checkpoints" / "step-00000002" / SHARD)
    assert invoke("list", run).exit_code == 0  # contents are not read
    verified = invoke("verify", run, "--json")
    assert verified.exit_code == 1
    one, two = json.loads(verified.output)
    assert (one["step"], one["whole"], one["damage"]) == (1, True, None)
    assert (two["step"], two["whole"]) == (2, False)
    assert two["damage"].endswith(f"{SHARD} does not match its checksum")
    assert invoke("verify", run / "checkpoints" / "step-00000001").exit_code == 0
    assert invoke("verify", run / "checkpoints" / "step-00000002").exit_code == 1
    assert isinstance(invoke("list", tmp_path / "nowhere").exception, UserError)
    assert isinstance(invoke("verify", run / "step-00000009").exception, UserError)


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(UserError, match=r"step 2 was not written: rank 0 failed on .*file"):
        saved(blocked, 2)
