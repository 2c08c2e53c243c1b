"""Captions to embeddings without a network: each word is a fixed random direction.

Words that are the same have the same vector, and different ones are nearly orthogonal when vectors are
wide (the inner product of two has deviation sqrt(width), of one with itself mean width). That says what
words a caption holds and in which order, nothing of what they mean: enough to train a model on captions
where no text encoder can be had.
"""

import hashlib
import re
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from data_pipeline.encoders.embedded import Embedded
from flows.errors import UserError
from flows.randomness import Draw

# Raised whenever the same caption would give other numbers.
VERSION = 1
# Letters, digits and what joins them inside a word ("o'clock", "t-shirt").
WORD = re.compile(r"\w+(?:['’-]\w+)*")
KEPT_WORDS = 1 << 16


class HashedWords:
    """See `TextEncoder`; a token is a word, in lower case.

    Every number is standard normal, a pure function of the word and its place in the vector.
    """

    kind = "hashed"
    pooled = None

    def __init__(self, width: int, *, max_tokens: int) -> None:
        self.width = width
        self.max_tokens = max_tokens
        self.fingerprint = hashlib.sha256(f"hashed words {VERSION} {width}".encode()).hexdigest()
        self._vector = lru_cache(KEPT_WORDS)(self._draw)

    def encode(self, captions: Sequence[str]) -> Embedded:
        """Embeddings of a few captions; one without words has none."""
        words = [WORD.findall(caption.lower()) for caption in captions]
        tokens = [
            torch.stack([self._vector(word) for word in some[: self.max_tokens]])
            if some
            else torch.zeros(0, self.width)
            for some in words
        ]
        return Embedded(tokens, None, sum(len(some) > self.max_tokens for some in words))

    def _draw(self, word: str) -> Tensor:
        digest = hashlib.blake2b(word.encode(), digest_size=8, person=b"word").digest()
        key = torch.tensor([int.from_bytes(digest, "little") >> 1])
        return Draw(0, 0, key).normal("word", (self.width,))[0]


def parse_hashed(name: str, *, max_tokens: int) -> HashedWords:
    """The encoder called `hashed:WIDTH`; raises UserError if that is no width."""
    width = name.partition(":")[2]
    if not width.isascii() or not width.isdecimal() or not 0 < int(width) <= 1 << 16:
        raise UserError(
            f"--text {name}: hashed words need a width of 1 to {1 << 16:,}; write hashed:64 or the like"
        )
    return HashedWords(int(width), max_tokens=max_tokens)
