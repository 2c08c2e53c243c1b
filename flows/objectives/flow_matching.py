"""Flow matching (Lipman et al. 2023; Liu et al. 2023): regress the velocity from noise to data.

L = E || v(x_t, t, label) - u ||^2 with x_t = alpha_t data + sigma_t noise, u = alpha_t' data +
sigma_t' noise, the mean over dimensions. The network may predict the data or the noise instead;
weighted by `velocity`, its loss is the loss of the velocity it implies.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from flows.batch import Batch
from flows.objectives.objective import Couple, Prepared
from flows.paths import Path
from flows.randomness import Draw
from flows.times import TimeDistribution


@dataclass(frozen=True)
class FlowMatching:
    """An objective.

    label_drop: share of labels replaced by `null_label`, so that the network also learns p(x) for
        classifier-free guidance (Ho and Salimans 2022)
    null_label: the label of `no label`: the number of classes
    """

    path: Path
    prediction: Literal["velocity", "data", "noise"]
    weighting: Literal["none", "velocity"]
    label_drop: float
    null_label: int
    time: TimeDistribution

    @property
    def couple(self) -> Couple | None:
        """None: samples are independent."""
        return None

    def prepare(self, batch: Batch, draw: Draw) -> Prepared:
        """Noise, time and label drop by sample key, on the device of `draw.samples`."""
        shape = tuple(batch.image.shape[1:])
        noise = draw.normal("noise", shape)
        support = self.path.support(self.prediction, sampling=False)
        t = support.rescale(self.time(draw.uniform("time")))
        dropped = draw.uniform("label_drop") < self.label_drop
        label = torch.where(dropped, self.null_label, batch.label)
        point = self.path.interpolate(batch.image, noise, t)
        candidates = {"velocity": point.velocity, "data": batch.image, "noise": noise}
        return Prepared(
            inputs={"x": point.x, "t": t, "label": label},
            targets={"prediction": candidates[self.prediction], "weight": self._weight(t)},
            time=t,
        )

    def loss(self, outputs: Tensor, targets: dict[str, Tensor]) -> Tensor:
        """(batch,) weighted mean squared error of each sample, in float32."""
        error = outputs.to(torch.float32) - targets["prediction"]
        return error.square().flatten(1).mean(1) * targets["weight"]

    def velocity(self, outputs: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """(batch, ...) velocity at `x` that the network's output implies, for samplers."""
        return self.path.to_velocity(self.prediction, outputs, x, t)

    def _weight(self, t: Tensor) -> Tensor:
        if self.weighting == "none":
            return torch.ones_like(t)
        return self.path.velocity_gain(self.prediction, t).square()
