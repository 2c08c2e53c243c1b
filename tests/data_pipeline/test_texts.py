"""A batch carries its samples' embedded captions, of one shape, whatever the ranks and the captions."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from data_pipeline.encoders.hashed import HashedWords
from data_pipeline.faults import Tolerance, read_lines
from data_pipeline.latents import write_array
from data_pipeline.loader import Loader
from data_pipeline.share import Share
from data_pipeline.sources.archives import TarSource
from data_pipeline.stream import open_stream
from data_pipeline.texts import TextMember
from data_pipeline.verify import verify
from flows.errors import UserError
from launch.commands.data import app
from tests.data_pipeline.conftest import sample, write_tar
from tests.data_pipeline.test_loader import CPU, PLAIN, decoder

WIDTH, TOKENS = 6, 4
TEXT = TextMember("text.npy", TOKENS, WIDTH)


def words(number: int, count: int | None = None, width: int = WIDTH) -> np.ndarray:
    """0 to 6 words of sample `number`."""
    count = number % 7 if count is None else count
    return np.random.default_rng(number).normal(size=(count, width)).astype(np.float32)


def with_text(number: int, content: bytes | None = None) -> list[tuple[str, bytes]]:
    key = f"{number:04d}"
    content = write_array(words(number)) if content is None else content
    return [*sample(key, number, number % 10), (f"{key}.text.npy", content)]


def write_set(folder: Path, sizes=(9, 5, 11), spoiled=None) -> str:
    folder.mkdir()
    number = 0
    for shard, size in enumerate(sizes):
        members = []
        for _ in range(size):
            members += with_text(number, (spoiled or {}).get(number))
            number += 1
        write_tar(folder / f"train-{shard}.tar", members)
    return f"{folder}/train-*.tar"


def batches(pattern, count, *, text=TEXT, rank=0, ranks=1, tolerate=None):
    stream = open_stream(
        [(pattern, 1.0)],
        keep={},
        classes=10,
        seed=3,
        lanes=3,
        window=4,
        tolerate=tolerate,
        text=text,
    )
    share = Share(
        stream, decoder(), size=(4, 4), augment=PLAIN, seed=3, batch=6, rank=rank, ranks=ranks,
        device=CPU,
    )  # fmt: skip
    loader = Loader(share, prefetch=2)
    try:
        return [next(loader) for _ in range(count)]
    finally:
        loader.close()


def expected(image: torch.Tensor) -> np.ndarray:
    """What the caption of a sample, painted with its number, has to become."""
    found = words(round((float(image.mean()) + 1) * 127.5))[:TOKENS]
    return np.pad(found, ((0, TOKENS - len(found)), (0, 0)))


def test_captions_come_with_their_images_padded_or_cut(tmp_path):
    for batch in batches(write_set(tmp_path / "set"), 5):
        text = batch.extras["text"]
        assert (text.dtype, tuple(text.shape)) == (torch.float32, (6, TOKENS, WIDTH))
        for image, rows in zip(batch.image, text, strict=True):
            np.testing.assert_array_equal(rows.numpy(), expected(image))


def test_ranks_share_them_as_they_share_images(tmp_path):
    pattern = write_set(tmp_path / "set")
    whole = batches(pattern, 4)
    shares = [batches(pattern, 4, rank=rank, ranks=3) for rank in range(3)]
    for want, *parts in zip(whole, *shares, strict=True):
        assert torch.equal(torch.cat([part.extras["text"] for part in parts]), want.extras["text"])


def test_captions_nobody_asks_for_are_not_read(tmp_path):
    pattern = write_set(tmp_path / "set", spoiled=dict.fromkeys(range(25), b"no array"))
    assert batches(pattern, 1, text=None)[0].extras == {}


def test_half_precision_is_read_as_float32(tmp_path):
    half = {n: write_array(words(n).astype(np.float16)) for n in range(25)}
    (batch,) = batches(write_set(tmp_path / "set", spoiled=half), 1)
    assert batch.extras["text"].dtype == torch.float32
    want = expected(batch.image[0]).astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(batch.extras["text"][0].numpy(), want)


PICKLED = io.BytesIO()
np.save(PICKLED, np.array([{}], object), allow_pickle=True)
BAD = {
    "width": (write_array(words(1, 2, 5)), r"has shape \(2, 5\) and \(words, 6\) is asked for"),
    "one vector": (write_array(words(1, 1)[0]), r"has shape \(6,\) and \(words, 6\) is asked for"),
    "cut": (write_array(words(1, 3))[:-1], "is damaged"),
    "pickled": (PICKLED.getvalue(), "is damaged"),
    "whole numbers": (write_array(np.ones((2, 6), np.int64)), "its numbers are int64"),
    "not finite": (write_array(np.full((2, 6), np.nan, np.float32)), "numbers that are not finite"),
    "raw": (b"a caption", "is damaged"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_text_is_named_or_replaced(tmp_path, kind):
    content, what = BAD[kind]
    pattern = write_set(tmp_path / "set", spoiled={7: content})
    with pytest.raises(
        UserError, match=rf"train-0\.tar: sample 0007: its \.text\.npy .*{what}"
    ) as bad:
        batches(pattern, 5)
    assert "\n" not in str(bad.value)
    report = tmp_path / "report.jsonl"
    found = batches(pattern, 5, tolerate=Tolerance(0.2, report, None))
    assert {line["key"] for line in read_lines(report)} == {"0007"}
    for batch in found:
        for image, rows in zip(batch.image, batch.extras["text"], strict=True):
            np.testing.assert_array_equal(rows.numpy(), expected(image))


def test_a_set_without_texts_is_refused_before_training(tmp_path):
    url = write_tar(tmp_path / "a.tar", [*with_text(0), *sample("0001", 1)])
    with pytest.raises(
        UserError, match=r"sample 0001 has no text members \(\.text\.npy\).*encode --text"
    ):
        batches(url, 1)


def test_hashed_words_are_a_vector_a_word_whatever_is_around_it():
    encoder = HashedWords(512, max_tokens=4)
    captions = ["A red Cat", "cat", "", "red, red… fish-hook", "one two three four five six"]
    found = encoder.encode(captions)
    assert [len(rows) for rows in found.tokens] == [3, 1, 0, 3, 4]
    assert (found.cut, found.pooled) == (1, None)
    a_red_cat, cat, _, red_red_fish, _ = found.tokens
    assert torch.equal(a_red_cat[2], cat[0])
    assert torch.equal(a_red_cat[1], red_red_fish[0])
    assert torch.equal(red_red_fish[0], red_red_fish[1])
    again = HashedWords(512, max_tokens=99).encode(captions[:1])
    assert torch.equal(again.tokens[0], a_red_cat)
    # Another width is another encoder.
    assert encoder.fingerprint != HashedWords(256, max_tokens=4).fingerprint


def test_hashed_words_are_standard_normal_and_nearly_orthogonal():
    names = [f"word{number}" for number in range(400)]
    vectors = torch.stack([rows[0] for rows in HashedWords(256, max_tokens=1).encode(names).tokens])
    count = vectors.numel()
    # Five deviations of each estimate.
    assert abs(vectors.mean()) < 5 / count**0.5
    assert abs(vectors.var() - 1) < 5 * (2 / count) ** 0.5
    products = vectors @ vectors.T / 256
    apart = products[~torch.eye(400, dtype=torch.bool)]
    assert abs(apart.std() - 256**-0.5) < 0.01
    assert apart.abs().max() < 6 * 256**-0.5


def test_the_command_encodes_embedded_captions_without_any_network(tmp_path):
    out = tmp_path / "out"
    arguments = [
        "encode",
        "embedded:emoji64/heldout-*.tar",
        str(out),
        "--text",
        "hashed:16",
        "--max-tokens",
        "5",
    ]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "data.text=" in done.output
    report = verify(f"{out}/*.tar", classes=None)
    assert report.problems == []
    source = TarSource("embedded:emoji64/heldout-*.tar", label_field=None, caption_field=None)
    encoder = HashedWords(16, max_tokens=5)
    stream = open_stream(
        [(f"{out}/*.tar", 1.0)], keep={}, classes=1000, seed=0, lanes=2, window=2,
        text=TextMember("text.npy", 5, 16),
    )  # fmt: skip
    captions = {source[n].key: source[n].members["txt"].decode() for n in range(len(source))}
    positions = torch.arange(20)
    found = stream.fetch(positions, torch.zeros_like(positions))
    for key, one in zip(stream.keys(positions), found, strict=True):
        (want,) = encoder.encode([captions[key.rpartition("/")[2]]]).tokens
        np.testing.assert_array_equal(one.words, want.numpy())
    stream.close()
    before = CliRunner().invoke(app, arguments)
    assert before.exit_code == 0
    assert "0 made" in before.output


@pytest.mark.parametrize("width", ["", "0", "-3", "1.5", "many", "70000"])
def test_a_width_that_is_none_is_refused(tmp_path, width):
    url = write_tar(tmp_path / "a.tar", [*sample("0", 1), ("0.txt", b"a")])
    done = CliRunner().invoke(
        app, ["encode", url, str(tmp_path / "out"), "--text", f"hashed:{width}"]
    )
    assert isinstance(done.exception, UserError)
    assert f"--text hashed:{width}: hashed words need a width of 1 to" in str(done.exception)
