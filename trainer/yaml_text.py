"""YAML as people mean it: a doubled key is an error with its line, `1e-3` is a number, a date is text."""

import re
from pathlib import Path
from typing import Any

import yaml

from flows.errors import UserError


class _Loader(yaml.SafeLoader):
    """Plain data alone, without the traps of YAML 1.1 that a recipe can fall into."""


def _unique_mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    """A mapping; left to itself, YAML keeps silently the last value of a key given twice."""
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key, line = loader.construct_object(key_node), key_node.start_mark.line + 1
        if not isinstance(key, str):
            raise UserError(f"line {line}: key {key!r} is not a word; put it in quotes.")
        if key in seen:
            raise UserError(f"line {line}: {key} is given twice; keep one.")
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping)
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in found if not tag.endswith(":timestamp")]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
# YAML 1.1 wants a dot and a sign in `1.0e-3`; 1.2 and everybody else do not.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def read_yaml(path: Path, where: str) -> Any:
    """The plain data of a file. Raises UserError for one that is unreadable, not text or not YAML."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{where} is not a text file; give a recipe written in YAML.") from None
    except OSError as error:
        raise UserError(
            f"{where} cannot be read ({error.strerror}); check its permissions."
        ) from None
    return parse_yaml(text, where)


def parse_yaml(text: str, where: str) -> Any:
    """Plain data. Raises UserError with the line of a syntax error or of a doubled key."""
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    except yaml.reader.ReaderError:
        raise UserError(f"{where} is not a text file; give a recipe written in YAML.") from None
    except yaml.MarkedYAMLError as error:
        problem = error.problem or "its structure is broken"
        line = f"line {error.problem_mark.line + 1}" if error.problem_mark else "it"
        remedies = {r"'\t'": "indent with spaces", "the tag": "remove the tag"}
        found = (remedy for sign, remedy in remedies.items() if sign in problem)
        remedy = next(found, "check its indentation and quotes")
        raise UserError(f"{where}: {line} is not valid YAML ({problem}); {remedy}.") from None
    except ValueError:
        raise UserError(
            f"{where}: a value in it cannot be read as the number it looks like; put it in quotes."
        ) from None
    except RecursionError:
        raise UserError(f"{where} is nested too deeply; a recipe has sections of keys.") from None
