"""The objective of models that predict a velocity, in a recipe."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from trainer.section import AnyObjective, AnySampling, Fraction, Positive, Section

NotNegative = Annotated[float, Field(ge=0.0)]
Above0 = Annotated[float, Field(gt=0.0)]


class TimeSection(Section):
    kind: Literal["uniform", "logit_normal", "mode", "u_shaped"] = "uniform"
    mean: float = Field(0.0, description="logit_normal: of the normal number")
    std: Above0 = Field(1.0, description="logit_normal: of the normal number")
    mode_scale: Annotated[float, Field(ge=-1.0, le=1.75)] = Field(
        1.29, description="mode: above 0 more of the middle of the path, below 0 more of its ends"
    )
    steepness: Annotated[float, Field(gt=0.0, le=1000.0)] = Field(
        4.0, description="u_shaped: the greater, the more of both ends"
    )
    shift: Above0 = Field(1.0, description="< 1 moves times towards the noise")
    stratified: bool = Field(
        False, description="a step draws one time from each of train.batch equal parts"
    )


class CouplingSection(Section):
    """Which noise an image is joined to, over the whole batch of all ranks."""

    kind: Literal["independent", "assignment", "entropic", "stable", "weighted"] = Field(
        "independent",
        description="assignment: optimal transport; entropic: drawn from a Sinkhorn plan; stable: the "
        "nearest first; weighted: independent noise, near pairs weigh more",
    )
    epsilon: Above0 | None = Field(
        None,
        description="entropic, weighted: in units of squared distance, which is about twice the number of "
        "dimensions; null: 2 objective.bridge^2",
    )
    group: Annotated[int, Field(ge=0)] = Field(
        0, description="samples coupled, or weighted, among themselves; 0: the whole batch"
    )

    @property
    def takes_epsilon(self) -> bool:
        return self.kind in ("entropic", "weighted")


class BaseSection(Section):
    """What paths begin at."""

    kind: Literal["noise", "inpainting", "super_resolution"] = "noise"
    tile: Positive = Field(4, description="inpainting: side of the tiles that are seen or not")
    seen: Fraction = Field(0.5, description="inpainting: share of the tiles that are seen")
    factor: Annotated[int, Field(ge=2)] = Field(
        2, description="super_resolution: pixels a side that become one"
    )
    noise: NotNegative = Field(0.1, description="super_resolution: noise added to what is left")


class BoundarySection(Section):
    """Ends of the linear path at which the velocity is exact, whatever the network says."""

    ends: Literal["none", "data", "both"] = "none"
    power: Annotated[float, Field(gt=1.0)] = Field(
        2.0, description="the greater, the nearer to the ends the network alone decides"
    )
    mean: list[float] | None = Field(
        None, description="both: the mean of the data, of each channel; 0 of normalised latents"
    )

    @model_validator(mode="after")
    def _both_need_the_mean(self) -> "BoundarySection":
        if self.ends == "both" and self.mean is None:
            raise ValueError(
                "ends = both needs the mean of the data, which the velocity of noise leads to; set "
                "objective.boundary.mean, or objective.boundary.ends=data"
            )
        return self


class ObjectiveSection(AnyObjective):
    """Flow matching, for models that predict a velocity."""

    kind: Literal["flow_matching"] = "flow_matching"
    path: Literal["linear", "gvp", "vp", "polynomial", "linear_vp"] = "linear"
    sigma_min: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        0.0, description="linear: noise left in the data at the end of the path"
    )
    exponent: Annotated[float, Field(ge=1.0)] = Field(
        2.0, description="polynomial: alpha = t^exponent"
    )
    prediction: Literal["velocity", "data", "noise", "score"] = "velocity"
    weighting: Literal["none", "velocity", "likelihood"] = Field(
        "none",
        description="velocity: the loss of the velocity that the prediction implies; likelihood: of the "
        "score, as bounds a diffusion's likelihood",
    )
    loss: Literal["squared", "pseudo_huber", "squared_cosine"] = "squared"
    time: TimeSection = TimeSection()
    coupling: CouplingSection = CouplingSection()
    bridge: NotNegative = Field(
        0.0, description="sigma of a Brownian bridge about the linear path; 0: none"
    )
    contrast: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        0.0, description="weight of the push away from another sample's target (0.05 as published)"
    )
    base: BaseSection = BaseSection()
    boundary: BoundarySection = BoundarySection()
    alignment: NotNegative = Field(
        0.0,
        description="weight of aligning tokens with features (REPA: 0.5); in Python alone, for no shards "
        "hold any",
    )

    @property
    def independent(self) -> bool:
        """Whether paths begin at noise that knows nothing of the image, so that scores are known."""
        return self.coupling.kind == "independent" and self.base.kind == "noise" and not self.bridge

    @model_validator(mode="after")
    def _an_epsilon(self) -> "ObjectiveSection":
        coupling = self.coupling
        if coupling.takes_epsilon and coupling.epsilon is None and not self.bridge:
            raise ValueError(
                f"coupling.kind = {coupling.kind} needs a scale of distances; set "
                "objective.coupling.epsilon, in units of squared distance, or objective.bridge"
            )
        return self


class SampleSection(AnySampling):
    """Of a velocity model: solving its differential equation."""

    solver: Literal[
        "euler", "heun", "midpoint", "rk4", "pseudo_corrector", "dopri5", "sde", "sde_heun"
    ] = "euler"
    steps: Positive = Field(20, description="solver steps from noise to data")
    times: list[float] | None = Field(
        None, description="in place of steps and time_shift: times from 0, noise, to 1"
    )
    guidance_low: Fraction = Field(0.0, description="guided where low <= t < high")
    guidance_high: Fraction = 1.0
    guidance_channels: Positive | None = Field(
        None, description="guide the first channels alone, DiT the first 3; null: all"
    )
    guidance_cosine: Annotated[float, Field(ge=-1.0, le=1.0)] | None = Field(
        None, description="guide a sample until both velocities are this alike; null: to the end"
    )
    diffusion: Literal["constant", "sbdm", "sigma", "linear", "decreasing", "bump"] = "sigma"
    diffusion_scale: Annotated[float, Field(ge=0)] = 1.0
    diffusion_last: Literal["tweedie", "mean", "euler"] = Field(
        "tweedie",
        description="the last step, without noise: to the mean of the data, by the drift "
        "or by the velocity",
    )
    time_shift: Annotated[float, Field(gt=0)] = 1.0

    @property
    def guided(self) -> bool:
        return self.guidance != 1.0

    def in_words(self) -> str:
        steps = self.steps if self.times is None else len(self.times) - 1
        taken = "" if self.solver == "dopri5" else f"{steps} steps, "
        return f"{self.solver}, {taken}guidance {self.guidance:g}"

    @model_validator(mode="after")
    def _an_interval(self) -> "SampleSection":
        if self.guidance_low >= self.guidance_high:
            raise ValueError(
                f"sample.guidance_low = {self.guidance_low} is not below sample.guidance_high = "
                f"{self.guidance_high}; lower it, for guidance acts where low <= t < high"
            )
        return self
