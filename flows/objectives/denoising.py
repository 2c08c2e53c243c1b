"""Teach a network the noise that a trained flow sees in noisy data (Gu et al. 2025, "STARFlow-V").

    L = E || d(x) + sigma grad log p(x) ||^2,  x = data + sigma noise

the mean over dimensions, with p the flow's density. The target costs a backward through the flow;
a trainer that trains the flow at the same time has it already, in the gradient of x
(`flows.samplers.denoise.noise_from_gradient`).
"""

from dataclasses import dataclass

from torch import Tensor

from flows.batch import Batch
from flows.objectives.likelihood import Likelihood
from flows.objectives.objective import Couple, Prepared
from flows.randomness import Draw
from flows.samplers.denoise import Flow, score


@dataclass(frozen=True)
class Denoising:
    """An objective, for `flows.models.denoiser.Denoiser`.

    flow: with its weights as they shall be
    trained_by: the objective that it was trained by, whose noise is to be found
    variance: (tokens, features) of the flow's prior, see `flows.objectives.likelihood.prior_variance`;
        None for 1
    """

    flow: Flow
    trained_by: Likelihood
    variance: Tensor | None = None

    @property
    def couple(self) -> Couple | None:
        """None: samples are independent."""
        return None

    def prepare(self, batch: Batch, draw: Draw) -> Prepared:
        """Noisy data as the flow was shown it, and the noise that the flow sees in it."""
        inputs = self.trained_by.prepare(batch, draw).inputs
        x = inputs.pop("x")
        target = -self.trained_by.noise * score(self.flow, x, inputs, self.variance)
        return Prepared(inputs={"x": x}, targets={"noise": target}, time=None)

    def loss(self, outputs: Tensor, targets: dict[str, Tensor]) -> Tensor:
        """(batch,) mean squared error of each sample, in float32."""
        return (outputs.float() - targets["noise"]).square().flatten(1).mean(1)
