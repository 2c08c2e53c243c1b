"""The Accelerate engine: Hugging Face Accelerate prepares the model, by the user's `accelerate config`.

`accelerate launch` hands its config to the ranks as environment variables. Accelerate is left to wrap
the model (DDP, FSDP2 or DeepSpeed); what it makes is moved by the engine that such a model has here
anyway, so the mathematics is that of every other engine. What the config says and the recipe decides
must agree, and what Accelerate made must be what was asked for: it is known to fall back to DDP, or
to one process, without a word.
"""

import os
from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from types import ModuleType
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import nn

from flows.errors import UserError
from flows.initialise import rules_of
from parallel.engines import deepspeed
from parallel.engines.deepspeed import DeepSpeedEngine
from parallel.engines.deepspeed_config import OFFLOADS, STAGE, Json, read
from parallel.engines.engine import Start
from parallel.engines.native import NativeEngine
from parallel.execution import Execution, prepare_blocks
from parallel.fsdp import quiet
from parallel.initialise import fill_parameters
from parallel.parallelize import FlowModel, ParallelModel
from parallel.precision import Precision, gather_policy

Kind = Literal["none", "ddp", "fsdp", "deepspeed"]
CONFIG = "the accelerate config"
OFF = ("", "0", "false", "no", "none")
# Variable of the config, where it is on -> what to do instead.
REFUSED = {
    "ACCELERATE_DYNAMO_BACKEND": "use train.compile",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM is not supported",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "only DDP, FSDP2 and DeepSpeed are supported",
    "ACCELERATE_USE_SAGEMAKER": "SageMaker is not supported",
    "FSDP_ACTIVATION_CHECKPOINTING": "use train.checkpoint_activations",
    "FSDP_IGNORED_MODULES": "every module is sharded",
    "FSDP_OFFLOAD_PARAMS": "use DeepSpeed to keep parameters on the host",
}
# Kind -> the types that Accelerate may say it has made, by name.
TYPES = {
    "none": ("NO",),
    "ddp": ("MULTI_CPU", "MULTI_GPU"),
    "fsdp": ("FSDP",),
    "deepspeed": ("DEEPSPEED",),
}


def launched(world_size: int) -> Kind | None:
    """What the config asks for if `accelerate launch` started this process, else None."""
    if _on("ACCELERATE_USE_DEEPSPEED"):
        return "deepspeed"
    if _on("ACCELERATE_USE_FSDP"):
        return "fsdp"
    if "ACCELERATE_MIXED_PRECISION" not in os.environ:  # every launch sets it
        return None
    return "ddp" if world_size > 1 else "none"


def check(precision: Precision, world_size: int) -> None:
    """Raises UserError where the config asks for what is not supported, or the recipe decides otherwise."""
    for name, instead in REFUSED.items():
        if _on(name):
            raise UserError(f"{CONFIG} sets {name} = {os.environ[name]}: {instead}.")
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    ours = "bf16" if precision == "bf16" else "no"
    if launched(world_size) is not None and asked != ours:
        raise UserError(
            f"{CONFIG} has mixed_precision = {asked}, and train.precision = {precision}; make the two "
            f"agree ({ours} there, or another precision in the recipe)."
        )
    if launched(world_size) == "fsdp" and os.environ.get("FSDP_VERSION", "1") != "2":
        raise UserError(f"{CONFIG} has fsdp_version = 1; set it to 2.")
    if world_size == 1 and _on("ACCELERATE_USE_CPU") and "MASTER_ADDR" in os.environ:
        raise UserError(
            f"{CONFIG} asks for several processes and `accelerate launch` started one, for on CPUs it "
            "starts ranks by MPI alone; use `flowmill train --ranks N`, or `accelerate launch --multi_gpu`."
        )


def deepspeed_settings() -> Json:
    """What the config says to DeepSpeed, as the JSON it stands for."""
    found = read(os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE"))
    for name, key in {
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": STAGE,
        "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": OFFLOADS["offload_optimizer"],
        "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": OFFLOADS["offload_parameters"],
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "gradient_accumulation_steps",
        "ACCELERATE_GRADIENT_CLIPPING": "gradient_clipping",
    }.items():
        if (text := os.environ.get(name, "auto")) != "auto":
            *inside, last = key.split(".")
            place = found
            for part in inside:
                place = place.setdefault(part, {})
            place.setdefault(last, _number(text))
    return found


def build(
    model: nn.Module,
    kind: Kind,
    config: Json | None,
    execution: Execution,
    start: Start,
) -> NativeEngine | DeepSpeedEngine:
    """The engine of a `FlowModel` on the meta device that Accelerate has prepared; a collective.

    config: what DeepSpeed is given, where `kind` is deepspeed
    execution: its resharding after the forward, unless the accelerate config says it
    """
    if "FSDP_RESHARD_AFTER_FORWARD" in os.environ:
        execution = replace(execution, reshard_after_forward=_on("FSDP_RESHARD_AFTER_FORWARD"))
    if config is not None:
        deepspeed.load(start.device)  # before Accelerate does, for the device that this rank has
        accelerator = _accelerator(
            kind, start.device, {"deepspeed_plugin": _deepspeed_plugin(config)}
        )
        return deepspeed.build(
            model,
            config,
            execution,
            start,
            initialise=lambda *both: accelerator.prepare(*both)[0],
        )
    world = dist.group.WORLD
    assert world is not None
    return NativeEngine(
        _prepare(model, kind, execution, start),
        execution,
        start,
        data_rank=dist.get_rank(),
        data_size=dist.get_world_size(),
        data_groups=[world] if dist.get_world_size() > 1 else [],
        peer_groups=[],
    )


def _prepare(model: nn.Module, kind: Kind, execution: Execution, start: Start) -> ParallelModel:
    """The order of things is that of `parallel.parallelize`; only the wrapping is Accelerate's."""
    described = cast(FlowModel, model)
    rules, names = rules_of(described), [name for name, _ in model.named_parameters()]
    plugins = {}
    if kind == "fsdp":
        plugins["fsdp_plugin"] = _fsdp_plugin(
            model, execution.precision, execution.reshard_after_forward
        )
    prepare_blocks(model, described.blocks, execution)
    accelerator = _accelerator(kind, start.device, plugins)
    if kind == "fsdp":
        # Cut on the meta device, which Accelerate's own way, of a model and its optimizer, is not for.
        import_module("accelerate.utils").fsdp2_prepare_model(accelerator, model)
        quiet()
    model.to_empty(device=start.device)
    parameters = dict(zip(names, model.parameters(), strict=True))
    fill_parameters(parameters, rules, start.seed)
    described.reset_buffers()
    trained = model if kind == "fsdp" else accelerator.prepare_model(model)
    return ParallelModel(model, trained, parameters, {})


def _accelerator(kind: Kind, device: torch.device, plugins: Mapping[str, Any]) -> Any:
    """An `Accelerator` that has made what it was asked to."""
    accelerate = _load(kind)
    state = import_module("accelerate.state")
    on_cpu = device.type == "cpu"
    # It meets the ranks through the process group that is there, in the one way that works on CPUs.
    state.PartialState(cpu=on_cpu)
    if on_cpu and kind == "fsdp":
        # Accelerate shards on accelerators alone, though FSDP2 shards on any device; this is the
        # whole of the difference.
        state.PartialState._shared_state["distributed_type"] = state.DistributedType.MULTI_XPU
    plain = on_cpu and kind in ("none", "ddp")
    made = accelerate.Accelerator(mixed_precision="no", cpu=plain, **plugins)
    found = str(made.distributed_type.value)
    if found not in TYPES[kind] or made.num_processes != dist.get_world_size():
        raise UserError(
            f"Accelerate was asked for {kind} on {dist.get_world_size()} ranks and made {found} on "
            f"{made.num_processes}; look at `accelerate env`, or use parallel.engine=native."
        )
    return made


def _fsdp_plugin(model: nn.Module, precision: Precision, reshard_after_forward: bool) -> Any:
    """The config's plugin; where there is none, and where it names no class, our blocks are the units."""
    block = type(cast(FlowModel, model).blocks[0]).__name__
    os.environ.setdefault("FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP")
    named = (os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP") or block).split(",")
    known = {type(module).__name__ for module in model.modules()}
    if absent := [name for name in named if name not in known]:
        raise UserError(
            f"{CONFIG} has fsdp_transformer_layer_cls_to_wrap = {absent[0]}, and the model has no such "
            f"class; leave it empty, or name its blocks, {block}."
        )
    return import_module("accelerate").FullyShardedDataParallelPlugin(
        fsdp_version=2,
        reshard_after_forward=reshard_after_forward,
        mixed_precision_policy=gather_policy(precision),
        transformer_cls_names_to_wrap=named,
        cpu_ram_efficient_loading=False,  # no rank ever holds the whole model
    )


def _deepspeed_plugin(config: Json) -> Any:
    # The fields of the config are in `config` already; given twice they would be refused.
    os.environ.pop("ACCELERATE_CONFIG_DS_FIELDS", None)
    return import_module("accelerate").DeepSpeedPlugin(hf_ds_config=config)


def _load(kind: Kind) -> ModuleType:
    if kind == "deepspeed":
        try:
            import_module("transformers")
        except ImportError:
            raise UserError(
                "Accelerate reads DeepSpeed's configuration by the package transformers, which is not "
                "installed; run pip install transformers, or use parallel.engine=deepspeed."
            ) from None
    return import_module("accelerate")


def _on(name: str) -> bool:
    return os.environ.get(name, "").lower() not in OFF


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
