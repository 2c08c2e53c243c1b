"""Flow matching (Lipman et al. 2023; Liu et al. 2023): regress the velocity from noise to data.

L = E w(t) | v(x_t, t, c) - u |^2 with x_t = alpha_t data + sigma_t noise, u = alpha_t' data + sigma_t'
noise, the mean over dimensions. The network may predict the data, the noise or the score instead;
weighted by `velocity`, its loss is the loss of the velocity it implies.

What papers have added since are options of this one record: other paths and times, losses other than
the square, noise coupled to images over the global batch, a Brownian bridge, negatives, a base made of
the image, boundary conditions, features to align with.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from flows.bases import Base
from flows.batch import Batch
from flows.couplings import Coupling, other_samples
from flows.errors import UserError
from flows.objectives.boundary import Boundary
from flows.objectives.conditions import hidden, kept_conditions
from flows.objectives.losses import LossShape, compare, misalignment
from flows.objectives.objective import Couple, Prepared
from flows.objectives.output_mask import OutputMask
from flows.paths import LINEAR, Interpolation, Path, Prediction, TimeSupport, brownian_bridge
from flows.randomness import Draw
from flows.routed import Mixed
from flows.times import TimeDistribution

Weighting = Literal["none", "velocity", "likelihood"]

# Where a bridge's velocity or a likelihood's weight is infinite at the ends.
INSIDE = TimeSupport(1e-3, 1.0 - 1e-3)

# What a network returns: its prediction, or that and its tokens projected to an encoder's features, or
# that and what its routers of experts cost.
Outputs = Tensor | tuple[Tensor, Tensor] | Mixed


@dataclass(frozen=True)
class FlowMatching:
    """An objective. The options after `time` are off where nothing is said of them.

    weighting: `none`; `velocity`: the loss of the velocity that the prediction implies; `likelihood`:
        see `Path.likelihood_weight`. A score is compared as sigma score, in units of the noise.
    label_drop: share of labels (and texts) replaced by `null_label` (and zeros)
    null_label: the label of `no label`: the number of classes
    coupling: which noise each image is joined to; None for its own
    bridge: sigma of a Brownian bridge about the path; 0 is none. With an `entropic` coupling of epsilon
        2 sigma^2 the flow is that of the Schroedinger bridge (Tong et al. 2024, SB-CFM)
    contrast: lambda of - lambda | v - u' |^2, u' the target of another sample of the global batch
        (Stoica et al. 2025, "Contrastive flow matching"), as a mean over samples of which some labels are
        hidden: lambda is contrast / (1 - label_drop) for the others. The best v is
        (v* - lambda E u') / (1 - lambda)
    base: what paths begin at, made of the image; None for noise
    boundary: what makes the velocity exact at the ends
    alignment: weight of the misalignment with `features` (batch, tokens, width) of the batch's extras,
        for networks that also return their projected tokens (REPA; 0.5 as published)
    output_mask: which outputs of experts are left out, for networks of experts
    """

    path: Path
    prediction: Prediction
    weighting: Weighting
    label_drop: float
    null_label: int
    time: TimeDistribution
    shape: LossShape = "squared"
    coupling: Coupling | None = None
    bridge: float = 0.0
    contrast: float = 0.0
    base: Base | None = None
    boundary: Boundary | None = None
    alignment: float = 0.0
    output_mask: OutputMask | None = None

    def __post_init__(self) -> None:
        _check_path(self)
        _check_square(self)
        if self.base and (self.coupling or self.bridge or self.contrast or self.boundary):
            raise UserError(
                "objective.base makes the noise of an image of the image itself, which cannot be "
                "coupled, bridged, contrasted or known at the ends; drop objective.base or the others."
            )

    @property
    def couple(self) -> Couple | None:
        """None where samples are independent."""
        return self._couple if self.coupling or self.contrast else None

    @property
    def support(self) -> TimeSupport:
        """The times to train at."""
        own = self.path.support(self.prediction, sampling=False)
        if not self.bridge and self.weighting != "likelihood":
            return own
        return TimeSupport(max(own.low, INSIDE.low), min(own.high, INSIDE.high))

    def prepare(self, batch: Batch, draw: Draw) -> Prepared:
        """Noise, time and what is hidden by sample key, on the device of `draw.samples`."""
        t = self.support.rescale(self.time.draw(draw))
        noise = self._noise(batch, draw)
        point = self._point(batch.image, noise, t, draw)
        weight = self._weight(t)
        if "weight" in batch.extras:
            weight = weight * batch.extras["weight"]
        targets = {"prediction": self._target(batch.image, noise, point), "weight": weight}
        if self.prediction == "score":
            targets["sigma"] = self.path.coefficients(t, noise.dim()).sigma
        if self.contrast:
            image, other = batch.extras["negative_image"], batch.extras["negative_noise"]
            negative = self._point(image, other, t, draw)
            targets["negative"] = self._target(image, other, negative)
            targets["negative_weight"] = batch.extras["negative_weight"]
        if self.boundary:
            targets |= {"x": point.x, "t": t}
        if self.alignment:
            targets["features"] = _features(batch)
        told = kept_conditions(batch, draw, drop=self.label_drop, null_label=self.null_label)
        if self.output_mask:
            told["mask"] = self.output_mask(draw)
        return Prepared(inputs={"x": point.x, "t": t} | told, targets=targets, time=t)

    def loss(self, outputs: Outputs, targets: dict[str, Tensor]) -> Tensor:
        """(batch,) weighted loss of each sample, in float32; with what its routing costs."""
        if isinstance(outputs, Mixed):
            return self.loss(outputs.prediction, targets) + outputs.penalty
        output, projection = outputs if isinstance(outputs, tuple) else (outputs, None)
        prediction = output.to(torch.float32)
        if self.prediction == "score":
            prediction = prediction * targets["sigma"]
        if self.boundary:
            prediction = self.boundary(prediction, targets["x"], targets["t"])
        loss = compare(self.shape, prediction, targets["prediction"])
        if self.contrast:
            apart = compare(self.shape, prediction, targets["negative"])
            loss = loss - targets["negative_weight"] * apart
        loss = loss * targets["weight"]
        if not self.alignment:
            return loss
        if projection is None:
            raise UserError(
                f"objective.alignment = {self.alignment:g} needs a model that projects its tokens to "
                "an encoder's features; configure its projector, or set objective.alignment=0."
            )
        return loss + self.alignment * misalignment(projection, targets["features"])

    def velocity(self, outputs: Outputs, x: Tensor, t: Tensor) -> Tensor:
        """(batch, ...) velocity at `x` that the network's output implies, for samplers."""
        output = outputs[0] if isinstance(outputs, tuple) else outputs
        if self.boundary:
            return self.boundary(output, x, t)
        return self.path.to_velocity(self.prediction, output, x, t)

    def _noise(self, batch: Batch, draw: Draw) -> Tensor:
        """Where paths begin: what samples were joined to, what a base makes, or their own noise."""
        if "noise" in batch.extras:
            return batch.extras["noise"]
        if self.base:
            return self.base(batch.image, draw)
        return draw.normal("noise", tuple(batch.image.shape[1:]))

    def _point(self, image: Tensor, noise: Tensor, t: Tensor, draw: Draw) -> Interpolation:
        point = self.path.interpolate(image, noise, t)
        if not self.bridge:
            return point
        return brownian_bridge(point, t, draw.normal("bridge", tuple(noise.shape[1:])), self.bridge)

    def _target(self, image: Tensor, noise: Tensor, point: Interpolation) -> Tensor:
        match self.prediction:
            case "velocity":
                return point.velocity
            case "data":
                return image
            case "noise":
                return noise
            case "score":
                return -noise

    def _weight(self, t: Tensor) -> Tensor:
        kind: Prediction = "noise" if self.prediction == "score" else self.prediction
        match self.weighting:
            case "none":
                return torch.ones_like(t)
            case "velocity":
                return self.path.velocity_gain(kind, t).square()
            case "likelihood":
                return self.path.likelihood_weight(kind, t)

    def _couple(self, batch: Batch, whole: Batch, seed: int, step: int) -> Batch:
        """`batch` with `noise`, `weight` and negatives that all samples of the step decide."""
        if "noise" in batch.extras:
            raise UserError(
                "data.train joins each image to its own noise, which objective.coupling and "
                "objective.contrast would exchange; set objective.coupling.kind=independent and "
                "objective.contrast=0."
            )
        draw = Draw(seed, step, whole.position)
        noise, weight = draw.normal("noise", tuple(whole.image.shape[1:])), None
        if self.coupling:
            coupled = self.coupling(whole.image, noise, draw)
            noise, weight = coupled.noise, coupled.weight
        own = torch.searchsorted(whole.position, batch.position)
        extras = dict(batch.extras) | {"noise": noise[own]}
        if weight is not None:
            extras["weight"] = weight[own]
        if self.contrast:
            extras |= self._negatives(whole, noise, own, draw)
        return replace(batch, extras=extras)

    def _negatives(self, whole: Batch, noise: Tensor, own: Tensor, draw: Draw) -> dict[str, Tensor]:
        """Another sample for each of the samples `own`.

        A sample whose label is hidden is to be like any other, so it is pushed from none, and the
        others harder by as much. By their expected share, for few that a batch happens to show would be
        pushed harder than they are drawn.
        """
        other = other_samples(whole.label, own, draw.uniform("negative")[own])
        shown = ~hidden(draw, self.label_drop)
        weight = self.contrast / (1.0 - self.label_drop)
        pushed = shown[own] & (other != own)
        return {
            "negative_image": whole.image[other],
            "negative_noise": noise[other],
            "negative_weight": torch.where(pushed, weight, 0.0).to(torch.float32),
        }


def _check_path(objective: FlowMatching) -> None:
    """UserError for what is known of the linear path alone."""
    straight = objective.path.name == "linear" and objective.prediction == "velocity"
    for key in ("bridge", "boundary", "base"):
        if getattr(objective, key) and not straight:
            raise UserError(
                f"objective.{key} is for velocities on the linear path; set objective.path=linear and "
                f"objective.prediction=velocity, or drop objective.{key}."
            )
    for key in ("boundary", "base"):
        if getattr(objective, key) and objective.path is not LINEAR:
            raise UserError(
                f"objective.sigma_min leaves noise in the data, and objective.{key} counts on paths that "
                f"end at the data themselves; set objective.sigma_min=0, or drop objective.{key}."
            )


def _check_square(objective: FlowMatching) -> None:
    """UserError for what is known of squared errors alone, or leaves them without a minimum."""
    contrast, shape, weighting = objective.contrast, objective.shape, objective.weighting
    if contrast and shape != "squared":
        raise UserError(
            f"objective.contrast = {contrast:g} pushes squared errors apart, and "
            f"objective.loss = {shape} is another loss; set objective.loss=squared."
        )
    if contrast and contrast >= 1.0 - objective.label_drop:
        raise UserError(
            f"objective.contrast = {contrast:g} is not below 1 - objective.label_drop = "
            f"{1.0 - objective.label_drop:g}, from where on the push apart outweighs the loss; lower it "
            "(0.05 is usual)."
        )
    if weighting != "none" and shape != "squared":
        raise UserError(
            f"objective.weighting = {weighting} is the weight of a squared error, and objective.loss = "
            f"{shape} is another loss; set objective.loss=squared or objective.weighting=none."
        )


def _features(batch: Batch) -> Tensor:
    if "features" not in batch.extras:
        raise UserError(
            "objective.alignment needs an encoder's features beside each image, and the batch has none; "
            "set objective.alignment=0, or give them as `features` of its extras."
        )
    return batch.extras["features"]
