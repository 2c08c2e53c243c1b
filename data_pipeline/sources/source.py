"""What can be packed into shards: a list of samples, each made when it is asked for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from data_pipeline.description import Description
from data_pipeline.headers import printable
from flows.errors import UserError


@dataclass(frozen=True)
class Sample:
    """One sample of a shard.

    key: name without extension
    members: extension -> content
    """

    key: str
    members: Mapping[str, bytes]


class Source(Protocol):
    """about: what is known of the samples, for the `dataset.json` of the shards made of them."""

    about: Description

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> Sample: ...


def check_name(name: str, where: str) -> None:
    """Raises UserError for a name that shards, and reports on them, cannot hold."""
    if (shown := printable(name)) != name:
        raise UserError(
            f"{where}: '{shown}' is not UTF-8, or has a line end or another control character in it; "
            "rename it"
        )


def image_extension(content: bytes, name: str) -> str:
    """What the bytes are, whatever their file was called; raises UserError if no image we read."""
    if content.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if content.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "webp"
    raise UserError(
        f"{name}: its {len(content)} bytes are not a PNG, JPEG or WebP; convert or remove it"
    )


def number_classes(values: Sequence[Any], where: str) -> tuple[list[int], tuple[str, ...]]:
    """Labels and class names of a column: integers as they are, words numbered alphabetically.

    where: gives the name of a value's place in a message, followed by its number from 0

    Raises UserError for an empty value, a negative one, or numbers among words.
    """
    words = any(isinstance(value, str) for value in values)
    for row, value in enumerate(values):
        fits = isinstance(value, str) if words else is_integer(value) and value >= 0
        if not fits:
            wanted = "a class name like others" if words else "a class: a number from 0, or a word"
            raise UserError(f"{where} {row}: {value!r} is not {wanted}; correct it")
    if not words:
        return [int(value) for value in values], ()
    names = tuple(sorted(set(values)))
    numbers = {name: number for number, name in enumerate(names)}
    return [numbers[value] for value in values], names


def is_integer(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)
