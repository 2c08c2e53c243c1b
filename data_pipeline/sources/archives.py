"""Samples that lie in WebDataset tars already: re-sharded, or labelled out of their JSON."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate

from data_pipeline.description import Description, folder_of, read_description
from data_pipeline.headers import sample_name
from data_pipeline.index import ShardIndex, open_index
from data_pipeline.keep import parse_json
from data_pipeline.reader import Range, RangeReader
from data_pipeline.shards import expand
from data_pipeline.sources.source import Sample
from flows.errors import UserError


class TarSource:
    """Samples of tars, member by member as they are.

    label_field, caption_field: fields of each sample's `.json` that become its `.cls` and `.txt`
    """

    def __init__(self, pattern: str, *, label_field: str | None, caption_field: str | None) -> None:
        self.indexes = [open_index(url) for url in expand(pattern)]
        self.ends = list(accumulate(len(index) for index in self.indexes))
        fields = {"cls": label_field, "txt": caption_field}
        self.fields = {extension: field for extension, field in fields.items() if field}
        self._refuse_shared_keys()
        self.reader = RangeReader()
        known = read_description(folder_of(self.indexes[0].url)) or Description()
        names = () if label_field else known.class_names
        self.about = known.model_copy(update={"class_names": names, "shards": {}})

    def __len__(self) -> int:
        return self.ends[-1]

    def _refuse_shared_keys(self) -> None:
        """Raises UserError for a key in two shards: of one shard, its two samples would be one."""
        seen: dict[str, str] = {}
        for index in self.indexes if len(self.indexes) > 1 else []:
            for key in index.keys.tolist():
                if (other := seen.setdefault(key, index.url)) != index.url:
                    raise UserError(
                        f"{sample_name(index.url, key)} is also in {other}; leave one of them out, or pack "
                        "each shard into a folder of its own"
                    )

    def __getitem__(self, number: int) -> Sample:
        return self.read([number])[0]

    def read(self, numbers: Sequence[int]) -> list[Sample]:
        """Several samples at once: one round of requests where shards lie on remote storage."""
        places: list[Range] = []
        rows: list[tuple[ShardIndex, int, list[int]]] = []
        for number in numbers:
            shard = bisect_right(self.ends, number)
            index = self.indexes[shard]
            row = number - (self.ends[shard - 1] if shard else 0)
            present = [c for c in range(len(index.extensions)) if index.offsets[row, c] >= 0]
            places += [
                Range(index.url, int(index.offsets[row, c]), int(index.sizes[row, c]))
                for c in present
            ]
            rows.append((index, row, present))
        contents = iter(self.reader.read(places))
        return [self._sample(index, row, present, contents) for index, row, present in rows]

    def _sample(
        self, index: ShardIndex, row: int, present: list[int], contents: Iterator[bytes]
    ) -> Sample:
        members = {index.extensions[c]: next(contents) for c in present}
        key = str(index.keys[row])
        if self.fields:
            members |= self._from_json(members, sample_name(index.url, key))
        return Sample(key, members)

    def _from_json(self, members: dict[str, bytes], name: str) -> dict[str, bytes]:
        try:
            record = parse_json(members["json"])
            return {e: str(record[field]).encode() for e, field in self.fields.items()}
        except (KeyError, TypeError, ValueError) as error:
            wanted = ", ".join(self.fields.values())
            raise UserError(
                f"{name}: its .json has no readable {wanted} ({error}); name other fields"
            ) from error
