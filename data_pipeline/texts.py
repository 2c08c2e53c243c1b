"""Embedded captions beside images: one member a sample, and a batch's rows of one length."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_pipeline.npy import read_npy
from flows.errors import UserError

Words = NDArray[np.float32]


@dataclass(frozen=True)
class TextMember:
    """Where samples hold their embedded captions, and what a batch takes of them.

    member: extension of the `.npy` member of (words, width) numbers, as `flowmill data encode` writes it
    tokens: rows of each sample in a batch: of longer captions the first ones, after shorter ones zeros
    width: numbers a word
    """

    member: str
    tokens: int
    width: int

    def read(self, content: bytes, name: str) -> Words:
        """(words, width) float32, at most `tokens` words.

        Raises UserError, which begins with `name`, for damaged content, and numbers of another shape.
        """
        try:
            values = read_npy(content)
            if values.dtype.kind != "f":
                raise ValueError(f"its numbers are {values.dtype}")
        except ValueError as error:
            raise UserError(
                f"{name}: its .{self.member} ({len(content)} bytes) is damaged: {error}; encode its shard "
                "again"
            ) from error
        if values.ndim != 2 or values.shape[1] != self.width:
            raise UserError(
                f"{name}: its .{self.member} has shape {values.shape} and (words, {self.width}) is asked "
                f"for; set data.text.width as in dataset.json, or name a member of embedded words"
            )
        words = values[: self.tokens].astype(np.float32)
        if not np.isfinite(words).all():
            raise UserError(
                f"{name}: its .{self.member} has numbers that are not finite; encode its shard again"
            )
        return words

    def stack(self, captions: Sequence[Words]) -> Tensor:
        """(batch, tokens, width) float32 of captions read."""
        rows = np.zeros((len(captions), self.tokens, self.width), np.float32)
        for row, words in zip(rows, captions, strict=True):
            row[: len(words)] = words
        return torch.from_numpy(rows)
