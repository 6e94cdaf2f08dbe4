from __future__ import annotations

import random

import httpx
import pytest

from stable_audio_serve.api.answers import attachment
from stable_audio_serve.api.links import published_url
from stable_audio_serve.core.keys import hash_key
from stable_audio_serve.jobs.queue import JobQueue
from tests.api.compat.serving import make_client


async def publish(jobs: JobQueue, *, data: bytes = b"RIFF", name: str = "a.wav", kind: str = "audio/wav") -> str:
    file_id, _ = await jobs.publish(lambda: [data], media_type=kind, file_name=name)
    return published_url("", file_id, file_name=name)


async def test_published_file_can_be_downloaded(client: httpx.AsyncClient, jobs: JobQueue) -> None:
    reply = await client.get(await publish(jobs, data=b"x" * 3_000_000))
    assert reply.status_code == 200
    assert reply.content == b"x" * 3_000_000
    assert reply.headers["content-length"] == "3000000"
    assert reply.headers["content-type"] == "audio/wav"
    assert reply.headers["content-disposition"] == 'attachment; filename="a.wav"'
    assert reply.headers["x-content-type-options"] == "nosniff"
    assert "x-recipe" not in reply.headers


@pytest.mark.parametrize(
    ("kind", "served"),
    [
        *((kind, kind) for kind in ("audio/wav", "audio/mpeg; codecs=mp3", "application/zip")),
        *((kind, "application/octet-stream") for kind in ("text/javascript", "text/html", "audio/x+xml", "image/png")),
    ],
)
async def test_files_are_served_as_audio_or_as_bytes(
    client: httpx.AsyncClient, jobs: JobQueue, kind: str, served: str
) -> None:
    """No file is served as HTML, because files share an origin with the server's pages."""
    url = await publish(jobs, kind=kind)
    for reply in (await client.get(url), await client.head(url)):
        assert reply.headers["content-type"] == served


async def test_head_describes_the_download(client: httpx.AsyncClient, jobs: JobQueue) -> None:
    url = await publish(jobs, data=b"x" * 3_000_000)
    reply, head = await client.get(url), await client.head(url)
    assert (head.status_code, head.content) == (200, b"")
    for name in ("content-length", "content-type", "content-disposition", "x-content-type-options"):
        assert head.headers[name] == reply.headers[name]
    assert (await client.head(url.replace("a.wav", "b.wav"))).status_code == 404


@pytest.mark.parametrize(
    ("value", "span"),
    [
        ("bytes=0-9", slice(0, 10)),
        ("bytes=0-0", slice(0, 1)),
        ("bytes=1048570-1048580", slice(1_048_570, 1_048_581)),
        ("bytes=2999999-", slice(2_999_999, None)),
        ("bytes=100-99999999999999999999", slice(100, None)),
        ("bytes=-10", slice(-10, None)),
        ("bytes=-5000000", slice(0, None)),
    ],
)
async def test_range_returns_a_part_of_the_file(
    client: httpx.AsyncClient, jobs: JobQueue, value: str, span: slice
) -> None:
    data = random.Random(0).randbytes(3_000_000)
    reply = await client.get(await publish(jobs, data=data), headers={"Range": value})
    start, stop, _ = span.indices(len(data))
    assert (reply.status_code, reply.content) == (206, data[span])
    assert reply.headers["content-range"] == f"bytes {start}-{stop - 1}/3000000"
    assert reply.headers["content-length"] == str(stop - start)


@pytest.mark.parametrize("value", ["bytes=3000-", "bytes=3000-4000", "bytes=-0"])
async def test_range_past_the_end_is_416(client: httpx.AsyncClient, jobs: JobQueue, value: str) -> None:
    reply = await client.get(await publish(jobs, data=bytes(3000)), headers={"Range": value})
    assert reply.status_code == 416
    assert reply.headers["content-range"] == "bytes */3000"
    assert "Range" in reply.json()["detail"]


@pytest.mark.parametrize(
    "headers",
    [
        *({"Range": value} for value in ("bytes=5-2", "bytes=-", "bytes=a-b", "items=0-1", "bytes=0-1,5-6", "")),
        {"Range": "bytes=0-1", "If-Range": '"another"'},
        {"Range": "bytes=0-1", "If-Range": "Wed, 25 Nov 2026 00:00:00 GMT"},
        {"If-None-Match": '"another"'},
    ],
    ids=str,
)
async def test_other_ranges_and_tags_return_the_whole_file(
    client: httpx.AsyncClient, jobs: JobQueue, headers: dict[str, str]
) -> None:
    reply = await client.get(await publish(jobs, data=b"x" * 3000), headers=headers)
    assert (reply.status_code, reply.content, reply.headers["accept-ranges"]) == (200, b"x" * 3000, "bytes")


async def test_tag_identifies_the_content(client: httpx.AsyncClient, jobs: JobQueue) -> None:
    url, other = await publish(jobs, data=b"one"), await publish(jobs, data=b"two")
    tag = (await client.get(url)).headers["etag"]
    for value in (tag, f'"x", W/{tag}', "*"):
        for reply in (
            await client.get(url, headers={"If-None-Match": value, "Range": "bytes=9-"}),
            await client.head(url, headers={"If-None-Match": value}),
        ):
            assert (reply.status_code, reply.content, reply.headers["etag"]) == (304, b"", tag)
    assert (await client.get(other, headers={"If-None-Match": tag})).content == b"two"
    part = {"Range": "bytes=1-", "If-Range": tag}
    assert (await client.get(url, headers=part)).content == b"ne"
    assert (await client.get(other, headers=part)).content == b"two"


async def test_empty_file_can_be_downloaded(client: httpx.AsyncClient, jobs: JobQueue) -> None:
    reply = await client.get(await publish(jobs, data=b""))
    assert (reply.status_code, reply.content, reply.headers["content-length"]) == (200, b"", "0")


@pytest.mark.parametrize(
    ("name", "shown"), [('a"b\\c.wav', "a_b_c.wav"), ("größe ♪.wav", "gr__e _.wav"), ("a\r\nX-Evil: 1", "a__X-Evil: 1")]
)
async def test_file_name_cannot_break_the_header(
    client: httpx.AsyncClient, jobs: JobQueue, name: str, shown: str
) -> None:
    reply = await client.get(await publish(jobs, name=name))
    assert reply.status_code == 200
    assert reply.headers["content-disposition"] == f'attachment; filename="{shown}"'
    assert "x-evil" not in reply.headers


@pytest.mark.parametrize("path", ["/files/0/a.wav", f"/files/{'0' * 32}/a.wav", "/files/..%2f/jobs.db", "/files/x/%00"])
async def test_unknown_link_is_404(client: httpx.AsyncClient, path: str) -> None:
    reply = await client.get(path)
    assert reply.status_code == 404
    assert isinstance(reply.json()["detail"], str)


async def test_file_name_is_part_of_the_link(client: httpx.AsyncClient, jobs: JobQueue) -> None:
    url = await publish(jobs)
    assert (await client.get(url.replace("a.wav", "b.wav"))).status_code == 404


async def test_missing_file_is_404(client: httpx.AsyncClient, jobs: JobQueue) -> None:
    file_id, file = await jobs.publish(lambda: [b"x"], media_type="audio/wav", file_name="a.wav")
    await jobs.artifacts.delete(file.key)
    assert (await client.get(f"/files/{file_id}/a.wav")).status_code == 404


async def test_link_needs_no_key() -> None:
    async with make_client(api={"key_hashes": [hash_key(b"secret")]}) as (client, _):
        client.headers["Authorization"] = "Bearer secret"
        body = {"model": "stable-audio", "prompt": "x", "seconds_total": 1}
        job_id = (await client.post("/v2/generate/audio", json=body)).json()["id"]
        status: dict[str, object] = {}
        while status.get("status") != "completed":
            status = (await client.get("/v2/generate/audio", params={"generation_id": job_id})).json()
        del client.headers["Authorization"]
        file = status["audio_file"]
        assert isinstance(file, dict)
        reply = await client.get(file["url"])
        assert reply.status_code == 200
        assert len(reply.content) == file["file_size"]


def test_download_name_is_plain_ascii() -> None:
    header = attachment('a"\\\r\nX-Evil: 1;\u017f\x00.wav')["Content-Disposition"]
    assert header == 'attachment; filename="a____X-Evil: 1;__.wav"'
