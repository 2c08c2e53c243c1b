"""A malformed shard ends in a sentence that names the shard, and the sample if it is one."""

import tarfile
from pathlib import Path

import pytest

from tests.data_pipeline.conftest import Members, grey, sample, write_tar
from tests.launch.conftest import SHORT, Flowmill, Refused

# Two batches of good samples, so that a bad one is met after training has begun.
GOOD = [member for n in range(16) for member in sample(f"{n:04d}", n, n % 10)]


def link() -> tarfile.TarInfo:
    member = tarfile.TarInfo("0099.png")
    member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
    return member


# Found before training: (what is wrong, members, what the sentence says beside the shard's name)
UNSAFE = [
    ("pickle", [*GOOD, ("0099.pkl", b"\x80\x04.")], ("member 0099.pkl is a pickle", "remove it")),
    ("path that escapes", [*GOOD, ("../../0099.png", grey(1))], ("leads outside", "pack it again")),
    ("absolute path", [*GOOD, ("/etc/0099.png", grey(1))], ("leads outside", "pack it again")),
    ("link", [*GOOD, (link(), b"")], ("0099.png is a link", "plain files only")),
    ("doubled key", [*GOOD, *sample("0003", 1)], ("duplicate key 0003", "pack it again")),
    ("no image", [*GOOD, ("0099.cls", b"1")], ("sample 0099 has no image", "exactly one")),
    ("no label", [*GOOD, ("0099.png", grey(1))], ("sample 0099 has no label", "exactly one")),
    ("no sample", [], ("hold no samples", "pack some images")),
]

# Found while training, by whoever decodes the sample
BAD_SAMPLES = [
    ("label out of range", sample("0099", 1, 10), ("sample 0099: label 10", "raise data.classes")),
    ("negative label", sample("0099", 1, -1), ("sample 0099: label -1", "relabel it")),
    ("label that is a word", sample("0099", 1, "cat"), ("label b'cat' is not an integer", "0099")),
    ("corrupt PNG", [("0099.png", grey(1)[:50]), ("0099.cls", b"1")], ("sample 0099",)),
    ("text for an image", [("0099.png", b"hello"), ("0099.cls", b"1")], ("sample 0099",)),
]


def cases(table: list[tuple]) -> list:
    return [pytest.param(*row[1:], id=row[0].replace(" ", "-")) for row in table]


def train(shards: str, *more: str) -> tuple[str, ...]:
    return ("train", "digits8", f"data.train={shards}", "run.dir=fresh", *SHORT, *more)


@pytest.mark.parametrize(("members", "says"), cases(UNSAFE))
def test_an_unsafe_shard_is_refused_before_training(
    refused: Refused, place: Path, members: Members, says: tuple[str, ...]
) -> None:
    write_tar(place / "bad.tar", members)
    refused(*train(f"{place}/bad.tar"), says=("bad.tar", *says))
    assert not (place / "fresh").exists()


@pytest.mark.parametrize(("members", "says"), cases(BAD_SAMPLES))
def test_a_bad_sample_is_named_while_training(
    refused: Refused, place: Path, members: Members, says: tuple[str, ...]
) -> None:
    write_tar(place / "bad.tar", [*GOOD, *members])
    refused(*train(f"{place}/bad.tar", "train.batch=17"), says=("bad.tar", *says))


@pytest.mark.parametrize("size", [0, 100, 1000, -600])
def test_a_truncated_shard_is_refused(refused: Refused, place: Path, size: int) -> None:
    whole = Path(write_tar(place / "bad.tar", GOOD)).read_bytes().rstrip(b"\0")
    (place / "bad.tar").write_bytes(whole[:size])
    refused(*train(f"{place}/bad.tar"), says=("bad.tar", "pack"))


def test_a_shard_cut_after_it_was_indexed(
    refused: Refused, flowmill: Flowmill, place: Path
) -> None:
    whole = Path(write_tar(place / "bad.tar", GOOD)).read_bytes()
    assert flowmill("data", "index", f"{place}/bad.tar").code == 0
    (place / "bad.tar").write_bytes(whole[:2000])
    refused(*train(f"{place}/bad.tar"), says=("bad.tar", "pack the shard again"))


def test_a_damaged_index_is_made_anew(flowmill: Flowmill, place: Path) -> None:
    write_tar(place / "good.tar", GOOD)
    (place / "good.tar.index.npz").write_bytes(b"no index")
    assert flowmill(*train(f"{place}/good.tar", "--dry-run")).code == 0


@pytest.mark.parametrize(
    ("shards", "says"),
    [
        ("nowhere/*.tar", "there is no shard"),
        ("nowhere/{0..3}.tar", "there is no shard nowhere/0.tar"),
        ("nowhere/{0..3.tar", "write {00..07} or {a,b}"),
        ("embedded:digits9/*.tar", "where SET is digits28 or digits8"),
        ("embedded:../*.tar", "drop `..`"),
        ("foo://bucket/x.tar", "no storage driver"),
    ],
)
def test_shards_that_are_not_there(refused: Refused, place: Path, shards: str, says: str) -> None:
    refused(*train(shards), says=(shards, says))
    refused("data", "verify", shards, says=(shards, says))
    refused("data", "index", shards, says=(shards, says))


def test_a_folder_is_no_shard(refused: Refused, place: Path) -> None:
    refused(*train(str(place)), says=(str(place), "is a folder", f"{place}/*.tar"))


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("nowhere.npz", "nowhere.npz"),
        ("pictures.zip", "cannot be packed; give a folder of images"),
        ("text.npz", "text.npz"),
        ("nowhere.tar", "there is no shard"),
    ],
)
def test_what_cannot_be_packed(refused: Refused, place: Path, source: str, says: str) -> None:
    Path("text.npz").write_text("hello")
    refused("data", "pack", source, "packed", says=(says,))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ((), "give --autoencoder, --text, or both"),
        (("--autoencoder", "absent"), "absent: is no folder with a config.json"),
        (("--text", "net"), "net: holds None; give the folder of a T5 or CLIP"),
        (("--text", "bare"), "bare: has no .safetensors weights"),
        (("--text", "damaged"), "damaged: the text encoder cannot be loaded"),
    ],
)
def test_what_cannot_be_encoded_by(
    refused: Refused, place: Path, options: tuple[str, ...], says: str
) -> None:
    for name, config in {"net": "{}", "bare": "{}", "damaged": '{"model_type": "t5"}'}.items():
        Path(name).mkdir()
        Path(name, "config.json").write_text(config)
        if name != "bare":
            Path(name, "model.safetensors").write_bytes(b"\x10")
    write_tar(place / "good.tar", GOOD)
    refused("data", "encode", str(place / "good.tar"), "encoded", *options, says=(says,))


def test_pack_overwrites_nothing(refused: Refused, place: Path) -> None:
    write_tar(place / "good.tar", GOOD)
    write_tar(place / "runs" / "train-000000.tar", GOOD)
    refused(
        "data",
        "pack",
        f"{place}/good.tar",
        "runs",
        says=("train-000000.tar", "name another folder"),
    )
    refused(
        "data",
        "pack",
        f"{place}/good.tar",
        "out",
        "--heldout",
        "16",
        says=("16 of 16", "ask for fewer"),
    )
    refused("data", "pack", f"{place}/good.tar", "good.tar", says=("good.tar",))


def test_verify_writes_no_picture_where_there_is_no_folder(refused: Refused, place: Path) -> None:
    write_tar(place / "good.tar", GOOD)
    refused("data", "verify", f"{place}/good.tar", "--picture", "no/x.png", says=("no/x.png",))
