"""What each engine asks of a recipe and of the world around it, and what it says where that is wrong."""

import importlib.util
import json

import pytest

from flows.errors import UserError
from tests.trainer import runs
from trainer.engines import place

DEEPSPEED = "parallel.engine=deepspeed"
ACCELERATE = "parallel.engine=accelerate"


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def launched(monkeypatch):
    """What `accelerate launch` sets, with more."""

    def launch(**more: str) -> None:
        for name, value in {"ACCELERATE_MIXED_PRECISION": "no", **more}.items():
            monkeypatch.setenv(name, value)

    return launch


def placed(tmp_path, *changes, ranks=2):
    return place(runs.recipe(tmp_path, *changes), ranks)


def refused(tmp_path, *changes, ranks=2):
    with pytest.raises(UserError) as error:
        placed(tmp_path, *changes, ranks=ranks)
    return str(error.value)


def written(tmp_path, content):
    path = tmp_path / "ds.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return f"parallel.deepspeed.config={path}"


def test_the_json_is_that_of_the_recipe(tmp_path):
    given = placed(tmp_path, DEEPSPEED, "train.microbatch=3").deepspeed
    assert given == {
        "train_micro_batch_size_per_gpu": 3,
        "gradient_accumulation_steps": 3,
        "gradient_clipping": 0.0,
        "bf16": {"enabled": False, "check_grad_overflow": False},
        "timers": {"throughput": {"enabled": False}},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": {
            "stage": 2,
            "memory_efficient_linear": False,
            "compute_grad_norm": False,
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    changes = ("parallel.deepspeed={stage: 3, offload_optimizer: true, offload_parameters: true}",)
    zero = placed(tmp_path, DEEPSPEED, *changes).deepspeed["zero_optimization"]
    assert zero == {
        "stage": 3,
        "memory_efficient_linear": False,
        "offload_optimizer": {"device": "cpu"},
        "offload_param": {"device": "cpu"},
    }


def test_a_users_json_is_merged(tmp_path):
    mine = {
        "train_batch_size": 16,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": False},
        "zero_optimization": {"stage": 3, "overlap_comm": False, "reduce_bucket_size": 1000},
        "comms_logger": {"enabled": True},
    }
    made = placed(tmp_path, DEEPSPEED, written(tmp_path, mine))
    assert made.layout.strategy == "zero-3"
    given = made.deepspeed
    assert given["zero_optimization"] == {
        "stage": 3,
        "memory_efficient_linear": False,
        "overlap_comm": False,
        "reduce_bucket_size": 1000,
    }
    assert given["comms_logger"] == {"enabled": True}
    assert given["gradient_clipping"] == 0.0
    assert given["bf16"]["enabled"] is False
    assert "train_batch_size" not in given


@pytest.mark.parametrize(
    ("mine", "said"),
    [
        (
            {"zero_optimization": {"stage": 3}},
            "zero_optimization.stage = 3, and parallel.deepspeed.stage makes it 2; make the two agree",
        ),
        ({"train_batch_size": 32}, "train_batch_size = 32, and train.batch makes it 16; "),
        ({"gradient_clipping": 0.5}, "gradient_clipping = 0.5, and optimizer.clip makes it 1.0; "),
        ({"bf16": {"enabled": True}}, "bf16.enabled = true, and train.precision makes it false; "),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}},
            "zero_optimization.offload_optimizer.device = 'nvme' is not supported; use cpu or none.",
        ),
        (
            {"data_types": {"grad_accum_dtype": "bf16"}},
            'data_types.grad_accum_dtype = "bf16", and flowmill needs "fp32"; write "auto".',
        ),
        ({"optimizer": {"type": "Lamb"}}, "optimizer.type is not followed; drop it: use the rec"),
        ({"fp16": {"enabled": True}}, "fp16.enabled is not followed; drop it: use train.precision"),
        (
            {"zero_optimization": {"zero_quantized_weights": True}},
            "zero_optimization.zero_quantized_weights is not followed; drop it: it would change the",
        ),
    ],
)
def test_what_a_users_json_says_otherwise_is_refused_by_name(tmp_path, mine, said):
    sentence = refused(tmp_path, DEEPSPEED, "parallel.deepspeed.stage=2", written(tmp_path, mine))
    assert sentence.startswith(f"{tmp_path}/ds.json: {said}")


def test_a_json_that_is_none_is_refused(tmp_path):
    assert "is not JSON (" in refused(tmp_path, DEEPSPEED, written(tmp_path, "{"))
    assert "is no JSON object; " in refused(tmp_path, DEEPSPEED, written(tmp_path, [1]))
    absent = f"parallel.deepspeed.config={tmp_path}/absent.json"
    assert "cannot be read (No such file or directory); " in refused(tmp_path, DEEPSPEED, absent)
    wrong = written(tmp_path, {"zero_optimization": {"stage": 4}})
    assert "zero_optimization.stage = 4 is not known; use 0, 1, 2 or 3." in refused(
        tmp_path, DEEPSPEED, wrong
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            ["parallel.deepspeed={stage: 0, offload_optimizer: true}"],
            "parallel.deepspeed.offload_optimizer = true needs an optimizer that is cut",
        ),
        (
            ["parallel.deepspeed={stage: 2, offload_parameters: true}"],
            "parallel.deepspeed.offload_parameters = true needs parameters that are cut",
        ),
        (
            ["parallel.deepspeed.stage=3", "train.compile=true"],
            "train.compile = true does not go together with ZeRO stage 3",
        ),
    ],
)
def test_what_zero_cannot_do_is_refused_by_name(tmp_path, changes, said):
    assert refused(tmp_path, DEEPSPEED, *changes).startswith(said)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ([DEEPSPEED, "parallel.strategy=fsdp"], "strategy"),
        ([DEEPSPEED, "parallel.shard=2"], "shard"),
        (["parallel.deepspeed.stage=2"], "deepspeed"),
        ([ACCELERATE, "parallel.deepspeed.stage=2"], "deepspeed"),
        ([ACCELERATE, "parallel.replicate=2"], "replicate"),
    ],
)
def test_a_key_of_another_engine_is_refused(tmp_path, changes, key):
    said = refused(tmp_path, *changes)
    assert f"parallel.{key} is given, and parallel.engine = " in said
    assert said.endswith("has no use for it; drop it, or choose another engine.")


@pytest.mark.parametrize("package", ["deepspeed", "accelerate"])
def test_a_package_that_is_missing_is_named_with_the_way_to_install_it(
    tmp_path, monkeypatch, package
):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == package else found(n))
    assert refused(tmp_path, f"parallel.engine={package}") == (
        f"parallel.engine asks for the package {package}, which is not installed; run "
        f"pip install 'flowmill[{package}]'."
    )


def test_accelerate_without_its_launcher_follows_the_strategy(tmp_path):
    assert placed(tmp_path, ACCELERATE).kind == "fsdp"
    assert placed(tmp_path, ACCELERATE, "parallel.strategy=ddp").kind == "ddp"
    assert placed(tmp_path, ACCELERATE, ranks=1).kind == "none"
    assert "hsdp is not supported with parallel.engine = accelerate" in refused(
        tmp_path, ACCELERATE, "parallel.strategy=hsdp", ranks=4
    )


def test_accelerates_launcher_decides_what_is_made(tmp_path, launched):
    launched()
    assert placed(tmp_path, ACCELERATE).kind == "ddp"
    launched(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2", FSDP_RESHARD_AFTER_FORWARD="true")
    assert placed(tmp_path, ACCELERATE).kind == "fsdp"


def test_accelerates_deepspeed_is_what_its_config_says(tmp_path, launched):
    launched(ACCELERATE_USE_DEEPSPEED="true", ACCELERATE_DEEPSPEED_ZERO_STAGE="3",
             ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE="cpu", ACCELERATE_GRADIENT_CLIPPING="1.0")  # fmt: skip
    made = placed(tmp_path, ACCELERATE)
    assert (made.kind, made.layout.strategy) == ("deepspeed", "zero-3")
    assert made.deepspeed["zero_optimization"]["offload_param"] == {"device": "cpu"}
    launched(ACCELERATE_GRADIENT_ACCUMULATION_STEPS="4")
    assert refused(tmp_path, ACCELERATE).startswith(
        "the accelerate config: gradient_accumulation_steps = 4, and train.microbatch makes it 1; "
    )


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "has mixed_precision = bf16, and train.precision"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "has fsdp_version = 1; set it to 2."),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_ACTIVATION_CHECKPOINTING": "true"},
            "sets FSDP_ACTIVATION_CHECKPOINTING = true: use train.checkpoint_activations.",
        ),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "sets ACCELERATE_USE_MEGATRON_LM = true: Megatr"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "sets ACCELERATE_DYNAMO_BACKEND = INDUCTOR: "),
    ],
)  # fmt: skip
def test_what_the_accelerate_config_asks_otherwise_is_refused(
    tmp_path, launched, environment, said
):
    launched(**environment)
    assert refused(tmp_path, ACCELERATE).startswith(f"the accelerate config {said}")


def test_ranks_that_accelerate_did_not_start_are_missed(tmp_path, launched):
    launched(ACCELERATE_USE_CPU="True", MASTER_ADDR="127.0.0.1")
    assert refused(tmp_path, ACCELERATE, ranks=1).startswith(
        "the accelerate config asks for several processes and `accelerate launch` started one"
    )


@pytest.mark.parametrize("engine", ["native", "deepspeed"])
def test_an_accelerate_config_is_not_passed_over(tmp_path, launched, engine):
    launched(ACCELERATE_USE_FSDP="true")
    assert refused(tmp_path, f"parallel.engine={engine}") == (
        f"`accelerate launch` started this, and parallel.engine = {engine} would pass over its config; "
        "set parallel.engine=accelerate, or start with --ranks or torchrun."
    )


def test_memory_falls_with_the_stage(tmp_path):
    """Of a million parameters with one average on two ranks: 4 bytes each of weights, gradients, the
    optimizer's own weights, two moments and the average."""
    found = [
        placed(tmp_path, DEEPSPEED, f"parallel.deepspeed.stage={stage}").state_bytes(
            1_000_000, 1, False
        )
        for stage in range(4)
    ]
    assert found == [20e6, 16e6, 14e6, 12e6]
