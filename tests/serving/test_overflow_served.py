"""A real Ray Serve whose model runs on a GPU that is only a clock, and on a real CPU replica for what that refuses."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
from ray import serve

from benchmarks.servers.timed import TimedReplica
from stable_audio_serve.core.errors import StableAudioError
from stable_audio_serve.core.generation import DeviceUse, GenerationRequest, GenerationResult
from stable_audio_serve.serving.app import assemble
from tests.patience import PATIENCE_S
from tests.serving.conftest import TINY
from tests.serving.launched import free_port

pytestmark = [pytest.mark.server, pytest.mark.slow]

URL = "/v1/audio/generations"
CLIP = {"prompt": "rain", "duration": 0.5, "steps": 2}
# Half an hour of work for the clock: far above `max_queue_s` for as long as this test can take.
LONG = {"prompt": "rain", "duration": 5, "steps": 1000, "batch_size": 99}
GPU, CPU = ("cuda", "float16"), ("cpu", "float32")
BURST = 12


class FakeGpu(TimedReplica):
    """Says that it is a GPU."""

    async def generate(self, request: GenerationRequest) -> GenerationResult | StableAudioError:
        result = await super().generate(request)
        if isinstance(result, StableAudioError):
            return result
        return replace(result, device=DeviceUse(GPU[0], dtype=GPU[1]))


@pytest.fixture(scope="module")
def base_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder: Path = tmp_path_factory.mktemp("overflow")
    model = {
        "name": "tiny",
        "path": TINY,
        "num_gpus": 1,
        "max_queue_s": 30.0,  # a CPU replica of a busy machine takes the burst, too
        "overflow": "cpu",
        "threads": 1,
        "engine": {"warmup_budget_s": 0.2},
    }
    args = {"models": [model], "output_dir": str(folder), "api": {"max_steps": 1000, "max_batch_size": 99}}
    ray.init("local", num_cpus=2, num_gpus=1, include_dashboard=False, log_to_driver=False)
    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    try:
        serve.run(assemble(args, replica=FakeGpu))
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()


@pytest.fixture
async def client(base_url: str) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=base_url, timeout=PATIENCE_S) as client:
        yield client


def made_on(reply: httpx.Response) -> tuple[str, str]:
    assert reply.status_code == 200, reply.text
    return reply.headers["x-device"], reply.headers["x-dtype"]


async def burst(client: httpx.AsyncClient, **fields: Any) -> list[httpx.Response]:
    return await asyncio.gather(*(client.post(URL, json=CLIP | fields) for _ in range(BURST)))


async def wait_until_full(client: httpx.AsyncClient) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while (await client.post(URL, json=CLIP | {"exact": True})).status_code != 503:  # noqa: ASYNC110
            await asyncio.sleep(0.05)


async def test_a_burst_is_answered_by_cpus_and_what_must_be_exact_is_told_when_to_come_again(
    client: httpx.AsyncClient,
) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while (await client.get("/health")).json()["models"]["tiny"]["overflow"] != "ready":  # noqa: ASYNC110
            await asyncio.sleep(0.1)
    assert [model["id"] for model in (await client.get("/v1/models")).json()["data"]] == ["tiny"]
    assert made_on(await client.post(URL, json=CLIP)) == GPU

    occupying = asyncio.create_task(client.post(URL, json=LONG))
    await wait_until_full(client)
    assert not occupying.done()
    assert Counter(map(made_on, await burst(client))) == {CPU: BURST}
    async with asyncio.timeout(PATIENCE_S):
        while not (model := (await client.get("/v1/status")).json()["models"]["tiny"])["requests_per_minute"]:  # noqa: ASYNC110
            await asyncio.sleep(0.1)
    assert [replica["device"] for replica in model["overflow"]] == ["cpu"]
    for refused in await burst(client, exact=True):
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) >= 60
    late = await client.post(URL, json=LONG | {"deadline_s": 30.0})
    assert late.status_code == 503  # it is not begun to end in a 504

    job = (await client.post("/jobs", json=CLIP)).json()
    occupying.cancel()
    with suppress(asyncio.CancelledError):
        await occupying
    async with asyncio.timeout(PATIENCE_S):
        while (status := (await client.get(f"/jobs/{job['id']}")).json())["status"] != "succeeded":
            assert status["status"] in ("queued", "running")
            await asyncio.sleep(0.1)
    assert (status["device"], status["dtype"]) == GPU  # it waited rather than overflow
    async with asyncio.timeout(PATIENCE_S):  # what a full model said counts for a second
        while (reply := await client.post(URL, json=CLIP | {"exact": True})).status_code == 503:  # noqa: ASYNC110  others make the room
            await asyncio.sleep(0.2)
    assert made_on(reply) == GPU
