"""A malformed recipe or override ends in a sentence that names the key and what would be right."""

from pathlib import Path

import pytest

from tests.launch.conftest import TINY, Refused

RECIPE = """\
name: small
run:
  dir: runs/kept
data:
  train: embedded:digits8/train-{000000..000001}.tar
  image_size: 8
  channels: 1
  classes: 10
model:
  name: SiT-nano/2
train:
  steps: 4
  batch: 8
"""

# (what is wrong, text to replace, its replacement, what the sentence says)
WRONG_KEYS = [
    ("text for a number", "steps: 4", "steps: many", ("train.steps = 'many' must be a whole number",)),
    ("a fraction of a step", "steps: 4", "steps: 2.5", ("train.steps = 2.5 must be a whole number",)),
    ("negative", "steps: 4", "steps: -4", ("train.steps = -4 must be at least 0",)),
    ("nothing", "steps: 4", "steps:", ("train.steps is empty and must be a whole number",)),
    ("yes for a number", "steps: 4", "steps: yes", ("train.steps", "yes or no", "write a value")),
    ("NaN", "name: small", "name: small\noptimizer: {lr: .nan}",
     ("optimizer.lr = nan must be a finite",)),
    ("infinite", "name: small", "name: small\noptimizer: {lr: .inf}", ("optimizer.lr = inf must be a",)),
    ("a yes in a list", "batch: 8", "batch: 8\n  ema: [on]", ("train.ema", "yes or no")),
    ("list for a number", "batch: 8", "batch: [8]", ("train.batch = [8] must be a whole number",)),
    ("number for a list", "batch: 8", "batch: 8\n  ema: 0.9", ("train.ema = 0.9 must be a list",)),
    ("wrong in a list", "batch: 8", "batch: 8\n  ema: [2]",
     ("value 1 of train.ema = 2 must be below 1",)),
    ("short list", "name: small", "name: small\noptimizer: {betas: [0.9]}",
     ("value 2 of optimizer.betas is missing",)),
    ("long list", "name: small", "name: small\noptimizer: {betas: [0, 0, 0]}",
     ("optimizer.betas", "must have 2 values")),
    ("number for text", "name: small", "name: 3", ("name = 3 must be text; put it in quotes",)),
    ("empty text", "dir: runs/kept", "dir: ''", ("run.dir = '' must not be empty",)),
    ("word for yes or no", "batch: 8", "batch: 8\n  compile: maybe",
     ("train.compile = 'maybe' must be true or false",)),
    ("unknown choice", "batch: 8", "batch: 8\n  precision: fp64",
     ("train.precision = 'fp64' must be 'fp32' or 'bf16'",)),
    ("unknown key at the top", "name: small", "name: small\nsead: 3",
     ("sead is not a key", "did you mean seed?")),
    ("unknown key in a section", "batch: 8", "batch: 8\n  bach: 9",
     ("train.bach is not", "did you mean train.batch?")),
    ("unknown key two levels down", "name: small", "name: small\nobjective: {time: {kid: uniform}}",
     ("objective.time.kid is not", "did you mean objective.time.kind?")),
    ("key of another section", "batch: 8", "batch: 8\n  lr: 0.1",
     ("train.lr is not", "did you mean optimizer.lr?")),
    ("key like none", "batch: 8", "batch: 8\n  qqqq: 1",
     ("train.qqqq is not", "train has the keys steps, samples")),
    ("value for a section", "train:\n  steps: 4\n  batch: 8", "train: 5",
     ("train = 5 is a value", "train is a section", "train.steps")),
    ("section for a value", "steps: 4", "steps: {every: 4}",
     ("train.steps = {'every': 4} must be a whole number",)),
    ("empty section", "train:\n  steps: 4\n  batch: 8", "train:",
     ("train is empty", "is a section", "train.steps")),
    ("missing section", "train:\n  steps: 4\n  batch: 8", "",
     ("the section train is missing", "train.batch")),
    ("range from high to low", "classes: 10", "classes: 10\n  augment: {scale: [1, 0.5]}",
     ("data.augment.scale: the larger of its two numbers comes first; write the smaller one first",)),
    ("crop of nothing", "classes: 10", "classes: 10\n  augment: {scale: [0, 1]}",
     ("value 1 of data.augment.scale = 0 must be above 0",)),
    ("key of a section inside", "classes: 10", "classes: 10\n  flip: 0.5",
     ("data.flip is not a key", "did you mean data.augment.flip?")),
    ("missing key", "  classes: 10\n", "", ("data.classes is missing and has no default; give it",)),
    ("doubled key", "batch: 8", "batch: 8\n  batch: 9", ("line 14: batch is given twice; keep one",)),
    ("number for a key", "batch: 8", "batch: 8\n  1: 9", ("line 14: key 1 is not a word",)),
    ("tab", "  batch: 8", "\tbatch: 8", ("line 13 is not valid YAML", "indent with spaces")),
    ("bracket left open", "batch: 8", "batch: [8",
     ("is not valid YAML", "check its indentation and quotes")),
    ("YAML that runs code", "batch: 8", "batch: !!python/object/apply:os.getcwd []",
     ("line 13 is not valid YAML",)),
    ("nested without end", "batch: 8", f"batch: {'[' * 400}{']' * 400}", ("nested too deeply",)),
    ("number without end", "batch: 8", f"batch: {'9' * 5000}", ("cannot be read",)),
    ("beyond 64 bits", "name: small", f"name: small\nseed: {2**63}", ("seed", "must be below")),
]  # fmt: skip

CONTENTS = [
    ("empty", b"", "is empty; begin from a recipe that is shipped: digits"),
    ("comment alone", b"# later\n", "is empty"),
    ("list", b"- name: x\n", "holds no sections; begin from a recipe"),
    ("text", b"hello\n", "holds no sections"),
    ("picture", b"\x89PNG\r\n\x1a\n\0\0", "is not a text file; give a recipe written in YAML"),
    ("zeros", bytes(100), "is not a text file"),
]

# (what does not go together, arguments after the recipe, what the sentence says)
IMPOSSIBLE = [
    ("heads and width", ["model.heads=7"], ("model.width = 8", "model.heads = 7", "use 1, 2, 4 or 8")),
    ("patch and image", ["model.patch=3"], ("data.image_size = 8", "model.patch = 3", "use a patch of")),
    ("width and position table", ["model.width=30"], ("model.width = 30", "divisible by 4", "use 32")),
    ("part of a model", ["model.width=null"], ("model.width not set", "give them all")),
    ("unknown model", ["model.name=SiT-Q/2"], ("model.name = 'SiT-Q/2'", "SiT-S/2")),
    ("batch and ranks", ["train.batch=33", "--ranks", "2"], ("train.batch = 33", "multiple of 2")),
    ("none and ranks", ["parallel.strategy=none", "--ranks", "2"],
     ("parallel.strategy = none", "use ddp")),
    ("shard and one rank", ["parallel.shard=4"], ("parallel.shard = 4", "use parallel.shard = 1")),
    ("hsdp on two", ["parallel.strategy=hsdp", "--ranks", "2"], ("hsdp needs", "use fsdp or ddp")),
    ("hsdp degrees", ["parallel.strategy=hsdp", "parallel.shard=3", "--ranks", "4"],
     ("parallel.shard = 3", "may be 2 x 2")),
    ("products and ranks", ["parallel.tp=3", "--ranks", "2"],
     ("parallel.tp = 3 does not divide 2 ranks", "may be 1 or 2")),
    ("products and heads", ["parallel.tp=4", "--ranks", "4"],
     ("parallel.tp = 4 does not divide the model's heads = 1", "use parallel.tp = 1,")),
    ("tokens and products", ["parallel.sequence=true", "--ranks", "2"],
     ("parallel.sequence = true", "parallel.tp = 1; set parallel.tp")),
    ("products and DeepSpeed", ["parallel.tp=2", "parallel.engine=deepspeed", "--ranks", "2"],
     ("parallel.tp is given", "parallel.engine = deepspeed", "choose another engine")),
    ("sequences and Accelerate", ["parallel.cp=2", "parallel.engine=accelerate", "--ranks", "2"],
     ("parallel.cp is given", "parallel.engine = accelerate", "choose another engine")),
    ("one decay twice", ["train.ema=[0.9,0.9]"], ("train.ema", "twice; list each once")),
    ("grids without averages", ["train.ema=[]", "sample.every=2"],
     ("train.ema is empty", "sample.every=0")),
    ("warm-up below zero", ["optimizer.warmup=-1"], ("optimizer.warmup = -1 must be at least 0",)),
    ("final rate above", ["optimizer.final_lr=1"], ("optimizer.final_lr = 1", "above optimizer.lr")),
    ("guidance interval", ["sample.guidance_low=0.5", "sample.guidance_high=0.2"],
     ("sample.guidance_low = 0.5", "not below")),
    ("guidance unlearned", ["objective.label_drop=0", "sample.guidance=2"],
     ("sample.guidance = 2.0", "set objective.label_drop")),
    ("names and classes", ["data.class_names=[a,b]"],
     ("data.class_names lists 2 names", "give one for each")),
    ("a grid of no use", ["sample.times=[0,0.7,0.3,1]"],
     ("sample.times = [0.0, 0.7, 0.3, 1.0]", "begin with 0, end with 1")),
    ("more channels than there are", ["sample.guidance_channels=3"],
     ("sample.guidance_channels = 3", "data.channels = 1", "null for all")),
    ("a cosine above one", ["sample.guidance_cosine=2"],
     ("sample.guidance_cosine = 2 must be at most 1",)),
    ("disk", ["model.width=65536", "model.depth=64"], ("run.dir", "free", "choose another folder")),
    ("override without =", ["train.steps"], ("'train.steps' is not section.key=value",)),
    ("override without key", ["=3"], ("'=3' is not section.key=value; write it as in",)),
    ("override with half a key", ["train.=3"], ("'train.=3' is not section.key=value",)),
    ("unknown override", ["train.stepz=3"], ("command line: train.stepz", "did you mean train.steps?")),
    ("override of no section", ["steps=3"],
     ("command line: steps", "did you mean train.steps or sample.steps?")),
    ("override of a section", ["train=5"], ("command line: train = 5 is a value", "train.steps")),
    ("override inside a value", ["seed.x=3"], ("'seed.x=3' sets a key in seed", "write seed=VALUE")),
    ("override with half a list", ["train.ema=[0.9"],
     ("command line: 'train.ema=[0.9'", "not valid YAML")),
]  # fmt: skip


def cases(table: list[tuple]) -> list:
    return [pytest.param(*row[1:], id=row[0].replace(" ", "-")) for row in table]


@pytest.mark.parametrize(("before", "after", "says"), cases(WRONG_KEYS))
def test_a_wrong_key_is_named_with_what_it_must_be(
    refused: Refused, before: str, after: str, says: tuple[str, ...]
) -> None:
    assert RECIPE.count(before) == 1
    Path("small.yaml").write_text(RECIPE.replace(before, after))
    refused("train", "small.yaml", says=("small.yaml", *says))


def test_every_wrong_key_has_its_sentence(refused: Refused) -> None:
    text = RECIPE.replace("steps: 4", "steps: no").replace("batch: 8", "bach: 8")
    Path("small.yaml").write_text(text)
    refused(
        "train", "small.yaml", "data.classes=x", sentences=4,
        says=(
            "small.yaml: train.steps = false", "small.yaml: train.bach is not",
            "small.yaml: train.batch is missing", "command line: data.classes = 'x'",
        ),
    )  # fmt: skip


@pytest.mark.parametrize(("content", "says"), cases(CONTENTS))
def test_a_file_that_is_no_recipe_is_named(refused: Refused, content: bytes, says: str) -> None:
    Path("odd.yaml").write_bytes(content)
    refused("train", "odd.yaml", says=("odd.yaml", says))


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("digitz", "did you mean digits?"),
        ("recipes/digitz.yaml", "did you mean digits?"),
        ("nothing/like/it.yaml", "shipped are: digits, digits8, dit_moe_digits, jet_bits"),
        ("runs", "runs is a folder; give a recipe file, or one of: digits"),
    ],
)
def test_a_recipe_that_is_not_there(refused: Refused, source: str, says: str) -> None:
    refused("train", source, says=(source, says))


@pytest.mark.parametrize(("arguments", "says"), cases(IMPOSSIBLE))
def test_what_does_not_go_together_is_refused_before_any_rank(
    refused: Refused, place: Path, arguments: list[str], says: tuple[str, ...]
) -> None:
    refused("train", "digits8", "run.dir=fresh", *TINY, *arguments, says=says)
    assert not (place / "fresh").exists()


def test_numbers_are_read_as_people_write_them(place: Path) -> None:
    """`1e-3` is text to YAML 1.1, and a date is no text."""
    from trainer.recipe import load_recipe

    recipe = load_recipe("digits8", ["optimizer.lr=1e-3", "train.steps=2e3", "name=2024-13-45"])
    assert (recipe.optimizer.lr, recipe.train.steps, recipe.name) == (1e-3, 2000, "2024-13-45")


def test_a_demo_refuses_a_wrong_change_before_it_packs(refused: Refused, place: Path) -> None:
    refused("demo", "train.stepz=1", "--folder", "runs/demo", says=("train.stepz", "train.steps?"))


def test_a_rule_between_keys_is_blamed_on_both_who_may_have_broken_it(refused: Refused) -> None:
    rule = "sample.guidance = 1.5 needs a model that saw hidden labels"
    says = (f"digits8 with the changes of the command line: {rule}",)
    refused("train", "digits8", "run.dir=runs/new", "objective.label_drop=0", says=says)


def test_a_recipe_without_a_name(refused: Refused) -> None:
    refused("train", "", says=("The recipe has no name; give a file, or digits",))
