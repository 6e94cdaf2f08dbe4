from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.object_storage import Faults, ObjectStorage, running_object_storage


@pytest.fixture(scope="session")
def _object_storage() -> Iterator[ObjectStorage]:
    with running_object_storage() as storage:
        yield storage


@pytest.fixture
def object_storage(_object_storage: ObjectStorage) -> Iterator[ObjectStorage]:
    """An S3 service over HTTP, with a proxy in front that spares everything until a test sets its `faults`."""
    yield _object_storage
    _object_storage.proxy.faults = Faults()
    _object_storage.proxy.requests.clear()
