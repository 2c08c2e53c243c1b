"""Samples in files: a folder of them, or WebDataset shards, written by ranks that share the work.

The bytes of a file are a function of the checkpoint and of what was asked for, whichever rank writes it
and however many there are. Files appear whole or not at all, so the same command goes on where it was
cut short. `samples.json`, written first, says what they are made of; samples of anything else are never
mixed in. `dataset.json` (of shards) or `metadata.jsonl` (of a folder) is written when all are there.
"""

import io
import json
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from PIL import Image
from pydantic import ValidationError
from torch import Tensor

from data_pipeline import description
from data_pipeline.description import Description, Record, Shard, write_description
from data_pipeline.latents import write_array
from data_pipeline.pack import add
from data_pipeline.sources.source import Sample
from data_pipeline.storage import resolve
from data_pipeline.storing import reason, sha256_of, write_text, written_whole
from flows.errors import UserError
from parallel.processes import Ranks, from_first, gather
from trainer.asked import ask, asked_names
from trainer.drawing import Samples, broken_rows
from trainer.pictures import to_bytes
from trainer.recipe import Recipe
from trainer.refusals import shown
from trainer.trained import Trained, batches

RECORD = "samples.json"
METADATA = "metadata.jsonl"

Form = Literal["folder", "shards"]
Member = Literal["png", "npy"]


@dataclass(frozen=True)
class Order:
    """What is asked for.

    out: folder or URL
    member: a PNG of each sample, or the numbers that the model made, float32 (channels, height, width)
    per_shard: samples in a shard
    batch: samples in one call of the network; changes nothing but rounding
    """

    out: str
    form: Form
    member: Member
    count: int
    per_shard: int
    batch: int

    @property
    def summary(self) -> str:
        """The file that is there when all others are."""
        return description.NAME if self.form == "shards" else METADATA

    def parts(self, count: int) -> list[range]:
        """The first `count` ids, as they are written together: a shard, or a batch of single files."""
        return batches(range(count), self.per_shard if self.form == "shards" else self.batch)

    def files(self, part: range) -> list[str]:
        """Names of the files of a part."""
        if self.form == "shards":
            return [f"samples-{part.start // self.per_shard:06d}.tar"]
        return [f"{_key(number)}.{self.member}" for number in part]


@dataclass(frozen=True)
class Written:
    """What one command did.

    made, kept: samples written now, and those that were there already
    network_calls: for a sample made now, in the mean; None where none was
    broken: of those made now, the ids of samples with a number that is not finite
    """

    made: int
    kept: int
    network_calls: float | None
    broken: list[int]


class _Facts(Record):
    """All that decides the bytes of the files, and how many samples there are to be."""

    version: Literal[1] = 1
    checkpoint: str
    step: int
    seed: int
    sample: dict[str, Any]
    form: Form
    member: Member
    per_shard: int | None
    batch: int
    count: int


@dataclass(frozen=True)
class _Part:
    """calls: network evaluations of all its samples together; shards: name -> what was written

    broken: see `Written`
    """

    samples: int
    calls: float
    broken: list[int]
    shards: dict[str, Shard]


def write_samples(
    trained: Trained, order: Order, ranks: Ranks, report: Callable[[int, int], None]
) -> Written | None:
    """Write what is missing of an order; a collective, whose result the first rank gets.

    report: told, after each part, how many of this rank's parts are done, and of how many

    Raises UserError where the place cannot be written, or holds samples of something else.
    """
    there = from_first(lambda: _prepare(trained, order))
    own = order.parts(order.count)[ranks.rank :: ranks.world_size]
    made = []
    for done, part in enumerate(own, 1):
        if not there.issuperset(order.files(part)):
            made.append(_write_part(trained, order, part))
        report(done, len(own))
    every = gather(made)
    if every is None:
        return None
    return _finish(trained.recipe, order, [part for parts in every for part in parts])


def _prepare(trained: Trained, order: Order) -> set[str]:
    """Say what the folder is for; which of its files are there already.

    Raises UserError if it is for something else.
    """
    there, facts = _names(order.out), _facts(trained, order)
    old = _read_facts(order.out) if RECORD in there else None
    if old is None and there:
        raise UserError(
            f"{order.out} holds files and no {RECORD} that says what they are; name an empty folder"
        )
    if old is not None:
        _check_same(order.out, old, facts)
        last = order.files(order.parts(old.count)[-1])
        if order.form == "shards" and old.count < order.count and old.count % order.per_shard:
            # It has room for more, and must not pass for whole until it is made anew.
            _remove(order.out, last[0])
            there.difference_update(last)
    if any(not there.issuperset(order.files(part)) for part in order.parts(order.count)):
        _remove(order.out, order.summary)
        there.discard(order.summary)
    if old != facts:
        write_text(f"{order.out}/{RECORD}", facts.model_dump_json(indent=1) + "\n")
    return there


def _facts(trained: Trained, order: Order) -> _Facts:
    recipe = trained.recipe
    return _Facts(
        checkpoint=trained.checkpoint,
        step=trained.step,
        seed=recipe.seed,
        sample=recipe.sample.model_dump(mode="json", exclude={"every", "count"}),
        form=order.form,
        member=order.member,
        per_shard=order.per_shard if order.form == "shards" else None,
        batch=order.batch,
        count=order.count,
    )


def _check_same(out: str, old: _Facts, new: _Facts) -> None:
    before, after = (
        facts.model_dump(exclude={"sample", "count"})
        | {f"sample.{key}": value for key, value in facts.sample.items()}
        for facts in (old, new)
    )
    changed = [
        f"{key} was {shown(before.get(key))} and is now {shown(after[key])}"
        for key in after
        if before.get(key) != after[key]
    ]
    if changed:
        raise UserError(
            f"{out} holds other samples ({', '.join(changed)}); name another folder, or ask for the "
            "same again"
        )
    if old.count > new.count:
        raise UserError(
            f"{out} is for {old.count} samples already, and {new.count} are asked for; ask for as many "
            "or more, or name another folder"
        )


def _write_part(trained: Trained, order: Order, part: range) -> _Part:
    """Draw a part and write its files."""
    drawn: list[Samples] = []

    def samples() -> Iterator[Sample]:
        for ids in batches(part, order.batch):
            made = trained.draw(ids, as_images=order.member == "png")
            drawn.append(made)
            yield from _members(trained.recipe, order.member, ids, made)

    shards = {}
    if order.form == "shards":
        (name,) = order.files(part)
        with written_whole(f"{order.out}/{name}") as path:
            with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
                for sample in samples():
                    add(archive, sample)
            size, checksum = path.stat().st_size, sha256_of(str(path))
        shards[name] = Shard(samples=len(part), bytes=size, sha256=checksum)
    else:
        for name, sample in zip(order.files(part), samples(), strict=True):
            with written_whole(f"{order.out}/{name}") as path:
                path.write_bytes(sample.members[order.member])
    calls = sum(made.network_calls.sum().item() for made in drawn)
    broken = [part[i] for i in broken_rows(torch.cat([made.images for made in drawn]))]
    return _Part(len(part), calls, broken, shards)


def _members(recipe: Recipe, member: Member, ids: range, drawn: Samples) -> Iterator[Sample]:
    """Each sample as a shard has it: itself, its class, and what is known of it."""
    labels, calls = drawn.labels.tolist(), drawn.network_calls.tolist()
    for number, image, label, cost in zip(ids, drawn.images, labels, calls, strict=True):
        content = _png(image) if member == "png" else write_array(image.numpy())
        about = _about(recipe, number, label) | {"network_calls": cost}
        if not image.isfinite().all():
            about["finite"] = False
        yield Sample(
            _key(number),
            {member: content, "cls": str(label).encode(), "json": json.dumps(about).encode()},
        )


def _about(recipe: Recipe, number: int, label: int) -> dict[str, Any]:
    what = "prompt" if recipe.sample.prompts else "class"
    return {"id": number, "label": label, what: asked_names(recipe)[label]}


def _key(number: int) -> str:
    """Of a sample, and the name of its file."""
    return f"{number:08d}"


def _png(image: Tensor) -> bytes:
    """Of an image (1 or 3, height, width) in [-1, 1]."""
    pixels = to_bytes(image).permute(1, 2, 0).squeeze(2).numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def _finish(recipe: Recipe, order: Order, made: list[_Part]) -> Written:
    """Write the summary, if it is not there."""
    if order.summary not in _names(order.out):
        if order.form == "shards":
            new = {name: shard for part in made for name, shard in part.shards.items()}
            _describe(recipe, order, new)
        else:
            _list(recipe, order)
    samples, calls = sum(part.samples for part in made), sum(part.calls for part in made)
    broken = sorted(number for part in made for number in part.broken)
    return Written(samples, order.count - samples, calls / samples if samples else None, broken)


def _describe(recipe: Recipe, order: Order, made: dict[str, Shard]) -> None:
    """`dataset.json`, as every data set has it: the shards can be trained on."""
    shards = {}
    for part in order.parts(order.count):
        (name,) = order.files(part)
        url = f"{order.out}/{name}"
        place = resolve(url)
        shards[name] = made.get(name) or Shard(
            samples=len(part),
            bytes=int(place.storage.info(place.path)["size"]),
            sha256=sha256_of(url),
        )
    names = tuple(recipe.sample.prompts or recipe.data.class_names or ())
    write_description(order.out, Description(class_names=names, shards=shards))


def _list(recipe: Recipe, order: Order) -> None:
    """`metadata.jsonl`: a row for each file."""
    labels = ask(recipe, torch.arange(order.count)).labels.tolist()
    rows = [
        {"file_name": name} | _about(recipe, number, labels[number])
        for part in order.parts(order.count)
        for number, name in zip(part, order.files(part), strict=True)
    ]
    write_text(f"{order.out}/{METADATA}", "".join(f"{json.dumps(row)}\n" for row in rows))


def _names(out: str) -> set[str]:
    """Files in a folder, without those that are being written; none if it is not there.

    Raises UserError if it cannot be looked at.
    """
    place = resolve(out)
    place.storage.invalidate_cache()
    try:
        found = place.storage.ls(place.path, detail=False)
    except FileNotFoundError:
        return set()
    except OSError as error:
        raise UserError(f"{out}: cannot be looked at ({reason(error)}); name a folder") from error
    names = {str(path).rstrip("/").rpartition("/")[2] for path in found}
    return {name for name in names if not name.startswith(".")}


def _read_facts(out: str) -> _Facts:
    place = resolve(f"{out}/{RECORD}")
    try:
        return _Facts.model_validate_json(place.storage.cat_file(place.path))
    except (OSError, ValidationError) as error:
        raise UserError(
            f"{out}/{RECORD}: is no record of samples ({reason(error)}); name another folder"
        ) from error


def _remove(out: str, name: str) -> None:
    place = resolve(f"{out}/{name}")
    if place.storage.exists(place.path):
        place.storage.rm_file(place.path)
