from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from operator import attrgetter
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_type_hints

import httpx
import numpy as np
import pytest

from stable_audio_serve.api.native import schemas
from stable_audio_serve.api.native.edits import TIME_FIELDS
from stable_audio_serve.client import AsyncClient, Client, Retries
from stable_audio_serve.client.calls import Audio
from stable_audio_serve.client.controls import (
    EditControls,
    GenerateControls,
    InpaintControls,
    JobControls,
    JobEditControls,
    JobInpaintControls,
    LoopControls,
)
from stable_audio_serve.core.errors import InvalidRequestError


@pytest.mark.parametrize(
    ("controls", "body"),
    [
        (GenerateControls, schemas.GenerationBody),
        (EditControls, schemas.VariationForm),
        (InpaintControls, schemas.InpaintForm),
        (JobControls, schemas.JobBody),
        (JobEditControls, schemas.JobVariationForm),
        (JobInpaintControls, schemas.JobInpaintForm),
    ],
)
def test_the_clients_fields_match_the_api(controls: type, body: type[schemas.Controls]) -> None:
    assert set(get_type_hints(controls)) == body.model_fields.keys() - {"prompt", "audio"} - TIME_FIELDS


METHODS = {
    "generate": GenerateControls,
    "vary": EditControls,
    "inpaint": InpaintControls,
    "extend": InpaintControls,
    "loop": LoopControls,
    "jobs.submit": JobControls,
    "jobs.submit_variation": JobEditControls,
    "jobs.submit_inpaint": JobInpaintControls,
}


@pytest.mark.parametrize("kind", [Client, AsyncClient])
@pytest.mark.parametrize("name", METHODS)
def test_methods_have_real_parameters_with_docs(kind: type, name: str) -> None:
    method = attrgetter(name)(kind("http://a"))
    parameters = inspect.signature(method).parameters
    fields = set(get_type_hints(METHODS[name])) - ({"duration"} if name == "extend" else set())
    assert fields <= set(parameters)
    assert all(parameter.kind is not inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    assert all(f"    {field}: " in (inspect.getdoc(method) or "") for field in fields)
    given = {"regions": [(0, 1)]} if "regions" in parameters else {}
    words = ["rain"] if "audio" not in parameters or name == "loop" else [b"RIFF", "rain"]
    with pytest.raises(TypeError, match=r"\w+\(\) got an unexpected keyword argument 'nonsense'"):
        method(*words, **given, nonsense=1)


def test_both_clients_have_the_same_methods() -> None:
    for one, other in ((Client, AsyncClient), (type(Client("http://a").jobs), type(AsyncClient("http://a").jobs))):
        public = [name for name in vars(one) if not name.startswith("_")]
        assert public == [name for name in vars(other) if not name.startswith("_")]
        for name in public:
            mine, twin = inspect.signature(getattr(one, name)), inspect.signature(getattr(other, name))
            assert list(mine.parameters.values()) == list(twin.parameters.values()), name
            assert inspect.getdoc(getattr(one, name)) == inspect.getdoc(getattr(other, name)), name


def test_importing_the_client_loads_no_heavy_package() -> None:
    program = "import sys, stable_audio_serve.client; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    loaded = set(subprocess.check_output([sys.executable, "-c", program], text=True).split())
    assert {"httpx", "httpx_sse"} <= loaded
    assert not loaded & {"torch", "ray", "fastapi", "starlette", "pydantic", "numpy", "soundfile", "sqlalchemy"}


def test_the_environment_sets_server_and_key(monkeypatch: pytest.MonkeyPatch) -> None:
    from stable_audio_serve.client.calls import Connection

    monkeypatch.setenv("STABLE_AUDIO_URL", "https://audio.example.com/sound")
    monkeypatch.setenv("STABLE_AUDIO_API_KEY", "secret")
    connection = Connection.choose(None, None)
    assert str(connection.url("/jobs")) == "https://audio.example.com/sound/jobs"
    assert connection.headers()["Authorization"] == "Bearer secret"
    assert Connection.choose("http://other", "mine").headers()["Authorization"] == "Bearer mine"


@pytest.mark.parametrize("url", ["nowhere", "ftp://a", "http://", "http://[::1", "http://a:99999", "http://xn--"])
def test_an_invalid_url_is_refused_at_once(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"is not (a|the) URL"):
        Client(url)
    monkeypatch.setenv("STABLE_AUDIO_URL", url)
    with pytest.raises(ValueError, match=r" \(STABLE_AUDIO_URL\) is not (a|the) URL"):
        Client()


@pytest.mark.parametrize("make", [Client, AsyncClient])
@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [
        ("all_proxy", "socks5://127.0.0.1:9", "^the proxy set in the environment: .*socks"),
        ("http_proxy", "::::", "^the proxy set in the environment: Invalid port"),
        ("SSL_CERT_FILE", "/nope", "SSL_CERT_FILE"),
    ],
)
def test_unusable_network_variables_are_named(
    make: type, variable: str, value: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "socksio", None)
    monkeypatch.setenv(variable, value)
    with pytest.raises((ValueError, FileNotFoundError), match=reason):
        make("https://a")


@pytest.mark.parametrize("key", ["secret\n", " secret", "sécret", "sec\x00ret"])
def test_an_invalid_key_is_refused_and_not_shown(key: str) -> None:
    with pytest.raises(ValueError, match="API key") as caught:
        Client("http://a", api_key=key)
    assert key.strip() not in str(caught.value)


@pytest.mark.parametrize("key", ["order\n1", "órder", " order"])
def test_an_idempotency_key_that_no_header_may_contain_is_invalid(key: str) -> None:
    with pytest.raises(InvalidRequestError, match="white space") as caught:
        Client("http://a", retries=Retries(most=0)).jobs.submit("rain", idempotency_key=key)
    assert caught.value.field == "idempotency_key"


class Echo(httpx.MockTransport):
    """Refuses each request, and keeps its body."""

    def __init__(self) -> None:
        super().__init__(self.answer)
        self.body = b""

    def answer(self, request: httpx.Request) -> httpx.Response:
        self.body = request.read()
        return httpx.Response(400)


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        (np.int64(7), 7),
        (np.float32(0.5), 0.5),
        (np.bool_(True), True),
        (np.arange(3), [0, 1, 2]),
        ([np.int64(7)], [7]),
        (range(2), [0, 1]),
        (MappingProxyType({"sampler_type": "dpmpp"}), {"sampler_type": "dpmpp"}),
    ],
)
def test_numbers_of_numpy_and_other_containers_are_sent_as_json(given: object, sent: object) -> None:
    echo = Echo()
    client = Client("http://a", http=httpx.Client(transport=echo))
    with pytest.raises(InvalidRequestError, match="400"):
        client.vary(b"RIFF", "rain", seed=given)  # type: ignore[arg-type]
    assert f'name="seed"\r\n\r\n{json.dumps(sent)}\r\n'.encode() in echo.body
    with pytest.raises(InvalidRequestError, match="400"):
        client.generate("rain", seed=given)  # type: ignore[arg-type]
    assert json.loads(echo.body) == {"prompt": "rain", "seed": sent}


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"steps": object()}, "steps must be text, a number, a list or a mapping"),
        ({"steps": b"8"}, "steps must be text, a number, a list or a mapping"),
        ({"seeds": {1, 2}}, "seeds must be text, a number, a list or a mapping"),
        ({"duration": np.float32("nan")}, "duration must be finite"),
        ({"negative_prompt": "caf\udce9"}, "negative_prompt must be text that UTF-8 can encode"),
    ],
)
def test_a_value_that_json_cannot_contain_is_named(given: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidRequestError, match=f"^{reason}$") as caught:
        Client("http://a", retries=Retries(most=0)).generate("rain", **given)
    assert caught.value.field == next(iter(given))


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_bytes_of_any_kind_are_source_audio(kind: Callable[[bytes], Audio]) -> None:
    echo = Echo()
    client = Client("http://a", http=httpx.Client(transport=echo))
    for send in (client.vary, lambda audio, prompt: client.replay({"prompt": prompt}, sources=audio)):
        with pytest.raises(InvalidRequestError, match="400"):
            send(kind(b"RIFF-1"), "rain")
        assert b"\r\n\r\nRIFF-1\r\n" in echo.body


def test_a_file_whose_name_is_not_utf_8_is_sent(tmp_path: Path) -> None:
    echo = Echo()
    source = tmp_path / os.fsdecode(b"caf\xe9.wav")
    source.write_bytes(b"RIFF")
    with pytest.raises(InvalidRequestError, match="400"):
        Client("http://a", http=httpx.Client(transport=echo)).vary(source, "rain")
    assert b'filename="caf?.wav"' in echo.body


class Events(httpx.SyncByteStream):
    """An event stream with two events of a job."""

    is_closed = False

    def __iter__(self) -> Iterator[bytes]:
        for fraction in (0.25, 0.5):
            data = f'{{"stage": "denoise", "fraction": {fraction}, "eta_seconds": null, "queue_position": null}}'
            yield f"event: progress\ndata: {data}\n\n".encode()

    def close(self) -> None:
        self.is_closed = True


async def test_the_client_works_inside_an_event_loop() -> None:
    """A notebook also runs code inside an event loop. Also checks that closing an iterator closes the event stream."""
    stream, headers = Events(), {"content-type": "text/event-stream"}
    transport = httpx.MockTransport(lambda request: httpx.Response(200, headers=headers, stream=stream))
    with Client("http://a", http=httpx.Client(transport=transport)) as client:
        following = client.jobs.follow("0" * 32)
        assert (next(following).fraction, next(following).fraction) == (0.25, 0.5)
        assert not stream.is_closed
        following.close()
        assert stream.is_closed
