from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from dataclasses import dataclass

import httpx
import pytest

from stable_audio_serve.client import Client, Retries
from stable_audio_serve.client.failures import Attempts
from stable_audio_serve.core import errors
from stable_audio_serve.core.generation import GenerationRequest, GenerationResult
from tests.backends import ToneBackend
from tests.client.conftest import ASYNC, IN_ONE_LOOP, Caller, serve

Make = Callable[[], errors.StableAudioError]

pytestmark = [pytest.mark.server, IN_ONE_LOOP]


@dataclass
class RefusingBackend(ToneBackend):
    """A backend that refuses the first requests."""

    num_refusals: int = 2
    make: Make = lambda: errors.OverloadedError("full", retry_after_s=1.0)

    async def generate(self, model: str, request: GenerationRequest, **options: object) -> GenerationResult:
        if self.num_refusals:
            self.num_refusals -= 1
            self.requests.append((model, request))
            raise self.make()
        return await super().generate(model, request, **options)  # type: ignore[arg-type]


def pauses(retries: Retries, failures: list[errors.StableAudioError], *, jitter: float = 0.0) -> list[float]:
    attempts = Attempts(retries, jitter=lambda: jitter)
    return [attempts.pause_s(failure) for failure in failures]


async def test_pauses_follow_retry_after_or_double() -> None:
    lost, full = errors.UnreachableError("gone"), errors.OverloadedError("full", retry_after_s=7.0)
    assert pauses(Retries(), [lost, lost, lost]) == [0.25, 0.5, 1.0]
    assert pauses(Retries(), [lost, lost, lost], jitter=1.0) == [0.5, 1.0, 2.0]
    assert pauses(Retries(), [full, full]) == [7.0, 7.0]
    assert pauses(Retries(), [full, full], jitter=1.0) == [7.25, 7.5]


async def test_retries_end_at_their_limit() -> None:
    full = errors.OverloadedError("full", retry_after_s=7.0)
    with pytest.raises(errors.OverloadedError):
        pauses(Retries(most=2), [full] * 3)
    with pytest.raises(errors.OverloadedError):
        pauses(Retries(most_wait_s=20.0), [full] * 3)
    for final in (
        errors.InvalidRequestError("no"),
        errors.DeadlineExceededError("late"),
        errors.StorageFullError("no room"),
        errors.GenerationError("not finite"),
    ):
        with pytest.raises(type(final)):
            pauses(Retries(), [final])


@ASYNC
@pytest.mark.parametrize(
    "make",
    [
        lambda: errors.OverloadedError("full", retry_after_s=1.0),
        lambda: errors.QuotaError("yours is full"),
        lambda: errors.ModelUnavailableError("its replica died"),
        lambda: errors.StoppingError("stopping"),
    ],
)
async def test_temporary_failures_are_retried(make: Make, connect: Callable[..., Caller]) -> None:
    backend = RefusingBackend(num_refusals=1, make=make)
    async with serve(backend) as served:
        take = await connect(served.url)("generate", "rain", duration=0.1, seed=3)
    assert take.seed == 3
    assert len(backend.requests) == 2


@ASYNC
async def test_the_last_failure_is_raised(connect: Callable[..., Caller]) -> None:
    backend = RefusingBackend(num_refusals=9, make=lambda: errors.ModelUnavailableError("its replica died"))
    async with serve(backend) as served:
        with pytest.raises(errors.ModelUnavailableError, match="died"):
            await connect(served.url)("generate", "rain", duration=0.1)
    assert len(backend.requests) == 4


@pytest.mark.parametrize("asked", [("models",), ("jobs.section", "0" * 32, 1)])
async def test_an_unreachable_server_is_retried(asked: tuple[object, ...], connect: Callable[..., Caller]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    call = connect(f"http://127.0.0.1:{port}", retries=Retries(most=2, first_pause_s=0.01))
    with pytest.raises(errors.UnreachableError, match=f"http://127.0.0.1:{port} did not answer"):
        await call(*asked)


@pytest.mark.parametrize("body", ["<html>Bad Gateway</html>", '["no object"]', ""])
async def test_an_error_page_of_a_proxy_is_an_error_of_the_client(body: str) -> None:
    http = httpx.Client(transport=httpx.MockTransport(lambda _: httpx.Response(502, text=body)))
    error = pytest.raises(errors.UnreachableError, match=r"^the server answered 502 Bad Gateway$")
    with Client("http://localhost", http=http, retries=Retries(most=0)) as client, error:
        client.models()


async def test_a_redirect_names_the_url_to_use() -> None:
    answer = httpx.Response(308, headers={"location": "https://audio.example.com/v1/models?state=secret"})
    http = httpx.Client(transport=httpx.MockTransport(lambda _: answer))
    expected = r"^the server redirects to https://audio\.example\.com/v1/models; check the server's URL$"
    with pytest.raises(errors.StableAudioError, match=expected):
        Client("http://audio.example.com", http=http).models()


def connect_to(*answers: httpx.Response) -> Client:
    """Return a client of a server that gives each of these answers once."""
    left = iter(answers)
    http = httpx.Client(transport=httpx.MockTransport(lambda _: next(left)))
    return Client("http://localhost", http=http, retries=Retries(most=1, first_pause_s=0.01))


async def test_a_proxy_that_waits_in_vain_for_the_server_is_asked_again() -> None:
    late = httpx.Response(504, text="<html>")
    event = 'event: progress\ndata: {"stage": "x", "fraction": 0.5, "eta_seconds": null, "queue_position": null}\n\n'
    stream = httpx.Response(200, text=event, headers={"content-type": "text/event-stream"})
    assert connect_to(late, httpx.Response(200, json={"data": []})).models() == ()
    assert next(connect_to(late, stream).jobs.follow("0" * 32)).fraction == 0.5
    with pytest.raises(errors.DeadlineExceededError, match="504"):  # a long generation would only start again
        connect_to(late).generate("rain")


async def test_unloading_an_adapter_with_a_lost_answer_succeeds() -> None:
    missing = httpx.Response(404)
    connect_to(httpx.Response(502), missing).unload_lora("vinyl")
    with pytest.raises(errors.NotFoundError):
        connect_to(missing).unload_lora("vinyl")


@pytest.mark.parametrize("asked", [("models",), ("jobs.audio_chunks", "0" * 32), ("jobs.wait", "0" * 32)])
async def test_a_damaged_compressed_answer_is_a_lost_answer(asked: tuple[str, ...]) -> None:
    def answer(_: httpx.Request) -> httpx.Response:
        headers = {"content-encoding": "gzip", "content-type": "text/event-stream"}
        return httpx.Response(200, headers=headers, stream=httpx.ByteStream(b"not compressed"))

    http = httpx.Client(transport=httpx.MockTransport(answer))
    error = pytest.raises(errors.UnreachableError, match=r"did not answer: .*decompressing")
    with Client("http://localhost", http=http, retries=Retries(most=1, first_pause_s=0.01)) as client, error:
        await Caller(client)(*asked)


async def test_an_interrupted_answer_is_retried(connect: Callable[..., Caller]) -> None:
    """The first answer ends too early, the second is complete."""
    num_calls = 0

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal num_calls
        num_calls += 1
        await reader.readuntil(b"\r\n\r\n")
        body = b'{"data": []}'
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % len(body))
        writer.write(body[: 5 if num_calls == 1 else None])
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        assert await connect(f"http://127.0.0.1:{port}")("models") == ()
    assert num_calls == 2
