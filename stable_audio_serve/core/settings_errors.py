"""Error messages for invalid settings.

For an invalid value the message is Pydantic's. For an unknown key it suggests a similar key or lists the valid keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from difflib import get_close_matches
from reprlib import repr as shorten
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

Path = tuple[str, ...]


def faults(error: ValidationError, *, is_secret: Callable[[Path], bool] = lambda path: False) -> dict[Path, str]:
    """Return Pydantic's error messages by the path of the setting, except messages about unknown keys.

    A message shows the invalid value, unless `is_secret` returns True for the path.
    """
    items = error.errors(include_url=False)
    parents = {item["loc"][:end] for item in items for end in range(len(item["loc"]))}
    found: dict[Path, str] = {}
    for item in items:
        # Also skip errors of a list that has an invalid entry. Pydantic drops the entry, and may then report that the
        # list is too short.
        if item["type"] == "extra_forbidden" or item["loc"] in parents:
            continue
        path, message = tuple(map(str, item["loc"])), item["msg"].removeprefix("Value error, ")
        is_shown = item["type"] not in {"missing", "value_error"} and not is_secret(path)
        found[path] = f"{message} (got {shorten(item['input'])})" if is_shown else message
    return found


def unknown_keys(value: object, model: type[BaseModel], *, path: Path = ()) -> Iterator[tuple[Path, str]]:
    """Yield the path of each key in `value` that is not a field of `model`, with an error message.

    A model's extra keys are yielded even if the model allows them. Keys inside a field that is a plain mapping are not.
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
            if get_origin(field.annotation) is dict and isinstance(item, dict):  # sections by name
                for name, named in item.items():
                    yield from unknown_keys(named, section, path=(*here, str(name)))
            else:
                yield from unknown_keys(item, section, path=here)


def nearest(word: str, words: Iterable[str]) -> str | None:
    """Return the one of `words` that is most similar to `word`, or None. Ignores case and treats "-" as "_"."""
    plain = {each.lower(): each for each in words}
    return next((plain[each] for each in get_close_matches(word.lower().replace("-", "_"), plain, n=1)), None)


def _section_in(annotation: Any) -> type[BaseModel] | None:
    """Return the Pydantic model inside an optional, union or list type, or None."""
    if isinstance(annotation, type) and not get_origin(annotation) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for each in get_args(annotation) if (found := _section_in(each))), None)
