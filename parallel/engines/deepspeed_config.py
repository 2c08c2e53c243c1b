"""The JSON that DeepSpeed is given: generated, with a user's own put over it where the two agree.

What the recipe decides, a user's JSON may repeat or leave "auto"; where it says otherwise it is
refused by name, for one of the two would silently lose.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args

from flows.errors import UserError
from parallel.precision import Precision

Stage = Literal[0, 1, 2, 3]
Json = dict[str, Any]

STAGE = "zero_optimization.stage"
OFFLOADS = {
    "offload_optimizer": "zero_optimization.offload_optimizer.device",
    "offload_parameters": "zero_optimization.offload_param.device",
}
# What a user's JSON may change. DeepSpeed's own timer waits for the device, twice a step.
DEFAULTS: Json = {
    "communication_data_type": "fp32",
    "timers": {"throughput": {"enabled": False}},
}
# Key of the JSON -> key of the recipe that decides it.
DECIDED = {
    "bf16.enabled": "train.precision",
    "gradient_accumulation_steps": "train.microbatch",
    "gradient_clipping": "optimizer.clip",
    "train_batch_size": "train.batch",
    "train_micro_batch_size_per_gpu": "train.microbatch",
    STAGE: "parallel.deepspeed.stage",
    **{key: f"parallel.deepspeed.{name}" for name, key in OFFLOADS.items()},
}
# Key of the JSON -> what to do instead.
REFUSED = {
    "amp": "use train.precision",
    "checkpoint": "checkpoints are flowmill's own, in run.dir",
    "compile": "use train.compile",
    "compression_training": "it would change the mathematics",
    "fp16": "use train.precision=bf16",
    "optimizer": "use the recipe's section optimizer",
    "scheduler": "use optimizer.schedule and optimizer.warmup",
    "tensor_parallel": "it does not go together with parallel.engine=deepspeed",
    "torch_autocast": "use train.precision=bf16",
    "zenflow": "it would change the mathematics",
    "zero_optimization.mics_shard_size": "use parallel.engine=native, parallel.strategy=hsdp",
    "zero_optimization.zenflow": "it would change the mathematics",
    "zero_optimization.zero_hpz_partition_size": "a second copy of the weights is not supported",
    "zero_optimization.zero_quantized_gradients": "it would change the mathematics",
    "zero_optimization.zero_quantized_weights": "it would change the mathematics",
}


def read(path: str | None) -> Json:
    """A user's JSON; nothing where there is none. Raises UserError if it cannot be read."""
    if path is None:
        return {}
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"parallel.deepspeed.config = {path} cannot be read ({error.strerror}); give the path of "
            "a DeepSpeed JSON, or leave it null."
        ) from None
    except ValueError as error:
        raise UserError(f"parallel.deepspeed.config = {path} is not JSON ({error}).") from None
    if not isinstance(found, dict):
        raise UserError(f"parallel.deepspeed.config = {path} is no JSON object; write {{...}}.")
    return found


def stage_of(asked: Stage | None, user: Json, where: str) -> Stage:
    """The recipe's stage, or the JSON's where the recipe leaves it open, or 2."""
    given = _at(user, STAGE)
    chosen = asked if asked is not None else 2 if given in (None, "auto") else given
    if chosen not in get_args(Stage):
        raise UserError(f"{where}: {STAGE} = {chosen!r} is not known; use 0, 1, 2 or 3.")
    return chosen


def offloaded(name: str, asked: bool | None, user: Json, where: str) -> bool:
    """Whether `offload_optimizer` or `offload_parameters` is on: by the recipe, or by the JSON."""
    device = _at(user, OFFLOADS[name])
    if device not in (None, "auto", "none", "cpu"):
        raise UserError(
            f"{where}: {OFFLOADS[name]} = {device!r} is not supported; use cpu or none."
        )
    return device == "cpu" if asked is None else asked


def generate(
    user: Json,
    where: str,
    *,
    stage: Stage,
    precision: Precision,
    batch: int,
    microbatch: int,
    accumulate: int,
    max_norm: float | None,
    offload_optimizer: bool,
    offload_parameters: bool,
) -> Json:
    """What DeepSpeed is given.

    user: their own JSON, and `where` it is from
    batch: samples a step over all ranks
    microbatch, accumulate: samples a forward on one rank, forwards a step; the last may be smaller
    max_norm: largest gradient norm, None for none
    Raises UserError naming the first key of `user` that cannot be followed.
    """
    _refuse_offload(stage, offload_optimizer, offload_parameters)
    # Stage 0 keeps float32 weights and computes in bfloat16 by autocast, as DDP does.
    low = precision == "bf16" and stage > 0
    zero: Json = {"stage": stage, "memory_efficient_linear": False}
    if offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    if offload_parameters:
        zero["offload_param"] = {"device": "cpu"}
    if stage in (1, 2) and not offload_optimizer:
        zero["compute_grad_norm"] = False  # the engine does, and does not wait for it
    made: Json = {
        "train_micro_batch_size_per_gpu": microbatch,
        "gradient_accumulation_steps": accumulate,
        "gradient_clipping": 0.0,  # the engine does this too
        "bf16": {"enabled": low, "check_grad_overflow": False},
        # Float32 would send stage 1 to another optimizer of DeepSpeed, with other flat tensors.
        "data_types": {"grad_accum_dtype": "bf16" if low and stage == 1 else "fp32"},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    decided = made | {"train_batch_size": batch, "gradient_clipping": max_norm or 0.0}
    _check(user, decided, where)
    # The batch is left out: DeepSpeed takes microbatches to be of one size, and they need not be.
    free = {key: value for key, value in user.items() if key != "train_batch_size"}
    return _over(DEFAULTS, _over(free, made))


def _refuse_offload(stage: Stage, offload_optimizer: bool, offload_parameters: bool) -> None:
    if offload_optimizer and stage == 0:
        raise UserError(
            "parallel.deepspeed.offload_optimizer = true needs an optimizer that is cut over the ranks; "
            "set parallel.deepspeed.stage to 1, 2 or 3."
        )
    if offload_parameters and stage != 3:
        raise UserError(
            "parallel.deepspeed.offload_parameters = true needs parameters that are cut over the ranks; "
            "set parallel.deepspeed.stage=3."
        )


def _check(user: Json, decided: Json, where: str) -> None:
    """Raises UserError for the first key that says what is not so, or what is not supported."""
    for key, value in _leaves(user):
        refused = next((name for name in REFUSED if f"{key}.".startswith(f"{name}.")), None)
        if refused is not None and not _off(value):
            raise UserError(f"{where}: {key} is not followed; drop it: {REFUSED[refused]}.")
        known = _at(decided, key)
        if value == "auto" or known is None or value == known:
            continue
        if key in DECIDED:
            raise UserError(
                f"{where}: {key} = {json.dumps(value)}, and {DECIDED[key]} makes it "
                f'{json.dumps(known)}; make the two agree, or write "auto".'
            )
        raise UserError(
            f'{where}: {key} = {json.dumps(value)}, and flowmill needs {json.dumps(known)}; write "auto".'
        )


def _off(value: Any) -> bool:
    """Whether a value says that a thing is not wanted: sizes of 1 and below mean one rank, or none."""
    few = isinstance(value, int) and not isinstance(value, bool) and value <= 1
    return value in (False, None, "auto") or few


def _leaves(value: Json, inside: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything that is not an object itself."""
    for key, inner in value.items():
        if isinstance(inner, dict):
            yield from _leaves(inner, f"{inside}{key}.")
        else:
            yield f"{inside}{key}", inner


def _at(value: Json, key: str) -> Any:
    """The value of a dotted key, None where there is none."""
    found: Any = value
    for part in key.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    return found


def _over(below: Json, above: Json) -> Json:
    """Both, object by object; `above` wins, and "auto" gives way to whatever is there."""
    made = dict(below)
    for key, value in above.items():
        inner = made.get(key)
        made[key] = (
            _over(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
        )
    return made
