"""Says what is wrong with settings: Pydantic's complaint about each value, and the valid keys beside an unknown one.

Knows nothing of what the settings mean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from difflib import get_close_matches
from reprlib import repr as shorten
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

Path = tuple[str, ...]


def faults(error: ValidationError, *, is_secret: Callable[[Path], bool] = lambda path: False) -> dict[Path, str]:
    """Returns Pydantic's complaints by path, without those about unknown keys; values at secret paths are not shown."""
    items = error.errors(include_url=False)
    parents = {item["loc"][:end] for item in items for end in range(len(item["loc"]))}
    found: dict[Path, str] = {}
    for item in items:
        if item["type"] == "extra_forbidden" or item["loc"] in parents:  # a list of unusable entries counts as empty
            continue
        path, said = tuple(map(str, item["loc"])), item["msg"].removeprefix("Value error, ")
        is_shown = item["type"] not in {"missing", "value_error"} and not is_secret(path)
        found[path] = f"{said} (got {shorten(item['input'])})" if is_shown else said
    return found


def unknown_keys(value: object, model: type[BaseModel], *, path: Path = ()) -> Iterator[tuple[Path, str]]:
    """Yields path and complaint of each key in `value` that `model` has no field for, even where it allows extra ones.

    Mappings that are no sections may have any keys.
    """
    if isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from unknown_keys(item, model, path=(*path, str(index)))
    for key, item in value.items() if isinstance(value, dict) else ():
        field, here = model.model_fields.get(key), (*path, str(key))
        if field is None:
            near = nearest(str(key), model.model_fields)
            yield here, "unknown; " + (f"did you mean {near}?" if near else f"valid: {', '.join(model.model_fields)}")
        elif section := _section_in(field.annotation):
            yield from unknown_keys(item, section, path=here)


def nearest(word: str, words: Iterable[str]) -> str | None:
    """Returns the most similar of `words`, None if none is similar; ignores case and treats - as _."""
    plain = {each.lower(): each for each in words}
    return next((plain[each] for each in get_close_matches(word.lower().replace("-", "_"), plain, n=1)), None)


def _section_in(annotation: Any) -> type[BaseModel] | None:
    """Returns the model that an optional, union or list type is of."""
    if isinstance(annotation, type) and not get_origin(annotation) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for each in get_args(annotation) if (found := _section_in(each))), None)
