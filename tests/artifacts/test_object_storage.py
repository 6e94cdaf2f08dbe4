"""The test service itself: what it breaks, and that it breaks nothing unasked."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from tests.object_storage import Faults, ObjectStorage
from tests.patience import PATIENCE_S


@pytest.fixture
def url(object_storage: ObjectStorage) -> str:
    return f"{object_storage.proxy.url}/{object_storage.make_bucket()}/key"


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    with httpx.Client(
        headers={"x-amz-acl": "public-read"}, timeout=PATIENCE_S
    ) as client:  # or GET would need a signature
        yield client


def test_without_faults_everything_passes(object_storage: ObjectStorage, client: httpx.Client, url: str) -> None:
    data = bytes(range(256)) * 4000
    for _ in range(3):
        assert client.put(url, content=data).status_code == 200
        assert client.get(url).content == data
        assert int(client.head(url).headers["content-length"]) == len(data)
    assert client.delete(url).status_code == 204
    assert len(object_storage.proxy.requests) == 10


def test_an_error_is_an_answer_of_the_service(object_storage: ObjectStorage, client: httpx.Client, url: str) -> None:
    object_storage.proxy.faults = Faults(errors=1.0)
    answers = [client.put(url, content=b"x") for _ in range(20)]
    assert {(answer.status_code, "SlowDown" in answer.text) for answer in answers} == {(500, False), (503, True)}


def test_a_cut_connection_is_an_error_of_the_client(
    object_storage: ObjectStorage, client: httpx.Client, url: str
) -> None:
    client.put(url, content=b"x" * 1_000_000)
    object_storage.proxy.faults = Faults(cuts=1.0)
    begun = []

    def fetch() -> None:
        with client.stream("GET", url) as answer:
            begun.append(answer)
            answer.read()

    for _ in range(20):
        with pytest.raises((httpx.NetworkError, httpx.RemoteProtocolError)):
            fetch()
    assert 0 < len(begun) < 20  # before the answer, and in its middle


def test_shares_are_shares(object_storage: ObjectStorage, client: httpx.Client, url: str) -> None:
    proxy = object_storage.proxy
    client.put(url, content=b"x")
    proxy.faults = Faults(errors=0.3)
    statuses = [client.get(url).status_code for _ in range(100)]
    assert 10 < sum(status >= 500 for status in statuses) < 50


def test_faults_may_spare_other_requests(object_storage: ObjectStorage, client: httpx.Client, url: str) -> None:
    object_storage.proxy.faults = Faults(answer=(403, "AccessDenied"), only="GET")
    assert client.put(url, content=b"x").status_code == 200
    assert client.get(url).status_code == 403


def test_down_and_up_again(object_storage: ObjectStorage, client: httpx.Client, url: str) -> None:
    client.put(url, content=b"x")
    object_storage.proxy.faults = Faults(is_down=True)
    for _ in range(2):
        with pytest.raises(httpx.NetworkError):
            client.get(url)
    object_storage.proxy.faults = Faults()
    assert client.get(url).content == b"x"


def test_silent_means_no_answer(object_storage: ObjectStorage, client: httpx.Client, url: str) -> None:
    object_storage.proxy.faults = Faults(is_silent=True)
    with pytest.raises(httpx.ReadTimeout):
        client.get(url, timeout=0.2)
