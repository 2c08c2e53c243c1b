"""How this process reaches the storages that shards lie on: through which driver, with what options, and
how patiently.

Any address that fsspec serves is served. Every request has a time limit, is sent again with growing
pauses when what went wrong may pass, and is believed only when all bytes asked for have come.
"""

import asyncio
import random
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import fsspec
from fsspec.asyn import AsyncFileSystem, sync

from data_pipeline import credentials
from flows.errors import UserError

T = TypeVar("T")

# The first pause lies between half of this and all of it; each later one is twice as long.
PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.2, 10.0
# What storages call the mark that changes with the content, the most telling first.
CHANGE_MARKS = ("mtime", "ETag", "etag", "LastModified", "last_modified", "updated", "created")
# Asking again would give the same answer.
FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
FINAL_BY_NAME = frozenset({"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound"})
NOT_FOUND = 404
# Client errors (4xx) that ask to come again: timeout, too early, too many requests.
PASSING_STATUS = (408, 425, 429)
# Drivers have errors of their own that are no OSError. IndexError: s3fs 2026.9 loses the timeout of a
# stalled read and fails on its empty arguments.
PASSING = (OSError, IndexError, asyncio.TimeoutError)
PASSING_OF_DRIVERS = (
    ("aiohttp", "ClientError"),
    ("botocore.exceptions", "BotoCoreError"),
    ("botocore.exceptions", "ClientError"),
)
LONGEST_REASON = 300
# Pauses are no part of the mathematics, and must not advance anyone's generator.
_jitter = random.Random()


@dataclass(frozen=True)
class Access:
    """How storages are reached.

    options: protocol -> options of its fsspec driver, secrets in place
    hidden: secrets that no message may show
    timeout: seconds a request may take; None: as long as the driver lets it
    attempts: times a request is sent before it is given up
    requests: in flight at once
    cache_dir: folder, shared by the ranks of a machine, for blocks of remote shards; None: none
    cache_bytes: most that lies in it
    """

    options: Mapping[str, Mapping[str, Any]] = field(repr=False)
    hidden: frozenset[str] = field(repr=False)
    timeout: float | None
    attempts: int
    requests: int
    cache_dir: Path | None
    cache_bytes: int


class Place(NamedTuple):
    """Where a URL leads: an fsspec file system and a path in it.

    local: the path is a plain file of this machine
    """

    storage: Any
    path: str
    local: bool


class Facts(NamedTuple):
    """What a storage tells of a file: its bytes, and a mark that changes with its content."""

    size: int
    mark: str


class GaveUp(OSError):
    """A request failed as often as it may, or in a way that will not pass."""


class DriverError(OSError):
    """A driver raised what is none of the errors that drivers are known to raise."""


class ShortRead(OSError):
    """Fewer bytes came than were asked for; `content` holds them."""

    def __init__(self, content: bytes, wanted: int) -> None:
        super().__init__(f"{len(content)} of {wanted} bytes came")
        self.content = content


# What a process does that nobody has told otherwise: each driver's own ways, asked once.
_access = Access({}, frozenset(), None, 1, 8, None, 0)


def use(access: Access) -> None:
    """From now on this process reaches storages in this way."""
    global _access
    _access = access
    resolve.cache_clear()


def access() -> Access:
    """The way in which this process reaches storages."""
    return _access


@lru_cache(4096)
def resolve(url: str) -> Place:
    """The storage a URL lives on; raises UserError if no driver for it is installed."""
    try:
        credentials.check_address(url)
    except ValueError as error:
        raise UserError(str(error)) from None
    protocols = {part.partition("://")[0] for part in url.split("::")}
    options = {name: dict(_access.options[name]) for name in protocols & set(_access.options)}
    try:
        storage, path = fsspec.core.url_to_fs(url, **options)
    except (ImportError, ValueError, TypeError) as error:
        reason = describe(error)
        raise UserError(f"{url}: no storage driver serves this address ({reason})") from error
    names = (storage.protocol,) if isinstance(storage.protocol, str) else storage.protocol
    return Place(storage, path, "file" in names)


def fetch(url: str, start: int, end: int, *, attempts: int | None = None) -> bytes:
    """Bytes `start` to `end` of a file; all of them, if the file is that long.

    attempts: other than this process's usual number
    Raises OSError (GaveUp where it was tried several times).
    """
    place = resolve(url)

    def request() -> bytes:
        content = call(place.storage, "cat_file", place.path, start=start, end=end)
        if len(content) < end - start:
            raise ShortRead(content, end - start)
        if len(content) > end - start:
            raise PermissionError("the server sends whole files where a part is asked for")
        return bytes(content)

    try:
        return patiently(request, attempts=attempts)
    except GaveUp as error:
        # A file that has become shorter gives the same answer every time.
        if isinstance(error.__cause__, ShortRead):
            return error.__cause__.content
        raise


def read_whole(url: str) -> bytes:
    """All bytes of a small file. Raises OSError."""
    place = resolve(url)
    return bytes(patiently(lambda: call(place.storage, "cat_file", place.path)))


def facts(url: str) -> Facts:
    """Size and change mark of a file. Raises OSError."""
    place = resolve(url)
    return facts_of(patiently(lambda: call(place.storage, "info", place.path)))


def facts_of(info: Mapping[str, Any]) -> Facts:
    """Size and change mark in what fsspec's `info` and `ls` tell of a file."""
    mark = next((info[name] for name in CHANGE_MARKS if info.get(name)), "")
    if isinstance(mark, datetime):
        mark = mark.timestamp()
    return Facts(int(info["size"] or 0), str(mark))


def call(storage: Any, method: str, *arguments: Any, **keywords: Any) -> Any:
    """One request, within the time limit where the driver can be interrupted (all that use a network
    asynchronously: s3, gs, abfs, http).

    Raises OSError or another of `passing_errors`, whatever the driver raised.
    """
    try:
        if isinstance(storage, AsyncFileSystem) and not storage.asynchronous:
            coroutine = getattr(storage, f"_{method}")
            return sync(storage.loop, coroutine, *arguments, timeout=_access.timeout, **keywords)
        return getattr(storage, method)(*arguments, **keywords)
    except FileNotFoundError as error:
        # The http driver says so whatever went wrong.
        cause = error.__cause__
        if cause is None or not type(cause).__module__.startswith("aiohttp"):
            raise
        if getattr(cause, "status", None) == NOT_FOUND:
            raise
        raise cause from error
    except passing_errors():
        raise
    except Exception as error:
        raise DriverError(describe(error)) from error


def patiently(request: Callable[[], T], *, attempts: int | None = None) -> T:
    """What `request` returns, asked again with growing, jittered pauses while its errors may pass.

    Raises OSError: FileNotFoundError and the like as they are, GaveUp for the rest.
    """
    most = _access.attempts if attempts is None else attempts
    pause = PAUSE_SECONDS
    for attempt in range(1, most + 1):
        try:
            return request()
        except FINAL:
            raise
        except passing_errors() as error:
            if attempt == most or _is_final(error):
                raise GaveUp(describe(error)) from error
        time.sleep(pause * _jitter.uniform(0.5, 1.0))
        pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
    raise ValueError("attempts must be at least 1")


def passing_errors() -> tuple[type[BaseException], ...]:
    """The errors that may be gone at the next try, of the drivers that are in use."""
    loaded = [
        getattr(sys.modules[module], name)
        for module, name in PASSING_OF_DRIVERS
        if module in sys.modules
    ]
    return (*PASSING, *loaded)


def describe(error: BaseException) -> str:
    """An error's own words on one line, without secrets."""
    if isinstance(error, asyncio.TimeoutError) or _is_lost_timeout(error):
        limit = f" within {_access.timeout:g} s" if _access.timeout else " in time"
        return f"no answer{limit}"
    if isinstance(error, FileNotFoundError):
        return "no such file"
    words = " ".join(str(error).split()) or type(error).__name__
    for secret in _access.hidden:
        words = words.replace(secret, "***")
    return words if len(words) <= LONGEST_REASON else words[:LONGEST_REASON] + " ..."


def _is_lost_timeout(error: BaseException) -> bool:
    """Whether it is s3fs's own mistake about a timeout; see PASSING."""
    if not isinstance(error, IndexError):
        return False
    frames = list(traceback.walk_tb(error.__traceback__))
    return any(frame.f_globals.get("__name__", "").startswith("s3fs") for frame, _ in frames[-1:])


def remedy(error: BaseException, otherwise: str) -> str:
    """What a person can do about an error of a storage."""
    if type(error.__cause__ or error).__name__ in FINAL_BY_NAME:
        return (
            "export AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or name variables in "
            "data.storage.options (docs/data.md, Credentials)"
        )
    return otherwise


def _is_final(error: BaseException) -> bool:
    status = getattr(error, "status", None)
    refused = isinstance(status, int) and 400 <= status < 500 and status not in PASSING_STATUS
    return refused or type(error).__name__ in FINAL_BY_NAME
