"""The headers of plain JPEG files, read in a tenth of the time that pillow takes.

Pillow's reading is Python's, which keeps the other threads of a loader waiting. Most JPEGs of a training
set hold an image and nothing else; whatever may turn it, or mean another kind of it (EXIF, XMP, colour
profiles, Adobe's mark, CMYK), and whatever looks wrong, is left to pillow.
"""

import struct

START, END, SCAN = b"\xff\xd8", b"\xff\xd9", 0xDA
TABLES, JFIF = 0xDB, 0xE0
# Baseline, extended and progressive.
FRAMES = frozenset({0xC0, 0xC1, 0xC2})
# Huffman tables, restarts, comments.
PASSED_OVER = frozenset({0xC4, 0xDD, 0xFE})
FRAME = struct.Struct(">BHHB")
MODES = {1: "L", 3: "RGB"}
# A table of 64 bytes after one that names it, and the shortest mark of JFIF.
TABLE_SIZE, JFIF_SIZE = 65, 16


def read_plain(content: bytes) -> tuple[int, int, str] | None:
    """Height, width and pillow's mode of a plain JPEG whose end is there, or None."""
    place, frame = 2, None
    try:
        if content[:2] != START:
            return None
        while True:
            if content[place] != 0xFF:
                return None
            marker = content[place + 1]
            size = content[place + 2] << 8 | content[place + 3]
            if marker == SCAN:
                break
            if marker in FRAMES and frame is None:
                frame = _read_frame(content, place, size)
            elif not _is_plain(content, marker, place, size):
                return None
            place += 2 + size
    except (IndexError, struct.error):
        return None
    return frame if content.rfind(END, place + 2 + size) >= 0 else None


def _read_frame(content: bytes, place: int, size: int) -> tuple[int, int, str] | None:
    bits, height, width, channels = FRAME.unpack_from(content, place + 4)
    if bits != 8 or channels not in MODES or size != 8 + 3 * channels or not height * width:
        return None
    return height, width, MODES[channels]


def _is_plain(content: bytes, marker: int, place: int, size: int) -> bool:
    """Whether a part of the header means what it always means, and is whole."""
    if marker == TABLES:
        names = content[place + 4 : place + 2 + size : TABLE_SIZE]
        return (size - 2) % TABLE_SIZE == 0 and all(name < 16 for name in names)
    return size >= (JFIF_SIZE if marker == JFIF else 2) and marker in {JFIF, *PASSED_OVER}
