"""What a recipe says of its data: one set or several, which samples, and for how long."""

import math

import pytest

from flows.errors import UserError
from trainer.assembly import in_steps, plan
from trainer.recipe import load_recipe, write_recipe

DIGITS8 = "embedded:digits8/train-*.tar"
TINY = ["model.width=16", "model.depth=1", "model.heads=2"]


def digits8(*overrides):
    return load_recipe("digits8", [*TINY, *overrides])


def lengths(recipe):
    return recipe.train.steps, recipe.train.samples, recipe.train.epochs


def test_one_data_set_is_given_as_text_and_several_as_a_list(tmp_path):
    one = digits8(f"data.train={DIGITS8}")
    assert one.data.sources == [(DIGITS8, 1.0)]
    two = digits8(f"data.train=[{{url: '{DIGITS8}', weight: 3}}, {{url: other.tar}}]")
    assert two.data.sources == [(DIGITS8, 3.0), ("other.tar", 1.0)]
    for recipe in (one, two):
        write_recipe(recipe, tmp_path / "recipe.yaml")
        assert load_recipe(str(tmp_path / "recipe.yaml"), []) == recipe


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.train=[]", r"data\.train = \[\] must have at least 1 values"),
        ("data.train=5", r"data\.train = 5 must be text"),
        (
            "data.train=[{url: a, wieght: 2}]",
            r"wieght of value 1 of data\.train .* did you mean weight of value 1 of data\.train",
        ),
        ("data.train=[{url: a}, {weight: 2}]", r"url of value 2 of data\.train is missing"),
        (
            "data.train=[{url: a, weight: 0}]",
            r"weight of value 1 of data\.train = 0 must be above 0",
        ),
        (
            "data.train=[{url: a, weight: .inf}]",
            r"weight of value 1 of data\.train = inf must be a finite number",
        ),
        ("data.keep={cls: 3}", r"data\.keep\.cls = 3 must be a list"),
        ("data.keep={cls: []}", r"data\.keep\.cls = \[\] must have at least 1 values"),
        (
            "data.keep={size: [[8, 8]]}",
            r"value 1 of data\.keep\.size: \[8, 8\] is not text, a number",
        ),
        ("train.steps=0", r"train: nothing says how long to train; give exactly one of"),
        ("train.epochs=2", r"train: train\.steps and train\.epochs says how long"),
        ("train.samples=-1", r"train\.samples = -1 must be at least 0"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(override, message):
    with pytest.raises(UserError, match=rf"^command line: {message}"):
        digits8(override)


@pytest.mark.parametrize(
    ("length", "steps"),
    [
        ("train.samples=1000", math.ceil(1000 / 64)),
        ("train.samples=64", 1),
        ("train.epochs=1", math.ceil(1500 / 64)),
        ("train.epochs=3", math.ceil(4500 / 64)),
        ("train.epochs=0.5", math.ceil(750 / 64)),
    ],
)
def test_a_length_in_samples_or_epochs_is_the_fewest_steps_that_cover_it(length, steps):
    recipe = digits8("train.steps=0", "train.batch=64", length)
    made = plan(recipe, 1)
    assert made.stream.samples == 1500
    assert lengths(made.recipe) == (steps, 0, 0.0)
    assert in_steps(made.recipe, [1]) is made.recipe


def test_epochs_of_a_mixture_are_refused_and_samples_are_not():
    mixture = f"data.train=[{{url: '{DIGITS8}'}}, {{url: 'embedded:digits8/heldout-*.tar'}}]"
    with pytest.raises(UserError, match=r"train\.epochs = 2 has no meaning for a mixture"):
        plan(digits8(mixture, "train.steps=0", "train.epochs=2"), 1)
    made = plan(digits8(mixture, "train.steps=0", "train.samples=640", "train.batch=64"), 1)
    assert lengths(made.recipe)[0] == 10
    assert len(made.stream.sets) == 2


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.cache_bytes=5", r"data\.cache_bytes = 5 is less than one block"),
        ("data.cache_dir=/proc/none", r"data\.cache_dir = /proc/none cannot be written"),
    ],
)
def test_a_cache_that_cannot_be_is_refused_before_ranks_start(tmp_path, override, words):
    with pytest.raises(UserError, match=words):
        plan(digits8(f"data.cache_dir={tmp_path}", override), 1)


def test_epochs_count_kept_samples():
    made = plan(digits8("data.keep={cls: [3, 7]}", "train.steps=0", "train.epochs=2"), 1)
    kept = made.stream.samples
    assert 250 < kept < 350
    assert made.recipe.train.steps == math.ceil(2 * kept / made.recipe.train.batch)
