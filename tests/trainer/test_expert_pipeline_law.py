"""Networks of experts in pipelines: losses, balance, counts and samples are those of one rank.

What routers carry from step to step is moved by the load of the whole batch, whichever rank has the
layer; what they hand from layer to layer travels with the tokens.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from parallel.pipeline import laid
from parallel.pipeline.catalog import NAMES
from parallel.processes import Ranks
from tests.distributed.harness import run_ranks
from tests.trainer import families, runs
from tests.trainer.test_expert_law import EXACT, UNBOUND, hold, train_all, trained
from tests.trainer.test_expert_law import recipe as mixture

pytestmark = pytest.mark.timeout(900)

# Eight links, as many as four ranks with two stages each need; biases, both losses, a capacity, a recurrent
# state and masks come with the recipe.
DEEP = ["model.depth=6"]
PP2 = ["parallel.pp=2", "train.microbatch=2", *DEEP]
PP4 = ["parallel.pp=4", "train.microbatch=1", *DEEP]
EP2, BITPIPE, ZBV = "parallel.ep=2", "parallel.schedule=bitpipe", "parallel.schedule=zbv"
CHOOSE = ["model.chooser=experts", "model.bias_rate=0"]
MOVED = "pp2 bitpipe after one rank"
# ranks -> name: changes
LAYOUTS: dict[int, dict[str, list[str]]] = {
    2: {"pp2 zbv": [*PP2, ZBV], MOVED: [*PP2, BITPIPE]},
    4: {"pp2 ep2 bitpipe": [*PP2, EP2, BITPIPE]},
}
MORE_LAYOUTS: dict[int, dict[str, list[str]]] = {
    2: {
        **{f"pp2 {name}": [*PP2, f"parallel.schedule={name}"] for name in NAMES},
        "pp2 experts choose": [*PP2, *CHOOSE],
    },
    4: {
        **{f"pp4 {name}": [*PP4, f"parallel.schedule={name}"] for name in NAMES},
        "pp2 fsdp2": [*PP2, ZBV, "train.checkpoint_activations=1"],
        "pp2 ddp2": [*PP2, BITPIPE, "parallel.strategy=ddp"],
        "pp2 tp2": [*PP2, "parallel.tp=2"],
        "pp2 ep2 1f1b": [*PP2, EP2],
        "pp2 ep2 zbv": [*PP2, EP2, ZBV, "train.checkpoint_activations=1"],
        "pp2 ep2 cp2 cut": [*PP2, EP2, "parallel.cp=2", *UNBOUND],
    },
    8: {
        "pp2 ep2 fsdp2 bitpipe": [*PP2, EP2, BITPIPE, "train.microbatch=1"],
        "pp2 ep2 hsdp 2x2": [*PP2, EP2, "parallel.strategy=hsdp", "train.microbatch=1"],
        "pp2 ep2 tp2": [*PP2, EP2, "parallel.tp=2"],
    },
}
# A word of a layout's name: what else it changes, and the run of one rank that it is held against too.
OTHERS = {"choose": CHOOSE, "cut": UNBOUND}


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    """The run of one rank."""
    folder: Path = tmp_path_factory.mktemp("one") / "plain"
    runs.train_here(mixture(folder, DEEP))
    return folder


@pytest.fixture(scope="module")
def folder(one, tmp_path_factory) -> Path:
    """Of all runs, one of which was begun by one rank."""
    made: Path = tmp_path_factory.mktemp("pipelines")
    families.stopped(one, made / MOVED)
    return trained(made, LAYOUTS)


@pytest.fixture(scope="module")
def more(tmp_path_factory) -> Callable[[int], Path]:
    """Ranks -> the folder of the runs of so many."""

    @cache
    def made(ranks: int) -> Path:
        folder: Path = tmp_path_factory.mktemp("more")
        if ranks > 1:
            return trained(folder, {ranks: MORE_LAYOUTS[ranks]})
        for word, changes in OTHERS.items():
            runs.train_here(mixture(folder / word, [*DEEP, *changes]))
        return folder

    return made


@pytest.mark.parametrize("name", [name for some in LAYOUTS.values() for name in some])
def test_stages_with_experts_train_what_one_rank_trains(folder, one, name):
    hold(folder / name, one, cut="ep" in name)


def test_one_rank_goes_on_from_stages_with_experts(folder, one, tmp_path):
    place = families.stopped(folder / "pp2 zbv", tmp_path / "run")
    assert runs.train_here(mixture(place, DEEP)).finished
    hold(place, one, cut=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "name"), [(ranks, name) for ranks, some in MORE_LAYOUTS.items() for name in some]
)
def test_every_schedule_trains_what_one_rank_trains(more, one, ranks, name):
    other = name.rpartition(" ")[2]
    cut = any(word in ("tp2", "ep2") for word in name.split())
    hold(more(ranks) / name, more(1) / other if other in OTHERS else one, cut=cut)


def told_apart(ranks: Ranks, folder: str) -> int:
    """Train where each part of a rank has routers of its own, the first one's alone being told of loads."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(laid, "_share_buffers", lambda model, _: model.reset_buffers())
        return train_all(ranks, folder, {"apart": [*PP2, ZBV]})


@pytest.mark.slow
def test_the_law_notices_routers_that_were_not_told(one, tmp_path):
    run_ranks(told_apart, 2, timeout=280.0, folder=str(tmp_path))
    ours, theirs = (runs.series(place, "loss") for place in (tmp_path / "apart", one))
    assert runs.relative(ours, theirs) > 10 * EXACT
