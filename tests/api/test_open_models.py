"""Native routes with models that predict v: noise levels become sigmas, and options of flow models are refused."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Iterator

import httpx
import pytest
from fastapi import FastAPI

from stable_audio_serve.core.catalog import V_SAMPLERS, ModelCard, ModelCatalog
from tests.api.compat.serving import connect_anew, keep_app
from tests.audio_files import make_audio_file
from tests.backends import ToneBackend

pytestmark = pytest.mark.server

OPEN = ModelCard("open", "stable-audio-open", max_duration_s=47.0, objective="v", samplers=V_SAMPLERS)
FLOW = ModelCard("flow", "stable-audio-3")
NAMED = ModelCard("stable-audio-open-small", "stable-audio-open")


@pytest.fixture(scope="module")
def kept() -> Iterator[tuple[FastAPI, ToneBackend]]:
    with keep_app(ToneBackend(catalog=ModelCatalog([OPEN, FLOW, NAMED]))) as kept:
        yield kept


@pytest.fixture
async def served(kept: tuple[FastAPI, ToneBackend]) -> AsyncIterator[tuple[httpx.AsyncClient, ToneBackend]]:
    async with connect_anew(kept) as pair:
        yield pair


async def vary(client: httpx.AsyncClient, path: str = "/v1/audio/variations", **fields: object) -> httpx.Response:
    form = {"prompt": "x", "duration": "1", **{name: str(value) for name, value in fields.items()}}
    return await client.post(path, data=form, files={"audio": make_audio_file(duration_s=0.2)})


@pytest.mark.parametrize(("share", "level"), [(0.5, 1.0), (0.25, math.tan(math.pi / 8)), (1, 500.0), (0, 0.01)])
async def test_noise_share_becomes_a_sigma(
    served: tuple[httpx.AsyncClient, ToneBackend], share: float, level: float
) -> None:
    client, backend = served
    assert (await vary(client, init_noise_level=share)).status_code == 200
    assert backend.last.init_noise_level == pytest.approx(level)


async def test_flow_models_and_time_samplers_get_the_share(
    served: tuple[httpx.AsyncClient, ToneBackend],
) -> None:
    client, backend = served
    assert (await vary(client, init_noise_level=0.3, sampler_kwargs='{"sampler_type": "v-ddim"}')).status_code == 200
    assert backend.last.init_noise_level == 0.3
    assert (await vary(client, init_noise_level=0.3, model="flow")).status_code == 200
    assert (backend.last.init_noise_level, backend.last.edit_schedule) == (0.3, None)


async def test_noise_share_above_one_is_refused(served: tuple[httpx.AsyncClient, ToneBackend]) -> None:
    reply = await vary(served[0], init_noise_level=1.5)
    assert reply.status_code == 422
    assert reply.json()["detail"][0]["loc"] == ["body", "init_noise_level"]


@pytest.mark.parametrize("path", ["/v1/audio/variations", "/jobs/variations"])
async def test_edit_schedule_is_refused_except_for_flow_models(
    served: tuple[httpx.AsyncClient, ToneBackend], path: str
) -> None:
    client, backend = served
    for schedule in ("reference", "scaled"):
        assert (await vary(client, model="flow", edit_schedule=schedule)).status_code == 200
        assert backend.last.edit_schedule == schedule
    for fields in ({"model": "open", "edit_schedule": "scaled"}, {"model": "flow", "edit_schedule": "linear"}):
        reply = await vary(client, path, **fields)
        assert reply.status_code == 422
        assert reply.json()["detail"][0]["loc"] == ["body", "edit_schedule"]


async def test_noise_levels_reach_stable_audio_open(served: tuple[httpx.AsyncClient, ToneBackend]) -> None:
    client, backend = served
    options = {"sigma_min": 0.03, "sigma_max": 80, "rho": 2, "sampler_type": "k-heun", "scale_phi": 0.4}
    body = {"prompt": "x", "duration": 1, "sampler_kwargs": options}
    assert (await client.post("/v1/audio/generations", json=body)).status_code == 200
    request = backend.last
    assert (request.sigma_min, request.sigma_max, request.rho, request.sampler) == (0.03, 80.0, 2.0, "k-heun")
    body["model"] = "flow"
    body["sampler_kwargs"] = {"sigma_min": 0.03, "sampler_type": "euler"}
    assert (await client.post("/v1/audio/generations", json=body)).status_code == 200
    assert backend.last.sigma_min is None


@pytest.mark.parametrize("path", ["/v1/audio/generations", "/jobs"])
@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"apg_scale": 1}, "apg_scale"),
        ({"sampler_kwargs": {"cfg_norm_threshold": 2}}, "sampler_kwargs"),
        ({"sampler_kwargs": {"sigma_min": 0}}, "sampler_kwargs"),
        ({"sampler_kwargs": {"sigma_max": 1e9}}, "sampler_kwargs"),
        ({"sampler_kwargs": {"sigma_min": 5, "sigma_max": 5}}, "sampler_kwargs"),
        ({"sampler_kwargs": {"rho": -1}}, "sampler_kwargs"),
        ({"sampler_kwargs": {"sampler_type": "k-dpm-adaptive"}}, "sampler_kwargs"),
        ({"sampler_kwargs": {"sampler_type": "pingpong"}}, "sampler_kwargs"),
    ],
)
async def test_unsupported_option_is_refused_by_name(
    served: tuple[httpx.AsyncClient, ToneBackend], path: str, fields: dict[str, object], field: str
) -> None:
    reply = await served[0].post(path, json={"prompt": "x", "duration": 1, **fields})
    assert reply.status_code == 422, reply.text
    assert reply.json()["detail"][0]["loc"] == ["body", field]


@pytest.mark.parametrize(
    ("model", "name"),
    [("flow", "stable-audio-3-flow.wav"), ("stable-audio-open-small", "stable-audio-open-small.wav")],
)
async def test_files_are_named_after_their_model(
    served: tuple[httpx.AsyncClient, ToneBackend], model: str, name: str
) -> None:
    reply = await served[0].post("/v1/audio/generations", json={"prompt": "x", "duration": 1, "model": model})
    assert reply.headers["content-disposition"].endswith(f'"{name}"')
