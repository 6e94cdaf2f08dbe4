"""Says what is wrong with a setting: the key, what it must be, and for an unknown key the nearest known one.

Works on the JSON schema of a Pydantic model, so that the words come from the declared types and bounds; knows nothing
of what the settings mean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from difflib import get_close_matches
from functools import cache
from typing import Any

from pydantic import BaseModel, ValidationError

_SURE = 0.8  # similarity above which a key in another place is suggested
_MOST_LISTED = 24
_MOST_SHOWN = 80
_Path = tuple[str, ...]


def faults(
    error: ValidationError,
    model: type[BaseModel],
    *,
    name: Callable[[_Path], str] = ".".join,
    is_secret: Callable[[_Path], bool] = lambda path: False,
) -> list[tuple[str, str]]:
    """Returns name and complaint of each thing that `error` finds wrong in a value of `model`.

    `name` gives the text that the operator knows a path by; values at secret paths are not shown.
    """
    schema = schema_of(model)
    found: dict[_Path, tuple[str, str]] = {}
    for item in error.errors(include_url=False, include_context=False):
        path, node = _locate(schema, [str(part) for part in item["loc"]])
        if item["type"] == "extra_forbidden":
            path = (*path, str(item["loc"][-1]))
            complaint = unknown(path, schema)
        elif item["type"] == "missing":
            complaint = f"missing; it must be {_requirement(schema, node)}"
        elif item["type"] == "value_error":
            complaint = item["msg"].removeprefix("Value error, ")
        else:
            shown = "" if is_secret(path) else f" (got {_short(item['input'])})"
            complaint = f"must be {_requirement(schema, node)}{shown}"
        found.setdefault(path, (name(path), complaint))  # a union complains once for each of its members
    # A list with an unusable entry also counts as too short.
    return [
        said for path, said in found.items() if not any(path == other[: len(path)] for other in found.keys() - {path})
    ]


@cache
def schema_of(model: type[BaseModel]) -> dict[str, Any]:
    """Returns the JSON schema of `model`."""
    return model.model_json_schema()


def unknown_keys(value: object, schema: Mapping[str, Any]) -> Iterator[_Path]:
    """Returns the paths of keys in `value` that `schema` does not declare, even where validation allows extra ones.

    Mappings without declared keys may hold any.
    """
    yield from _unknown_keys(value, schema, node=schema, path=())


def places(schema: Mapping[str, Any]) -> Iterator[str]:
    """Returns the dotted path of every key; lists have one entry, 0."""
    yield from _places_below(schema, schema, where="")


def unknown(path: _Path, schema: Mapping[str, Any], *, elsewhere: Iterable[str] = ()) -> str:
    """Returns the complaint about an unknown key.

    It names the nearest key beside it, else one of `elsewhere` or of another place in `schema` (dotted paths), else
    all keys that are valid there.
    """
    *parents, key = path
    beside = sorted(_properties(schema, _locate(schema, parents)[1]))
    near = nearest(key, beside) or _nearest_place(key, [*elsewhere, *places(schema)])
    if near is not None:
        return f"unknown; did you mean {near}?"
    return f"unknown; valid here: {', '.join(beside[:_MOST_LISTED])}{', ...' if len(beside) > _MOST_LISTED else ''}"


def nearest(word: str, words: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """Returns the most similar of `words`, None if none is similar; ignores case and treats - as _."""
    plain = {_plain(each): each for each in words}
    matches = get_close_matches(_plain(word), plain, n=1, cutoff=cutoff)
    return plain[matches[0]] if matches else None


def _nearest_place(key: str, places: Iterable[str]) -> str | None:
    by_key: dict[str, str] = {}
    for place in places:
        by_key.setdefault(place.rpartition(".")[2], place)
    found = nearest(key, by_key, cutoff=_SURE)
    return by_key[found] if found else None


def _plain(word: str) -> str:
    return word.lower().replace("-", "_")


def _locate(schema: Mapping[str, Any], loc: Iterable[str]) -> tuple[_Path, Mapping[str, Any]]:
    """Returns the keys and indices of `loc`, without the union members Pydantic adds, and the schema there."""
    path: list[str] = []
    node: Mapping[str, Any] = schema
    for part in loc:
        step = _step(schema, node, part=part)
        if step is not None:
            node = step
            path.append(part)
    return tuple(path), node


def _step(schema: Mapping[str, Any], node: Mapping[str, Any], *, part: str) -> Mapping[str, Any] | None:
    for member in _members(schema, node):
        if part in member.get("properties", {}):
            found: Mapping[str, Any] = member["properties"][part]
            return found
        if part.isdigit() and isinstance(member.get("items"), dict):
            items: Mapping[str, Any] = member["items"]
            return items
    return None


def _members(schema: Mapping[str, Any], node: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yields the schemas that `node` may have, with references and unions resolved and null left out."""
    if "$ref" in node:
        yield from _members(schema, schema["$defs"][node["$ref"].rpartition("/")[2]])
        return
    for combined in ("anyOf", "oneOf", "allOf"):
        for member in node.get(combined, ()):
            yield from _members(schema, member)
    if not {"anyOf", "oneOf", "allOf"} & node.keys() and node.get("type") != "null":
        yield node


def _properties(schema: Mapping[str, Any], node: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    return {key: value for member in _members(schema, node) for key, value in member.get("properties", {}).items()}


def _places_below(schema: Mapping[str, Any], node: Mapping[str, Any], *, where: str) -> Iterator[str]:
    for key, value in _properties(schema, node).items():
        yield f"{where}{key}"
        yield from _places_below(schema, value, where=f"{where}{key}.")
        for member in _members(schema, value):
            if isinstance(member.get("items"), dict):
                yield from _places_below(schema, member["items"], where=f"{where}{key}.0.")


def _unknown_keys(value: object, schema: Mapping[str, Any], *, node: Mapping[str, Any], path: _Path) -> Iterator[_Path]:
    if isinstance(value, list):
        for index, item in enumerate(value):
            inner = _step(schema, node, part=str(index))
            if inner is not None:
                yield from _unknown_keys(item, schema, node=inner, path=(*path, str(index)))
        return
    known = _properties(schema, node)
    if not isinstance(value, dict) or not known:
        return
    for key, item in value.items():
        here = (*path, str(key))
        if key in known:
            yield from _unknown_keys(item, schema, node=known[key], path=here)
        else:
            yield here


def _requirement(schema: Mapping[str, Any], node: Mapping[str, Any]) -> str:
    """Returns the end of a sentence that begins with "must be"."""
    return " or ".join(dict.fromkeys(_kind(member) for member in _members(schema, node))) or "left out"


def _kind(member: Mapping[str, Any]) -> str:
    if "form" in member:
        return str(member["form"])
    if "enum" in member:
        return f"one of {', '.join(map(str, member['enum']))}"
    match member.get("type"):
        case "integer":
            return f"a whole number{_range(member)}"
        case "number":
            return f"a number{_range(member)}"
        case "boolean":
            return "true or false"
        case "string":
            return f"text{_range(member, 'Length', unit=' characters')}"
        case "array":
            return f"a list{_range(member, 'Items')}"
        case "object":
            return "a mapping"
        case _:
            return str(member.get("const", "something else"))


def _range(member: Mapping[str, Any], of: str = "imum", *, unit: str = "") -> str:
    low, high = member.get(f"min{of}"), member.get(f"max{of}")
    if low is not None and high is not None:
        return f" {'of' if unit else 'from'} {low} to {high}{unit}"
    if low is not None:
        return f" of at least {low}{unit}"
    if high is not None:
        return f" of at most {high}{unit}"
    above = member.get("exclusiveMinimum")
    return f" above {above}" if above is not None else ""


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _MOST_SHOWN else text[: _MOST_SHOWN - 3] + "..."
