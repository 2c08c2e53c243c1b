"""Pillow and DALI give the same batch; what either cannot read, both refuse, naming the sample."""

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipeline.decode.decoder import dali_installed, open_decoder
from data_pipeline.samples import Samples
from flows.errors import UserError
from tests.data_pipeline.conftest import grey, image_file

CPU = torch.device("cpu")
BOTH = [
    "pillow",
    pytest.param("dali", marks=pytest.mark.skipif(not dali_installed(), reason="no DALI")),
]
needs_dali = pytest.mark.skipif(not dali_installed(), reason="no DALI")


def decode(kind, images, *, size, channels=3, flip=None, device=CPU):
    flip = np.zeros(len(images), np.bool_) if flip is None else flip
    decoder = open_decoder(kind, image_size=size, channels=channels, threads=2, device=device)
    try:
        names = [f"a.tar: sample {number:04d}" for number in range(len(images))]
        return decoder.decode(images, flip=flip, names=names)
    finally:
        decoder.close()


def embedded(name, count):
    contents = Samples(f"embedded:{name}/train-000000.tar", classes=None)
    return contents.read(np.zeros(count, np.int64), np.arange(count)).images


def photo(height, width, seed=0):
    """Smooth colours, as photographs have."""
    small = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


@pytest.mark.parametrize("kind", BOTH)
def test_pixels_become_minus_one_to_one_and_flip_where_asked(kind):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    pixels[0, 0, 0] = (0, 255, 51)
    flip = np.array([False, True, False, True, True])
    got = decode(kind, [image_file(p) for p in pixels], size=8, flip=flip)
    want = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    want[flip] = want[flip].flip(-1)
    assert got.dtype == torch.float32
    assert torch.equal(got, want)
    assert got[0, :, 0, 0].tolist() == pytest.approx([-1, 1, -0.6])


@pytest.mark.parametrize("kind", BOTH)
def test_the_middle_is_kept(kind):
    wide = np.repeat(np.arange(0, 130, 10, dtype=np.uint8)[None], 8, axis=0)
    for pixels in (wide, wide.T.copy()):
        got = decode(kind, [image_file(pixels)], size=8, channels=1)[0, 0]
        line = got[0] if pixels is wide else got[:, 0]
        assert torch.round((line + 1) * 127.5).tolist() == list(range(20, 100, 10))


@pytest.mark.parametrize("kind", BOTH)
def test_batches_of_any_size_follow_each_other(kind):
    decoder = open_decoder(kind, image_size=4, channels=1, threads=2, device=CPU)
    for count in (3, 1, 7, 2):
        images = [grey(20 * number) for number in range(count)]
        got = decoder.decode(images, flip=np.zeros(count, np.bool_), names=[""] * count)
        want = [pytest.approx(20 * number / 127.5 - 1) for number in range(count)]
        assert got.mean((1, 2, 3)).tolist() == want
    decoder.close()


@needs_dali
@pytest.mark.parametrize("channels", [1, 3])
def test_both_decoders_give_digits_exactly(channels):
    images = embedded("digits28", 256)
    pillow, dali = (decode(k, images, size=28, channels=channels) for k in ("pillow", "dali"))
    assert pillow.shape == (256, channels, 28, 28)
    assert torch.equal(pillow, dali)


@needs_dali
@pytest.mark.parametrize(
    ("size", "channels", "mean", "most"),
    [(64, 3, 0, 0), (64, 1, 0.5, 1), (32, 3, 0.2, 6), (48, 3, 0.2, 2)],
)
def test_both_decoders_give_emoji_to_within_rounding(size, channels, mean, most):
    """In levels of 255. DALI keeps fractions between the two passes of a resize and pillow rounds
    to bytes, and their filter weights differ in the last digits: that is what is allowed."""
    images = embedded("emoji64", 128)
    pillow, dali = (decode(k, images, size=size, channels=channels) for k in ("pillow", "dali"))
    difference = (pillow - dali).abs() * 127.5
    assert difference.mean() <= mean
    assert difference.max() <= most + 1e-3


@needs_dali
@pytest.mark.parametrize(
    "shape", [(123, 171), (171, 123), (123, 124), (200, 64), (65, 64), (40, 56)]
)
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_both_decoders_agree_on_geometry(shape, kind):
    """A size or crop off by one pixel would differ by tens of levels."""
    images = [image_file(photo(*shape), kind, quality=95)]
    pillow, dali = (decode(k, images, size=64) for k in ("pillow", "dali"))
    difference = (pillow - dali).abs() * 127.5
    assert difference.mean() <= 0.5
    assert difference.max() <= 4 + 1e-3


@needs_dali
def test_both_decoders_turn_photographs_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    images = [image_file(photo(96, 128), "JPEG", quality=95, exif=exif)]
    pillow, dali = (decode(k, images, size=64) for k in ("pillow", "dali"))
    assert ((pillow - dali).abs() * 127.5).max() <= 4
    assert (pillow - decode("pillow", [image_file(photo(96, 128))], size=64)).abs().max() > 0.1


def bad_images():
    colour = photo(64, 64)
    whole, jpeg = image_file(colour), image_file(colour, "JPEG")
    garbled = bytearray(whole)
    garbled[len(whole) // 2] ^= 0xFF
    alpha = np.dstack([colour, np.full((64, 64), 128, np.uint8)])
    return {
        "empty": (b"", r"\(0 bytes\) is not a PNG"),
        "not an image": (b"<html>404</html>", "is not a PNG, JPEG or WebP"),
        "header alone": (whole[:40], "is not a PNG"),
        "png cut": (whole[: len(whole) // 2], "damaged: image file is truncated"),
        "png garbled": (bytes(garbled), "damaged"),
        "jpeg cut": (jpeg[: len(jpeg) // 2], "damaged"),
        "gif": (image_file(colour[..., 0], "GIF"), "is not a PNG"),
        "transparent": (image_file(alpha), "mode RGBA is not read"),
        "16 bits": (image_file(colour[..., 0].astype(np.uint16) * 256), "mode I;16 is not read"),
        "palette": (image_file(Image.fromarray(colour).quantize(16)), "mode P is not read"),
        "cmyk": (
            image_file(Image.fromarray(colour).convert("CMYK"), "JPEG"),
            "mode CMYK is not read",
        ),
    }


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("what", bad_images())
def test_a_bad_image_is_named(kind, what):
    content, words = bad_images()[what]
    good = image_file(photo(64, 64))
    decoder = open_decoder(kind, image_size=64, channels=3, threads=2, device=CPU)
    names = [f"a.tar: sample {number}" for number in range(4)]
    none = np.zeros(4, np.bool_)
    with pytest.raises(UserError, match=rf"^a\.tar: sample 2: .*{words}") as caught:
        decoder.decode([good, good, content, good], flip=none, names=names)
    assert "\n" not in str(caught.value)
    # The decoder itself is well.
    again = decoder.decode([good] * 4, flip=none, names=names)
    assert torch.equal(again[0], again[2])
    decoder.close()


def test_auto_takes_dali_where_it_is():
    decoder = open_decoder("auto", image_size=8, channels=1, threads=1, device=CPU)
    assert decoder.name == ("dali" if dali_installed() else "pillow")
    decoder.close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_the_gpu_decodes_what_the_cpu_does(kind):
    """JPEG differs by its inverse cosine transform: a few levels, here over all of an image."""
    images = [image_file(photo(96, 128, seed), kind) for seed in range(16)]
    flip = np.arange(16) % 2 == 0
    on_gpu = decode("dali", images, size=64, flip=flip, device=torch.device("cuda", 0))
    assert on_gpu.is_cuda
    difference = (on_gpu.cpu() - decode("pillow", images, size=64, flip=flip)).abs() * 127.5
    assert difference.mean() <= 1
    assert difference.max() <= 12
