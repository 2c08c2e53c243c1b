"""What may leave the process: names and values fit for MLflow, with all secrets taken out."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

HIDDEN = "***"
KEY_LIMIT = 250
PARAM_LIMIT = 6000
TAG_LIMIT = 5000

_WORDS = (
    r"password|passwd|passphrase|secret|token|credentials?|(?:api|access|private|secret)[_-]?key"
)
_SECRET_NAME = re.compile(rf"(?:^|[_.-])(?:{_WORDS})(?:$|[_.-])", re.IGNORECASE)
# Both begin at the start of a word alone: else a long text of one word costs its length squared.
_ASSIGNMENT = re.compile(rf"(?<![\w-])([\w-]*(?:{_WORDS})[\w-]*=)[^\s&;,\"']+", re.IGNORECASE)
_URL = re.compile(r"(?<![a-zA-Z0-9+.-])([a-zA-Z][a-zA-Z0-9+.-]*://)([^\s\"'<>]*)")
_NOT_IN_NAMES = re.compile(r"[^\w\-. /]", re.ASCII)


def redact_text(text: str) -> str:
    """`text` without user-info and queries in URLs, and without `password=...` and the like."""
    return _ASSIGNMENT.sub(rf"\1{HIDDEN}", _URL.sub(_bare_url, text))


def redact(value: Any, name: str = "") -> Any:
    """A copy of nested data with secrets hidden, known by a key's name or a text's looks."""
    if isinstance(value, Mapping):
        return {key: redact(inner, str(key)) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact(inner, name) for inner in value]
    if _SECRET_NAME.search(name) and value is not None and not isinstance(value, bool):
        return HIDDEN
    return redact_text(value) if isinstance(value, str) else value


def flatten(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, leaf) of nested mappings; lists are leaves."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from flatten(inner, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


def safe_name(name: str) -> str:
    """A name MLflow accepts: letters, digits, `_ - . /` and spaces, at most 250 of them."""
    return _NOT_IN_NAMES.sub("_", name)[:KEY_LIMIT]


def cut(value: Any, limit: int) -> str:
    """`value` as text of at most `limit` characters; an ellipsis marks what was cut."""
    text = str(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _bare_url(match: re.Match[str]) -> str:
    scheme, rest = match.groups()
    authority = rest.split("/", 1)[0]
    port_like = re.fullmatch(r"[^:@]*(:\d*)?", authority)
    # A secret key may itself hold slashes, so that `key:se/cret@bucket` hides behind what looks
    # like a host; a true host has at most a number after its colon.
    if "@" in authority or ("@" in rest and not port_like):
        rest = rest.split("@", 1)[1]
    for mark in "?#":
        before, found, after = rest.partition(mark)
        if found and "=" in after:
            rest = before + mark + HIDDEN
    return scheme + rest
