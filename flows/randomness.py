"""Random numbers that belong to the sample, not to the rank: the first promise rests on this file.

Every number is a pure function of (seed, stream name, step, sample, element), computed by the block
cipher Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") in int64
tensor operations. There is no state: nothing is saved, nothing is skipped, and it does not matter
which rank draws.

The same bits come out on CPU and CUDA and however samples are grouped into batches. Library `log`,
`sin`, `cos` and even `sqrt` differ between devices, and on CPU between the vectorised body and the
scalar tail of one tensor, so the normal transform uses none of them: it is built of operations that
torch rounds exactly as IEEE 754 asks (+ - *, tensor by tensor division) and of integer ones, each
its own eager call. Two habits would break this and are avoided: dividing by a Python number (CUDA
multiplies by the reciprocal) and compiling (a compiler fuses a multiplication and an addition into
one rounding).
"""

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor

Words = tuple[Tensor, Tensor, Tensor, Tensor]

MASK32 = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10

# The logarithm keeps its mantissa in [sqrt(1/2), sqrt(2)); the bits of the lower end as float32.
SQRT_HALF_BITS = 0x3F3504F3
# Half the bits of a float plus this are the bits of its square root, to 3.5 %.
SQRT_BITS = 0x1FBD1DF5
# log 2 in two parts: an exponent times the first is exact.
LOG2_HIGH = 0.693359375
LOG2_LOW = -2.12194440e-4
# 2 artanh(s) = 2s + s^3 (2/3 + 2/5 s^2 + ...), for |s| <= 0.172
LOG_SERIES = (2 / 9, 2 / 7, 2 / 5, 2 / 3)
# Minimax on [-pi/4, pi/4]: sin x = x + x^3 (...), cos x = 1 - x^2 / 2 + x^4 (...)
SIN_SERIES = (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1)
COS_SERIES = (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2)


@dataclass(frozen=True)
class Draw:
    """All randomness of one step for a few samples.

    seed, step: integers in [0, 2^63)
    samples: (batch,) int64 place of each sample in the global stream, on the device of the numbers
    """

    seed: int
    step: int
    samples: Tensor

    def uniform(self, stream: str, shape: tuple[int, ...] = ()) -> Tensor:
        """(batch, *shape) float32 in the open interval (0, 1)."""
        return self._shaped(uniforms(self._words(stream, shape)), shape)

    def normal(self, stream: str, shape: tuple[int, ...] = ()) -> Tensor:
        """(batch, *shape) float32, standard normal."""
        return self._shaped(normals(self._words(stream, shape)), shape)

    def _words(self, stream: str, shape: tuple[int, ...]) -> Words:
        blocks = -(-math.prod(shape) // 4)
        if blocks > MASK32:
            raise ValueError(f"a sample of shape {shape} needs more than 2^34 random numbers")
        key0, key1, word3, _ = _hash(b"draw", self.seed, self.step, stream)
        samples = self.samples[:, None]
        block = torch.arange(blocks, device=samples.device)
        counter = (block, samples & MASK32, samples >> 32, samples.new_full((), word3))
        return philox(counter, (key0, key1))

    def _shaped(self, numbers: Tensor, shape: tuple[int, ...]) -> Tensor:
        wanted = numbers[:, : math.prod(shape)].contiguous()
        return wanted.view(len(self.samples), *shape)


def uniform_runs(seed: int, stream: str, start: Tensor, count: int) -> Tensor:
    """(runs, count) float32 in (0, 1): numbers start, start + 1, ... of an endless stream.

    start: (runs,) int64, not negative; a number depends on its place, not on where its run began
    """
    return _cut(uniforms(_run_words(seed, stream, start, count)), start, count)


def normal_runs(seed: int, stream: str, start: Tensor, count: int) -> Tensor:
    """(runs, count) float32 standard normal: numbers start, start + 1, ... of an endless stream."""
    return _cut(normals(_run_words(seed, stream, start, count)), start, count)


def philox(counter: Words, key: tuple[int, int]) -> Words:
    """Philox4x32-10: four words of 32 bits from a counter of four and a key of two.

    Words are held in int64 tensors, in [0, 2^32), and broadcast against each other. The product of
    two words wraps in int64 with the right bits; its high half is a shift, whose sign bits the mask
    removes.
    """
    shape = torch.broadcast_shapes(*(word.shape for word in counter))
    layout = torch.contiguous_format
    even0, odd1, even2, odd3 = (word.expand(shape).clone(memory_format=layout) for word in counter)
    product0, product2 = torch.empty_like(even0), torch.empty_like(even2)
    for r in range(ROUNDS):
        key0, key1 = ((k + r * step) & MASK32 for k, step in zip(key, KEY_STEPS, strict=True))
        torch.mul(even0, MULTIPLIERS[0], out=product0)
        torch.mul(even2, MULTIPLIERS[1], out=product2)
        torch.bitwise_right_shift(product2, 32, out=even0)
        torch.bitwise_right_shift(product0, 32, out=even2)
        even0.bitwise_xor_(odd1).bitwise_xor_(key0).bitwise_and_(MASK32)
        even2.bitwise_xor_(odd3).bitwise_xor_(key1).bitwise_and_(MASK32)
        # The odd words are the low halves. They stay unmasked: what they meet next is masked.
        odd1, odd3, product0, product2 = product2, product0, odd1, odd3
    return even0, odd1.bitwise_and_(MASK32), even2, odd3.bitwise_and_(MASK32)


def uniforms(words: Words) -> Tensor:
    """(..., 4 blocks) float32 in (0, 1) from words (..., blocks): (23 bits + 1/2) / 2^23."""
    bits = torch.stack([word.to(torch.int32) for word in words], -1).flatten(-2)
    return ((bits >> 9) & 0x7FFFFF).to(torch.float32).add_(0.5).mul_(2.0**-23)


def normals(words: Words) -> Tensor:
    """(..., 4 blocks) float32 standard normal from words of shape (..., blocks), by Box and Muller.

    One word of a pair gives the radius sqrt(-2 log u), at most 6.66. The other gives the angle: 30
    bits an angle in [-pi/4, pi/4], one the sign of its cosine, one whether sine and cosine change
    places.
    """
    first, second, third, fourth = (word.to(torch.int32) for word in words)
    angle = torch.stack([second, fourth], -1)
    radius = torch.stack([first, third], -1)
    u = ((radius >> 1) & 0x7FFFFFFF).to(torch.float32).add_(0.5).mul_(2.0**-31)
    # u rounds to 1 once in 2^25 draws; the square root wants a positive number.
    length = sqrt(log(u).mul_(-2.0).clamp_min_(2.0**-24))
    sine, cosine = sin_cos((angle << 2).to(torch.float32).add_(2.0).mul_(math.pi / 2**33))
    sine.mul_(length)
    cosine.mul_(length)
    cosine.view(torch.int32).bitwise_xor_(angle & -(2**31))
    swap = (angle & 2**30).to(torch.bool)
    pair = torch.stack([torch.where(swap, sine, cosine), torch.where(swap, cosine, sine)], -1)
    return pair.flatten(-3)


def sqrt(x: Tensor) -> Tensor:
    """The root of positive normal float32 x, to 2e-7; the same bits on every device."""
    root = ((x.view(torch.int32) >> 1) + SQRT_BITS).view(torch.float32)
    for _ in range(3):  # Heron: an error e becomes e^2 / 2
        root.add_(x / root).mul_(0.5)
    return root


def log(u: Tensor) -> Tensor:
    """log u for positive normal float32 u, to 2e-7 relative; the same bits on every device."""
    bits = u.view(torch.int32) - SQRT_HALF_BITS
    exponent = (bits >> 23).to(torch.float32)
    mantissa = bits.bitwise_and_(0x7FFFFF).add_(SQRT_HALF_BITS).view(torch.float32)
    s = (mantissa - 1.0).div_(mantissa + 1.0)
    square = s * s
    tail = _horner(square, LOG_SERIES).mul_(square).mul_(s)
    tail.add_(exponent * LOG2_LOW).add_(s.mul_(2.0))
    return tail.add_(exponent.mul_(LOG2_HIGH))


def sin_cos(x: Tensor) -> tuple[Tensor, Tensor]:
    """(sin x, cos x) for float32 x in [-pi/4, pi/4], to 1e-7; the same bits on every device."""
    square = x * x
    sine = _horner(square, SIN_SERIES).mul_(square).mul_(x).add_(x)
    cosine = _horner(square, COS_SERIES).mul_(square).mul_(square)
    return sine, cosine.add_(square.mul_(-0.5)).add_(1.0)


def _horner(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    """The polynomial with these coefficients, highest power first."""
    value = x * coefficients[0]
    for coefficient in coefficients[1:-1]:
        value.add_(coefficient).mul_(x)
    return value.add_(coefficients[-1])


def _hash(purpose: bytes, seed: int, step: int, stream: str) -> tuple[int, int, int, int]:
    """Four words of 32 bits in which every bit of the arguments matters; stable for ever."""
    text = seed.to_bytes(8, "little") + step.to_bytes(8, "little") + stream.encode()
    digest = hashlib.blake2b(text, digest_size=16, person=purpose).digest()
    first, second, third, fourth = (
        int.from_bytes(digest[i : i + 4], "little") for i in range(0, 16, 4)
    )
    return first, second, third, fourth


def _run_words(seed: int, stream: str, start: Tensor, count: int) -> Words:
    """Words of all blocks that runs touch; a run that starts inside a block touches one more."""
    key0, key1, word2, word3 = _hash(b"run", seed, 0, stream)
    blocks = torch.arange((count + 6) // 4, device=start.device)
    block = (start >> 2)[:, None] + blocks
    counter = (block & MASK32, block >> 32, start.new_full((), word2), start.new_full((), word3))
    return philox(counter, (key0, key1))


def _cut(numbers: Tensor, start: Tensor, count: int) -> Tensor:
    """The `count` numbers of every run out of its whole blocks."""
    place = (start & 3)[:, None] + torch.arange(count, device=start.device)
    return numbers.gather(1, place)
