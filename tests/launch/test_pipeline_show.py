"""`flowmill pipeline show`: what is printed and drawn is the schedule; bad input is refused."""

import json
from pathlib import Path

import pytest
from PIL import Image

from parallel.pipeline.catalog import NAMES
from tests.launch.conftest import Flowmill


@pytest.mark.parametrize("name", NAMES)
def test_every_schedule_is_shown(flowmill: Flowmill, name: str) -> None:
    ended = flowmill("pipeline", "show", "--schedule", name, "--stages", "4", "--json")
    found = json.loads(ended.out)
    assert (ended.code, ended.err, found["schedule"]) == (0, "", name)
    assert [len(found["ranks"]), found["microbatches"]] == [4, 8]
    ends = [action["end"] for rank in found["ranks"] for action in rank["actions"]]
    assert max(ends) == found["makespan"]
    assert 0 < found["bubble"] < 0.3


def test_a_table_and_pictures(flowmill: Flowmill, tmp_path: Path) -> None:
    asked = ("--schedule", "bitpipe", "--stages", "4", "--microbatches", "4")
    png, svg = tmp_path / "a.png", tmp_path / "a.svg"
    ended = flowmill("pipeline", "show", *asked, "--png", str(png), "--svg", str(svg))
    assert ended.code == 0
    assert "14.3% idle" in ended.out
    assert "0, 7, 3^, 4^" in ended.out
    with Image.open(png) as image:
        colours = {colour for _, colour in image.convert("RGB").getcolors(10**6) or []}
    # Forward, backward, idle and an addition of gradients.
    assert {(61, 127, 179), (63, 143, 99), (236, 239, 242), (192, 57, 43)} <= colours
    assert "bitpipe: 4 ranks, 8 stages, 4 microbatches, " in ended.out
    one = flowmill("pipeline", "show", "--schedule", "gpipe", "--microbatches", "1")
    assert "gpipe: 4 ranks, 4 stages, 1 microbatch, " in one.out
    first = svg.read_bytes()
    flowmill("pipeline", "show", *asked, "--svg", str(svg))
    assert svg.read_bytes() == first
    assert b"</svg>" in first


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (("--schedule", "fast"), "--schedule = fast is no schedule"),
        (("--stages", "5"), "--stages = 5 is odd"),
        (("--stages", "5000"), "--stages 5000 and --microbatches 8 are too many to show"),
        (("--forward", "-1"), "--forward = -1.0 is no cost"),
        (("--forward", "nan"), "--forward = nan is no cost"),
        (("--forward", "1e308"), "use a number from 0 to 1,000,000,000,000."),
        (("--input", "0", "--weight", "0"), "--input or --weight, must be above 0"),
        (("--png", "a.jpg"), "--png a.jpg is not the name of a .png file"),
        (("--svg", "a.png"), "--svg a.png is not the name of a .svg file"),
        (("--png", "nowhere/a.png"), "there is no folder nowhere"),
    ],
)
def test_bad_input_is_refused(flowmill: Flowmill, given: tuple[str, ...], sentence: str) -> None:
    ended = flowmill("pipeline", "show", *given)
    assert (ended.code, ended.out) == (2, "")
    assert sentence in ended.err


def test_a_cut_within_flow_blocks_and_at_their_borders(flowmill: Flowmill) -> None:
    asked = ("pipeline", "cut", "starflow_emoji", "model.layers=[1,1,1,28]")
    ended = flowmill(*asked, "--json")
    found = json.loads(ended.out)
    assert ended.code == 0
    assert found["between layers"]["balance"] >= 0.9
    assert found["at the borders of flow blocks"]["balance"] <= 0.3
    shares = [rank["share"] for rank in found["between layers"]["ranks"]]
    assert sum(shares) == pytest.approx(1)
    table = flowmill(*asked, "--schedule", "bitpipe").out
    assert "Cut between layers: 9" in table
    assert "too few" in table  # eight stages, four blocks


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (("jet_digits",), "model.family = jet is not cut into stages"),
        (("digits", "--stages", "64"), "too few for 64 stages"),
        (  # no order is looked for, which would take minutes
            ("dit_moe_digits", "--stages", "200", "--schedule", "bitpipe"),
            "the model has 6 places to cut at, too few for 400 stages",
        ),
        (("digits", "model.align_depth=1"), "model.align_depth"),
        (("digits", "--schedule", "bitpipe", "--stages", "3"), "--stages = 3 is odd"),
        (("digits", "--batch", "64"), "--batch 64 says how many samples are timed, and nothing is"),
        (
            ("digits", "--stages", "2", "parallel.pp=4", "parallel.schedule=zbv"),
            "parallel.pp is not looked at here: --stages, --schedule and --chunks say how the model",
        ),
    ],
)
def test_what_cannot_be_cut_is_refused(
    flowmill: Flowmill, given: tuple[str, ...], sentence: str
) -> None:
    ended = flowmill("pipeline", "cut", *given)
    assert (ended.code, ended.out) == (2, "")
    assert sentence in ended.err
