from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import pytest

from tests.jobs.conftest import forks_of


@pytest.fixture(scope="package")
def processes() -> Iterator[ProcessPoolExecutor]:
    """Yield a pool of three processes. They are forks of one process that has imported the tests' helpers."""
    modules = ("tests.jobs.stores", "tests.jobs.store.test_key_uses")
    with forks_of(*modules) as context, ProcessPoolExecutor(3, mp_context=context) as pool:
        yield pool
