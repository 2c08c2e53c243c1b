"""What pydantic refuses in a recipe, as sentences that name the key and say what would be right."""

import difflib
from collections.abc import Callable, Iterator
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

SHOWN = 60  # characters of a wrong value

# What a value must be, by pydantic's name of the error; braces are filled from its context.
_MUST = {
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
    "finite_number": "must be a finite number",
    "float_parsing": "must be a number",
    "float_type": "must be a number",
    "greater_than": "must be above {gt}",
    "greater_than_equal": "must be at least {ge}",
    "int_from_float": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_parsing_size": "must be a whole number of fewer digits",
    "int_type": "must be a whole number",
    "less_than": "must be below {lt}",
    "less_than_equal": "must be at most {le}",
    "list_type": "must be a list, written as [a, b]",
    "literal_error": "must be {expected}",
    "string_too_short": "must not be empty",
    "string_type": "must be text; put it in quotes",
    "too_long": "must have {max_length} values",
    "too_short": "must have at least {min_length} values",
    "tuple_type": "must be a list, written as [a, b]",
    "yes_or_no": (
        "must not be or hold a yes or no (YAML reads yes, no, on and off as one); write a value, or put "
        "the word in quotes"
    ),
}


# Dotted name -> the families of models whose recipes have such a key.
Owners = Callable[[str], list[str]]


def refusals(
    error: ValidationError, model: type[BaseModel], owners: Owners
) -> Iterator[tuple[str, str]]:
    """(dotted name, sentence) of each key of a `model` that was refused; "" is the whole."""
    for item in error.errors(include_url=False):
        # Which kind a value was taken for, in brackets, is no part of its name.
        location = [part for part in item["loc"] if not str(part).startswith("(")]
        keys = [part for part in location if isinstance(part, str)]
        yield ".".join(keys), _sentence(model, item["type"], location, item, owners)


def _sentence(
    model: type[BaseModel], kind: str, location: list[Any], item: Any, owners: Owners
) -> str:
    name, value = _named(location), shown(item["input"])
    context = {key: _plain(limit) for key, limit in item.get("ctx", {}).items()}
    if kind == "value_error":
        return f"{name}: {context['error']}." if name else f"{context['error']}."
    if kind == "extra_forbidden":
        if families := owners(name):
            return _of_others(model, location, families)
        return f"{name} is not a key of a recipe; {_nearest(model, location)}"
    if kind == "missing":
        return _missing(model, location)
    if kind == "model_type":
        example = f"{name}.{_keys(_at(model, location))[0]}"
        given = "is empty" if item["input"] is None else f"= {value} is a value"
        return f"{name} {given}, and {name} is a section; give it keys such as {example}."
    if kind not in _MUST:
        message = str(item["msg"])
        return f"{name} = {value} is refused: {message[0].lower()}{message[1:]}."
    given = f"{name} is empty and" if item["input"] is None else f"{name} = {value}"
    return f"{given} {_MUST[kind].format(**context)}."


def _missing(model: type[BaseModel], location: list[Any]) -> str:
    name = _named(location)
    if isinstance(location[-1], int):
        return f"{name} is missing; give the list all its values."
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
        return f"did you mean {_named([*inside, near[0]])}?"
    if elsewhere := [name for name in _leaves(model) if name.rpartition(".")[2] == key]:
        return f"did you mean {' or '.join(elsewhere)}?"
    return f"{_named(inside) or 'a recipe'} has the keys {', '.join(_keys(section))}."


def _of_others(model: type[BaseModel], location: list[Any], families: list[str]) -> str:
    """Of a key that recipes of other families have."""
    *inside, key = location
    near = difflib.get_close_matches(str(key), _keys(_at(model, inside) or model), 1)
    hint = (
        f"did you mean {_named([*inside, near[0]])}?" if near else "drop it, or change the family."
    )
    many = (
        f"the families {', '.join(families)}" if len(families) > 1 else f"the family {families[0]}"
    )
    return f"{_named(location)} is a key of {many}, and not of the family of this recipe; {hint}"


def has_key(model: type[BaseModel], name: str) -> bool:
    """Whether a `model` has the key, or the section, of a dotted name."""
    return any(leaf == name or leaf.startswith(f"{name}.") for leaf in _leaves(model))


def _at(model: type[BaseModel], location: list[Any]) -> type[BaseModel] | None:
    """The section at a place, or None where a value is."""
    found: Any = model
    for part in location:
        found = _item(found) if isinstance(part, int) else found.model_fields[part].annotation
    return found if isinstance(found, type) and issubclass(found, BaseModel) else None


def _item(kind: Any) -> type[BaseModel] | None:
    """The section that the items of a list are, if they are any."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return kind
    return next((section for part in get_args(kind) if (section := _item(part))), None)


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


def _named(location: list[Any]) -> str:
    """`section.key`, `value 2 of section.key`, or `key of value 2 of section`."""
    *keys, last = location or [""]
    if isinstance(last, int):
        return f"value {last + 1} of {_named(keys)}"
    if any(isinstance(part, int) for part in keys):
        return f"{last} of {_named(keys)}"
    return ".".join([*keys, last])


def _plain(limit: Any) -> Any:
    """A limit without the decimals that say nothing."""
    return f"{limit:g}" if isinstance(limit, float) else limit


def shown(value: Any) -> str:
    """A value for a sentence: as YAML has it, and not too long."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    listed = isinstance(value, list | tuple)
    text = f"[{', '.join(map(shown, value))}]" if listed else repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
