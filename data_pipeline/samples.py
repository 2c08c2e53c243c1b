"""The samples of a few shards by (shard, sample): their keys, encoded images and labels."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_pipeline.catalog import Summary
from data_pipeline.description import refuse_unfinished
from data_pipeline.faults import BadSample, Found, PastShard, Tolerance
from data_pipeline.headers import sample_name
from data_pipeline.index import IMAGES, ShardIndex
from data_pipeline.indexes import KEPT_INDEXES, Indexes, in_threads
from data_pipeline.reader import Range, RangeReader
from data_pipeline.shards import address, find, folder_of, search, short_names
from data_pipeline.storage import resolve
from data_pipeline.storing import size_if_there
from data_pipeline.texts import TextMember
from flows.errors import UserError

Int64 = NDArray[np.int64]

LABEL = "cls"
# Python's int() takes more: underscores, and any number of digits.
NUMBER = re.compile(rb"\s*(-?[0-9]{1,40})\s*")
LARGEST = 2**63 - 1


class Kind(NamedTuple):
    """A member that every sample has one of.

    what: what messages call it; extensions: any of these; remedy: what to do where there is none
    """

    what: str
    extensions: tuple[str, ...]
    remedy: str


IMAGE_AND_LABEL = (
    Kind("image", IMAGES, "pack the shard again"),
    Kind("label", (LABEL,), "pack the shard again"),
)


@dataclass(frozen=True)
class Encoded:
    """A few samples as they lie in the shards.

    names: "URL: sample KEY" of each, for messages
    images: the bytes of each image file
    labels: (batch,) int64
    """

    names: list[str]
    images: list[bytes]
    labels: Int64


class Samples:
    """Every sample of the shards that a pattern names.

    urls, names, sizes: address, short name and number of samples of each shard
    remote: some are not files of this machine
    past: the same, as a run that begins now has to remember it, with the shards left out
    classes: labels are below this; None: any label that is not negative
    tolerate: which faults are left for later, or left out; None: none
    text: the embedded captions that samples have, too; None: they are not read

    Raises UserError if a shard is missing or unsafe, or a sample lacks its image, label or text.
    """

    def __init__(
        self,
        pattern: str,
        *,
        classes: int | None,
        tolerate: Tolerance | None = None,
        text: TextMember | None = None,
    ) -> None:
        self.classes = classes
        self.tolerate = tolerate
        self.text = text
        self._kinds = IMAGE_AND_LABEL if text is None else (*IMAGE_AND_LABEL, _kind_of(text))
        self._tables = lru_cache(KEPT_INDEXES)(self._read_table)
        strict = tolerate is None or tolerate.strict
        self._open(pattern, strict)
        self._reader = RangeReader()
        if strict:
            for url in self.urls:
                self._check(url)
        if sum(self.sizes) == 0:
            raise UserError(f"{pattern}: the shards hold no samples; pack some images into them")

    def __len__(self) -> int:
        return sum(self.sizes)

    def keys(self, shard: Int64, sample: Int64) -> list[str]:
        """`SHARD/KEY` of each sample, the same wherever the data set lies."""
        return [
            f"{self.names[s]}/{self._indexes[self.urls[s]].keys[n]}"
            for s, n in zip(shard.tolist(), sample.tolist(), strict=True)
        ]

    def read(self, shard: Int64, sample: Int64) -> Encoded:
        """(batch,) samples, in the order asked for.

        Raises UserError for the first that cannot be read, or whose label is no class.
        """
        return whole(self.fetch(shard, sample))

    def fetch(self, shard: Int64, sample: Int64) -> list[Found | BadSample]:
        """(batch,) samples, in the order asked for; in the place of a bad one, what is wrong."""
        places = [self._place(s, n) for s, n in zip(shard.tolist(), sample.tolist(), strict=True)]
        ranges = [part for place in places if isinstance(place, _Place) for part in place.members]
        contents = iter(self._reader.fetch(ranges))
        return [
            place
            if isinstance(place, BadSample)
            else self._compose(place, [next(contents) for _ in place.members])
            for place in places
        ]

    def index(self, url: str) -> ShardIndex:
        """Where the samples of one of the shards lie; raises UserError if it has gone or changed."""
        return self._indexes[url]

    def expect(self, shard: Int64, sample: Int64) -> None:
        """Name samples that will be asked for soon."""
        remote = [not resolve(self.urls[number]).local for number in shard.tolist()]
        shard, sample = shard[remote], sample[remote]
        self._indexes.load([self.urls[number] for number in np.unique(shard).tolist()])
        places = [self._place(s, n) for s, n in zip(shard.tolist(), sample.tolist(), strict=True)]
        self._reader.expect(
            part for place in places if isinstance(place, _Place) for part in place.members
        )

    def forget(self) -> None:
        """What was expected will not be asked for."""
        self._reader.forget()

    def close(self) -> None:
        self._reader.close()

    def _open(self, pattern: str, strict: bool) -> None:
        """Decide which shards there are."""
        found, missing = (find(pattern), []) if strict else search(pattern)
        self._indexes = Indexes(found)
        known: dict[str, Summary | UserError] = dict(self._indexes.summaries)
        for name in missing:
            known[address(name)] = UserError(f"{name}: there is no shard at that place")
        begun = (self.tolerate.past if self.tolerate else None) or []
        # Where the data lie elsewhere by now, all addresses are others and the names alone count.
        if any(shard.url in known for shard in begun):
            unnamed = [shard.url for shard in begun if shard.url not in known]
            known |= zip(unnamed, in_threads(_refuse_unnamed, unnamed), strict=True)
        urls = tuple(sorted(known))
        names = dict(zip(urls, short_names(urls), strict=True))
        past = {shard.name: shard for shard in begun}
        self.past = [_settle(names[url], url, known[url], past.get(names[url])) for url in urls]
        if strict:
            for shard in self.past:
                _refuse(shard, known[shard.url])
        present = [shard for shard in self.past if shard.left_out is None]
        self._check_share(pattern, len(self.past) - len(present))
        self.urls = tuple(shard.url for shard in present)
        self.names = tuple(shard.name for shard in present)
        self.sizes = tuple(shard.samples for shard in present)
        self._indexes.samples = dict(zip(self.urls, self.sizes, strict=True))
        one_a_folder = {folder_of(url): url for url in self.urls}.values()
        for url in one_a_folder:
            refuse_unfinished(folder_of(url) or ".")
        self.remote = any(not resolve(url).local for url in one_a_folder)

    def _check_share(self, pattern: str, left_out: int) -> None:
        fraction = self.tolerate.max_bad_fraction if self.tolerate else 0.0
        if left_out > fraction * len(self.past):
            first = next(shard for shard in self.past if shard.left_out is not None)
            raise UserError(
                f"{pattern}: {left_out} of {len(self.past)} shards cannot be used, and "
                f"data.max_bad_fraction = {fraction:g} allows {int(fraction * len(self.past))}; the first: "
                f"{first.left_out}"
            )

    def _check(self, url: str) -> None:
        """Refuse a shard with a sample that lacks a member; the shard is looked into only if it may."""
        summary = self._indexes.summaries[url]
        if isinstance(summary, UserError):
            raise summary
        counts = [sum(e in summary.extensions for e in kind.extensions) for kind in self._kinds]
        if (summary.uniform and set(counts) == {1}) or summary.samples == 0:
            return
        index = self._indexes[url]
        for kind in self._kinds:
            if (wrong := np.flatnonzero(find_one(index, kind.extensions).offsets < 0)).size:
                raise _incomplete(index, int(wrong[0]), kind)

    def _place(self, shard: int, sample: int) -> "_Place | BadSample":
        url = self.urls[shard]
        try:
            index, tables = self._tables(url)
        except UserError as error:
            return BadSample(str(error), url=url, key=None)
        members = []
        for kind, table in zip(self._kinds, tables, strict=True):
            if (offset := int(table.offsets[sample])) < 0:
                return _incomplete(index, sample, kind)
            members.append(Range(url, offset, int(table.sizes[sample])))
        return _Place(url, str(index.keys[sample]), members)

    def _read_table(self, url: str) -> "tuple[ShardIndex, list[Members]]":
        """Where the members of a shard's samples lie; raises UserError as its index does."""
        index = self._indexes[url]
        return index, [find_one(index, kind.extensions) for kind in self._kinds]

    def _compose(self, place: "_Place", contents: Sequence[bytes | UserError]) -> Found | BadSample:
        try:
            image, label, *texts = _raise_first(contents)
            name = sample_name(place.url, place.key)
            number = parse_label(label, name, self.classes)
            words = self.text.read(texts[0], name) if self.text else None
        except UserError as error:
            return BadSample(str(error), url=place.url, key=place.key)
        return Found(place.url, place.key, image, number, words)


def whole(samples: Sequence[Found | BadSample]) -> Encoded:
    """Samples none of which may be bad; raises the first that is."""
    found: list[Found] = []
    for one in samples:
        if isinstance(one, BadSample):
            raise one
        found.append(one)
    labels = np.array([one.label for one in found], np.int64)
    return Encoded([one.name for one in found], [one.image for one in found], labels)


@dataclass(frozen=True)
class _Place:
    """Where the members of a sample lie."""

    url: str
    key: str
    members: list[Range]


class Members(NamedTuple):
    """One member of each sample of a shard: (samples,) its offset, -1 where there is none, and size."""

    offsets: Int64
    sizes: Int64


def find_one(index: ShardIndex, extensions: Sequence[str]) -> Members:
    """Each sample's one member with any of these extensions; a sample with several has none."""
    columns = _columns(index, extensions)
    if len(columns) == 1:
        # Views: what is in use of a large data set's indexes is not held twice.
        return Members(index.offsets[:, columns[0]], index.sizes[:, columns[0]])
    one = (index.offsets[:, columns] >= 0).sum(axis=1) == 1
    offsets = index.offsets[:, columns].max(axis=1, initial=-1)
    return Members(np.where(one, offsets, -1), index.sizes[:, columns].sum(axis=1))


def _columns(index: ShardIndex, extensions: Sequence[str]) -> list[int]:
    return [column for e in extensions if (column := index.column(e)) is not None]


def _kind_of(text: TextMember) -> Kind:
    return Kind("text", (text.member,), "embed its captions by flowmill data encode --text")


def _raise_first(contents: Iterable[bytes | UserError]) -> list[bytes]:
    read = []
    for content in contents:
        if isinstance(content, UserError):
            raise content
        read.append(content)
    return read


def parse_label(text: bytes, name: str, classes: int | None) -> int:
    """The class in a `.cls` member; raises UserError naming the sample."""
    if (found := NUMBER.fullmatch(text)) is None:
        raise UserError(f"{name}: label {text[:40]!r} is not an integer; write its class")
    label = int(found[1])
    most = LARGEST if classes is None else classes - 1
    if not 0 <= label <= most:
        raise UserError(
            f"{name}: label {label} must lie in 0 .. {most}; raise data.classes or relabel it"
        )
    return label


def _settle(name: str, url: str, found: Summary | UserError, past: PastShard | None) -> PastShard:
    """A shard's part in the order: the one it had when the run began, else what is found now."""
    if past is not None:
        return PastShard(name, url, past.samples, past.left_out)
    if isinstance(found, UserError):
        return PastShard(name, url, 0, str(found))
    return PastShard(name, url, found.samples, None)


def _refuse(shard: PastShard, found: Summary | UserError) -> None:
    if isinstance(found, UserError):
        raise found
    if shard.left_out is not None:
        raise UserError(
            f"{shard.url}: was left out when this run began ({shard.left_out}); set "
            "data.max_bad_fraction as it was, or start in a new run.dir"
        )


def _refuse_unnamed(url: str) -> UserError:
    """Why a shard that the run began with, and that its pattern does not lead to, cannot be used.

    Raises UserError if it is there: left out in silence, it would be lost without being bad.
    """
    try:
        size = size_if_there(url)
    except UserError as error:
        return error
    if size is not None:
        raise UserError(
            f"{url}: the run began with this shard and data.train no longer names it; restore data.train, "
            "or start in a new run.dir"
        )
    return UserError(
        f"{url}: there is no shard at that place any more; put it back, set data.max_bad_fraction, or "
        "start in a new run.dir"
    )


def _incomplete(index: ShardIndex, sample: int, kind: Kind) -> BadSample:
    key = str(index.keys[sample])
    count = int((index.offsets[sample, _columns(index, kind.extensions)] >= 0).sum())
    named = " or ".join(f".{extension}" for extension in kind.extensions)
    return BadSample(
        f"{sample_name(index.url, key)} has {count or 'no'} {kind.what} members ({named}) and needs "
        f"exactly one; {kind.remedy}",
        url=index.url,
        key=key,
    )
