"""Requests with adapters, and the methods that list, load and unload adapters, with a fake server."""

from __future__ import annotations

import json
from collections.abc import Callable
from email.parser import BytesParser
from typing import Any

import httpx
import pytest

from stable_audio_serve.client import Adapter, AsyncClient, Client
from stable_audio_serve.core.errors import ForbiddenError, InvalidRequestError, NotFoundError
from tests.client.conftest import IN_ONE_LOOP, QUICK, Caller

pytestmark = IN_ONE_LOOP

MODELS = {
    "data": [
        {
            "id": "medium",
            "aliases": [],
            "description": "",
            "is_default": True,
            "max_duration_s": 380.0,
            "sample_rate_hz": 44100,
            "channels": 2,
            "default_steps": 8,
            "default_cfg_scale": 1.0,
        },
        {"id": "medium:vinyl", "parent": "medium", "root": "a", "type": "dora-rows", "rank": 16, "sha256": "ab"},
    ]
}


class Refusing:
    """A fake server that records requests, and answers each with `answer`."""

    def __init__(self) -> None:
        self.requests: list[httpx.Request] = []
        self.answer = httpx.Response(422, json={"detail": [{"loc": ["body", "loras"], "msg": "refused"}]})

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        return self.answer

    @property
    def fields(self) -> dict[str, Any]:
        """The fields of the last request. If the request is a form, a field that contains JSON is parsed."""
        content_type, content = self.requests[-1].headers["content-type"], self.requests[-1].content
        if content_type == "application/json":
            return json.loads(content)  # type: ignore[no-any-return]
        message = BytesParser().parsebytes(f"Content-Type: {content_type}\r\n\r\n".encode() + content)
        parts = {part.get_param("name", header="content-disposition"): part for part in message.get_payload()}
        texts = {str(name): str(part.get_payload()) for name, part in parts.items()}
        return {name: json.loads(text) if text[:1] in "[{" else text for name, text in texts.items()}


@pytest.fixture
def server() -> Refusing:
    return Refusing()


@pytest.fixture(params=[Client, AsyncClient])
def call(request: pytest.FixtureRequest, server: Refusing) -> Caller:
    make: Callable[..., Any] = httpx.Client if request.param is Client else httpx.AsyncClient
    return Caller(request.param("http://a", retries=QUICK, http=make(transport=httpx.MockTransport(server))))


SOURCE, REGIONS = b"RIFF", [(0.0, 1.0)]
METHODS: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "generate": (["rain"], {}),
    "vary": ([SOURCE, "rain"], {}),
    "inpaint": ([SOURCE, "rain"], {"regions": REGIONS}),
    "extend": ([SOURCE, "rain"], {"extend_after_s": 1.0}),
    "jobs.submit": (["rain"], {}),
    "jobs.submit_variation": ([SOURCE, "rain"], {}),
    "jobs.submit_inpaint": ([SOURCE, "rain"], {"regions": REGIONS}),
}


@pytest.mark.parametrize("name", METHODS)
async def test_adapters_reach_every_route(call: Caller, server: Refusing, name: str) -> None:
    words, given = METHODS[name]
    loras = ["tape", ("vinyl", 0.8), {"name": "bells", "strength": 0.5, "interval": (0.2, 1)}]
    with pytest.raises(InvalidRequestError) as caught:
        await call(name, *words, **given, loras=loras, lora_stacking="summed")
    assert caught.value.field == "loras"
    assert server.fields["lora_stacking"] == "summed"
    assert server.fields["loras"] == [
        {"name": "tape"},
        {"name": "vinyl", "strength": 0.8},
        {"name": "bells", "strength": 0.5, "interval": [0.2, 1]},
    ]


async def test_a_single_name_is_one_adapter(call: Caller, server: Refusing) -> None:
    with pytest.raises(InvalidRequestError):
        await call("generate", "rain", loras="tape")
    assert server.fields["loras"] == [{"name": "tape"}]


async def test_requests_without_adapters_have_no_such_field(call: Caller, server: Refusing) -> None:
    with pytest.raises(InvalidRequestError):
        await call("generate", "rain", loras=None)
    assert server.fields == {"prompt": "rain"}


async def test_adapters_are_listed_apart_from_models(call: Caller, server: Refusing) -> None:
    server.answer = httpx.Response(200, json=MODELS)
    assert [model.name for model in await call("models")] == ["medium"]
    assert await call("list_loras") == (Adapter("vinyl", "medium", "dora-rows", 16, "ab", sent=MODELS["data"][1]),)


async def test_adapter_is_loaded_and_unloaded(call: Caller, server: Refusing) -> None:
    server.answer = httpx.Response(200, text="Success: LoRA adapter 'vinyl' added successfully.")
    assert await call("load_lora", "vinyl", "owner/repository") is None
    assert server.requests[-1].url.path == "/v1/load_lora_adapter"
    assert server.fields == {"lora_name": "vinyl", "lora_path": "owner/repository", "model": None}
    await call("load_lora", "vinyl", "/adapters/vinyl.safetensors", model="medium")
    assert server.fields["model"] == "medium"
    assert await call("unload_lora", "vinyl") is None
    assert server.requests[-1].url.path == "/v1/unload_lora_adapter"
    assert server.fields == {"lora_name": "vinyl", "model": None}
    await call("unload_lora", "vinyl", model="medium")
    assert server.fields["model"] == "medium"


@pytest.mark.parametrize(("status", "error"), [(400, InvalidRequestError), (403, ForbiddenError), (404, NotFoundError)])
async def test_refused_load_raises_its_error(call: Caller, server: Refusing, status: int, error: type) -> None:
    server.answer = httpx.Response(status, json={"detail": "no"})
    with pytest.raises(error):
        await call("load_lora", "vinyl", "missing.safetensors")
