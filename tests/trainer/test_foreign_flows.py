"""TarFlow, STARFlow and Jet files make flows that compute what those programs compute."""

import numpy as np
import pytest
import torch

from flows.errors import UserError
from flows.models.flow import FlowOutput
from flows.models.jet import Jet, JetConfig
from flows.models.starflow import STARFlow, STARFlowConfig
from flows.models.tarflow import TarFlow, TarFlowConfig
from flows.models.zoo import family_of
from trainer.checkpoints.foreign import convert, to_foreign

from .references import jet as jet_reference
from .references import tarflow as reference
from .references.parts import State, random_state

TOLERANCE = 1e-5  # of z, which is about 1; log-determinants are sums over a hundred numbers
TARFLOW_KNOWN = reference.Known(64, softplus=False, clip=0.0, first_reversed=False)


def flow_shapes(
    *, blocks: int, layers: list[int], width: int, features: int, outputs: int
) -> dict[str, tuple[int, ...]]:
    """What TarFlow and a plain STARFlow have in common."""
    found: dict[str, tuple[int, ...]] = {}
    for k in range(blocks):
        block = f"blocks.{k}"
        found |= {
            f"{block}.proj_in.weight": (width, features),
            f"{block}.proj_in.bias": (width,),
            f"{block}.proj_out.weight": (outputs, width),
            f"{block}.proj_out.bias": (outputs,),
        }
        for layer in (f"{block}.attn_blocks.{index}" for index in range(layers[k])):
            for name, rows, columns in (
                ("attention.qkv", 3 * width, width),
                ("attention.proj", width, width),
                ("mlp.main.0", 4 * width, width),
                ("mlp.main.2", width, 4 * width),
            ):
                found |= {
                    f"{layer}.{name}.weight": (rows, columns),
                    f"{layer}.{name}.bias": (rows,),
                }
            for name in ("attention.norm", "mlp.norm"):
                found |= {f"{layer}.{name}.weight": (width,), f"{layer}.{name}.bias": (width,)}
    return found


def tarflow(*, classes: int = 5, volume_preserving: bool = False) -> State:
    """in 3, image 8, patch 2, width 128, 3 blocks of 1 layer"""
    shapes = flow_shapes(
        blocks=3, layers=[1, 1, 1], width=128, features=12, outputs=12 if volume_preserving else 24
    )
    for k in range(3):
        shapes[f"blocks.{k}.pos_embed"] = (16, 128)
        if classes:
            shapes[f"blocks.{k}.class_embed"] = (classes, 1, 128)
    masks = {f"blocks.{k}.attn_mask": torch.ones(16, 16).tril() for k in range(3)}
    return random_state(shapes, seed=11) | {"var": torch.ones(16, 12)} | masks


def starflow(*, reads: tuple[int, ...] = (2,), text: int = 16) -> State:
    """in 4, image 4, patch 1, width 128, 3 blocks of 1 layer, text of 16 in the top one"""
    shapes = flow_shapes(blocks=3, layers=[1, 1, 1], width=128, features=4, outputs=8)
    for k in range(3):
        shapes |= {f"blocks.{k}.sos_embed": (1, 1, 4), f"blocks.{k}.final_norm.weight": (128,)}
    for k in reads:
        shapes |= {f"blocks.{k}.proj_txt.weight": (128, text), f"blocks.{k}.proj_txt.bias": (128,)}
    return random_state(shapes, seed=21)


def starflow_options() -> State:
    """in 3, image 6, patch 2, width 64, 1 and 2 layers, 4 heads of 16 with 2 for keys, no bias"""
    shapes: dict[str, tuple[int, ...]] = {}
    for k in range(2):
        block = f"blocks.{k}"
        shapes |= {
            f"{block}.sos_embed": (1, 1, 12),
            f"{block}.proj_in.weight": (64, 12),
            f"{block}.proj_in.bias": (64,),
            f"{block}.proj_out.weight": (24, 64),
            f"{block}.proj_out.bias": (24,),
            f"{block}.final_norm.weight": (64,),
        }
        for layer in (f"{block}.attn_blocks.{index}" for index in range(k + 1)):
            shapes |= {
                f"{layer}.attention.norm.weight": (64,),
                f"{layer}.attention.qkv.weight": (128, 64),
                f"{layer}.attention.proj.weight": (64, 64),
                f"{layer}.attention.query_norm.weight": (16,),
                f"{layer}.attention.key_norm.weight": (16,),
                f"{layer}.attention.post_norm.weight": (64,),
                f"{layer}.mlp.norm.weight": (64,),
                f"{layer}.mlp.post_norm.weight": (64,),
                f"{layer}.mlp.gate_proj.weight": (256, 64),
                f"{layer}.mlp.up_proj.weight": (256, 64),
                f"{layer}.mlp.down_proj.weight": (64, 256),
            }
    return random_state(shapes, seed=23)


def jet() -> State:
    """7 couplings of 1 layer, width 32, 2 heads, patch 2, image 8: the tiny configuration"""
    shapes = jet_reference.shapes(couplings=7, layers=1, width=32, heads=2, features=12, tokens=16)
    channel, spatial = torch.zeros(7, 12, 12), torch.zeros(7, 16, 16)
    place = torch.arange(16)
    row, column = place // 4, place % 4
    halves = iter([(row + column) % 2, (row + column + 1) % 2])
    generator = torch.Generator().manual_seed(3)
    for i in range(7):
        if i % 3 == 2:
            order = next(halves).argsort(stable=True)
            spatial[i, order, torch.arange(16)] = 1
        else:
            order = torch.randperm(12, generator=generator)
            channel[i, order, torch.arange(12)] = 1
    masks = {jet_reference.CHANNEL: channel, jet_reference.SPATIAL: spatial}
    # Kernels are (in, out): the last axis is not what their scale should be measured by.
    return random_state(shapes, seed=41, scale=0.6) | masks


def image(channels: int, side: int) -> torch.Tensor:
    return torch.randn(3, channels, side, side, generator=torch.Generator().manual_seed(2))


def agree(found: FlowOutput, z: torch.Tensor, logdet: torch.Tensor) -> None:
    torch.testing.assert_close(found.z, z, rtol=TOLERANCE, atol=TOLERANCE)
    torch.testing.assert_close(found.logdet, logdet, rtol=TOLERANCE, atol=TOLERANCE)
    assert logdet.abs().min() > 1e-2 or not logdet.any()


@pytest.mark.parametrize("volume_preserving", [False, True])
@pytest.mark.parametrize("classes", [5, 0])
def test_a_tarflow_file_makes_the_flow_it_was_written_from(classes, volume_preserving) -> None:
    state = tarflow(classes=classes, volume_preserving=volume_preserving)
    config, ours = convert(state, source="ml-tarflow")
    assert config == TarFlowConfig(
        image_size=8,
        channels=3,
        classes=classes or 1,
        patch=2,
        width=128,
        flow_blocks=3,
        layers=1,
        volume_preserving=volume_preserving,
        conditional=classes > 0,
    )
    model = TarFlow(config)
    model.load_state_dict(ours)
    x = image(3, 8)
    label = torch.tensor([4, 0, -1])
    z, logdet = reference.forward(state, reference.tarflow_tokens(x, 2), TARFLOW_KNOWN, label)
    agree(model(x, label.where(label >= 0, config.classes)), z, logdet)


@pytest.mark.parametrize("conditioned", ["top", "all"])
def test_a_starflow_file_makes_the_flow_it_was_written_from(conditioned) -> None:
    state = starflow(reads=(0, 1, 2) if conditioned == "all" else (2,))
    config, ours = convert(state, source="ml-starflow", image_size=4, text_tokens=6)
    assert config == STARFlowConfig(
        image_size=4,
        channels=4,
        classes=1,
        patch=1,
        width=128,
        layers=(1, 1, 1),
        text_width=16,
        text_tokens=6,
        conditioned=conditioned,
    )
    model = STARFlow(config)
    model.load_state_dict(ours)
    x, text = image(4, 4), torch.randn(3, 6, 16)
    known = reference.Known(64, softplus=True, clip=4.0, first_reversed=True, lattice=(4, 6))
    z, logdet = reference.forward(state, reference.starflow_tokens(x, 1), known, text=text)
    agree(model(x, text=text), z, logdet)


def test_a_starflow_with_all_options_is_inferred() -> None:
    state = starflow_options()
    config, ours = convert(state, source="ml-starflow", image_size=6, channels=3, clip=3.0)
    assert config == STARFlowConfig(
        image_size=6,
        channels=3,
        classes=1,
        patch=2,
        width=64,
        layers=(1, 2),
        head_width=16,
        kv_heads=2,
        bias=False,
        qk_norm=True,
        gated=True,
        norm="rms",
        placement="peri",
        clip=3.0,
        conditional=False,
    )
    model = STARFlow(config)
    model.load_state_dict(ours)
    x = image(3, 6)
    known = reference.Known(16, softplus=True, clip=3.0, first_reversed=True, lattice=(3, 0))
    z, logdet = reference.forward(state, reference.starflow_tokens(x, 2), known)
    agree(model(x), z, logdet)


def test_a_class_conditional_starflow_reads_one_word() -> None:
    state = starflow(text=11)
    config, ours = convert(state, source="ml-starflow", image_size=4, classes=10)
    assert (config.classes, config.text_tokens) == (10, 0)
    model = STARFlow(config)
    model.load_state_dict(ours)
    x, label = image(4, 4), torch.tensor([0, 9, 10])
    known = reference.Known(64, softplus=True, clip=4.0, first_reversed=True, lattice=(4, 1))
    text = torch.nn.functional.one_hot(label, 11).float()[:, None]
    z, logdet = reference.forward(state, reference.starflow_tokens(x, 1), known, text=text)
    agree(model(x, label), z, logdet)


def test_a_jet_file_makes_the_flow_it_was_written_from() -> None:
    state = jet()
    config, ours = convert(state, source="jet")
    assert config == JetConfig(
        image_size=8,
        channels=3,
        classes=1,
        patch=2,
        width=32,
        couplings=7,
        layers=1,
        heads=2,
        kinds=("channel", "channel", "spatial"),
        patterns=("checkerboard", "checkerboard-inv"),
    )
    model = Jet(config)
    model.load_state_dict(ours)
    x = image(3, 8)
    agree(model(x), *jet_reference.forward(state, x, 2))


def test_a_jet_may_be_named_as_its_npz_files_are_or_be_a_tree() -> None:
    state = jet()

    def keys(name: str) -> list[str]:
        return name.strip("[']").split("']['")

    tree: dict = {}
    for name, value in state.items():
        *above, last = keys(name)
        place = tree
        for key in above:
            place = place.setdefault(key, {})
        place[last] = value.numpy()
    flat = {"/".join(("params", *keys(name))): value.numpy() for name, value in state.items()}
    moments = {name.replace("params", "opt/mu"): value + 1 for name, value in flat.items()}
    _, ours = convert(state, source="jet")
    for other in (tree, flat | moments):
        _, same = convert(other, source="jet")
        assert same.keys() == ours.keys()
        assert all(torch.equal(same[name], ours[name]) for name in ours)


CASES = {
    "tarflow": ("ml-tarflow", tarflow(), {}),
    "unconditional": ("ml-tarflow", tarflow(classes=0), {}),
    "volume": ("ml-tarflow", tarflow(volume_preserving=True), {}),
    "starflow": ("ml-starflow", starflow(), {"image_size": 4, "text_tokens": 6}),
    "classes": ("ml-starflow", starflow(text=11), {"image_size": 4, "classes": 10}),
    "options": ("ml-starflow", starflow_options(), {"image_size": 6, "channels": 3}),
    "jet": ("jet", jet(), {}),
}


@pytest.mark.parametrize(("source", "state", "facts"), CASES.values(), ids=CASES)
def test_there_and_back_no_bit_is_lost(source, state, facts) -> None:
    back = to_foreign(*convert(state, source=source, **facts), source)
    assert back.keys() == state.keys()
    for name, value in state.items():
        assert torch.equal(back[name], value), name


@pytest.mark.parametrize(
    ("name", "target", "total"),
    [
        # Beside the parameters the file has the prior's variance and eight masks.
        ("TarFlow-4-1024-8-8", "ml-tarflow", 817_636_096 + 256 * 48 + 8 * 256**2),
        ("STARFlow-1.4B", "ml-starflow", 1_412_255_816),
        ("Jet-32x2", "jet", 207_177_216 + 2_170_880),
    ],
)
def test_published_sizes_have_as_many_numbers_as_published(name, target, total) -> None:
    family = family_of(name)
    data = {"image_size": 64, "channels": 3, "classes": 1000}
    if target == "ml-starflow":
        data = {"image_size": 32, "channels": 4, "classes": 1000}
    config = family.config(**data, **family.published[name])
    with torch.device("meta"):
        state = dict(family.build(config).state_dict())
    foreign = to_foreign(config, state, target)
    assert sum(value.numel() for value in foreign.values()) == total


@pytest.mark.parametrize(
    ("source", "change", "facts", "sentence"),
    [
        ("ml-tarflow", {"var": torch.full((16, 12), 2.0)}, {}, "tensor var is not the table"),
        ("ml-tarflow", {"blocks.0.proj_in.bias": torch.full((128,), torch.inf)}, {}, "not finite"),
        (
            "ml-tarflow",
            {"blocks.1.proj_in.bias": torch.ones(128).int()},
            {},
            r"1\.proj_in\.bias .* kind int32",
        ),
        ("ml-tarflow", {"blocks.0.proj_in.weight": torch.ones(128, 0)}, {}, "holds no number"),
        ("ml-tarflow", {3: torch.ones(2)}, {}, r"3 \(int\) is no name"),
        (
            "ml-tarflow",
            {"blocks.0.proj_in.bias": np.array(["a"])},
            {},
            r"array of <U1, .*no numbers",
        ),
        ("ml-tarflow", {}, {"channels": 0}, r"data\.channels = 0 must be at least 1"),
        ("ml-tarflow", {}, {"patch": 0}, r"model\.patch = 0 must be at least 1"),
        ("ml-tarflow", {}, {"head_width": -1}, r"model\.head_width = -1 must be at least 1"),
        ("ml-tarflow", {}, {"patch": True}, r"model\.patch = True: is a yes or no"),
        ("ml-starflow", {}, {"head_width": 0}, r"model\.head_width = 0 must be at least 1"),
        ("jet", {}, {"channels": 0}, r"data\.channels = 0 must be at least 1"),
        ("jet", {}, {"heads": 0}, r"model\.heads = 0 must be at least 1"),
        ("ml-tarflow", {}, {"channels": 5}, r"model\.patch does not follow .* is 12, the features"),
        ("ml-tarflow", {}, {"head_width": 48}, r"model\.head_width = 48"),
        ("ml-tarflow", {}, {"classes": 4}, r"data\.classes = 4 was told, .* say 5"),
        ("ml-starflow", {}, {}, r"data\.image_size does not follow .*32 for images of 256"),
        (
            "ml-starflow",
            {},
            {"image_size": 4},
            r"data\.text\.tokens .* words a text has, or data\.classes=15",
        ),
        (
            "ml-starflow",
            {"blocks.0.proj_txt.weight": torch.ones(128, 16)},
            {"image_size": 4, "text_tokens": 6},
            "blocks 0, 2 of 3 read the text",
        ),
        (
            "ml-starflow",
            {"blocks.0.pos_embed": torch.ones(16, 128)},
            {"image_size": 4},
            "learned position table",
        ),
        (
            "jet",
            {
                jet_reference.name("MultiHeadDotProductAttention_0", "out", "bias"): torch.ones(
                    7, 32
                )
            },
            {},
            "attend to a context",
        ),
        (
            "jet",
            {
                jet_reference.SPATIAL: torch.eye(16)
                * jet()[jet_reference.SPATIAL].amax((1, 2), True)
            },
            {},
            "by none of the patterns",
        ),
        ("jet", {}, {"channels": 5}, r"model\.patch does not follow"),
    ],
)
def test_what_a_file_may_not_be_is_said(source, change, facts, sentence) -> None:
    state = {"ml-tarflow": tarflow, "ml-starflow": starflow, "jet": jet}[source]()
    with pytest.raises(UserError, match=sentence):
        convert(state | change, source=source, **facts)


def masks(*changes: tuple[int, float]) -> State:
    """A Jet whose masks of features are changed: (place in the flat matrices, value)."""
    state = jet()
    for place, value in changes:
        state[jet_reference.CHANNEL].view(-1)[place] = value
    return state


def test_masks_that_are_no_orders_are_refused() -> None:
    mask = jet()[jet_reference.CHANNEL]
    one = int(mask[0].flatten().argmax())
    other = 2 * 144  # in the coupling that splits tokens
    both = {jet_reference.SPATIAL: torch.eye(16).expand(7, 16, 16)}
    for state in (
        masks((one, 0.5)),
        masks((one, 0.0)),
        masks((one, torch.nan)),
        masks((one, 0.0), (one // 12 * 12 + (one + 1) % 12, 1.0)),
        masks((other, 1.0)),
        jet() | both,
        jet() | {jet_reference.CHANNEL: torch.zeros(7, 12, 12)},
    ):
        with pytest.raises(UserError, match=r"one matrix of zeros and ones .* cannot be imported"):
            convert(state, source="jet")
    for short in (jet_reference.CHANNEL, jet_reference.SPATIAL):
        with pytest.raises(UserError, match=r"masks-FREEZE_ME'\] is \[6, .* it is \[7, "):
            convert(jet() | {short: jet()[short][:6]}, source="jet")


def test_a_jet_without_couplings_is_refused() -> None:
    with pytest.raises(UserError, match="which holds no number"):
        convert({name: value[:0] for name, value in jet().items()}, source="jet")


def test_bfloat16_of_jax_and_whole_numbers_of_masks_are_read() -> None:
    state = {name: value.bfloat16() for name, value in jet().items()}
    arrays = {name: value.view(torch.uint16).numpy().view("V2") for name, value in state.items()}
    found, expected = convert(arrays, source="jet"), convert(state, source="jet")
    assert found.config == expected.config
    assert all(torch.equal(found.state[name], value) for name, value in expected.state.items())
    exact = {name: jet()[name].bool() for name in (jet_reference.CHANNEL, jet_reference.SPATIAL)}
    assert convert(state | exact, source="jet").config == expected.config


def test_a_learned_prior_is_refused_with_what_to_do() -> None:
    state = tarflow(volume_preserving=True) | {"var": torch.full((16, 12), 2.0)}
    with pytest.raises(UserError, match=r"var is the variance of the prior .* leave the tensor"):
        convert(state, source="ml-tarflow")
    del state["var"]
    assert convert(state, source="ml-tarflow").config.volume_preserving


@pytest.mark.parametrize(
    ("config", "target", "sentence"),
    [
        (TarFlowConfig(8, 3, 5, 2, 64, 2, 1, norm="rms"), "ml-tarflow", r"model\.norm = rms"),
        (
            TarFlowConfig(8, 3, 5, 2, 64, 2, 1, clip=3.0),
            "ml-tarflow",
            r"model\.clip = 3 has no place",
        ),
        (
            STARFlowConfig(4, 4, 1, 1, 64, (1, 1), position="learned"),
            "ml-starflow",
            r"model\.position = learned has no place",
        ),
        (
            STARFlowConfig(4, 4, 1, 1, 64, (1, 1), placement="post"),
            "ml-starflow",
            r"model\.placement = post",
        ),
        (
            JetConfig(8, 3, 5, 2, 32, 2, 1, 2, conditional=True),
            "jet",
            r"model\.conditional = True has no place",
        ),
    ],
)
def test_a_model_that_a_format_cannot_hold_is_not_exported(config, target, sentence) -> None:
    with pytest.raises(UserError, match=sentence):
        to_foreign(config, {}, target)
