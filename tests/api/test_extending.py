"""Requests that extend source audio before its start or after its end. Some also have regions or a noise level, and
some use the real demo model.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import AsyncIterator
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import pytest
import pytest_asyncio
import soundfile

from stable_audio_serve.api.app import create_app
from stable_audio_serve.core.settings import Settings
from stable_audio_serve.jobs.runner.runner import JobRunner
from stable_audio_serve.serving.engines import load_named_engine
from stable_audio_serve.serving.local import LocalBackend
from stable_audio_serve.serving.placement import plan_deployments
from tests.api.test_jobs import wait
from tests.audio_files import make_audio_file
from tests.backends import ToneBackend

ROUTES = ("/v1/audio/inpaint", "/jobs/inpaint")
RATE_HZ, FADE = 44_100, 1323
BASE = {"prompt": "x", "seed": "5"}


async def post(
    client: httpx.AsyncClient, fields: dict[str, Any], *, url: str = ROUTES[0], source: bytes | None = None
) -> httpx.Response:
    file = make_audio_file(duration_s=1.0) if source is None else source
    return await client.post(url, data={**BASE, **fields}, files={"audio": ("a.wav", file)})


@pytest.mark.parametrize(
    ("fields", "duration_s", "start_s", "regions_s"),
    [
        ({"extend_after_s": "3"}, 4, 0, [(1, 4)]),
        ({"extend_before_s": "2"}, 3, 2, [(0, 2)]),
        ({"extend_before_s": "2", "extend_after_s": "3"}, 6, 2, [(0, 2), (3, 6)]),
        ({"extend_before_s": "2", "extend_after_s": "0"}, 3, 2, [(0, 2)]),
        ({"extend_before_s": "0.5", "extend_after_s": "0.5", "duration": "2"}, 2, 0.5, [(0, 0.5), (1.5, 2)]),
        (
            {"extend_before_s": "2", "inpaint_start_seconds": "0.25", "inpaint_end_seconds": "0.5"},
            *(3, 2, [(0, 2), (2.25, 2.5)]),
        ),
        (
            {"extend_after_s": "1", "inpaint_start_seconds": "[0,0.5]", "inpaint_end_seconds": "[0.25,2]"},
            *(2, 0, [(0, 0.25), (0.5, 2), (1, 2)]),
        ),
        (
            {"inpaint_mask_start_seconds": "0", "inpaint_mask_end_seconds": "1", "extend_before_s": "1"},
            2,
            1,
            [(0, 1), (1, 2)],
        ),
        (
            {"inpaint_start_seconds": "0", "inpaint_end_seconds": "1", "extend_before_s": "0", "duration": "1"},
            1,
            0,
            [(0, 1)],
        ),
    ],
)
async def test_times_are_those_of_the_source_and_duration_follows(
    client: httpx.AsyncClient,
    backend: ToneBackend,
    fields: dict[str, Any],
    duration_s: float,
    start_s: float,
    regions_s: list[tuple[float, float]],
) -> None:
    reply = await post(client, fields)
    assert reply.status_code == 200, reply.text
    request = backend.last
    assert (request.duration_s, request.source_start_s) == (duration_s, start_s)
    np.testing.assert_allclose(sorted(request.inpaint_regions_s), sorted(regions_s), atol=1e-9)
    assert request.init_audio is None


async def test_added_audio_has_whole_samples_where_floats_are_slightly_less(
    client: httpx.AsyncClient, backend: ToneBackend
) -> None:
    reply = await post(client, {"extend_before_s": "0.7", "extend_after_s": "0.7"})
    assert reply.status_code == 200, reply.text
    request = backend.last
    lengths = (int(seconds * RATE_HZ) for seconds in (request.source_start_s, request.duration_s))
    assert tuple(lengths) == (30_870, 30_870 + 44_100 + 30_870)


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"extend_before_s": "0"}, ["extend_before_s"]),
        ({"extend_before_s": "0", "extend_after_s": "0"}, ["extend_before_s", "extend_after_s"]),
        ({"extend_after_s": "-1"}, ["extend_after_s"]),
        ({"extend_after_s": "nan"}, ["extend_after_s"]),
        ({"extend_after_s": "long"}, ["extend_after_s"]),
        ({"extend_after_s": "119.5"}, ["extend_after_s"]),
        ({"extend_before_s": "1e300"}, ["extend_before_s"]),
        ({"extend_before_s": "1e308"}, ["extend_before_s"]),  # more samples than a float can count
        ({"extend_before_s": "1e308", "extend_after_s": "1e308"}, ["extend_before_s", "extend_after_s"]),
        ({"extend_before_s": "60", "extend_after_s": "60"}, ["extend_before_s", "extend_after_s"]),
        ({"extend_after_s": "3", "duration": "3"}, ["duration"]),
        ({"extend_after_s": "3", "duration": "5"}, ["duration"]),
        ({"extend_after_s": "1", "init_noise_level": "1.1"}, ["init_noise_level"]),
        ({"extend_after_s": "1", "fade_in_s": "2", "fade_out_s": "1"}, ["fade_out_s"]),
    ],
)
async def test_bad_extensions_are_refused_by_name(
    client: httpx.AsyncClient, backend: ToneBackend, fields: dict[str, Any], names: list[str]
) -> None:
    for url in ROUTES:
        reply = await post(client, fields, url=url)
        assert reply.status_code == 422, reply.text
        assert [fault["loc"][-1] for fault in reply.json()["detail"]] == names
    assert not backend.requests


@pytest.mark.parametrize(
    "fields",
    [
        {"extend_after_s": "1", "inpaint_start_seconds": "0.5"},
        {"extend_after_s": "1", "inpaint_start_seconds": "0.5", "inpaint_end_seconds": "2.1"},
        {"extend_before_s": "1", "inpaint_start_seconds": "-0.5", "inpaint_end_seconds": "1"},
        {},
    ],
)
async def test_bad_times_are_refused_by_name(client: httpx.AsyncClient, fields: dict[str, Any]) -> None:
    for url in ROUTES:
        reply = await post(client, fields, url=url)
        assert reply.status_code == 400, reply.text
        assert "inpaint_" in reply.json()["detail"]


@pytest.mark.parametrize(("level", "starts"), [("0.6", True), ("0", True), ("1", False), (None, False)])
async def test_regions_start_from_the_source_at_a_strength(
    client: httpx.AsyncClient, backend: ToneBackend, level: str | None, starts: bool
) -> None:
    fields = {"inpaint_start_seconds": "0", "inpaint_end_seconds": "0.5", "duration": "1"}
    reply = await post(client, fields | ({} if level is None else {"init_noise_level": level}))
    request = backend.last
    assert (request.init_audio is not None, request.init_noise_level) == (starts, float(level or 1) if starts else 1.0)
    assert (json.loads(reply.headers["x-recipe"]).get("init_noise_level") is not None) == starts


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def real(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[httpx.AsyncClient]:
    """Yield a client of a server with the demo model."""
    settings = Settings.model_validate(
        {
            "models": [{"name": "demo", "threads": 1, "engine": {"warmup_budget_s": 0}}],
            "output_dir": str(tmp_path_factory.mktemp("outputs")),
        }
    )
    plan = plan_deployments(settings)
    engines = {model.name: load_named_engine(settings, model) for model in settings.models}
    async with LocalBackend(plan.catalog, engines) as backend:
        app = create_app(backend, settings)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            yield client


in_module_loop = pytest.mark.asyncio(loop_scope="module")


def read(content: bytes) -> npt.NDArray[np.int16]:
    return soundfile.read(io.BytesIO(content), dtype="int16", always_2d=True)[0]


@in_module_loop
@pytest.mark.parametrize("level", [None, "0.5"])
@pytest.mark.parametrize(("before_s", "after_s"), [(0.3, 0.0), (0.0, 0.4), (0.31234, 0.2777)])
async def test_the_source_is_kept_between_extensions(
    real: httpx.AsyncClient, before_s: float, after_s: float, level: str | None
) -> None:
    file = make_audio_file(duration_s=0.65432)
    source = read(file)
    fields = {"extend_before_s": str(before_s), "extend_after_s": str(after_s), "steps": "2", "peaks": "clip"}
    reply = await post(real, fields | ({} if level is None else {"init_noise_level": level}), source=file)
    assert reply.status_code == 200, reply.text
    audio, start = read(reply.content), int(before_s * RATE_HZ)
    assert len(audio) == start + len(source) + int(after_s * RATE_HZ)
    kept = slice(FADE if before_s else 0, len(source) - (FADE if after_s else 0))
    np.testing.assert_array_equal(audio[start : start + len(source)][kept], source[kept])
    assert np.abs(audio[:start]).max(initial=1) > 0
    recipe = json.loads(reply.headers["x-recipe"])
    assert recipe["inpaint_audio"]["sha256"] == hashlib.sha256(file).hexdigest()
    replay = await real.post("/v1/audio/replay", data={"recipe": json.dumps(recipe)}, files={"audio": ("a.wav", file)})
    assert (replay.content, replay.headers["x-replay"]) == (reply.content, "exact")


@in_module_loop
async def test_an_extension_has_the_audio_of_each_variations_own_request(real: httpx.AsyncClient) -> None:
    fields = {"extend_before_s": "0.2", "extend_after_s": "0.2", "steps": "2", "init_noise_level": "0.7"}
    single = await post(real, {**fields, "prompt": "b", "seed": "9"})
    several = await post(real, {**fields, "prompts": '["a", "b"]', "seeds": "[3, 9]"})
    with zipfile.ZipFile(io.BytesIO(several.content)) as archive:
        files = [archive.read(name) for name in archive.namelist()]
    assert files[1] == single.content
    assert files[0] != single.content


async def test_jobs_extend_too(client: httpx.AsyncClient, backend: ToneBackend, runner: JobRunner) -> None:
    fields = {"extend_before_s": "0.5", "extend_after_s": "1", "init_noise_level": "0.6"}
    ticket = await post(client, fields, url="/jobs/inpaint")
    assert ticket.status_code == 202, ticket.text
    job = await wait(client, ticket.json())
    assert (job["status"], job["duration"]) == ("succeeded", 2.5)
    request = backend.last
    assert (request.source_start_s, request.inpaint_regions_s) == (0.5, ((0.0, 0.5), (1.5, 2.5)))
    assert request.init_audio is request.inpaint_audio is not None
    (recipe,) = job["recipes"]
    assert (recipe["extend_before_s"], recipe["init_noise_level"]) == (0.5, 0.6)
    assert recipe["init_audio"] == recipe["inpaint_audio"]
