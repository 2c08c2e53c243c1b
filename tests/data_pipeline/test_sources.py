"""Folders and tables of images become shards: every image byte for byte, its class and caption."""

import json
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import csv, parquet

from data_pipeline.description import read_description
from data_pipeline.pack import open_source, pack
from data_pipeline.samples import Samples
from data_pipeline.sources.source import Source
from flows.errors import UserError
from tests.data_pipeline.conftest import grey, image_file


def opened(name: object, **fields: str | None) -> Source:
    plain = {"label_field": None, "caption_field": None, "image_field": "image"}
    return open_source(str(name), **{**plain, **fields})


def everything(source: Source) -> list[tuple[str, dict[str, bytes]]]:
    return [(source[n].key, dict(source[n].members)) for n in range(len(source))]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "pets"
    for number, name in enumerate(("dog/b.png", "cat/x.y/2.png", "cat/1.png")):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(grey(number))
    (root / "cat" / "0.jpg").write_bytes(image_file(Image.new("L", (4, 4), 9), "JPEG"))
    (root / "cat" / "1.txt").write_text("a cât")
    (root / ".hidden").mkdir()
    (root / ".hidden" / "no.png").write_bytes(b"no image")
    return root


def test_classes_are_folders_and_captions_lie_beside(folder: Path, tmp_path: Path) -> None:
    source = opened(folder)
    jpeg = (folder / "cat" / "0.jpg").read_bytes()
    assert everything(source) == [
        ("cat/0", {"jpg": jpeg, "cls": b"0"}),
        ("cat/1", {"png": grey(2), "cls": b"0", "txt": "a cât".encode()}),
        ("cat/x_y/2", {"png": grey(1), "cls": b"0"}),
        ("dog/b", {"png": grey(0), "cls": b"1"}),
    ]
    pack(source, str(tmp_path / "out"), per_shard=3, heldout=1, shuffle=None)
    about = read_description(str(tmp_path / "out"))
    assert about is not None
    assert about.class_names == ("cat", "dog")
    assert {name: shard.samples for name, shard in about.shards.items()} == {
        "train-000000.tar": 3, "heldout-000000.tar": 1,
    }  # fmt: skip
    contents = Samples(f"{tmp_path}/out/*.tar", classes=2)
    encoded = contents.read(np.array([0, 1]), np.array([0, 2]))
    assert (encoded.images, encoded.labels.tolist()) == ([grey(0), grey(1)], [1, 0])
    # What is known of the classes survives packing again.
    assert opened(f"{tmp_path}/out/*.tar").about.class_names == ("cat", "dog")


def test_a_flat_folder_is_one_class_with_metadata_from_a_table_or_beside(folder: Path) -> None:
    flat = opened(folder / "cat" / "x.y")
    assert everything(flat) == [("2", {"png": grey(1), "cls": b"0"})]
    rows = {"cat/0.jpg": "b", "cat/1.png": "a", "cat/x.y/2.png": "b", "dog/b.png": "7"}
    table = {"file_name": list(rows), "kind": list(rows.values()), "text": ["1", "2", "3", "4"]}
    for name in rows:
        record = {"kind": rows[name], "text": "beside"}
        (folder / name).with_suffix(".json").write_text(json.dumps(record))
    fields = {"label_field": "kind", "caption_field": "text"}
    expected = [b"2", b"1", b"2", b"0"]
    for caption in (b"beside", b"2"):
        source = opened(folder, **fields)
        assert source.about.class_names == ("7", "a", "b")
        assert [source[n].members["cls"] for n in range(4)] == expected
        assert source[1].members["txt"] == caption
        lines = [dict(zip(table, row, strict=True)) for row in zip(*table.values(), strict=True)]
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))


COLUMNS = {
    "picture": [grey(n) for n in range(5)],
    "kind": ["b", "a", "c", "a", "b"],
    "number": [3, 1, 0, 1, 3],
    "text": ["one", "two\nlines, and a comma", "3", "", "five"],
}


def write_table(path: Path, columns: dict[str, list[object]]) -> str:
    table = pyarrow.table(columns)
    if path.suffix == ".parquet":
        parquet.write_table(table, path, row_group_size=2)
    elif path.suffix == ".csv":
        csv.write_csv(table, path)
    else:
        path.write_text("\n".join(json.dumps(row) for row in table.to_pylist()))
    return str(path)


FORMS = [("csv", "path"), ("jsonl", "path"), *(("parquet", f) for f in ("path", "bytes", "record"))]


@pytest.mark.parametrize(("kind", "form"), FORMS)
def test_tables_of_paths_bytes_and_records_agree(kind: str, form: str, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    paths = [f"images/{n}.png" for n in range(5)]
    for name, content in zip(paths, COLUMNS["picture"], strict=True):
        (tmp_path / name).write_bytes(content)
    paths[1] = str(tmp_path / paths[1])
    paths[2] = f"file://{tmp_path / paths[2]}"
    records = [{"bytes": content, "path": None} for content in COLUMNS["picture"]]
    images = {"path": paths, "bytes": COLUMNS["picture"], "record": records}[form]
    name = write_table(tmp_path / f"t.{kind}", {**COLUMNS, "picture": images})
    fields = {"image_field": "picture", "caption_field": "text"}
    source = opened(name, **fields, label_field="kind")
    assert source.about.class_names == ("a", "b", "c")
    labels = [b"1", b"0", b"2", b"0", b"1"]
    assert everything(source) == [
        (f"{n:08d}", {"png": image, "cls": label, "txt": str(text).encode()})
        for n, (image, label, text) in enumerate(
            zip(COLUMNS["picture"], labels, COLUMNS["text"], strict=True)
        )
    ]
    numbers = opened(name, **fields, label_field="number")
    assert [numbers[n].members["cls"] for n in range(5)] == [b"3", b"1", b"0", b"1", b"3"]
    assert opened(name, image_field="picture")[4].members == {"png": grey(4), "cls": b"0"}


def test_a_table_in_several_files_is_one(tmp_path: Path) -> None:
    for part in (slice(0, 3), slice(3, 3), slice(3, 5)):
        columns = {name: values[part] for name, values in COLUMNS.items()}
        if columns["kind"]:
            write_table(tmp_path / f"p-{part.start}.parquet", columns)
    parts = opened(f"{tmp_path}/p-*.parquet", image_field="picture", label_field="kind")
    whole = opened(
        write_table(tmp_path / "w.parquet", COLUMNS), image_field="picture", label_field="kind"
    )
    assert everything(parts) == everything(whole)


def test_what_is_wrong_with_a_folder_is_said(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: has no \.png"):
        opened(tmp_path / "empty")
    with pytest.raises(UserError, match=r"cat/0\.jpg: no metadata table, and 0\.json .* no kind"):
        opened(folder, label_field="kind")
    write_table(folder / "metadata.csv", {"file_name": ["dog/b.png"], "kind": ["a"]})
    with pytest.raises(UserError, match=r"metadata\.csv: has no kind for cat/0\.jpg"):
        opened(folder, label_field="kind")
    with pytest.raises(
        UserError, match=r"metadata\.csv: has no column sort; name one of file_name"
    ):
        opened(folder, label_field="sort")
    (folder / "cat" / "more").symlink_to(folder / "dog")
    with pytest.raises(UserError, match=r"cat/more: is a link to a folder"):
        opened(folder)
    (folder / "cat" / "more").unlink()
    for name, words in {
        "dog/\udcff.png": r"\\udcff\.png' is not UTF-8",
        "dog/a\n.png": r"a\\n\.png' is not UTF-8, or has a line end",
        "dog/movie.gif": r"movie\.gif: images of kind \.gif are not read",
        "cat/1.jpg": r"cat/1\.png and cat/1\.jpg would both be sample cat/1",
        "top.png": r"top\.png: lies beside class folders",
    }.items():
        (folder / name).write_bytes(grey(1))
        with pytest.raises(UserError, match=words):
            opened(folder)
        (folder / name).unlink()
    (folder / "dog" / "b.png").write_bytes(b"<html>")
    with pytest.raises(UserError, match=r"dog/b\.png: its 6 bytes are not a PNG"):
        everything(opened(folder))


def test_what_is_wrong_with_a_table_is_said(tmp_path: Path) -> None:
    def refused(words: str, columns: dict[str, list[object]], **fields: str) -> None:
        name = write_table(tmp_path / "t.parquet", columns)
        with pytest.raises(UserError, match=words):
            everything(opened(name, **{"image_field": "picture", **fields}))

    refused("has no column image; name one of picture, kind", COLUMNS, image_field="image")
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, ["picture", "picture"])
    csv.write_csv(table, tmp_path / "twice.csv")
    with pytest.raises(UserError, match=r"twice\.csv: has several columns picture"):
        opened(tmp_path / "twice.csv", image_field="picture")
    damaged = Path(write_table(tmp_path / "damaged.parquet", {"image": [bytes(900)] * 5}))
    content = bytearray(damaged.read_bytes())
    content[4:60] = b"\xff" * 56
    damaged.write_bytes(content)
    with pytest.raises(UserError, match=r"damaged\.parquet: image of rows 0 to 1 cannot be read"):
        everything(opened(damaged))
    refused("kind of row 1: None is not a class name", {**COLUMNS, "kind": ["a", None, "b", "c", "d"]},
            label_field="kind")  # fmt: skip
    refused("kind of row 2: -1 is not a class", {**COLUMNS, "kind": [0, 1, -1, 0, 0]},
            label_field="kind")  # fmt: skip
    refused("kind of row 0: 0.5 is not a class", {**COLUMNS, "kind": [0.5] * 5},
            label_field="kind")  # fmt: skip
    refused("text of row 3 is None, not text", {**COLUMNS, "text": ["a", "b", "c", None, "d"]},
            caption_field="text")  # fmt: skip
    refused(r"row 0: its image no\.png cannot be read", {**COLUMNS, "picture": ["no.png"] * 5})
    refused("row 4: its image is None", {**COLUMNS, "picture": [grey(0)] * 4 + [None]})
    refused("row 0: its 1 bytes are not a PNG", {**COLUMNS, "picture": [b"x"] * 5})
    for kind in ("csv", "jsonl", "parquet"):
        broken = tmp_path / f"broken.{kind}"
        broken.write_bytes(b'{"a": 1}\nb"c",,,\n{')
        with pytest.raises(UserError, match=rf"broken\.{kind}: (the table cannot be read|has no)"):
            opened(broken)
