"""Small real shards, good and bad, and an index cache of the tests' own."""

import dataclasses
import io
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline import storage

Members = list[tuple[str, bytes]]


@pytest.fixture(autouse=True, scope="session")
def _own_index_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _own_storage_access() -> Iterator[None]:
    """What a test tells the process about storages ends with the test."""
    before = storage.access()
    yield
    storage.use(before)


def reach(**changes: object) -> None:
    """Reach storages in another way, until the test ends."""
    storage.use(dataclasses.replace(storage.access(), **changes))


def image_file(pixels: np.ndarray | Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def grey(value: int, size: int = 4) -> bytes:
    return image_file(np.full((size, size), value, np.uint8))


def sample(key: str, value: int, label: object = 0) -> Members:
    return [(f"{key}.png", grey(value)), (f"{key}.cls", str(label).encode())]


def write_tar(path: Path, members: list[tuple[str | tarfile.TarInfo, bytes]]) -> str:
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            member = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return str(path)


@pytest.fixture
def shards(tmp_path: Path) -> Callable[[list[int]], str]:
    """Shards of the given sizes; the image of the n-th sample overall is grey n, its label n %
    10."""

    def make(sizes: list[int], folder: str = "data") -> str:
        (tmp_path / folder).mkdir()
        number = 0
        for shard, size in enumerate(sizes):
            members: Members = []
            for _ in range(size):
                members += sample(f"{number:04d}", number % 256, number % 10)
                number += 1
            write_tar(tmp_path / folder / f"train-{shard:02d}.tar", members)
        return f"{tmp_path / folder}/train-*.tar"

    return make
