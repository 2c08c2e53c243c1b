"""What a recipe says of the run: where it lies, how it is trained, over which ranks, what it keeps."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from parallel.activation import Recompute
from trainer.section import Below1, Positive, Section, Text

PipelineSchedule = Literal[
    "gpipe",
    "1f1b",
    "interleaved1f1b",
    "looped_bfs",
    "interleaved_zero_bubble",
    "zbv",
    "dualpipev",
    "bitpipe",
    "chimera",
]
# Keys of `parallel` that cut the work on one sample.
SPLITTING = ("tp", "sequence", "cp", "context", "ep", "pp", "schedule", "chunks")


class RunSection(Section):
    dir: Text = Field(description="folder of this run; a checkpoint in it is resumed")

    @field_validator("dir")
    @classmethod
    def _home(cls, value: str) -> str:
        """`~/` means the same here as it does to a shell, which does not look behind `run.dir=`."""
        return str(Path(value).expanduser()) if value.startswith("~/") else value


class OptimizerSection(Section):
    kind: Literal["adamw"] = "adamw"
    lr: Annotated[float, Field(gt=0)] = 1e-3
    betas: tuple[Below1, Below1] = (0.9, 0.99)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    warmup: Annotated[int, Field(ge=0)] = Field(100, description="steps of linear warm-up")
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    final_lr: Annotated[float, Field(ge=0)] = Field(
        0.0, description="learning rate of the last step"
    )
    clip: Annotated[float, Field(gt=0)] | None = Field(1.0, description="largest gradient norm")


class TrainSection(Section):
    steps: Annotated[int, Field(ge=0, lt=2**31)] = Field(
        0, description="0: the length is given in samples or epochs"
    )
    samples: Annotated[int, Field(ge=0, lt=2**63)] = Field(
        0, description="in place of steps; rounded up"
    )
    epochs: Annotated[float, Field(ge=0)] = Field(
        0.0, description="in place of steps: passes over the one data set; rounded up to a step"
    )
    batch: Positive = Field(description="samples a step over all ranks: the batch of the science")
    microbatch: Positive | None = Field(
        None, description="samples a forward on one rank; null: the rank's whole share"
    )
    precision: Literal["fp32", "bf16"] = "fp32"
    float8: bool = Field(
        False,
        description="matrix products of blocks in float8, by torchao, on devices that have it",
    )
    checkpoint_activations: Annotated[int, Field(ge=0)] = Field(
        0, description="recompute every n-th block in backward; 0: none, 1: all"
    )
    checkpoint_keeps: Literal["nothing", "products"] = Field(
        "nothing",
        description="what a recomputed block keeps; products: results of matrix products and attention",
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
    trace_experts: Annotated[int, Field(ge=0)] = Field(
        0,
        description="steps between lines of routing.jsonl, which say from which experts tokens go to which; "
        "0: none",
    )

    @property
    def recompute(self) -> Recompute:
        """The two keys that say what is recomputed, as one."""
        return Recompute(self.checkpoint_activations, self.checkpoint_keeps)

    @model_validator(mode="after")
    def _float8_in_bf16(self) -> "TrainSection":
        if self.float8 and self.precision != "bf16":
            raise ValueError(
                f"train.float8 = true makes products of what is else bfloat16, and train.precision = "
                f"{self.precision}; set train.precision=bf16, or drop it"
            )
        return self

    @model_validator(mode="after")
    def _keeps_of_something(self) -> "TrainSection":
        if self.checkpoint_keeps != "nothing" and not self.checkpoint_activations:
            raise ValueError(
                f"train.checkpoint_keeps = {self.checkpoint_keeps} says what recomputed blocks keep, and "
                "train.checkpoint_activations = 0 recomputes none; set that to 1, or drop the key"
            )
        return self

    @model_validator(mode="after")
    def _one_length(self) -> "TrainSection":
        given = [name for name in ("steps", "samples", "epochs") if getattr(self, name)]
        if len(given) != 1:
            found = " and ".join(f"train.{name}" for name in given) or "nothing"
            raise ValueError(
                f"{found} says how long to train; give exactly one of train.steps, train.samples "
                "and train.epochs, and 0 for the others"
            )
        return self


class DeepSpeedSection(Section):
    """ZeRO. A key that is null is as the user's own JSON says, where there is one."""

    stage: Literal[0, 1, 2, 3] | None = Field(
        None, description="what is cut: 1 optimizer, 2 gradients too, 3 parameters too; null: 2"
    )
    offload_optimizer: bool | None = Field(None, description="keep the optimizer on the host")
    offload_parameters: bool | None = Field(None, description="and the parameters; stage 3 alone")
    config: Text | None = Field(
        None, description="path of a DeepSpeed JSON with further keys; what it repeats must agree"
    )


class ParallelSection(Section):
    engine: Literal["native", "deepspeed", "accelerate"] = Field(
        "native", description="what moves the model; none of them changes the mathematics"
    )
    strategy: Literal["none", "ddp", "fsdp", "hsdp"] | None = Field(
        None, description="null: none on one rank, fsdp on several"
    )
    replicate: Positive | None = Field(
        None, description="whole copies of the model; null: inferred"
    )
    shard: Positive | None = Field(None, description="ranks one copy is cut over; null: inferred")
    tp: Positive = Field(1, description="ranks that each matrix product is cut over")
    sequence: bool = Field(
        False, description="under tp: between matrix products, tokens are cut over its ranks too"
    )
    cp: Positive = Field(1, description="ranks that each sequence is cut over")
    ep: Positive = Field(
        1, description="ranks that experts are divided over, among the shard x cp of one copy"
    )
    pp: Positive = Field(
        1, description="ranks that the network's layers are cut over, as a pipeline"
    )
    schedule: PipelineSchedule = Field(
        "1f1b",
        description="under pp, else unused: the order of its work, see `flowmill pipeline show`",
    )
    chunks: Positive | None = Field(
        None,
        description="under pp, else unused: stages on each rank, where the schedule leaves it open; null: 2",
    )
    context: Literal["ulysses", "ring"] = Field(
        "ulysses",
        description="under cp: attention exchanges heads for tokens, or passes keys and values around",
    )
    reshard_after_forward: bool = Field(
        True,
        description="under FSDP: gather weights again for the backward, which takes less memory",
    )
    offload: bool = Field(
        False, description="under FSDP: weights, averages and the optimizer lie on the host"
    )
    timeout_seconds: Positive = Field(300, description="a collective that takes longer is an error")
    deepspeed: DeepSpeedSection = DeepSpeedSection()

    @model_validator(mode="after")
    def _keys_of_the_engine(self) -> "ParallelSection":
        """A key that another engine would follow must not be passed over in silence."""
        others = {
            "native": {"deepspeed"},
            "deepspeed": {"strategy", "replicate", "shard", "offload", *SPLITTING},
            "accelerate": {"deepspeed", "replicate", "shard", "offload", *SPLITTING},
        }[self.engine]
        for name in sorted(others):
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(
                    f"parallel.{name} is given, and parallel.engine = {self.engine} has no use for it; "
                    "drop it, or choose another engine"
                )
        return self

    @model_validator(mode="after")
    def _context_of_cp(self) -> "ParallelSection":
        if self.cp == 1 and self.context != type(self).model_fields["context"].default:
            raise ValueError(
                f"parallel.context = {self.context} says how ranks share sequences, and parallel.cp = 1 "
                "gives each rank whole ones; set parallel.cp, or drop it"
            )
        return self

    @model_validator(mode="after")
    def _sequence_over_tp(self) -> "ParallelSection":
        if self.sequence and self.tp == 1:
            raise ValueError(
                "parallel.sequence = true cuts tokens over the parallel.tp ranks of a matrix product, and "
                "parallel.tp = 1; set parallel.tp, or cut sequences by parallel.cp"
            )
        return self


class CheckpointSection(Section):
    every: Positive = 500
    keep: Positive = Field(2, description="newest checkpoints kept")


class TrackingSection(Section):
    mlflow: bool = True
    uri: Text | None = Field(
        None, description="null: sqlite file `mlflow.db` beside the run folder"
    )
    experiment: Text = "flowmill"
