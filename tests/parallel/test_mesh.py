"""Layout arithmetic: an answer uses all the ranks, a refusal names what works."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flows.errors import UserError
from parallel.mesh import Layout, resolve_layout

STRATEGIES = st.sampled_from([None, "none", "ddp", "fsdp", "hsdp"])
DEGREES = st.none() | st.integers(1, 16)


@pytest.mark.parametrize(
    ("asked", "world_size", "replicate", "shard", "strategy"),
    [
        ((None, None, None), 1, 1, 1, "none"),
        ((None, None, None), 4, 1, 4, "fsdp"),
        (("none", 1, 1), 1, 1, 1, "none"),
        (("fsdp", None, None), 1, 1, 1, "fsdp"),
        (("fsdp", 1, 8), 8, 1, 8, "fsdp"),
        (("ddp", None, None), 3, 3, 1, "ddp"),
        (("ddp", 2, 1), 2, 2, 1, "ddp"),
        (("hsdp", None, None), 12, 2, 6, "hsdp"),
        (("hsdp", None, 4), 12, 3, 4, "hsdp"),
        (("hsdp", 6, None), 12, 6, 2, "hsdp"),
        (("hsdp", 2, 2), 4, 2, 2, "hsdp"),
    ],
)
def test_layouts_that_fit(asked, world_size, replicate, shard, strategy):
    expected = Layout(strategy, pp=1, replicate=replicate, shard=shard, cp=1, tp=1)
    assert resolve_layout(*asked, world_size) == expected


@pytest.mark.parametrize(
    ("asked", "world_size", "sentence"),
    [
        (("none", None, None), 2, "parallel.strategy = none needs 1 rank but there are 2"),
        (
            ("ddp", None, 2),
            4,
            "parallel.shard = 2 does not fit .* = ddp on 4 ranks; .* = 1 or null",
        ),
        (
            ("ddp", 2, None),
            4,
            "parallel.replicate = 2 does not fit .*; use .* = 4 or null, or .* hsdp",
        ),
        (
            ("fsdp", 2, None),
            4,
            "parallel.replicate = 2 .* = fsdp on 4 ranks; .* = 1 or null, .* hsdp",
        ),
        (
            (None, None, 3),
            2,
            "parallel.shard = 3 .* = fsdp on 2 ranks; use parallel.shard = 2 or null",
        ),
        (("hsdp", None, None), 3, "hsdp needs a number of ranks that is a product .*, not 3"),
        (("hsdp", None, None), 1, "hsdp needs .*, not 1"),
        (("hsdp", 3, None), 8, "parallel.replicate = 3 .* 8 ranks .* may be 2 x 4, 4 x 2"),
        (("hsdp", 1, 4), 4, "may be 2 x 2"),
        (("hsdp", 2, 2), 8, "may be 2 x 4, 4 x 2"),
        (
            ("zero", None, None),
            2,
            "parallel.strategy = zero is not known; use none, ddp, fsdp, hsdp",
        ),
    ],
)
def test_layouts_that_do_not_fit_are_refused_with_the_remedy(asked, world_size, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        resolve_layout(*asked, world_size)
    message = str(caught.value)
    assert message.endswith(".")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("asked", "world_size", "expected"),
    [
        ((None, None, None, 2, 1), 2, ("none", 1, 1)),
        ((None, None, None, 2, 1), 4, ("fsdp", 1, 2)),
        ((None, None, None, 2, 2), 4, ("fsdp", 1, 1)),
        (("ddp", None, None, 1, 2), 2, ("ddp", 1, 1)),
        (("ddp", None, None, 2, 1), 4, ("ddp", 2, 1)),
        (("hsdp", None, None, 1, 2), 4, ("hsdp", 2, 1)),
        (("hsdp", None, 2, 2, 1), 8, ("hsdp", 2, 2)),
    ],
)
def test_layouts_that_share_samples(asked, world_size, expected):
    *over_data, tp, cp = asked
    strategy, replicate, shard = expected
    layout = Layout(strategy, pp=1, replicate=replicate, shard=shard, cp=cp, tp=tp)
    assert resolve_layout(*over_data, world_size, tp=tp, cp=cp) == layout
    assert layout.data_size * tp * cp == world_size


@pytest.mark.parametrize(
    ("strategy", "degrees", "world_size", "sentence"),
    [
        (None, (3, 1), 4, "parallel.tp = 3 does not divide 4 ranks; .* may be 1, 2 or 4"),
        (None, (2, 2), 2, "parallel.tp = 2 x parallel.cp = 2 does not divide 2 .* may be 1 or 2"),
        (None, (1, 2), 1, "parallel.cp = 2 does not divide 1 rank; .* may be 1"),
        ("none", (2, 1), 4, "parallel.strategy = none needs 2 ranks but there are 4"),
        ("none", (1, 2), 2, "parallel.strategy = none needs 1 rank but there are 2"),
        ("hsdp", (2, 1), 4, "hsdp needs a number of ranks that is a product .*, not 2"),
    ],
)
def test_ranks_that_cannot_share_samples_so_are_refused(strategy, degrees, world_size, sentence):
    tp, cp = degrees
    with pytest.raises(UserError, match=sentence):
        resolve_layout(strategy, None, None, world_size, tp=tp, cp=cp)


@pytest.mark.parametrize(
    ("asked", "world_size", "degrees", "sentence"),
    [
        ((None, None, None), 1, {}, r"divide the 1 rank that .*; it may be 1, or start 2 ranks or a .*"),
        ((None, None, None), 6, {"pp": 2, "tp": 3}, r"the 1 rank .*, or start 12 ranks or a multiple.*"),
        (("none", None, None), 1, {}, r".* start 2 ranks or a multiple of it, with .*strategy=fsdp\."),
        ((None, None, 1), 1, {}, r".* start 2 ranks or a multiple of it, with parallel\.shard=null\."),
        (("ddp", None, None), 1, {}, r"ddp cuts none; use fsdp, and start 2 ranks or a multiple of it\."),
        (("ddp", None, None), 2, {}, r"parallel\.strategy = ddp cuts none; use fsdp or hsdp\."),
        (("fsdp", None, None), 3, {}, r"the 3 ranks .*; it may be 1 or 3, or start 2 ranks or a multiple.*"),
        (("fsdp", None, None), 9, {"cp": 3}, r"the 9 ranks .*, or start 6 ranks or a multiple of it\."),
        (("hsdp", 2, None), 6, {}, r"the 3 ranks .*, or start 4 ranks or a multiple of it\."),
    ],
)  # fmt: skip
def test_experts_that_too_few_ranks_would_have(asked, world_size, degrees, sentence):
    """And on the ranks that the refusal asks for, they can be had."""
    with pytest.raises(UserError, match=rf"^parallel\.ep = 2 .*{sentence}$") as refusal:
        resolve_layout(*asked, world_size, ep=2, **degrees)
    strategy, replicate, shard = asked
    if proposed := re.search(r"start (\d+) ranks", str(refusal.value)):
        strategy = "fsdp" if "fsdp" in str(refusal.value) else strategy
        shard = None if "shard=null" in str(refusal.value) else shard
        for times in (1, 2, 3):
            number = times * int(proposed[1])
            layout = resolve_layout(strategy, replicate, shard, number, ep=2, **degrees)
            assert (layout.ep, layout.world_size) == (2, number)


SHARING = st.sampled_from([1, 2, 3])


@given(STRATEGIES, DEGREES, DEGREES, st.integers(1, 24), SHARING, SHARING)
def test_a_layout_has_all_the_ranks_and_keeps_what_was_asked(
    strategy, replicate, shard, world_size, tp, cp
):
    try:
        layout = resolve_layout(strategy, replicate, shard, world_size, tp=tp, cp=cp)
    except UserError:
        return
    assert layout.world_size == world_size == layout.data_size * tp * cp
    assert (layout.tp, layout.cp) == (tp, cp)
    assert replicate in (None, layout.replicate)
    assert shard in (None, layout.shard)
    assert strategy in (None, layout.strategy)
    several = layout.data_size > 1
    assert (layout.replicate > 1, layout.shard > 1) in {
        "none": [(False, False)],
        "ddp": [(several, False)],
        "fsdp": [(False, several)],
        "hsdp": [(True, True), (True, cp == 1)],
    }[layout.strategy]


@given(STRATEGIES, DEGREES, DEGREES, st.integers(1, 24))
def test_the_remedy_works(strategy, replicate, shard, world_size):
    """Whatever degree a refusal proposes is accepted in its place."""
    try:
        resolve_layout(strategy, replicate, shard, world_size)
    except UserError as refusal:
        asked = {"replicate": replicate, "shard": shard}
        if proposed := re.search(r"; use parallel\.(\w+) = (\d+)", str(refusal)):
            other = dict.fromkeys(asked)
            resolve_layout(
                strategy, **other | {proposed[1]: int(proposed[2])}, world_size=world_size
            )
        for copies, parts in re.findall(r"(\d+) x (\d+)", str(refusal)):
            resolve_layout(strategy, int(copies), int(parts), world_size)
