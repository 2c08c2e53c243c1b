"""Secrets of a storage stay out of recipes, logs and reports.

A recipe may hold what everyone may read (an endpoint, a region) and, for the rest, the name of the
environment variable that holds it: `secret: env:BUCKET_SECRET`. Whatever is not known to be public is
taken for a secret. Credentials written into an address are refused.
"""

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from flows.errors import UserError

REFERENCE = "env:"
# Options of fsspec's drivers that tell where and how, never who.
PUBLIC = frozenset(
    {
        "account_name", "addressing_style", "anon", "block_size", "cache_check", "cache_regions",
        "cache_storage", "check_files", "connect_timeout", "default_block_size", "default_cache_type",
        "default_fill_cache", "encoded", "endpoint_url", "expiry_time", "host", "max_attempts",
        "max_concurrency", "max_pool_connections", "mode", "port", "profile", "project", "protocol",
        "read_timeout", "region", "region_name", "requester_pays", "same_names", "signature_version",
        "size_policy", "target_protocol", "timeout", "token_kind", "use_listings_cache", "use_ssl",
        "verify", "version_aware",
    }
)  # fmt: skip
SECRET_IN_ADDRESS = re.compile("sig|token|secret|passw|credential|key|auth", re.IGNORECASE)
# Shorter values would be found inside ordinary words.
SHORTEST_HIDDEN = 4


def check_options(options: Mapping[str, Any]) -> None:
    """Raises ValueError, never showing a value, for an option that may be a secret in plain text."""
    for name, value in _leaves(options, ""):
        key = name.rpartition(".")[2]
        if isinstance(value, str) and value.startswith(REFERENCE):
            continue
        if isinstance(value, str) and key in PUBLIC:
            check_address(value)
        elif not (key in PUBLIC or value is None or isinstance(value, bool)):
            raise ValueError(
                f"{name} may be a secret, and a recipe is copied into run folder and tracker; put it "
                f"in an environment variable and write {name}: env:VARIABLE, or leave it to the "
                "driver's own credentials"
            )


def reveal(options: Mapping[str, Any]) -> tuple[dict[str, Any], frozenset[str]]:
    """Options with the variables' values in place, and those values, to be hidden in messages.

    Raises UserError for a variable that is not set.
    """
    hidden: set[str] = set()

    def walk(value: Any, name: str) -> Any:
        if isinstance(value, Mapping):
            return {key: walk(inner, f"{name}.{key}") for key, inner in value.items()}
        if not (isinstance(value, str) and value.startswith(REFERENCE)):
            return value
        variable = value.removeprefix(REFERENCE)
        if not (content := os.environ.get(variable)):
            raise UserError(
                f"data.storage.options{name} = {value}, but the environment variable {variable} is "
                "not set here; export it on every machine of the run"
            )
        hidden.add(content)
        return content

    return walk(options, ""), frozenset(text for text in hidden if len(text) >= SHORTEST_HIDDEN)


def check_address(url: str) -> None:
    """Raises ValueError for an address with a password or signature in it."""
    for part in url.split("::"):
        try:
            address = urlsplit(part)
            password = address.password
        except ValueError:
            # Braces and brackets of patterns are no valid hosts, and no credentials either.
            continue
        named = [name for name, _ in parse_qsl(address.query) if SECRET_IN_ADDRESS.search(name)]
        if password is not None or named:
            what = "a password" if password is not None else f"a credential ({named[0]}=...)"
            place = f"{address.scheme}://{address.hostname}{address.path}"
            raise ValueError(
                f"{place}: the address carries {what}, and addresses are written to reports; leave it "
                "out and give credentials by environment variables or data.storage.options"
            )


def _leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _leaves(inner, name)
    else:
        yield name, value
