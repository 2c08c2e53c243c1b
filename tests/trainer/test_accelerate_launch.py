"""`accelerate launch` with a config of the user's starts the same run, and any engine goes on with it."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.trainer import runs
from tests.trainer.test_layout_law import hold

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("accelerate") is None, reason="accelerate is not installed"
    ),
    pytest.mark.timeout(600),
]

STEPS = 20
CHANGES = (f"train.steps={STEPS}", "checkpoint.every=1000")
# As `accelerate config` writes them.
CONFIG = {
    "compute_environment": "LOCAL_MACHINE",
    "machine_rank": 0,
    "main_process_port": 0,
    "mixed_precision": "no",
    "num_machines": 1,
    "num_processes": 2,
    "same_network": True,
    "use_cpu": False,
}
FSDP = CONFIG | {
    "distributed_type": "FSDP",
    "fsdp_config": {
        "fsdp_version": 2,
        "fsdp_reshard_after_forward": True,
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_transformer_layer_cls_to_wrap": "Block",
        "fsdp_cpu_ram_efficient_loading": True,
        "fsdp_state_dict_type": "SHARDED_STATE_DICT",
        "fsdp_offload_params": False,
        "fsdp_activation_checkpointing": False,
    },
}
DEEPSPEED = CONFIG | {
    "distributed_type": "DEEPSPEED",
    "deepspeed_config": {
        "zero_stage": 3,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "offload_optimizer_device": "none",
        "offload_param_device": "none",
        "zero3_init_flag": False,
        "zero3_save_16bit_model": False,
    },
}
DDP = CONFIG | {"distributed_type": "MULTI_GPU"}


def launch(folder: Path, config: dict[str, object], *changes: str) -> str:
    """Train under `accelerate launch`; what was said."""
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config))
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(path)]
    train = ["-m", "launch", "train", runs.RECIPE, *runs.TINY, f"run.dir={folder}", *changes]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    found = subprocess.run(
        [*launcher, *train], env=environment, capture_output=True, text=True, timeout=240
    )
    assert found.returncode == 0, found.stderr
    return found.stdout + found.stderr


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one") / "run"
    runs.train_here(runs.recipe(folder, *CHANGES))
    return folder


def test_its_fsdp_trains_what_one_rank_trains(tmp_path, one):
    said = launch(tmp_path / "run", FSDP, *CHANGES, "parallel.engine=accelerate")
    assert "2 ranks (accelerate fsdp, replicate 1 x shard 2) on cpu" in said
    hold(tmp_path / "run", one)
    assert "shard" not in runs.manifests(one)[STEPS].layout
    assert runs.manifests(tmp_path / "run")[STEPS].layout.startswith("2 ranks, mesh ")


@pytest.mark.slow
def test_its_ddp_trains_what_one_rank_trains(tmp_path, one):
    said = launch(tmp_path / "run", DDP, *CHANGES, "parallel.engine=accelerate")
    assert "2 ranks (accelerate ddp, replicate 2 x shard 1) on cpu" in said
    hold(tmp_path / "run", one)


@pytest.mark.slow
def test_a_run_goes_from_launcher_to_launcher(tmp_path, one):
    """One rank, then Accelerate's DeepSpeed, then ours, then Accelerate's FSDP2."""
    folder, stops = tmp_path / "run", "optimizer.schedule=constant"
    whole = tmp_path / "whole"
    runs.train_here(runs.recipe(whole, *CHANGES, stops))

    def until(step: int) -> tuple[str, ...]:
        return (f"train.steps={step}", "checkpoint.every=1000", stops)

    runs.train_here(runs.recipe(folder, *until(5)))
    said = launch(folder, DEEPSPEED, *until(10), "parallel.engine=accelerate")
    assert "resuming" in said
    assert "from step 5" in said
    assert "(accelerate zero-3, replicate 1 x shard 2)" in said
    runs.train(folder, *until(15), "parallel.engine=deepspeed", ranks=2)
    launch(folder, FSDP, *until(20), "parallel.engine=accelerate")
    hold(folder, whole)


WRONG = {
    "precision": (
        FSDP | {"mixed_precision": "bf16"},
        "error: the accelerate config has mixed_precision = bf16, and train.precision = fp32; ",
    ),
    "class": (
        FSDP
        | {"fsdp_config": FSDP["fsdp_config"] | {"fsdp_transformer_layer_cls_to_wrap": "Bert"}},
        "error: the accelerate config has fsdp_transformer_layer_cls_to_wrap = Bert, and the model has",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", WRONG)
def test_what_its_config_asks_otherwise_is_refused_in_a_sentence(tmp_path, name):
    config, said = WRONG[name]
    with pytest.raises(AssertionError) as refused:
        launch(tmp_path / "run", config, *CHANGES, "parallel.engine=accelerate")
    assert said in str(refused.value)
