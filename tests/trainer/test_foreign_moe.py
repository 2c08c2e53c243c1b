"""DiT-MoE files make models that compute what the program computes, and come back bit by bit."""

from dataclasses import replace

import pytest
import torch

from flows.errors import UserError
from flows.models.dit_moe import DiTMoE
from flows.models.dit_moe_config import DiTMoEConfig
from tests.trainer.references import dit as reference
from tests.trainer.references.parts import State, random_state
from trainer.checkpoints.foreign import convert, to_foreign

TOLERANCE = 1e-5  # of a few hundred float32 operations on numbers of about 1
EXPERTS, WIDTH = 4, 32


def moe() -> State:
    """The tiny configuration of the format."""
    shapes = reference.shapes(
        tokens=4, width=WIDTH, patch=2, channels=4, outputs=8, classes=5, depth=2
    )
    for block in ("blocks.0", "blocks.1"):
        for name in ("mlp.fc1", "mlp.fc2"):
            del shapes[f"{block}.{name}.weight"], shapes[f"{block}.{name}.bias"]
        shapes[f"{block}.moe.gate.weight"] = (EXPERTS, WIDTH)
        networks = {f"experts.{index}": 4 * WIDTH for index in range(EXPERTS)}
        for name, hidden in (networks | {"shared_experts": 2 * WIDTH}).items():
            for part in ("gate_proj", "up_proj"):
                shapes[f"{block}.moe.{name}.{part}.weight"] = (hidden, WIDTH)
            shapes[f"{block}.moe.{name}.down_proj.weight"] = (WIDTH, hidden)
    state = random_state(shapes, seed=41) | {"pos_embed": reference.table(2, WIDTH)}
    for block in ("blocks.0", "blocks.1"):  # so that choices are far from ties
        state[f"{block}.moe.gate.weight"] *= 5
    return state


def test_a_file_makes_the_network_it_was_written_from() -> None:
    state = moe()
    config, ours = convert(state, source="dit-moe", heads=2)
    assert config == DiTMoEConfig(
        image_size=4, channels=4, classes=5, patch=2, width=WIDTH, depth=2, heads=2, experts=EXPERTS,
        chosen=2, learn_sigma=True, expert_hidden=4 * WIDTH, shared_hidden=2 * WIDTH, time="reversed",
    )  # fmt: skip
    model = DiTMoE(config).eval()
    model.load_state_dict(ours)
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(4, 4, 4, 4, generator=generator)
    t, label = torch.tensor([0.05, 0.4, 0.7, 0.95]), torch.tensor([0, 1, 5, 2])
    expected = -reference.forward(state, x, 1 - t, label, heads=2)[0][:, :4]
    torch.testing.assert_close(model(x, t, label), expected, rtol=0, atol=TOLERANCE)


def test_there_and_back_no_bit_is_lost() -> None:
    state = moe()
    config, ours = convert(state, source="dit-moe", heads=2)
    back = to_foreign(config, ours, "dit-moe")
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], value) for name, value in state.items())


def test_published_models_need_no_telling() -> None:
    """The largest, on the meta device: names and shapes alone."""
    published = DiTMoEConfig(
        image_size=32, channels=4, classes=1000, patch=2, width=1408, depth=40, heads=16, experts=16,
        chosen=2, learn_sigma=True, expert_hidden=4 * 1408, shared_hidden=2 * 1408, time="reversed",
    )  # fmt: skip
    with torch.device("meta"):
        model = DiTMoE(published)
        theirs = to_foreign(published, model.state_dict(), "dit-moe")
        theirs.pop("pos_embed")
        assert convert(theirs, source="dit-moe", image_size=32).config == published
    assert theirs["blocks.39.moe.experts.15.down_proj.weight"].shape == (1408, 5632)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"recurrent": 8}, r"model\.recurrent = 8 has no place in a dit-moe file, .*have 0"),
        ({"time": "flow"}, r"model\.time = flow has no place .* have reversed"),
        ({"capacity": 1.0}, r"model\.capacity = 1\.0 has no place"),
    ],
)
def test_what_the_program_does_not_know_is_not_exported(changes, sentence) -> None:
    config, _ = convert(moe(), source="dit-moe", heads=2)
    config = replace(config, **changes)
    with torch.device("meta"):
        state = dict(DiTMoE(config).state_dict())
    with pytest.raises(UserError, match=sentence):
        to_foreign(config, state, "dit-moe")


def test_a_dense_file_is_no_mixture() -> None:
    shapes = reference.shapes(
        tokens=4, width=WIDTH, patch=2, channels=4, outputs=8, classes=5, depth=2
    )
    with pytest.raises(UserError, match=r"no tensor blocks\.0\.moe\.gate\.weight"):
        convert(random_state(shapes, seed=1), source="dit-moe", heads=2)
