"""Shapes that no transformer over patches can have, refused by the keys of a recipe."""

from flows.errors import UserError


def check_patches(image_size: int, patch: int) -> None:
    """Patches tile the image, or UserError says which would."""
    if image_size % patch:
        raise UserError(
            f"data.image_size = {image_size} is not divisible by model.patch = {patch}; "
            f"use a patch of {_one_of(_divisors(image_size))}."
        )


def check_heads(width: int, heads: int) -> None:
    """Heads share the width, or UserError says how many could."""
    if width % heads:
        raise UserError(
            f"model.width = {width} is not divisible by model.heads = {heads}; "
            f"use {_one_of(_divisors(width))} heads."
        )


def check_position_table(width: int) -> None:
    """A table has sines and cosines of rows and columns, or UserError says which width has."""
    if width % 4:
        raise UserError(
            f"model.width = {width} is not divisible by 4, as the position table needs; "
            f"use {width // 4 * 4 + 4}."
        )


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _one_of(numbers: list[int]) -> str:
    return (
        ", ".join(map(str, numbers[:-1])) + f" or {numbers[-1]}" if numbers[1:] else str(numbers[0])
    )
