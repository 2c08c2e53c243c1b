"""Each row of the table of bad input in `docs/data.md`: the sentence it prints is the one a person gets.

SHARD, DATA and RECIPE stand for what changes from one run to another; ... for the words of a driver.
"""

import io
import os
import re
import tarfile
import threading
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipeline.decode.decoder import open_decoder
from data_pipeline.description import UNFINISHED
from data_pipeline.faults import Tolerance, read_lines
from data_pipeline.latents import write_array
from data_pipeline.loader import Loader
from data_pipeline.share import Share
from data_pipeline.sources.archives import TarSource
from data_pipeline.storage import resolve
from data_pipeline.stream import open_stream
from data_pipeline.texts import TextMember
from flows.errors import UserError
from launch.cli import main
from tests.data_pipeline.conftest import Members, grey, image_file, reach, sample, write_tar
from tests.data_pipeline.test_loader import PLAIN
from trainer.recipe import load_recipe
from trainer.storage import reach_storage

DOCUMENT = Path(__file__).parents[2] / "docs" / "data.md"
GOOD = 20
CPU = torch.device("cpu")
SERVERS: list[ThreadingHTTPServer] = []
UNDO: list[pytest.MonkeyPatch] = []


@dataclass
class Case:
    """A data set with something wrong with it.

    pattern: its shards
    broken: the one that is meant by SHARD
    spoil: what happens to it once it is open
    act: what is done other than reading an epoch
    text: embedded captions that are asked for
    batch: samples a step
    """

    pattern: str
    broken: str
    spoil: Callable[[], object] = field(default=lambda: None)
    act: Callable[[], object] | None = None
    text: TextMember | None = None
    batch: int = 10


def _set(folder: Path, members: Members | None = None) -> Case:
    """Four good shards, and a fifth with `members` after as many good ones."""
    for shard in range(4):
        numbers = range(GOOD * shard, GOOD * (shard + 1))
        write_tar(folder / f"{shard}.tar", [m for n in numbers for m in sample(f"{n:04d}", n)])
    tail = [m for n in range(80, 99) for m in sample(f"{n:04d}", n)]
    broken = write_tar(folder / "4.tar", [*tail, *(members or sample("0099", 99))])
    return Case(f"{folder}/*.tar", broken)


def _rewritten(change: Callable[[bytes], bytes]) -> Callable[[Path], Case]:
    def build(folder: Path) -> Case:
        case = _set(folder)
        Path(case.broken).write_bytes(change(Path(case.broken).read_bytes()))
        return case

    return build


def _with(*members: tuple[str | tarfile.TarInfo, bytes]) -> Callable[[Path], Case]:
    return lambda folder: _set(folder, list(members))


def _special(name: str, kind: bytes) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, "/etc/passwd"
    return member


def _pax(name: str, headers: dict[str, str]) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.pax_headers = headers
    return member


def _pipe(folder: Path) -> Case:
    (folder / "4.tar").unlink(missing_ok=True)  # writing into the pipe of a first call would wait
    case = _set(folder)
    Path(case.broken).unlink()
    os.mkfifo(case.broken)
    return case


def _bomb() -> bytes:
    """A PNG of 40,000 x 40,000 pixels in 68 bytes."""
    small = bytearray(grey(0))
    small[16:24] = (40_000).to_bytes(4, "big") * 2
    return bytes(small[:29]) + _checksum(small[12:29]) + bytes(small[33:])


def _checksum(chunk: bytes) -> bytes:
    return zlib.crc32(chunk).to_bytes(4, "big")


def _absent(folder: Path) -> Case:
    case = _set(folder)
    Path(case.broken).unlink()
    return Case(f"{folder}/{{0..4}}.tar", case.broken)


def _in_memory(folder: Path) -> Case:
    _set(folder)
    for path in folder.glob("*.tar"):
        resolve("memory://x").storage.pipe_file(f"/table/{path.name}", path.read_bytes())
    return Case("memory://table/*.tar", "memory:///table/4.tar")


def _interrupted(folder: Path) -> Case:
    case = _set(folder)
    (folder / UNFINISHED).touch()
    return case


def _vanished(folder: Path) -> Case:
    case = _in_memory(folder)
    case.spoil = lambda: resolve("memory://x").storage.rm("/table/4.tar")
    return case


def _shortened(folder: Path) -> Case:
    case = _set(folder)
    case.spoil = lambda: Path(case.broken).write_bytes(b"\0" * 600)
    return case


def _captioned(content: bytes | None) -> Callable[[Path], Case]:
    """Every sample has an embedded caption; that of the last is `content`."""

    def build(folder: Path) -> Case:
        words = write_array(np.ones((2, 3), np.float32))
        for shard in range(5):
            members: Members = []
            for number in range(GOOD * shard, GOOD * (shard + 1)):
                last = number == 5 * GOOD - 1
                members += sample(f"{number:04d}", number)
                if (text := content if last else words) is not None:
                    members.append((f"{number:04d}.text.npy", text))
            write_tar(folder / f"{shard}.tar", members)
        return Case(f"{folder}/*.tar", str(folder / "4.tar"), text=TextMember("text.npy", 2, 3))

    return build


def _refusing(folder: Path) -> Case:
    """Nobody listens at the address any more."""
    pytest.importorskip("aiohttp")
    case = _served(folder, BaseHTTPRequestHandler)
    server = SERVERS.pop()
    server.shutdown()
    server.server_close()
    reach(timeout=0.5, attempts=1)
    case.act = lambda: read_epoch(case, None)
    return case


def _nobody(folder: Path) -> Case:
    """A storage that wants credentials, asked by somebody who has none anywhere."""
    pytest.importorskip("s3fs")
    anywhere = pytest.MonkeyPatch()
    UNDO.append(anywhere)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        anywhere.delenv(name, raising=False)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        anywhere.setenv(name, str(folder / "none"))
    anywhere.setenv("AWS_EC2_METADATA_DISABLED", "true")
    reach(options={"s3": {"endpoint_url": "http://127.0.0.1:9"}})
    case = Case("s3://bucket/*.tar", "")
    case.act = lambda: read_epoch(case, None)
    return case


def _huge(folder: Path) -> Case:
    case = _set(folder)
    case.batch = 10**11
    case.act = lambda: read_epoch(case, None)
    return case


def _json(content: bytes) -> Callable[[Path], Case]:
    def build(folder: Path) -> Case:
        case = _set(folder, [*sample("0099", 99), ("0099.json", content)])
        source = TarSource(case.broken, label_field="class", caption_field="caption")
        case.act = lambda: source[19]
        return case

    return build


def _recipe(*changes: str) -> Callable[[Path], Case]:
    def build(folder: Path) -> Case:
        run = f"run.dir={folder}/run"
        act = lambda: reach_storage(load_recipe("digits8", [run, *changes]))  # noqa: E731
        return Case("", "", act=act)

    return build


def _served(folder: Path, handler: type[BaseHTTPRequestHandler]) -> Case:
    """The shards over HTTP, the broken one by `handler`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads, server.block_on_close = True, False
    server.handle_error = lambda *_: None  # clients that do not wait to the end
    SERVERS.append(server)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    return Case(f"{url}/{{0..4}}.tar", f"{url}/4.tar")


def _answering(fault: str) -> Callable[[Path], Case]:
    """A server that answers as it should until the shards are open, and one shard badly after that."""

    def build(folder: Path) -> Case:
        pytest.importorskip("aiohttp")
        _set(folder)
        begun = threading.Event()

        class Ranges(SimpleHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None: ...

            def do_GET(self) -> None:
                path = folder / Path(self.path).name
                if not path.exists():
                    self.send_error(404)
                    return
                bad = begun.is_set() and path.name == "4.tar"
                if bad and fault == "503":
                    self.send_error(503)
                    return
                if bad and fault == "stall":
                    threading.Event().wait(3)
                whole = path.read_bytes()
                first, last = re.match(r"bytes=(\d+)-(\d+)", self.headers["Range"]).groups()
                body = whole[int(first) : int(last) + 1]
                ranges = fault != "no ranges"
                body = body if ranges else whole
                self.send_response(206 if ranges else 200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[: len(body) // 2] if bad and fault == "cut" else body)
                self.close_connection = bad

            def translate_path(self, path: str) -> str:
                return str(folder / Path(path).name)

        case = _served(folder, Ranges)
        case.spoil = begun.set
        if fault == "no ranges":
            case.pattern = case.broken
        reach(timeout=0.5, attempts=2)
        return case

    return build


NOISE = image_file(np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8), "JPEG")
BUILD: dict[str, Callable[[Path], Case]] = {
    "tar cut in the middle of a member": _rewritten(lambda tar: tar[:20_000]),
    "tar cut between two members": _rewritten(lambda tar: tar[: 4 * 512]),
    "an error page, or a compressed tar": _rewritten(lambda _: b"<html>404</html>" * 99),
    "sparse member with a broken map": _with((_pax("0099.png", {"GNU.sparse.map": "a,b"}), b"x")),
    "pipe, socket or device in the place of a shard": _pipe,
    "two tars joined": _rewritten(lambda tar: tar + tar),
    "member with an absolute path": _with(("/etc/0099.png", b"x")),
    "member with `..` in its path": _with(("../0099.png", b"x")),
    "member whose name is not UTF-8": _with(("\udcff.png", b"x")),
    "control characters in a name": _with(("../\x1b[31m.png", b"x")),
    "link": _with((_special("0099.png", tarfile.SYMTYPE), b"")),
    "device, pipe": _with((_special("0099.png", tarfile.CHRTYPE), b"")),
    "`.pyd`, `.pickle`, `.pkl`, `.pth` or `.pt` member": _with(("0099.pth", b"x")),
    "key twice in a shard": _with(*sample("0080", 1)),
    "shard that is not there": _absent,
    "empty image": _with(("0099.png", b""), ("0099.cls", b"1")),
    "damaged image": _with(("0099.jpg", NOISE[:900]), ("0099.cls", b"1")),
    "no image but text": _with(("0099.jpg", b"<html>404</html>"), ("0099.cls", b"1")),
    "image bomb": _with(("0099.png", _bomb()), ("0099.cls", b"1")),
    "no label": _with(("0099.png", grey(1))),
    "no image": _with(("0099.cls", b"1")),
    "two images": _with(*sample("0099", 1), ("0099.jpg", NOISE)),
    "label that is no number": _with(*sample("0099", 1, "cat")),
    "label with an underscore": _with(*sample("0099", 1, "1_0")),
    "label out of range": _with(*sample("0099", 1, 10)),
    "shard that vanishes while it is read": _vanished,
    "shard that became shorter": _shortened,
    "storage that answers 503": _answering("503"),
    "storage that cuts the body": _answering("cut"),
    "storage that stalls": _answering("stall"),
    "server that sends whole files for a part": _answering("no ranges"),
    "no embedded caption": _captioned(None),
    "damaged embedded caption": _captioned(b"\x93NUMPY"),
    "embedded caption of another width": _captioned(write_array(np.ones((2, 4), np.float32))),
    "embedded caption that is not finite": _captioned(
        write_array(np.full((2, 3), np.nan, np.float32))
    ),
    "more names than a data set has shards": lambda folder: Case(
        f"{folder}/{{0..99999999}}.tar", ""
    ),
    "packing that was interrupted": _interrupted,
    "storage that nobody answers for": _refusing,
    "storage that wants credentials": _nobody,
    "batch larger than the memory": _huge,
    "broken JSON": _json(b'{"class": 1, "caption'),
    "JSON nested too deeply": _json(b"[" * 100_000),
    "no caption in the JSON": _json(b'{"class": 1}'),
    "secret in a recipe": _recipe("data.storage.options.s3.secret=hunter2"),
    "password in an address": _recipe("data.train=https://me:hunter2@host/{0..9}.tar"),
    "signed address": _recipe("data.train=https://host/a.tar?X-Amz-Signature=hunter2"),
    "variable that is not set": _recipe("data.storage.options.s3.secret=env:NO_SUCH_VARIABLE"),
}


def rows() -> list[tuple[str, str, str]]:
    """(input, what is said, with a tolerance) of each row of the table."""
    lines = DOCUMENT.read_text(encoding="utf-8").splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith("| Bad input"))
    found = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        bad, said, tolerated = (cell.strip() for cell in line.strip("|").split(" | "))
        found.append((bad, said, tolerated))
    return found


def template(said: str, case: Case) -> str:
    """The regular expression of a sentence of the table."""
    words = re.escape(said.removeprefix("`").removesuffix("`")).replace(r"\.\.\.", ".*")
    words = words.replace("RECIPE", "command line")
    return words.replace("SHARD", re.escape(case.broken)).replace("DATA", re.escape(case.pattern))


def said_by(case: Case, tolerate: Tolerance | None) -> str:
    """The sentence that one epoch of the data ends in."""
    act = case.act or partial(read_epoch, case, tolerate)
    with pytest.raises(UserError) as caught:
        act()
    return str(caught.value)


def read_epoch(case: Case, tolerate: Tolerance | None) -> tuple[list[int], int]:
    stream = open_stream(
        [(case.pattern, 1.0)],
        keep={},
        classes=10,
        seed=0,
        lanes=2,
        window=8,
        tolerate=tolerate,
        text=case.text,
    )
    case.spoil()
    share = Share(
        stream,
        open_decoder("pillow", channels=1, threads=1, device=CPU),
        size=(4, 4),
        augment=PLAIN,
        seed=0,
        batch=case.batch,
        rank=0,
        ranks=1,
        device=CPU,
    )
    with Loader(share, prefetch=1) as loader:
        positions, bad = [], 0
        for _ in range(stream.samples // 10):
            positions += next(loader).position.tolist()
            bad += loader.bad_samples
        return positions, bad


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "set").mkdir()
    yield tmp_path / "set"
    while SERVERS:
        server = SERVERS.pop()
        server.shutdown()
        server.server_close()
    while UNDO:
        UNDO.pop().undo()
    memory = resolve("memory://x").storage
    if memory.exists("/table"):
        memory.rm("/table", recursive=True)


def test_every_row_has_a_test_and_every_test_a_row():
    assert sorted(bad for bad, _, _ in rows()) == sorted(BUILD)


@pytest.mark.parametrize(("bad", "said", "tolerated"), rows(), ids=[row[0] for row in rows()])
def test_bad_input_is_met_as_the_table_says(bad, said, tolerated, folder):
    case = BUILD[bad](folder)
    strict = said_by(case, None)
    assert re.fullmatch(template(said, case), strict), strict
    assert "hunter2" not in strict
    if tolerated == "not tolerated":
        if case.act is None:
            again = BUILD[bad](folder)
            assert re.match(template(said, again), said_by(again, Tolerance(0.5, None, None)))
        return
    report = folder / "quarantine.jsonl"
    case = BUILD[bad](folder)
    positions, replaced = read_epoch(case, Tolerance(0.2, report, None))
    assert positions == list(range(len(positions)))
    if tolerated == "shard left out":
        assert (len(positions), replaced) == (80, 0)
    else:
        assert len(positions) == 100
        lines = read_lines(report)
        assert replaced == {"sample replaced": 1, "its samples replaced": GOOD}[tolerated]
        assert len(lines) == replaced
        for line in lines:
            assert line["url"] == case.broken
            assert re.fullmatch(template(said, case), line["reason"])


def test_the_bomb_is_one():
    """Without a limit it would decode: the header is sound and names its size."""
    limit = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None
    try:
        assert Image.open(io.BytesIO(_bomb())).size == (40_000, 40_000)
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def test_what_a_person_sees_is_the_sentence_and_exit_code_2(folder, capfd, monkeypatch):
    """Through the command itself, for one row."""
    case = BUILD["tar cut between two members"](folder)
    command = ["train", "digits8", f"data.train={case.pattern}", f"run.dir={folder}/run"]
    monkeypatch.setattr("sys.argv", ["flowmill", *command, "tracking.mlflow=false"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    said = next(said for bad, said, _ in rows() if bad == "tar cut between two members")
    assert re.search(template(said, case), capfd.readouterr().err)
