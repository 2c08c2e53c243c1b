"""Images in a folder of folders, one for each class, with captions and labels beside them."""

from pathlib import Path
from typing import Any

from data_pipeline.description import Description
from data_pipeline.index import IMAGE_FILES
from data_pipeline.keep import parse_json
from data_pipeline.sources.source import Sample, check_name, image_extension, number_classes
from data_pipeline.sources.tables import TABLES, open_table
from data_pipeline.storing import reason
from flows.errors import UserError

FILE_NAME = "file_name"
# Kinds of images that would be left out in silence if they were not named.
NOT_READ = frozenset({"gif", "bmp", "tif", "tiff", "avif", "heic", "jp2", "jxl", "jfif", "ppm"})


class FolderSource:
    """The images below a folder, sorted by path.

    The class of `ROOT/CLASS/.../x.png` is its uppermost folder; images in ROOT itself are all class
    0. The caption is `x.txt` beside the image, if there is one.

    label_field, caption_field: take label or caption from this field of `ROOT/metadata.csv` (or
        `.jsonl`, `.parquet`; rows are found by their `file_name`), else of `x.json` beside `x.png`

    Raises UserError for images both in ROOT and in class folders, for two of one name, and for kinds
    of images that are not read.
    """

    def __init__(self, root: Path, *, label_field: str | None, caption_field: str | None) -> None:
        self.root = root
        self.paths = _images(root)
        self.keys = _unique_keys(self.paths)
        fields = [field for field in (label_field, caption_field) if field is not None]
        records = _Records(root, fields) if fields else None
        self.caption_field, self.records = caption_field, records
        if records is None or label_field is None:
            values = _classes_by_folder(root, self.paths)
        else:
            values = [records.value(path, label_field) for path in self.paths]
        self.labels, names = number_classes(values, f"{root}: class of image")
        self.about = Description(class_names=names)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> Sample:
        path = self.paths[number]
        file = self.root / path
        content = _read(file)
        members = {image_extension(content, str(file)): content}
        members["cls"] = str(self.labels[number]).encode()
        if self.records is not None and self.caption_field is not None:
            caption = self.records.value(path, self.caption_field)
            if not isinstance(caption, str):
                raise UserError(
                    f"{file}: its {self.caption_field} is {caption!r}, not text; correct it"
                )
            members["txt"] = caption.encode()
        elif (text := file.with_suffix(".txt")).is_file():
            members["txt"] = _read(text)
        return Sample(self.keys[number], members)


class _Records:
    """Fields of images, from a metadata table in the root or from a `.json` beside each image."""

    def __init__(self, root: Path, fields: list[str]) -> None:
        self.root = root
        tables = [path for kind in TABLES if (path := root / f"metadata{kind}").is_file()]
        if len(tables) > 1:
            raise UserError(f"{root}: has {tables[0].name} and {tables[1].name}; keep one of them")
        self.table = tables[0] if tables else None
        self.columns: dict[str, dict[str, Any]] = {}
        if self.table is not None:
            table = open_table(str(self.table), [FILE_NAME])
            names = table.column(FILE_NAME)
            for field in fields:
                self.columns[field] = dict(zip(names, table.column(field), strict=True))

    def value(self, path: Path, field: str) -> Any:
        """The field of the image at `path` below the root."""
        if self.table is not None:
            found = self.columns[field].get(path.as_posix())
            if found is None:
                raise UserError(
                    f"{self.table}: has no {field} for {path}; add a row with its file_name"
                )
            return found
        beside = self.root / path.with_suffix(".json")
        try:
            return parse_json(beside.read_bytes())[field]
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{self.root / path}: no metadata table, and {beside.name} beside it gives no {field} "
                f"({type(error).__name__}); write one of them"
            ) from error


def _images(root: Path) -> list[Path]:
    """Paths below the root, sorted; hidden files and folders are left out."""
    found = []
    for path in root.rglob("*"):
        inside = path.relative_to(root)
        kind = path.suffix.lower().removeprefix(".")
        if any(part.startswith(".") for part in inside.parts):
            continue
        if path.is_symlink() and (path.is_dir() or not path.exists()):
            raise UserError(
                f"{path}: is a link to a folder or to nothing, and such links are not followed; put the "
                "images themselves there, or remove it"
            )
        if kind in NOT_READ:
            raise UserError(f"{path}: images of kind .{kind} are not read; convert or remove it")
        if kind in IMAGE_FILES and path.is_file():
            check_name(inside.as_posix(), str(root))
            found.append(inside)
    if not found:
        raise UserError(
            f"{root}: has no {', '.join(f'.{kind}' for kind in IMAGE_FILES)} images in it"
        )
    return sorted(found, key=lambda path: path.as_posix())


def _unique_keys(paths: list[Path]) -> list[str]:
    """Sample keys: paths without ending, and without dots, which would end a key."""
    seen: dict[str, Path] = {}
    for path in paths:
        key = path.with_suffix("").as_posix().replace(".", "_")
        if key in seen:
            raise UserError(f"{path} and {seen[key]} would both be sample {key}; rename one")
        seen[key] = path
    return list(seen)


def _classes_by_folder(root: Path, paths: list[Path]) -> list[Any]:
    """The uppermost folder of each image, or 0 for each where there are no folders."""
    flat = [path for path in paths if len(path.parts) == 1]
    if not flat:
        return [path.parts[0] for path in paths]
    if len(flat) < len(paths):
        raise UserError(
            f"{root / flat[0]}: lies beside class folders and has no class; move it into one"
        )
    return [0] * len(paths)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({reason(error)}); check your rights") from error
