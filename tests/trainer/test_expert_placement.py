"""A real run of experts is traced, its experts are placed, and it stays the same function and goes on."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from flows.errors import UserError
from launch.cli import main
from parallel.placement.problem import contiguous
from tests.trainer import families, runs
from trainer import metrics_log
from trainer.assembly import plan
from trainer.engines import fewest_ranks, native_layout
from trainer.expert_placement import (
    check_write,
    layers_of_experts,
    orders,
    place_run,
    write_placed,
)
from trainer.recipe import override_recipe, write_recipe
from trainer.run_folder import open_run
from trainer.trained import load_trained

LAYERS, EXPERTS, RANKS, EVERY, STEPS = 3, 8, 2, 2, 8
HALF = STEPS // 2 - 1
CHANGES = [
    f"model.experts={EXPERTS}", f"model.depth={LAYERS}", "model.recurrent=0", "model.mask_outputs=0",
    f"train.steps={STEPS}", f"checkpoint.every={STEPS}", "train.ema=[0.5, 0.9]",
    "sample.every=0", f"train.trace_experts={EVERY}",
]  # fmt: skip
# gelu experts have biases; sigmoid gates no common sum.
KINDS = {"swiglu": [], "gelu": ["model.expert=gelu", "model.gate=sigmoid"]}


def recipe(folder: Path, *changes: str):
    return override_recipe(families.recipe("dit_moe", folder), [*CHANGES, *changes])


@pytest.fixture(scope="module")
def traced(tmp_path_factory) -> dict[str, Path]:
    found = {}
    for name, changes in KINDS.items():
        found[name] = tmp_path_factory.mktemp("traced") / name
        assert runs.train_here(recipe(found[name], *changes)).finished
    return found


def placing(folder: Path, ranks: int | None = RANKS, **changes):
    chosen = {"method": "auto", "limit": 1.05, "since": 0, "seconds": 30.0} | changes
    return place_run(folder, ranks=ranks, **chosen)


@pytest.fixture(scope="module")
def placings(traced):
    return {kind: placing(folder) for kind, folder in traced.items()}


def outputs(folder: Path, weights_of_average: bool) -> torch.Tensor:
    run, made = open_run(str(folder))
    if not weights_of_average:
        made = override_recipe(made, ["train.ema=[]"])
    network = load_trained(run, made, torch.device("cpu"), batch=16).model.eval()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, 1, 8, 8, generator=generator)
    with torch.no_grad():
        return network(x, torch.rand(16, generator=generator), torch.arange(16) % 11)


def test_the_trace_counts_the_tokens_of_each_traced_step(traced) -> None:
    lines = metrics_log.read(traced["swiglu"] / "routing.jsonl")
    assert [line["step"] for line in lines] == list(range(EVERY, STEPS + 1, EVERY))
    shares = {line["step"]: line["experts"]["load"] for line in runs.lines(traced["swiglu"])}
    assert "routing" not in runs.lines(traced["swiglu"])[1]
    tokens, chosen = families.BATCH * 4, 2
    for line in lines:
        load, flow = np.array(line["load"]), np.array(line["flow"])
        assert load.shape == (LAYERS, EXPERTS)
        assert flow.shape == (LAYERS - 1, EXPERTS, EXPERTS)
        assert (load.sum(1) == tokens * chosen).all()
        assert (flow.sum(2) == chosen * load[:-1]).all()
        assert (flow.sum(1) == chosen * load[1:]).all()
        for layer, own in enumerate(load):
            assert (own / own.sum()).tolist() == pytest.approx(
                shares[line["step"]][f"layer_{layer}"]
            )


def test_a_run_that_is_not_traced_trains_the_same_and_writes_none(traced, tmp_path) -> None:
    runs.train_here(recipe(tmp_path / "run", "train.trace_experts=0"))
    assert not (tmp_path / "run" / "routing.jsonl").exists()
    assert runs.different(runs.tensors(tmp_path / "run"), runs.tensors(traced["swiglu"])) == []


def test_the_trace_goes_on_with_the_run(traced, tmp_path) -> None:
    half = recipe(tmp_path / "run", f"checkpoint.every={HALF}", "checkpoint.keep=3")
    runs.train_here(half)
    for step in (STEPS, 2 * HALF):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step-{step:08d}")
    assert runs.train_here(half).finished
    trace = tmp_path / "run" / "routing.jsonl"
    assert metrics_log.read(trace) == metrics_log.read(traced["swiglu"] / "routing.jsonl")


@pytest.mark.parametrize("kind", KINDS)
def test_the_placed_run_is_the_same_function_bit_for_bit(traced, placings, tmp_path, kind) -> None:
    found = placings[kind]
    assert not np.array_equal(found.placed.places, contiguous(LAYERS, EXPERTS, RANKS))
    write_placed(found, tmp_path / "run")
    for average in (True, False):
        before = outputs(traced[kind], average)
        assert before.std() > 1e-4
        assert torch.equal(outputs(tmp_path / "run", average), before)
    order = orders(found.placed.places)
    old, new = runs.tensors(traced[kind]), runs.tensors(tmp_path / "run")
    assert old.keys() == new.keys()
    moved = {name for name in old if not torch.equal(old[name], new[name])}
    for name in moved:
        layer = int(name.split("blocks.")[1].split(".")[0])
        assert torch.equal(old[name][torch.from_numpy(order[layer])], new[name]), name
    kinds = {name.split(".blocks.")[0] for name in moved}
    assert kinds == {"model", "optimizer", "ema.0.5", "ema.0.9", "buffer"}
    parts = {name.split(".mixture.")[1] for name in moved}
    biases = {"experts.up_bias", "experts.down_bias"} if kind == "gelu" else set()
    weights = {"experts.up", "experts.down", "router.gate.weight", *biases}
    moments = {f"{name}.{slot}" for name in weights for slot in ("exp_avg", "exp_avg_sq")}
    assert parts == weights | moments | {"router.bias", "router.share"}


def test_the_placed_run_goes_on_as_the_other_would_have(
    traced, placings, tmp_path, capsys, monkeypatch
) -> None:
    """But for the order in which numbers are added."""
    more = f"train.steps={STEPS + 4}"
    shutil.copytree(traced["swiglu"], tmp_path / "old")
    assert runs.train_here(recipe(tmp_path / "old", more)).finished
    found = placings["swiglu"]
    write_placed(found, tmp_path / "new")
    assert runs.train_here(recipe(tmp_path / "new", more)).finished
    old, new = runs.series(tmp_path / "old", "loss")[STEPS:], runs.series(tmp_path / "new", "loss")
    assert len(new) == 4
    placed = runs.manifests(tmp_path / "new")[STEPS + 4].state["placed"]
    assert (placed["run"], placed["ranks"]) == (str(traced["swiglu"]), RANKS)
    assert placed["order"] == orders(found.placed.places).tolist()
    monkeypatch.setattr("sys.argv", ["flowmill", "checkpoint", "inspect", str(tmp_path / "new")])
    with pytest.raises(SystemExit):
        main()
    assert f"placed     experts over 2 ranks, from {traced['swiglu']}\n" in capsys.readouterr().out
    assert runs.relative(new, old) <= 1e-5
    order = orders(found.placed.places)
    ours = runs.lines(tmp_path / "new")[0]["experts"]["load"]
    theirs = runs.lines(tmp_path / "old")[STEPS]["experts"]["load"]
    for layer in range(LAYERS):
        expected = [theirs[f"layer_{layer}"][expert] for expert in order[layer]]
        assert ours[f"layer_{layer}"] == pytest.approx(expected)
    tables = [
        np.array(runs.manifests(tmp_path / name)[STEPS + 4].state["telemetry"]["experts"])
        for name in ("old", "new")
    ]
    for layer in range(LAYERS):
        assert np.allclose(tables[1][layer], tables[0][layer][:, order[layer]])


def test_costs_are_those_of_the_trace(placings) -> None:
    found = placings["swiglu"]
    load = np.zeros((LAYERS, RANKS))
    for layer, own in enumerate(found.trace.load):
        np.add.at(load[layer], found.placed.places[layer], own)
    assert found.after.imbalance == pytest.approx((load.max(1) / load.mean(1)).tolist())
    assert found.after.hops < found.before.hops
    assert found.after.worst < found.before.worst
    assert found.pairs == found.trace.flow.sum()


def test_every_row_of_an_expert_is_known(traced) -> None:
    run, made = open_run(str(traced["gelu"]))
    shapes = {name: tuple(held.shape) for name, held in runs.tensors(run.root).items()}
    rows = layers_of_experts(made, shapes)
    for name, shape in shapes.items():
        expected = ".mixture." in name and ".shared." not in name and shape[:1] == (EXPERTS,)
        assert (name in rows) == expected, name


def test_the_command_prints_costs_and_a_record(traced, tmp_path, capsys, monkeypatch) -> None:
    def said(*more: str) -> str:
        command = ["experts", "place", str(traced["swiglu"]), *more]
        monkeypatch.setattr("sys.argv", ["flowmill", *command])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code in (0, None)
        return capsys.readouterr().out

    shown = said("--ranks", "2", "--method", "alternating")
    assert "hops between ranks" in shown
    assert "alternating assignment (as asked; the program has 304 variables)" in shown
    record = json.loads(said("--ranks", "2", "--json", "--write", str(tmp_path / "run")))
    assert record["after"]["hops"] < record["before"]["hops"]
    assert record["method"] == "exact"
    assert record["proven"]
    assert np.array(record["places"]).shape == (LAYERS, EXPERTS)
    assert record["written"] == str(tmp_path / "run")
    assert "recipe.yaml" in {path.name for path in (tmp_path / "run").iterdir()}
    _, made = open_run(str(tmp_path / "run"))
    assert plan(made, 2).layout.ep == 2
    shown = said("--ranks", "4", "--method", "alternating", "--write", str(tmp_path / "four"))
    assert f"flowmill train {tmp_path / 'four' / 'recipe.yaml'} --ranks 4 goes on" in shown
    assert plan(open_run(str(tmp_path / "four"))[1], 4).layout.ep == 4


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"ranks": None}, r"trained with parallel\.ep = 1, .* as in --ranks 2"),
        ({"ranks": 3}, r"--ranks 3: 8 experts a layer lie on 2, 4 or 8 ranks"),
        ({"limit": 0.0}, r"--limit 0 is not 1 or more"),
        ({"since": STEPS}, r"routing\.jsonl traces no step after step 8; train with"),
    ],
)
def test_what_cannot_be_placed_is_refused(traced, changes, sentence) -> None:
    with pytest.raises(UserError, match=sentence):
        placing(traced["swiglu"], **changes)


def test_runs_without_experts_or_trace_are_refused(traced, tmp_path) -> None:
    for name, changes, sentence in (
        ("dit", [], r"family dit, which has no experts to place"),
        ("dit_moe", [], r"routing\.jsonl traces no step; train with train\.trace_experts=10"),
    ):
        folder = tmp_path / name
        folder.mkdir()
        write_recipe(
            override_recipe(families.recipe(name, folder), changes), folder / "recipe.yaml"
        )
        with pytest.raises(UserError, match=sentence):
            placing(folder)
    with pytest.raises(UserError, match="is not a run folder"):
        placing(tmp_path)
    other = recipe(tmp_path / "dit_moe", "model.experts=4")
    write_recipe(other, tmp_path / "dit_moe" / "recipe.yaml")
    shutil.copyfile(traced["swiglu"] / "routing.jsonl", tmp_path / "dit_moe" / "routing.jsonl")
    with pytest.raises(UserError, match=r"`load` of step 2 is not 3 x 4 counts"):
        placing(tmp_path / "dit_moe")


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("load", True, "`load` of step 4 is not 3 x 8 counts"),
        ("load", 1.5, "`load` of step 4 is not 3 x 8 counts"),
        ("load", "7", "`load` of step 4 is not 3 x 8 counts"),
        ("load", -1, "`load` of step 4 is not 3 x 8 counts"),
        ("load", 2**53 - 1, "`load` of step 4 is not 3 x 8 counts"),
        ("load", 10**30, "`load` of step 4 is not 3 x 8 counts"),
        ("load", [1], "`load` of step 4 is not 3 x 8 counts"),
        ("step", 2, "step 2 is there already, in line 1"),
        ("load", 0, "step 4 has [\\d,]+ slots in layer 1 and [\\d,]+ in layer 0"),
        (
            "flow",
            999,
            "step 4 has [\\d,]+ pairs from expert 0 of layer 0 in its `flow`, where its `load`",
        ),
        ("step", -4, "`step` is not a whole number from 0 on"),
        ("step", 4.5, "`step` is not a whole number"),
        ("step", "Infinity", "is not a step's record"),
    ],
)
def test_a_damaged_trace_is_refused(traced, tmp_path, key, value, sentence) -> None:
    shutil.copytree(traced["swiglu"], tmp_path / "run")
    trace = tmp_path / "run" / "routing.jsonl"
    lines = [json.loads(line) for line in trace.read_text().splitlines()]
    if key == "step":
        lines[1]["step"] = value
    elif key == "flow":
        lines[1]["flow"][0][0] = [value] * EXPERTS
    else:
        lines[1][key][0][3] = value
    trace.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    with pytest.raises(UserError, match=rf"routing\.jsonl, line 2:? {sentence}"):
        placing(tmp_path / "run")


def test_a_trace_without_tokens_is_refused(traced, tmp_path) -> None:
    shutil.copytree(traced["swiglu"], tmp_path / "run")
    load, flow = np.zeros((LAYERS, EXPERTS), int), np.zeros((LAYERS - 1, EXPERTS, EXPERTS), int)
    line = {"step": 2, "load": load.tolist(), "flow": flow.tolist()}
    (tmp_path / "run" / "routing.jsonl").write_text(f"{json.dumps(line)}\n")
    with pytest.raises(UserError, match="counts no token"):
        placing(tmp_path / "run")


def test_a_trace_that_is_a_folder_is_refused(traced, tmp_path) -> None:
    shutil.copytree(traced["swiglu"], tmp_path / "run")
    (tmp_path / "run" / "routing.jsonl").unlink()
    (tmp_path / "run" / "routing.jsonl").mkdir()
    with pytest.raises(UserError, match=r"routing\.jsonl is a folder"):
        placing(tmp_path / "run")


def test_where_experts_choose_tokens_have_any_number_of_them(tmp_path) -> None:
    chosen = recipe(tmp_path / "run", "model.chooser=experts", "model.bias_rate=0", "train.steps=4")
    assert runs.train_here(chosen).finished
    assert placing(tmp_path / "run").pairs > 0


def test_what_cannot_be_written_is_refused_before_the_work(traced, tmp_path, capsys, monkeypatch):
    shutil.copytree(traced["swiglu"], tmp_path / "run")
    (tmp_path / "run" / "routing.jsonl").unlink()  # the work would refuse that

    for options, sentence in (
        (["--write", str(traced["gelu"])], "exists already"),
        (
            ["--write", str(tmp_path / "new"), "--step", "7"],
            "has no checkpoint of step 7; there is 8.",
        ),
        (["--step", "8"], "--step 8 says which checkpoint is rewritten"),
    ):
        monkeypatch.setattr(
            "sys.argv", ["flowmill", "experts", "place", str(tmp_path / "run"), *options]
        )
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2
        assert sentence in capsys.readouterr().err
        assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("changes", "ranks", "sentence"),
    [
        (
            ["train.batch=6"],
            4,
            r"new could not go on with experts on 4 ranks, by flowmill train --ranks 4 \(train\.batch = 6 "
            r"does not divide over 4 .* degrees\); choose other --ranks, or leave --write out\.$",
        ),
        (
            [
                "parallel.pp=2", "parallel.ep=2", "parallel.schedule=bitpipe", "train.batch=16",
                "train.microbatch=2", "model.depth=4",
            ],
            8,
            r"--ranks 16 \(train\.batch / train\.microbatch .* = 1 is odd, and bitpipe runs in two",
        ),
        (["train.compile=true"], 2, r"\(train\.compile = true compiles whole blocks"),
        (["parallel.engine=deepspeed"], 2, r"engine = deepspeed divides no experts, so that a .*=native\.$"),
        (["parallel.engine=accelerate"], 2, r"parallel\.engine = accelerate divides no experts"),
        ([], 3, r"^--ranks 3: 8 experts a layer lie on 2, 4 or 8 ranks"),
        ([], None, r"trained with parallel\.ep = 1, .* as in --ranks 2"),
    ],
)  # fmt: skip
def test_a_run_that_could_not_go_on_is_refused_before_the_work(
    traced, tmp_path, changes, ranks, sentence
) -> None:
    shutil.copytree(traced["swiglu"], tmp_path / "run")
    write_recipe(recipe(tmp_path / "run", *changes), tmp_path / "run" / "recipe.yaml")
    with pytest.raises(UserError, match=sentence):
        check_write(tmp_path / "run", tmp_path / "new", ranks=ranks, step=None)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "changes",
    [
        ["parallel.ep=2"],
        ["parallel.ep=4", "parallel.cp=2"],
        ["parallel.strategy=hsdp"],
        ["parallel.ep=2", "parallel.strategy=hsdp", "parallel.replicate=3", "parallel.tp=2"],
        ["parallel.pp=2", "parallel.shard=3"],
    ],
)
def test_the_fewest_ranks_are_enough(tmp_path, changes) -> None:
    section = recipe(tmp_path, *changes).parallel
    ranks = fewest_ranks(section)
    assert native_layout(section, ranks).world_size == ranks
    for fewer in range(1, ranks):
        with pytest.raises(UserError):
            native_layout(section, fewer)


def test_a_folder_that_holds_something_is_not_written(traced, placings) -> None:
    with pytest.raises(UserError, match="exists already"):
        write_placed(placings["swiglu"], traced["swiglu"])
