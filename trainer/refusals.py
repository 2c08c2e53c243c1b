"""What pydantic refuses in a recipe, as sentences that name the key and say what would be right."""

import difflib
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ValidationError

SHOWN = 60  # characters of a wrong value

# What a value must be, by pydantic's name of the error; braces are filled from its context.
_MUST = {
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
    "finite_number": "must be a finite number",
    "float_parsing": "must be a number",
    "float_type": "must be a number",
    "greater_than": "must be above {gt:g}",
    "greater_than_equal": "must be at least {ge:g}",
    "int_from_float": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_parsing_size": "must be a whole number of fewer digits",
    "int_type": "must be a whole number",
    "less_than": "must be below {lt:g}",
    "less_than_equal": "must be at most {le:g}",
    "list_type": "must be a list, written as [a, b]",
    "literal_error": "must be {expected}",
    "string_too_short": "must not be empty",
    "string_type": "must be text; put it in quotes",
    "too_long": "must have {max_length} values",
    "too_short": "must have at least {min_length} values",
    "tuple_type": "must be a list, written as [a, b]",
    "yes_or_no": "is a yes or no, as YAML reads yes, no, on and off too; give a value, or quote it",
}


def refusals(error: ValidationError, model: type[BaseModel]) -> Iterator[tuple[str, str]]:
    """(dotted name, sentence) of each key of a `model` that was refused; "" is the whole."""
    for item in error.errors(include_url=False):
        location = list(item["loc"])
        yield _dotted(location), _sentence(model, item["type"], location, item)


def _sentence(model: type[BaseModel], kind: str, location: list[Any], item: Any) -> str:
    name, context = _dotted(location), item.get("ctx", {})
    if kind == "value_error":
        return f"{name}: {context['error']}." if name else f"{context['error']}."
    if kind == "extra_forbidden":
        return f"{name} is not a key of a recipe; {_nearest(model, location)}"
    if kind == "missing":
        return _missing(model, location)
    if kind == "model_type":
        example = f"{name}.{_keys(_at(model, location))[0]}"
        given = "is empty" if item["input"] is None else f"= {_shown(item['input'])} is one value"
        return f"{name} {given}, and it is a section; give it keys such as {example}."
    if kind not in _MUST:
        message = str(item["msg"])
        return f"{name} = {_shown(item['input'])} is refused: {message[0].lower()}{message[1:]}."
    return f"{name} = {_shown(item['input'])} {_MUST[kind].format(**context)}."


def _missing(model: type[BaseModel], location: list[Any]) -> str:
    name = _dotted(location)
    if isinstance(location[-1], int):
        return (
            f"{_dotted(location[:-1])} must have more values; value {location[-1] + 1} is missing."
        )
    section = _at(model, location)
    if section is None:
        return f"{name} is missing and has no default; give it a value."
    needed = [key for key, field in section.model_fields.items() if field.is_required()]
    listed = ", ".join(f"{name}.{key}" for key in needed) or f"{name}.{_keys(section)[0]}"
    return f"the section {name} is missing; add it, with {listed}."


def _nearest(model: type[BaseModel], location: list[Any]) -> str:
    """The key that was meant: one like it in its section, else one of its name in another."""
    *inside, key = location
    section = _at(model, inside) or model
    if near := difflib.get_close_matches(str(key), _keys(section), 1):
        return f"did you mean {_dotted([*inside, near[0]])}?"
    if elsewhere := [name for name in _leaves(model) if name.rpartition(".")[2] == key]:
        return f"did you mean {' or '.join(elsewhere)}?"
    return f"{_dotted(inside) or 'it'} has the keys {', '.join(_keys(section))}."


def _at(model: type[BaseModel], location: list[Any]) -> type[BaseModel] | None:
    """The section at a place, or None where a value is."""
    found: Any = model
    for part in location:
        found = found.model_fields[part].annotation
    return found if isinstance(found, type) and issubclass(found, BaseModel) else None


def _keys(section: type[BaseModel] | None) -> list[str]:
    return list(section.model_fields) if section else []


def _leaves(model: type[BaseModel], inside: tuple[str, ...] = ()) -> Iterator[str]:
    """Dotted names of all values below a section."""
    for key in model.model_fields:
        section = _at(model, [key])
        if section is None:
            yield ".".join([*inside, key])
        else:
            yield from _leaves(section, (*inside, key))


def _dotted(location: list[Any]) -> str:
    name = ""
    for part in location:
        name += f"[{part}]" if isinstance(part, int) else f".{part}" if name else str(part)
    return name


def _shown(value: Any) -> str:
    """A value as YAML would have it, not too long."""
    text = {True: "true", False: "false"}[value] if isinstance(value, bool) else repr(value)
    text = "null" if value is None else text
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
