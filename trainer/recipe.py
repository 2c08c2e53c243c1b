"""The recipe: everything that decides a run, in one typed record. The only place where defaults live.

A recipe is read from YAML, changed by `section.key=value` overrides, checked as a whole, and written back,
complete, into the run's folder. Nothing in the environment changes the mathematics.
"""

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from flows.errors import UserError

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """Unknown keys are refused; values are what YAML says, never silently converted from text."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, allow_inf_nan=False)


class RunSection(Section):
    dir: str = Field(description="folder of this run; a checkpoint in it is resumed")


class DataSection(Section):
    train: str = Field(description="shards to train on: a path or URL with {00..07} braces or *")
    heldout: str | None = Field(None, description="shards kept for evaluation")
    image_size: Positive
    channels: Literal[1, 3] = 3
    classes: Positive
    flip: Fraction = Field(0.0, description="probability of a horizontal flip")
    lanes: Positive = Field(64, description="independent readers of the global order; fixes the order")
    window: Positive = Field(256, description="samples shuffled together within a lane")
    decoder: Literal["auto", "dali", "pillow"] = "auto"
    prefetch: Positive = Field(2, description="batches decoded ahead of the step")
    threads: Positive = Field(2, description="decoding threads a rank")


class ModelSection(Section):
    """A published name, or a size of your own; a name and a key together change that key alone."""

    family: Literal["dit"] = "dit"
    name: str | None = Field(None, description="a name of the zoo, e.g. SiT-S/2")
    patch: Positive | None = None
    width: Positive | None = None
    depth: Positive | None = None
    heads: Positive | None = None
    learn_sigma: bool = Field(False, description="two outputs a channel, as DiT has; the second is unused")


class TimeSection(Section):
    kind: Literal["uniform", "logit_normal"] = "uniform"
    mean: float = 0.0
    std: Annotated[float, Field(gt=0)] = 1.0
    shift: Annotated[float, Field(gt=0)] = Field(1.0, description="< 1 moves times towards the noise")


class ObjectiveSection(Section):
    kind: Literal["flow_matching"] = "flow_matching"
    path: Literal["linear", "gvp", "vp"] = "linear"
    prediction: Literal["velocity", "data", "noise"] = "velocity"
    weighting: Literal["none", "velocity"] = Field(
        "none", description="velocity: the loss of the velocity that the prediction implies"
    )
    label_drop: Fraction = Field(0.1, description="share of labels hidden, for guidance")
    time: TimeSection = TimeSection()


class OptimizerSection(Section):
    kind: Literal["adamw"] = "adamw"
    lr: Annotated[float, Field(gt=0)] = 1e-3
    betas: tuple[Fraction, Fraction] = (0.9, 0.99)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    warmup: Annotated[int, Field(ge=0)] = Field(100, description="steps of linear warm-up")
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    final_lr: Annotated[float, Field(ge=0)] = Field(0.0, description="learning rate of the last step")
    clip: Annotated[float, Field(gt=0)] | None = Field(1.0, description="largest gradient norm")


class TrainSection(Section):
    steps: Positive
    batch: Positive = Field(description="samples a step over all ranks: the batch of the science")
    microbatch: Positive | None = Field(
        None, description="samples a forward on one rank; null: the rank's whole share"
    )
    precision: Literal["fp32", "bf16"] = "fp32"
    checkpoint_activations: Annotated[int, Field(ge=0)] = Field(
        0, description="recompute every n-th block in backward; 0: none, 1: all"
    )
    compile: bool = False
    deterministic: bool = False
    max_skipped: Annotated[int, Field(ge=0)] = Field(
        10, description="steps with a non-finite gradient in a row before training stops"
    )
    ema: list[Annotated[float, Field(gt=0, lt=1)]] = Field(
        [0.999], description="decays of the averaged weights; the first is used to sample"
    )
    log_every: Positive = Field(10, description="steps between progress lines")


class ParallelSection(Section):
    strategy: Literal["none", "ddp", "fsdp", "hsdp"] | None = Field(
        None, description="null: none on one rank, fsdp on several"
    )
    replicate: Positive | None = Field(None, description="whole copies of the model; null: inferred")
    shard: Positive | None = Field(None, description="ranks one copy is cut over; null: inferred")
    reshard_after_forward: bool = True
    timeout_seconds: Positive = Field(300, description="a collective that takes longer is an error")


class CheckpointSection(Section):
    every: Positive = 500
    keep: Positive = Field(2, description="newest checkpoints kept")


class SampleSection(Section):
    every: Annotated[int, Field(ge=0)] = Field(0, description="steps between sample grids; 0: none")
    count: Positive = Field(40, description="samples in a grid while training")
    solver: Literal["euler", "heun", "midpoint", "dopri5", "sde"] = "euler"
    steps: Positive = Field(20, description="solver steps from noise to data")
    guidance: Annotated[float, Field(ge=0)] = Field(1.0, description="1: none")
    guidance_low: Fraction = Field(0.0, description="guided where low <= t < high")
    guidance_high: Fraction = 1.0
    diffusion: Literal["constant", "sbdm", "sigma", "linear", "decreasing", "bump"] = "sigma"
    diffusion_scale: Annotated[float, Field(ge=0)] = 1.0
    time_shift: Annotated[float, Field(gt=0)] = 1.0


class TrackingSection(Section):
    mlflow: bool = True
    uri: str | None = Field(None, description="null: sqlite file `mlflow.db` beside the run folder")
    experiment: str = "flowmill"


class Recipe(Section):
    name: str
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    run: RunSection
    data: DataSection
    model: ModelSection
    objective: ObjectiveSection = ObjectiveSection()
    optimizer: OptimizerSection = OptimizerSection()
    train: TrainSection
    parallel: ParallelSection = ParallelSection()
    checkpoint: CheckpointSection = CheckpointSection()
    sample: SampleSection = SampleSection()
    tracking: TrackingSection = TrackingSection()
