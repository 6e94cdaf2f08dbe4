"""Raw bytes at every route over a real socket: whatever is sent, an answer that blames the sender comes back."""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections.abc import Iterator

import httpx
import pytest
import structlog
from fastapi import FastAPI

from stable_audio_serve.api.app import create_app
from stable_audio_serve.core.settings import DialectSettings, Settings
from tests.audio_files import make_audio_file
from tests.backends import ToneBackend
from tests.patience import PATIENCE_S
from tests.sockets import listening

pytestmark = pytest.mark.slow

WAV = make_audio_file(duration_s=0.1)
TEXTS = [
    "",
    "x",
    "%00",
    "%ff",
    "%0d%0a",
    "../../etc/passwd",
    "%2e%2e%2f",
    "a" * 5000,
    '"',
    "'",
    "-1",
    "1e400",
    "nan",
    "true",
    "99999999999999999999",
    "\xff",
    "\xe9",
    "[",
    "//",
    "\\",
    "file:///etc/passwd",
    "http://[",
    "http://a\tb/",
    "javascript:1",
    "http://169.254.169.254/",
    "https://queue.fal.run/fal-ai/stable-audio",
    "https://fal.run",
    "https://fal.run/%ff%00/../x?%%%",
    "https://queue.fal.run/fal-ai/stable-audio/requests/x/status/stream",
]
VALUES: list[object] = [
    None,
    True,
    0,
    -1,
    1,
    1.5,
    2**63,
    10**30,
    1e308,
    "",
    "x",
    "1",
    "nan",
    "\x00",
    "\u202e",
    "a\r\nb: c",
    [],
    [1],
    {},
    "120 bpm",
    "0bpm",
    "9" * 5000 + "bpm",
    "1bpm",
    "1000000bpm",
    "\u0661\u0662\u0660bpm",
    "f",
    "wav",
    "base64",
]
FIELDS = [
    "prompt",
    "input",
    "model",
    "duration",
    "seconds_total",
    "seconds_start",
    "steps",
    "cfg_scale",
    "seed",
    "bars",
    "negative_prompt",
    "return_format",
    "response_format",
    "speed",
    "audio_length",
    "audio_start",
    "loop_type",
    "key",
    "guidance_scale",
    "num_inference_steps",
    "style_strength",
    "sampler_type",
    "model_type",
    "finetune_repo",
    "sampler_kwargs",
    "batch_size",
    "init_noise_level",
    "inpaint_start_seconds",
    "inpaint_end_seconds",
]
HEADERS = [
    "x-fal-request-timeout",
    "x-fal-queue-priority",
    "x-fal-target-url",
    "authorization",
    "x-forwarded-proto",
    "x-forwarded-host",
    "x-request-id",
    "range",
    "accept",
    "content-encoding",
    "cookie",
    "last-event-id",
    "origin",
]
PROMPTS = ["rain", "rain 300bpm", "drums 120 BPM"]


class Junk:
    """Requests that are wrong in many ways, the same for the same seed."""

    def __init__(self, seed: int, paths: list[tuple[str, list[str]]]) -> None:
        self._random = random.Random(seed)
        self._paths = paths

    def request(self) -> bytes:
        rng = self._random
        path, methods = rng.choice(self._paths)
        method = rng.choice(methods) if rng.random() < 0.9 else rng.choice(["GET", "PUT", "DELETE", "TRACE", "FOO"])
        path = re.sub(r"\{[^}]*\}", lambda _: self._text(), path)
        if rng.random() < 0.3:
            path += f"?{rng.choice(['generation_id', 'fal_webhook', 'logs'])}={self._text()}"
        body, content_type = self._body()
        hosts = ["localhost", "queue.localhost", "[::1]", ""] if rng.random() < 0.9 else ["x", "queue.x", 'evil"x', ":"]
        headers = [("Host", rng.choice(hosts)), ("Connection", "close")]
        headers += [(name, self._text()) for name in rng.sample(HEADERS, rng.randrange(3))]
        headers.append(("Content-Type", content_type if rng.random() < 0.95 else self._text()))
        if rng.random() < 0.1:
            headers.append(("Transfer-Encoding", "chunked"))
            body = (b"%x\r\n" % len(body) + body + b"\r\n" if body else b"") + b"0\r\n\r\n"
        else:
            headers.append(("Content-Length", str(len(body))))
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers)
        return f"{method} {path} HTTP/1.1\r\n{lines}\r\n".encode("latin-1", "replace") + body

    def _text(self) -> str:
        return self._random.choice(TEXTS).replace("\t", "%09")

    def _body(self) -> tuple[bytes, str]:
        rng = self._random
        kind = rng.choice(["json", "json", "form", "form", "urlencoded", "noise"])
        values = {name: rng.choice(VALUES) for name in rng.sample(FIELDS, rng.randrange(8))}
        values |= dict.fromkeys(rng.sample(["prompt", "input"], rng.randrange(3)), rng.choice(PROMPTS))
        if kind == "json":
            return self._damaged(json.dumps(values).encode()), "application/json"
        if kind == "form":
            parts = [_part(name, str(value).encode("utf-8", "replace")) for name, value in values.items()]
            parts += [_part(name, self._damaged(WAV), is_file=True) for name in ("audio", "audio_file")]
            body = b"".join(rng.sample(parts, len(parts))) + b"--B--\r\n"
            return self._damaged(body), "multipart/form-data; boundary=B"
        if kind == "urlencoded":
            return str(httpx.QueryParams({name: str(value) for name, value in values.items()})).encode(), (
                "application/x-www-form-urlencoded"
            )
        types = ["application/json", "multipart/form-data; boundary=B", "application/x-www-form-urlencoded"]
        return rng.randbytes(rng.randrange(2000)), rng.choice(types)

    def _damaged(self, data: bytes) -> bytes:
        rng = self._random
        if rng.random() < 0.8:
            return data
        damaged = bytearray(data[: rng.randrange(1, len(data) + 1)] if rng.random() < 0.5 else data)
        for _ in range(5):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        return bytes(damaged)


def _part(name: str, value: bytes, *, is_file: bool = False) -> bytes:
    disposition = f'form-data; name="{name}"' + ('; filename="a.wav"' if is_file else "")
    return f"--B\r\nContent-Disposition: {disposition}\r\n\r\n".encode() + value + b"\r\n"


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FastAPI]:
    """One application for all tests; it lives as long as they do, not as long as a server of theirs."""
    riffs = tmp_path_factory.mktemp("riffs")
    for name in ("f_110bpm_3.wav", "gsharp_80bpm_4.wav"):
        (riffs / name).write_bytes(make_audio_file(duration_s=1.0))
    settings = Settings(
        output_dir=str(tmp_path_factory.mktemp("outputs")), dialects=DialectSettings(riff_dir=str(riffs))
    )
    app = create_app(ToneBackend(), settings)
    yield app

    async def close() -> None:
        async with app.router.lifespan_context(app):
            pass

    asyncio.run(close())


async def send(port: int, request: bytes) -> tuple[int, bytes]:
    """Status and everything that came back, of a stream only its beginning."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request)
        await writer.drain()
        head = await reader.readuntil(b"\r\n\r\n")
        body = b"" if b"text/event-stream" in head else await reader.read(2_000_000)
    finally:
        writer.transport.abort()
    return int(head.split()[1]), head + body


@pytest.mark.parametrize("seed", range(4))
async def test_junk_is_answered_in_json_and_never_with_a_failure_of_ours(app: FastAPI, seed: int) -> None:
    paths = [(path, [method.upper() for method in methods]) for path, methods in app.openapi()["paths"].items()]
    paths.append(("/api/fal/proxy", ["GET", "POST", "PUT"]))
    junk = Junk(seed, paths)
    with structlog.testing.capture_logs() as lines:
        async with listening(app, lifespan="off") as port:
            for _ in range(250):
                request = junk.request()
                async with asyncio.timeout(PATIENCE_S):
                    status, answer = await send(port, request)
                assert status < 500 or status == 503, (request[:2000], answer[:500])
                if status >= 400 and b"Invalid HTTP request" not in answer:  # that is uvicorn's, of no request at all
                    assert b"content-type: application/json" in answer.lower(), (request[:2000], answer[:500])
    assert not [line for line in lines if line["log_level"] == "error"]


@pytest.mark.parametrize(
    "raw", [b"", b"\r\n", b"\x16\x03\x01" * 100, b"GET / HTTP/9.9\r\n\r\n", b"A" * 70_000, b"\x00"]
)
async def test_bytes_that_are_no_http_end_the_connection_and_nothing_else(app: FastAPI, raw: bytes) -> None:
    async with listening(app, lifespan="off") as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(raw)
        writer.write_eof()
        async with asyncio.timeout(PATIENCE_S):
            await reader.read()
        writer.close()
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE_S) as client:
            assert (await client.get("/health")).status_code == 200


@pytest.mark.parametrize(
    ("key", "status"), [("GSHARP", 200), ("g\u017fharp", 400), ("\uff46", 400), ("f\x00", 400), ("f\r\nx: y", 400)]
)
async def test_a_riff_key_in_other_letters_is_no_key(app: FastAPI, key: str, status: int) -> None:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
        reply = await client.post("/generate/loop-with-riff", data={"prompt": "x 120bpm", "key": key})
    assert reply.status_code == status, reply.text
    assert "x" not in reply.headers


def test_only_plain_ascii_names_a_download() -> None:
    from stable_audio_serve.api.answers import attachment

    header = attachment('a"\\\r\nX-Evil: 1;\u017f\x00.wav')["Content-Disposition"]
    assert header == 'attachment; filename="a____X-Evil: 1;__.wav"'
