"""Images that a table lists: CSV, JSON lines or Parquet, with a column of paths or of bytes.

Labels and captions of all rows are held in memory; images that lie in Parquet files are read a row
group at a time.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

from data_pipeline.description import Description, folder_of
from data_pipeline.shards import expand
from data_pipeline.sources.source import Sample, image_extension, number_classes
from data_pipeline.storage import call, passing_errors, resolve
from data_pipeline.storing import reason
from flows.errors import UserError

TABLES = (".csv", ".jsonl", ".parquet")
# Row groups of images kept in memory; rows in their order need one at a time.
KEPT_GROUPS = 4


@dataclass(frozen=True)
class TableFile:
    """One file of a table.

    content: the whole of it (pyarrow.Table), or a pyarrow.parquet.ParquetFile
    ends: rows before the end of each row group
    """

    url: str
    content: Any
    ends: tuple[int, ...]

    def column(self, field: str) -> list[Any]:
        """All values of a column; raises UserError if there is none of that name, or it is damaged."""
        self.require(field)
        with self._readable(f"column {field}"):
            whole = self.content.read(columns=[field]) if self.parquet else self.content
            return list(whole.column(field).to_pylist())

    def group(self, number: int, field: str) -> Any:
        """A column of one row group, as an Arrow array; raises UserError if it is damaged."""
        if not self.parquet:
            return self.content.column(field)
        first = self.ends[number - 1] if number else 0
        with self._readable(f"{field} of rows {first} to {self.ends[number] - 1}"):
            return self.content.read_row_group(number, columns=[field]).column(field)

    @contextmanager
    def _readable(self, what: str) -> Iterator[None]:
        import pyarrow as arrow

        try:
            yield
        except (*passing_errors(), arrow.ArrowException, UnicodeDecodeError) as error:
            raise UserError(
                f"{self.url}: {what} cannot be read ({reason(error)}); write the table again"
            ) from error

    def require(self, field: str) -> None:
        names = self.content.schema_arrow.names if self.parquet else self.content.column_names
        if field not in names:
            raise UserError(f"{self.url}: has no column {field}; name one of {', '.join(names)}")
        if names.count(field) > 1:
            raise UserError(f"{self.url}: has several columns {field}; rename all but one")

    @property
    def parquet(self) -> bool:
        return self.url.endswith(".parquet")


def open_table(url: str, texts: Sequence[str]) -> TableFile:
    """A CSV, JSON-lines or Parquet file, by its name; raises UserError if it is none.

    texts: columns that are text in a CSV file even where they look like numbers
    """
    import pyarrow as arrow
    from pyarrow import csv, json, parquet

    storage, path, _ = resolve(url)
    try:
        if url.endswith(".parquet"):
            file = parquet.ParquetFile(storage.open(path, "rb"))
            groups = range(file.metadata.num_row_groups)
            counts = [file.metadata.row_group(number).num_rows for number in groups]
            return TableFile(url, file, tuple(accumulate(counts)))
        with storage.open(path, "rb") as stream:
            if url.endswith(".csv"):
                # Captions may hold line ends.
                parse = csv.ParseOptions(newlines_in_values=True)
                convert = csv.ConvertOptions(column_types=dict.fromkeys(texts, arrow.string()))
                table = csv.read_csv(stream, parse_options=parse, convert_options=convert)
            else:
                table = json.read_json(stream)
    except (*passing_errors(), arrow.ArrowException) as error:
        raise UserError(
            f"{url}: the table cannot be read ({reason(error)}); write it again"
        ) from error
    return TableFile(url, table, (table.num_rows,))


class TableSource:
    """Samples of a table that may lie in several files.

    image_field: column of image bytes, of paths (from the table's folder, absolute, or a URL), or
        of records {bytes, path} as the `datasets` library writes them
    label_field: column of classes; None: all are class 0
    caption_field: column of captions; None: no sample has one
    """

    def __init__(
        self,
        pattern: str,
        *,
        image_field: str,
        label_field: str | None,
        caption_field: str | None,
    ) -> None:
        texts = [field for field in (image_field, caption_field) if field is not None]
        self.files = [open_table(url, texts) for url in expand(pattern, "file")]
        self.ends = list(accumulate(file.ends[-1] if file.ends else 0 for file in self.files))
        self.image_field = image_field
        for file in self.files:
            file.require(image_field)
        names: tuple[str, ...] = ()
        if label_field is None:
            self.labels = [0] * len(self)
        else:
            values = self._all(label_field)
            self.labels, names = number_classes(values, f"{pattern}: {label_field} of row")
        self.about = Description(class_names=names)
        self.captions = None if caption_field is None else self._texts(caption_field, pattern)
        self._group = lru_cache(KEPT_GROUPS)(self._read_group)

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, number: int) -> Sample:
        part = bisect_right(self.ends, number)
        file = self.files[part]
        row = number - (self.ends[part - 1] if part else 0)
        group = bisect_right(file.ends, row)
        value = self._group(part, group)[row - (file.ends[group - 1] if group else 0)].as_py()
        name = f"{file.url}: row {row}"
        content = _content(value, file.url, name)
        members = {image_extension(content, name): content}
        members["cls"] = str(self.labels[number]).encode()
        if self.captions is not None:
            members["txt"] = self.captions[number].encode()
        return Sample(f"{number:08d}", members)

    def _all(self, field: str) -> list[Any]:
        return [value for file in self.files for value in file.column(field)]

    def _texts(self, field: str, pattern: str) -> list[str]:
        texts = self._all(field)
        for row, text in enumerate(texts):
            if not isinstance(text, str):
                raise UserError(
                    f"{pattern}: {field} of row {row} is {text!r}, not text; correct it"
                )
        return texts

    def _read_group(self, part: int, group: int) -> Any:
        return self.files[part].group(group, self.image_field)


def _content(value: Any, url: str, name: str) -> bytes:
    """The bytes of an image, or of the file that a cell of the table names."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str) or not value:
        raise UserError(
            f"{name}: its image is {value!r}, neither bytes nor a path; correct the row"
        )
    elsewhere = value.startswith("/") or "://" in value
    place = resolve(value if elsewhere else f"{folder_of(url)}/{value}")
    try:
        content: bytes = call(place.storage, "cat_file", place.path)
    except passing_errors() as error:
        raise UserError(
            f"{name}: its image {value} cannot be read ({reason(error)}); correct the row"
        ) from error
    return content
