"""Pillow and DALI give the same batch, to the bit; what cannot be read is named, alike by both."""

import io
import re
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from data_pipeline.augment import Augment, Views, centre_views, draw_views
from data_pipeline.decode import images
from data_pipeline.decode.decoder import dali_installed, open_decoder
from data_pipeline.decode.images import BadImages, read_picture, read_pictures
from data_pipeline.decode.jpeg import read_plain
from data_pipeline.samples import Samples
from flows.errors import UserError
from tests.data_pipeline.conftest import grey, image_file

CPU = torch.device("cpu")
BOTH = [
    "pillow",
    pytest.param("dali", marks=pytest.mark.skipif(not dali_installed(), reason="no DALI")),
]
needs_dali = pytest.mark.skipif(not dali_installed(), reason="no DALI")
RANDOM = Augment("random", scale=(0.1, 1.0), aspect=(0.5, 2.0), flip=0.5)


def decode(kind, contents, *, size, channels=3, augment=None, device=CPU):
    """The middle of each image, or what `augment` draws, at `size`."""
    decoder = open_decoder(kind, channels=channels, threads=2, device=device)
    try:
        names = [f"a.tar: sample {number:04d}" for number in range(len(contents))]
        pictures = read_pictures(contents, names)
        sizes, target = [picture.size for picture in pictures], (size, size)
        if augment is None:
            views = centre_views(sizes, target)
        else:
            views = draw_views(
                sizes, target, augment, seed=1, positions=torch.arange(len(contents))
            )
        batch = decoder.decode(pictures, views)
        assert decoder.redecoded == 0
        return batch
    finally:
        decoder.close()


def both(contents, **how):
    """What both decoders give, once it is known to be the same."""
    pillow = decode("pillow", contents, **how)
    if dali_installed():
        assert torch.equal(pillow, decode("dali", contents, **how))
    return pillow


def levels(batch):
    """Back to 0 .. 255."""
    return ((batch + 1) * 127.5).round().to(torch.uint8)


def embedded(name, count):
    contents = Samples(f"embedded:{name}/train-000000.tar", classes=None)
    return contents.read(np.zeros(count, np.int64), np.arange(count)).images


def photo(height, width, seed=0):
    """Colours as smooth as a photograph's, and its noise."""
    generator = np.random.default_rng(seed)
    small = generator.integers(0, 256, (-(-height // 8), -(-width // 8), 3), np.uint8)
    smooth = np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))
    noise = generator.integers(-20, 20, smooth.shape)
    return np.clip(smooth + noise, 0, 255).astype(np.uint8)


def upright(pixels):
    """(height, width, channels) as a batch of one."""
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None]


@pytest.mark.parametrize("kind", BOTH)
def test_pixels_become_minus_one_to_one_and_flip_where_asked(kind):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    pixels[0, 0, 0] = (0, 255, 51)
    flip = np.array([False, True, False, True, True])
    pictures = read_pictures([image_file(p) for p in pixels], [""] * 5)
    region = np.tile(np.array([0, 0, 8, 8], np.int32), (5, 1))
    decoder = open_decoder(kind, channels=3, threads=2, device=CPU)
    got = decoder.decode(pictures, Views((8, 8), region, flip))
    decoder.close()
    want = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    want[flip] = want[flip].flip(-1)
    assert got.dtype == torch.float32
    # A last digit: 1 / 127.5 is rounded once, here each pixel is divided.
    assert torch.allclose(got, want, rtol=0, atol=1.2e-7)
    assert (got.min(), got.max()) == (-1, 1)
    assert got[0, :, 0, 0].tolist() == pytest.approx([-1, 1, -0.6])


@pytest.mark.parametrize("kind", BOTH)
def test_what_is_seen_is_the_region(kind):
    pixels = photo(40, 56)
    pictures = read_pictures([image_file(pixels)] * 2, ["", ""])
    region = np.array([[3, 10, 20, 30], [0, 0, 20, 30]], np.int32)
    decoder = open_decoder(kind, channels=3, threads=1, device=CPU)
    got = levels(decoder.decode(pictures, Views((20, 30), region, np.array([False, True]))))
    decoder.close()
    assert torch.equal(got[:1], upright(pixels[3:23, 10:40]))
    assert torch.equal(got[1:], upright(pixels[:20, :30][:, ::-1]))


@pytest.mark.parametrize("kind", BOTH)
def test_batches_of_any_number_and_shape_follow_each_other(kind):
    decoder = open_decoder(kind, channels=1, threads=2, device=CPU)
    kept = []
    for count, target in ((3, (4, 4)), (1, (2, 6)), (7, (4, 4)), (2, (8, 4)), (7, (4, 4))):
        pictures = read_pictures([grey(20 * n) for n in range(count)], [""] * count)
        got = decoder.decode(pictures, centre_views([(4, 4)] * count, target))
        assert got.shape == (count, 1, *target)
        kept.append((got, [pytest.approx(20 * n / 127.5 - 1) for n in range(count)]))
    # Memory is used again for later batches, but not while an earlier one is held.
    for got, want in kept:
        assert got.mean((1, 2, 3)).tolist() == want
    decoder.close()


def test_memory_of_batches_is_used_again():
    decoder = open_decoder("pillow", channels=1, threads=1, device=CPU)
    pictures = read_pictures([grey(7)], [""])
    views = centre_views([(4, 4)], (4, 4))
    first = decoder.decode(pictures, views)
    place, part = first.data_ptr(), first[0, 0, 0]
    del first
    assert decoder.decode(pictures, views).data_ptr() != place, "a part of it is still held"
    del part
    assert decoder.decode(pictures, views).data_ptr() == place
    decoder.close()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("name", "size"), [("digits28", 28), ("digits28", 16), ("emoji64", 48)])
def test_both_decoders_give_embedded_data_to_the_bit(name, size, channels):
    assert both(embedded(name, 128), size=size, channels=channels).shape[1] == channels


@needs_dali
@pytest.mark.parametrize("augment", [None, RANDOM], ids=["centre", "random"])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("PNG", {}),
        ("JPEG", {"quality": 90}),
        ("JPEG", {"quality": 95, "subsampling": 0}),
        ("JPEG", {"quality": 80, "progressive": True}),
        ("WEBP", {"quality": 85}),
        ("WEBP", {"lossless": True}),
    ],
)
def test_both_decoders_give_photographs_to_the_bit(kind, options, augment):
    """The same libraries decode for both, and the same code resizes; so nothing may differ."""
    shapes = [(123, 171), (171, 123), (64, 64), (65, 64), (200, 70), (40, 56), (8, 9), (300, 17)]
    contents = [image_file(photo(*shape, n), kind, **options) for n, shape in enumerate(shapes)]
    both(contents, size=64, augment=augment)
    both(contents, size=32, channels=1, augment=augment)


def test_resizing_is_pillows_triangle():
    """To within two levels: weights have 15 bits here and 22 in pillow."""
    pixels = photo(211, 211)
    for size in (64, 100, 210, 333):
        got = levels(both([image_file(pixels)], size=size))
        image = Image.fromarray(pixels).resize((size, size), Image.Resampling.BILINEAR)
        difference = (got.int() - upright(np.asarray(image)).int()).abs()
        assert difference.max() <= 2
        assert difference.float().mean() < 0.1


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_every_orientation_is_turned_upright(kind):
    stored = photo(24, 40)
    turned = {
        1: stored,
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.swapaxes(0, 1),
        6: np.rot90(stored, -1),
        7: stored[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(stored),
    }
    for orientation, want in turned.items():
        options = {"exif": exif(orientation)} | ({"lossless": True} if kind == "WEBP" else {})
        content = image_file(stored, kind, **options)
        picture = read_picture(content, "")
        assert picture.size == want.shape[:2]
        if kind != "JPEG":
            shape = min(want.shape[:2])
            middle = centre_views([picture.size], (shape, shape)).region[0]
            top, left = middle[:2]
            assert torch.equal(
                levels(both([content], size=shape)),
                upright(want[top : top + shape, left : left + shape]),
            )
        else:
            straight = both([image_file(stored, kind)], size=24)
            again = both([content], size=24)
            assert torch.equal(again, straight) == (orientation == 1)
        both([content] * 3, size=16, augment=RANDOM)


def odd_images():
    """Content, and the 8-bit RGB it stands for, of every kind of pixel that is not plain."""
    colour = photo(32, 32)
    alpha = photo(32, 32, seed=1)[..., 0]
    shade = (colour * (alpha[..., None] / 255) + 255 * (1 - alpha[..., None] / 255)).round()
    deep = np.random.default_rng(0).integers(0, 65536, (32, 32), dtype=np.uint16)
    image = Image.fromarray(colour)
    palette, bits = image.quantize(16), image.convert("1")
    grey_alpha = Image.fromarray(np.dstack([colour[..., 0], alpha]), "LA")
    grey_shade = np.repeat(shade[..., :1], 3, 2)
    first = palette.convert("RGB").getpixel((0, 0))
    clear = np.asarray(palette.convert("RGB")).copy()
    clear[(clear == first).all(-1)] = 255
    cmyk = image.convert("CMYK")
    keyed = colour[..., 0].copy()
    keyed[keyed == keyed[0, 0]] = 255
    return {
        "RGBA PNG": (image_file(np.dstack([colour, alpha])), shade),
        "RGBA WebP": (
            image_file(np.dstack([colour, alpha]), "WEBP", lossless=True, exact=True),
            shade,
        ),
        "grey with alpha": (image_file(grey_alpha), grey_shade),
        "palette": (image_file(palette), np.asarray(palette.convert("RGB"))),
        "palette, one clear": (image_file(palette, transparency=palette.getpixel((0, 0))), clear),
        "grey, one clear": (
            image_file(colour[..., 0], transparency=int(colour[0, 0, 0])),
            np.repeat(keyed[..., None], 3, 2),
        ),
        "one bit": (image_file(bits), np.asarray(bits.convert("RGB"))),
        "16-bit grey": (image_file(deep), np.repeat((deep >> 8)[..., None], 3, 2)),
        "16-bit RGB": (deep_colour(deep), np.repeat((deep >> 8)[..., None], 3, 2)),
        "CMYK JPEG": (
            image_file(cmyk, "JPEG", quality=100),
            np.asarray(cmyk.convert("RGB")),
        ),
    }


def deep_colour(values):
    """A PNG of 16 bits a channel, which pillow cannot write: red, green and blue all `values`."""
    height, width = values.shape
    rows = np.repeat(values[..., None], 3, 2).astype(">u2").reshape(height, -1)
    raw = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw)) + END


def chunk(kind, content):
    check = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)


END = chunk(b"IEND", b"")


@pytest.mark.parametrize("what", odd_images())
def test_kinds_of_pixels_become_eight_bits_on_white(what):
    content, want = odd_images()[what]
    assert not read_picture(content, "").plain
    got = levels(both([content], size=32)).int()
    # JPEG loses a little; the others are compared with exact arithmetic, rounded once.
    allowed = 12 if "JPEG" in what else 1
    assert (got - upright(np.asarray(want)).int()).abs().max() <= allowed
    dark = both([content] * 2, size=16, channels=1, augment=RANDOM)
    assert dark.shape == (2, 1, 16, 16)


@needs_dali
def test_plain_and_odd_images_share_a_batch():
    odd = [content for content, _ in odd_images().values()]
    plain = [image_file(photo(50, 60, n), kind) for n, kind in enumerate(("PNG", "JPEG", "WEBP"))]
    mixed = [content for pair in zip(odd, plain * 4, strict=False) for content in pair]
    both(mixed, size=24)
    both(mixed, size=24, augment=RANDOM)


def test_orientation_that_cannot_be_read_counts_as_upright():
    broken = image_file(photo(24, 40), "JPEG", exif=b"Exif\0\0not a TIFF header")
    assert read_picture(broken, "").size == (24, 40)
    both([broken], size=24)


def bomb(side):
    """A header that promises `side` x `side` pixels, and zeros that would keep such a promise."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(bytes(1 << 20)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + data + END


def bad_images():
    colour = photo(64, 64)
    whole, jpeg = image_file(colour), image_file(colour, "JPEG")
    webp = image_file(colour, "WEBP")
    garbled = bytearray(whole)
    garbled[len(whole) // 2] ^= 0xFF
    small = image_file(photo(16, 16), "JPEG")
    thumbnail = b"Exif\0\0" + small
    frames = [Image.fromarray(photo(16, 16, n)) for n in range(2)]
    text = PngImagePlugin.PngInfo()
    text.add_text("note", "x" * 10_000_000, zip=True)
    floats = io.BytesIO()
    Image.fromarray(colour[..., 0].astype(np.float32)).save(floats, "TIFF")
    return {
        "empty": (b"", r"\(0 bytes\) is not a PNG"),
        "not an image": (b"<html>404</html>", "is not a PNG, JPEG or WebP"),
        "header alone": (whole[:40], "is not a PNG"),
        "png cut": (whole[: len(whole) // 2], "damaged: cut off before its end mark"),
        "png without its last bytes": (whole[:-9], "damaged: cut off before its end mark"),
        "png garbled": (bytes(garbled), "damaged"),
        "jpeg cut": (jpeg[: len(jpeg) // 2], "damaged: cut off before its end mark"),
        "jpeg without its last byte": (jpeg[:-1], "damaged: cut off"),
        "jpeg cut behind its thumbnail": (
            image_file(colour, "JPEG", exif=thumbnail)[:-200],
            "damaged: cut off",
        ),
        "webp cut": (webp[: len(webp) // 2], "damaged"),
        "gif": (image_file(colour[..., 0], "GIF"), "is not a PNG"),
        "tiff": (floats.getvalue(), "is not a PNG"),
        "image bomb": (bomb(40_000), "more than 89,478,485 pixels"),
        "smaller image bomb": (bomb(9_460), "more than 89,478,485 pixels"),
        "text bomb": (image_file(colour, pnginfo=text), "damaged: Decompressed data too large"),
        "animated webp": (
            image_file(frames[0], "WEBP", save_all=True, append_images=frames[1:]),
            "is an animation",
        ),
        "animated png": (
            image_file(frames[0], "PNG", save_all=True, append_images=frames[1:]),
            "is an animation",
        ),
    }


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("what", bad_images())
def test_a_bad_image_is_named(kind, what):
    content, words = bad_images()[what]
    good = image_file(photo(64, 64))
    decoder = open_decoder(kind, channels=3, threads=2, device=CPU)
    names = [f"a.tar: sample {number}" for number in range(5)]

    def run(contents):
        pictures = read_pictures(contents, names)
        return decoder.decode(pictures, centre_views([p.size for p in pictures], (64, 64)))

    with pytest.raises(BadImages, match=rf"^a\.tar: sample 2: .*({words})") as caught:
        run([good, good, content, good, content])
    assert "\n" not in str(caught.value)
    assert list(caught.value.errors) == [2, 4]
    assert str(caught.value.errors[4]).startswith("a.tar: sample 4: ")
    # The decoder itself is well.
    again = run([good] * 5)
    assert torch.equal(again[0], again[2])
    decoder.close()


def test_the_documentation_quotes_what_is_said():
    page = Path(__file__).parents[2] / "docs" / "data-formats.md"
    table = page.read_text(encoding="utf-8").split("## What is refused")[1].split("##")[0]
    said = []
    for content, _ in bad_images().values():
        with pytest.raises(UserError) as caught:
            decode("pillow", [content], size=8)
        said.append(re.sub(r"\d+", "N", str(caught.value)))
    quoted = re.findall(r"\| `(.*)` \|", table)
    assert len(quoted) >= 6
    for sentence in quoted:
        assert f"a.tar: sample N: {re.sub(r'[0-9]+', 'N', sentence)}" in said


def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded(monkeypatch):
    monkeypatch.setattr(images, "MOST_PIXELS", 64 * 64 - 1)
    with pytest.raises(UserError, match="its image has more than 4,095 pixels"):
        read_picture(image_file(photo(64, 64)), "x")
    read_picture(image_file(photo(64, 63)), "x")


def test_the_content_decides_the_format_not_the_name():
    content = image_file(photo(20, 20), "JPEG")
    assert read_picture(content, "a.tar: sample 0001.png").plain
    both([content], size=20)


@needs_dali
def test_what_dali_alone_cannot_decode_comes_from_pillow():
    """DALI fails on WebP of the extended format, which therefore never goes there: but here it does."""
    contents = [image_file(photo(48, 64, n), "JPEG") for n in range(6)]
    contents[2] = image_file(photo(48, 64), "WEBP", lossless=True, exif=exif(1))
    pictures = read_pictures(contents, [f"sample {n}" for n in range(6)])
    sizes = [picture.size for picture in pictures]
    views = draw_views(sizes, (32, 32), RANDOM, seed=1, positions=torch.arange(6))
    decoder = open_decoder("dali", channels=3, threads=2, device=CPU)
    want = decoder.decode(pictures, views)
    assert (decoder.redecoded, pictures[2].plain) == (0, False)
    pictures[2] = pictures[2]._replace(plain=True)
    with pytest.warns(UserWarning, match="sample 2: DALI cannot decode its image and pillow can"):
        assert torch.equal(decoder.decode(pictures, views), want)
    assert decoder.redecoded == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(decoder.decode(pictures, views), want)
    assert decoder.redecoded == 2
    decoder.close()


def jpeg_kinds():
    """JPEGs with all kinds of headers, by what is special about them."""
    pixels = photo(20, 28)
    cmyk = Image.fromarray(pixels).convert("CMYK")
    return {
        "plain": image_file(pixels, "JPEG"),
        "best": image_file(pixels, "JPEG", quality=100, subsampling=0),
        "progressive": image_file(pixels, "JPEG", progressive=True),
        "restarts": image_file(pixels, "JPEG", restart_marker_rows=1, optimize=True),
        "comment": image_file(pixels, "JPEG", comment=b"\xff\xd9 no end"),
        "grey": image_file(pixels[..., 0], "JPEG"),
        "turned": image_file(pixels, "JPEG", exif=exif(6)),
        "profile": image_file(pixels, "JPEG", icc_profile=b"profile"),
        "density": image_file(pixels, "JPEG", dpi=(300, 300)),
        "cmyk": image_file(cmyk, "JPEG"),
        "one pixel": image_file(pixels[:1, :1], "JPEG"),
        "png": image_file(pixels),
    }


def told(read, content):
    try:
        return read(content, "it")
    except UserError as error:
        return str(error)


@pytest.mark.parametrize("kind", jpeg_kinds())
def test_a_header_read_quickly_is_what_pillow_reads(kind):
    content = jpeg_kinds()[kind]
    assert told(read_picture, content) == told(images.read_any, content)
    quick = {"plain", "best", "progressive", "restarts", "comment", "grey", "density", "one pixel"}
    assert (read_plain(content) is not None) == (kind in quick)
    # Cut anywhere, or with a number changed anywhere before the pixels, it is what pillow says it is.
    for length in {*range(min(len(content), 700)), *range(len(content) - 9, len(content))}:
        assert told(read_picture, content[:length]) == told(images.read_any, content[:length])
    generator = np.random.default_rng(0)
    for place in range(min(len(content), 700)):
        changed = bytearray(content)
        changed[place] = generator.integers(256)
        changed = bytes(changed)
        assert told(read_picture, changed) == told(images.read_any, changed)


def test_auto_takes_dali_where_it_is():
    decoder = open_decoder("auto", channels=1, threads=1, device=CPU)
    assert decoder.name == ("dali" if dali_installed() else "pillow")
    decoder.close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("augment", [None, RANDOM], ids=["centre", "random"])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_the_gpu_decodes_what_the_cpu_does(kind, augment):
    """To within a few levels: JPEG by another inverse cosine transform, resizing by DALI's weights."""
    odd = [content for content, _ in odd_images().values()]
    contents = [image_file(photo(96, 128, seed), kind) for seed in range(16)] + odd
    on_gpu = decode("dali", contents, size=64, augment=augment, device=torch.device("cuda", 0))
    assert on_gpu.is_cuda
    difference = (on_gpu.cpu() - decode("pillow", contents, size=64, augment=augment)).abs() * 127.5
    assert difference.mean() <= 1
    assert difference.max() <= 12
