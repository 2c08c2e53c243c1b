"""All schedules by name, and what each can do."""

from dataclasses import dataclass

from flows.errors import UserError
from parallel.pipeline.bidirectional import bitpipe, chimera
from parallel.pipeline.schedule import Schedule, looped, v_shaped
from parallel.pipeline.torch_schedules import (
    LOOPED,
    SINGLE,
    V_SHAPED,
    one_forward_one_backward,
    torch_schedule,
)

BIDIRECTIONAL = {"bitpipe": bitpipe, "chimera": chimera}
NAMES = (*SINGLE, "1f1b", *LOOPED, *V_SHAPED, *BIDIRECTIONAL)
CHUNKS = 2  # stages on a rank, of the looped schedules if nothing else is asked for


@dataclass(frozen=True)
class Words:
    """How a refusal calls what was asked for: options of a command, or keys of a recipe."""

    schedule: str
    stages: str
    microbatches: str
    chunks: str


def make_schedule(
    name: str, ranks: int, microbatches: int, chunks: int | None, words: Words
) -> Schedule:
    """The order of one step; found in more than linear time where there are two replicas.

    chunks: stages on every rank and in every replica; None for what the schedule has by itself
    Raises UserError for what the schedule cannot do.
    """
    places = places_of(name, ranks, microbatches, chunks, words)
    if name in BIDIRECTIONAL:
        return BIDIRECTIONAL[name](ranks, microbatches)
    if name == "1f1b":
        return one_forward_one_backward(ranks, microbatches)
    return torch_schedule(name, ranks, microbatches, len(places) // ranks)


def places_of(
    name: str, ranks: int, microbatches: int, chunks: int | None, words: Words
) -> tuple[int, ...]:
    """The rank of every stage of the first replica: all of a schedule that cutting a model needs.

    Raises UserError as `make_schedule` does.
    """
    if name not in NAMES:
        raise UserError(f"{words.schedule} = {name} is no schedule; use {', '.join(NAMES)}.")
    if ranks < 2:
        raise UserError(f"{words.stages} = {ranks} is no pipeline; use 2 or more.")
    if microbatches < 1:
        raise UserError(f"{words.microbatches} = {microbatches} is too few; use 1 or more.")
    own = _own_chunks(name)
    if chunks is not None and (chunks < 1 or own not in (None, chunks)):
        right = "1 or more" if own is None else f"{own} or leave it out"
        raise UserError(f"{words.chunks} = {chunks} does not fit {name}; use {right}.")
    if name in BIDIRECTIONAL:
        for word, number in ((words.stages, ranks), (words.microbatches, microbatches)):
            if number % 2:
                fits = " or ".join(str(n) for n in (number - 1, number + 1) if n)
                raise UserError(
                    f"{word} = {number} is odd, and {name} runs in two directions; use {fits}."
                )
    _check_enough(name, ranks, microbatches, words)
    if name in V_SHAPED or name == "bitpipe":
        return v_shaped(ranks)
    return looped(ranks, own or chunks or CHUNKS)


def _own_chunks(name: str) -> int | None:
    if name in LOOPED:
        return None
    return 1 if name in (*SINGLE, "1f1b", "chimera") else 2


def _check_enough(name: str, ranks: int, microbatches: int, words: Words) -> None:
    if name == "dualpipev" and microbatches < 2 * ranks:
        raise UserError(
            f"{words.microbatches} = {microbatches} is too few for {name} on {ranks} ranks; "
            f"use {2 * ranks} or more."
        )
    rounds = max(1, microbatches // ranks)
    if name in ("interleaved1f1b", "interleaved_zero_bubble") and microbatches % rounds:
        raise UserError(
            f"{words.microbatches} = {microbatches} does not divide into the {rounds} rounds of {name} on "
            f"{ranks} ranks; use a multiple of {ranks}."
        )
