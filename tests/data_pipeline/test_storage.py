"""Requests are repeated when that can help, within limits; secrets are kept out of what is written."""

import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer

import fsspec
import pytest

from data_pipeline import storage
from data_pipeline.credentials import check_address, check_options, reveal
from data_pipeline.shards import expand
from data_pipeline.storing import (
    names_in,
    read_if_there,
    remove_if_there,
    size_if_there,
    write_text,
)
from flows.errors import UserError
from tests.data_pipeline.conftest import reach


class Flaky:
    """Fails in the given ways one after the other, then answers."""

    def __init__(self, *errors):
        self.errors = list(errors)
        self.asked = 0

    def __call__(self):
        self.asked += 1
        if self.errors:
            raise self.errors.pop(0)
        return "answer"


def test_what_may_pass_is_asked_again_with_growing_pauses(monkeypatch):
    aiohttp = pytest.importorskip("aiohttp")
    exceptions = pytest.importorskip("botocore.exceptions")
    pauses = []
    monkeypatch.setattr(storage.time, "sleep", pauses.append)
    reach(attempts=9)
    request = Flaky(
        OSError("reset"),
        IndexError("tuple index out of range"),
        TimeoutError(),
        aiohttp.ClientPayloadError("cut"),
        exceptions.EndpointConnectionError(endpoint_url="http://x"),
        OSError(16, "503"),
        storage.ShortRead(b"x", 2),
    )
    assert storage.patiently(request) == "answer"
    assert request.asked == 8
    for number, pause in enumerate(pauses):
        longest = min(storage.PAUSE_SECONDS * 2**number, storage.LONGEST_PAUSE_SECONDS)
        assert longest / 2 <= pause <= longest
    assert len(set(pauses)) == len(pauses)


def test_an_index_error_is_a_timeout_only_where_the_driver_mistakes_one_for_it():
    def raised(module: str) -> IndexError:
        with pytest.raises(IndexError) as caught:
            exec("()[0]", {"__name__": module})
        return caught.value

    reach(timeout=7.0)
    assert storage.describe(raised("s3fs.core")) == "no answer within 7 s"
    assert storage.describe(raised("pyarrow")) == "tuple index out of range"


def test_what_stays_is_given_up_at_once_or_after_so_many_attempts(monkeypatch):
    monkeypatch.setattr(storage.time, "sleep", lambda _: None)
    reach(attempts=3)
    for error in (FileNotFoundError("x"), PermissionError("x")):
        request = Flaky(*[error] * 9)
        with pytest.raises(type(error)):
            storage.patiently(request)
        assert request.asked == 1
    request = Flaky(*[OSError("reset")] * 9)
    with pytest.raises(storage.GaveUp, match=r"^reset$"):
        storage.patiently(request)
    assert request.asked == 3
    request = Flaky(ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        storage.patiently(request)


@contextmanager
def web_server(handler):
    pytest.importorskip("aiohttp")
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/a.tar"
    finally:
        server.shutdown()
        server.server_close()


def test_a_web_server_that_refuses_is_not_asked_again_and_one_that_is_busy_is(monkeypatch):
    monkeypatch.setattr(storage.time, "sleep", lambda _: None)
    reach(attempts=3)
    answers = []

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self):
            answers.append(status)
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_): ...

    with web_server(Answer) as url:
        for status, asked in ((403, 1), (401, 1), (429, 3), (503, 3), (408, 3)):
            answers.clear()
            with pytest.raises(storage.GaveUp, match=str(status)):
                storage.fetch(url, 0, 10)
            assert len(answers) == asked


def test_a_server_without_ranges_is_refused_by_name(tmp_path):
    (tmp_path / "a.tar").write_bytes(bytes(5000))

    class Files(SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(tmp_path))

        def log_message(self, *_): ...

    with web_server(Files) as url:
        assert expand(url) == (url,)
        with pytest.raises(PermissionError, match="sends whole files where a part is asked for"):
            storage.fetch(url, 10, 20)


def test_a_request_takes_no_longer_than_it_may():
    fsspec_asyn = pytest.importorskip("fsspec.asyn")

    class Endless(fsspec_asyn.AsyncFileSystem):
        protocol = "endless"
        cachable = False

        async def _cat_file(self, path, start=None, end=None):
            await fsspec_asyn.asyncio.sleep(60)

    reach(timeout=0.2)
    began = time.perf_counter()
    with pytest.raises(TimeoutError):
        storage.call(Endless(), "cat_file", "x")
    assert time.perf_counter() - began < 5


@pytest.mark.parametrize(
    "options",
    [
        {"s3": {"key": "AKIA123"}},
        {"s3": {"client_kwargs": {"aws_secret_access_key": "AKIA123"}}},
        {"https": {"headers": {"Authorization": "Bearer AKIA123"}}},
        {"sftp": {"password": 123123}},
        {"gs": {"token": "AKIA123"}},
        {"s3": {"endpoint_url": "https://user:AKIA123@host"}},
        {"s3": {"anything_unknown": ["AKIA123"]}},
    ],
)
def test_a_recipe_cannot_hold_what_may_be_a_secret(options):
    with pytest.raises(ValueError, match="env") as caught:
        check_options(options)
    assert "123" not in str(caught.value)


def test_public_options_and_names_of_variables_pass(monkeypatch):
    options = {
        "s3": {
            "endpoint_url": "http://127.0.0.1:9000",
            "anon": False,
            "key": "env:BUCKET_KEY",
            "config_kwargs": {"s3": {"addressing_style": "path"}, "retries": {"max_attempts": 0}},
        }
    }
    check_options(options)
    with pytest.raises(UserError, match=r"options\.s3\.key = env:BUCKET_KEY, but .* not set"):
        reveal(options)
    monkeypatch.setenv("BUCKET_KEY", "hunter22")
    revealed, hidden = reveal(options)
    assert revealed["s3"]["key"] == "hunter22"
    assert revealed["s3"]["config_kwargs"] == options["s3"]["config_kwargs"]
    assert hidden == {"hunter22"}


def test_addresses_with_credentials_are_refused_and_patterns_are_not():
    for good in ("/a/train-?[0-9]*.tar", "s3://b/{00..07}.tar", "sftp://me@host/x", "a=b?.tar"):
        check_address(good)
    for bad in (
        "https://me:AKIA123@host/x.tar",
        "https://host/x.tar?X-Amz-Signature=AKIA123&x=1",
        "simplecache::https://me:AKIA123@host/x.tar",
        "https://host/x.tar?sig=AKIA123",
    ):
        with pytest.raises(ValueError, match="host") as caught:
            check_address(bad)
        assert "AKIA" not in str(caught.value)
        with pytest.raises(UserError):
            storage.resolve(bad)


def test_options_of_a_protocol_reach_its_driver_alone(tmp_path):
    reach(options={"file": {"auto_mkdir": True}, "memory": {}})
    assert storage.resolve(str(tmp_path / "x")).storage.auto_mkdir is False
    assert storage.resolve(f"file://{tmp_path}/x").storage.auto_mkdir is True


def test_a_chained_address_keeps_its_chain(tmp_path):
    place = storage.resolve("memory://chain/a.tar")
    place.storage.pipe_file(place.path, b"0123456789")
    assert expand("simplecache::memory://chain/*.tar") == ("simplecache::memory:///chain/a.tar",)
    assert storage.fetch("simplecache::memory:///chain/a.tar", 2, 5) == b"234"


def test_a_connection_that_is_refused_is_no_missing_shard():
    pytest.importorskip("aiohttp")
    reach(attempts=1)
    with pytest.raises(
        UserError, match=r"a\.tar: cannot be listed \(Cannot connect .*its server runs"
    ):
        expand("http://127.0.0.1:9/a.tar")


def test_a_web_server_that_forbids_hides_no_shard_and_one_without_it_does(monkeypatch):
    class Answer(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(status)
            self.end_headers()

        do_GET = do_HEAD

        def log_message(self, *_): ...

    with web_server(Answer) as url:
        status = 403
        with pytest.raises(UserError, match=r"a\.tar: cannot be listed \(403"):
            expand(url)
        status = 404
        with pytest.raises(UserError, match=r"a\.tar: there is no shard at that place"):
            expand(url)


def test_whatever_a_driver_raises_is_a_sentence():
    class Odd(fsspec.AbstractFileSystem):
        protocol = "odd"

        def info(self, path, **_):
            raise LookupError("the moon is full")

    fsspec.register_implementation("odd", Odd, clobber=True)
    reach(attempts=1)
    with pytest.raises(
        UserError, match=r"odd://x/a\.tar: cannot be listed \(the moon is full\); check"
    ):
        expand("odd://x/a.tar")


def test_embedded_sets_are_named_to_who_misses_them():
    for pattern in ("embedded:digits8", "embedded:digits9/*.tar", "embedded:digits8/test-*.tar"):
        with pytest.raises(
            UserError, match=r"embedded:SET/train-\*\.tar .* digits28 or digits8 or"
        ):
            expand(pattern)


def test_storage_without_credentials_says_how_to_give_them(monkeypatch, tmp_path):
    pytest.importorskip("s3fs")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    # No file of the machine, and nobody to ask for an instance's role.
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    reach(options={"s3": {"endpoint_url": "http://127.0.0.1:9"}})
    says = r"Unable to locate credentials\); export AWS_ACCESS_KEY_ID"
    with pytest.raises(UserError, match=rf"s3://bucket/\*\.tar: cannot be listed \({says}"):
        expand("s3://bucket/*.tar")
    with pytest.raises(UserError, match=rf"s3://bucket/a: cannot be written \({says}"):
        write_text("s3://bucket/a", "text")
    for ask in (read_if_there, size_if_there, remove_if_there):
        with pytest.raises(UserError, match=rf"s3://bucket/a: cannot be reached \({says}"):
            ask("s3://bucket/a")
    with pytest.raises(UserError, match=rf"s3://bucket/out: cannot be reached \({says}"):
        names_in("s3://bucket/out", "*.json")
