"""Mark test parameters as slow, so that `make test` runs only a part of a long list."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from functools import partial
from typing import Any

import pytest

slow = partial(pytest.param, marks=pytest.mark.slow)


def some(values: Iterable[Any], always: Collection[Any]) -> list[Any]:
    """Return `values` as test parameters. All values that are not in `always` are marked slow.

    An item that is a tuple has the values of several arguments.
    """
    return [value if value in always else slow(*_arguments(value)) for value in values]


def few(values: Iterable[Any], *, number: int = 2) -> list[Any]:
    """Return `values` as test parameters. All values after the first `number` are marked slow.

    An item that is a tuple has the values of several arguments.
    """
    return [value if index < number else slow(*_arguments(value)) for index, value in enumerate(values)]


def _arguments(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)
