"""Features of Inception v3 (Szegedy et al. 2016) as the Fréchet inception distance takes them, from a
local file of its weights.

The network is the one ported from TensorFlow for that distance (Heusel et al. 2017): means leave the
padding out, and the last block pools by maximum. Its weights say how large its kernels are. Images are
resized bilinearly to 299 x 299, as PyTorch programs do it, whose values differ a little from
TensorFlow's.
"""

import hashlib
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from flows.errors import UserError
from flows.metrics.features import Features

SIDE = 299
EPSILON = 1e-3
WIDTH = 2048
# The classifiers, and counters of batches.
UNUSED = ("fc.", "AuxLogits.")
# What reading a file that holds no tensors ends in.
DAMAGE = (
    OSError, SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError,
    TypeError, AttributeError, IndexError,
)  # fmt: skip

Weights = Mapping[str, Tensor]
Pool = Callable[[Tensor], Tensor]


def inception_features(file: Path, *, device: torch.device) -> Features:
    """2048 features of images of 1 or 3 channels.

    file: weights by the names of torchvision's Inception v3, as .safetensors or a plain state
        dictionary of torch (which is read as tensors alone: nothing is unpickled that could run)
    Raises UserError if it is not that.
    """
    weights = {name: value.to(device) for name, value in _read(file).items()}
    size = (1, 3, SIDE, SIDE)
    try:
        with torch.device("meta"):
            shape = trunk({k: v.to("meta") for k, v in weights.items()}, torch.empty(size)).shape
    except (KeyError, RuntimeError) as error:
        raise UserError(
            f"{file}: is not Inception v3 by torchvision's names ({error}); give the weights of the "
            "network that FID takes its features from."
        ) from error
    if shape != (1, WIDTH):
        raise UserError(f"{file}: gives {shape[1]} features, not the {WIDTH} of Inception v3.")

    @torch.inference_mode()
    def extract(images: Tensor) -> Tensor:
        x = images.to(device, torch.float32).expand(-1, 3, -1, -1)
        x = F.interpolate(x, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
        # Matrix products in full float32 on a GPU as well.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return trunk(weights, x).double()

    return Features(f"inception2048-{_digest(file)}", extract)


def trunk(weights: Weights, x: Tensor) -> Tensor:
    """(n, 3, 299, 299) in [-1, 1] -> (n, 2048)."""
    net = _Net(weights)
    x = net.chain(x, "Conv2d_1a_3x3", stride=2, padded=False)
    x = net.chain(x, "Conv2d_2a_3x3", padded=False)
    x = _shrink(net.chain(x, "Conv2d_2b_3x3"))
    x = net.chain(x, "Conv2d_3b_1x1")
    x = _shrink(net.chain(x, "Conv2d_4a_3x3", padded=False))
    for block in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
        x = net.block(block).small(x)
    x = net.block("Mixed_6a").halving_small(x)
    for block in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
        x = net.block(block).factored(x)
    x = net.block("Mixed_7a").halving_factored(x)
    x = net.block("Mixed_7b").expanded(x, _mean)
    x = net.block("Mixed_7c").expanded(x, _most)
    return x.mean((2, 3))


class _Net:
    """Weights below a prefix, and the blocks that can be made of them."""

    def __init__(self, weights: Weights, prefix: str = "") -> None:
        self._weights, self._prefix = weights, prefix

    def block(self, name: str) -> "_Net":
        return _Net(self._weights, f"{name}.")

    def chain(self, x: Tensor, *names: str, stride: int = 1, padded: bool = True) -> Tensor:
        """Convolutions with norm and ReLU, one after the other; the last one has the stride."""
        for name in names:
            last = name == names[-1]
            x = self._convolve(x, f"{self._prefix}{name}", stride if last else 1, padded)
        return x

    def _convolve(self, x: Tensor, name: str, stride: int, padded: bool) -> Tensor:
        kernel = self._weights[f"{name}.conv.weight"]
        height, width = kernel.shape[2:]
        padding = (height // 2, width // 2) if padded and stride == 1 else (0, 0)
        x = F.conv2d(x, kernel, stride=stride, padding=padding)
        mean, variance, scale, shift = (
            self._weights[f"{name}.bn.{part}"]
            for part in ("running_mean", "running_var", "weight", "bias")
        )
        return F.batch_norm(x, mean, variance, scale, shift, eps=EPSILON).relu_()

    def small(self, x: Tensor) -> Tensor:
        """Kernels of 1, 3 and 5."""
        return torch.cat(
            (
                self.chain(x, "branch1x1"),
                self.chain(x, "branch5x5_1", "branch5x5_2"),
                self.chain(x, "branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"),
                self.chain(_mean(x), "branch_pool"),
            ),
            1,
        )

    def halving_small(self, x: Tensor) -> Tensor:
        return torch.cat(
            (
                self.chain(x, "branch3x3", stride=2),
                self.chain(x, "branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3", stride=2),
                _shrink(x),
            ),
            1,
        )

    def factored(self, x: Tensor) -> Tensor:
        """Kernels of 7, as 1 x 7 and 7 x 1."""
        return torch.cat(
            (
                self.chain(x, "branch1x1"),
                self.chain(x, *(f"branch7x7_{i}" for i in range(1, 4))),
                self.chain(x, *(f"branch7x7dbl_{i}" for i in range(1, 6))),
                self.chain(_mean(x), "branch_pool"),
            ),
            1,
        )

    def halving_factored(self, x: Tensor) -> Tensor:
        return torch.cat(
            (
                self.chain(x, "branch3x3_1", "branch3x3_2", stride=2),
                self.chain(x, *(f"branch7x7x3_{i}" for i in range(1, 5)), stride=2),
                _shrink(x),
            ),
            1,
        )

    def expanded(self, x: Tensor, pool: Pool) -> Tensor:
        """Branches that end in two kernels side by side."""
        three = self.chain(x, "branch3x3_1")
        double = self.chain(x, "branch3x3dbl_1", "branch3x3dbl_2")
        return torch.cat(
            (
                self.chain(x, "branch1x1"),
                self.chain(three, "branch3x3_2a"),
                self.chain(three, "branch3x3_2b"),
                self.chain(double, "branch3x3dbl_3a"),
                self.chain(double, "branch3x3dbl_3b"),
                self.chain(pool(x), "branch_pool"),
            ),
            1,
        )


def _mean(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def _most(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, stride=1, padding=1)


def _shrink(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, stride=2)


def _read(file: Path) -> dict[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            found = load_file(file)
        else:
            found = torch.load(file, map_location="cpu", weights_only=True)
    except DAMAGE as error:
        raise UserError(
            f"{file}: cannot be read as tensors ({type(error).__name__}); give a .safetensors "
            "file or a state dictionary saved by torch.save."
        ) from error
    if not isinstance(found, dict) or not all(isinstance(v, Tensor) for v in found.values()):
        raise UserError(f"{file}: holds no state dictionary; give one of Inception v3.")
    return {
        name: value.float()
        for name, value in found.items()
        if not name.startswith(UNUSED) and not name.endswith("num_batches_tracked")
    }


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:8]
