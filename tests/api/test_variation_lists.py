"""Prompts and seeds of the variations of one native request."""

from __future__ import annotations

import io
import json
import zipfile
from typing import Any

import httpx
import pytest

from stable_audio_serve.jobs.runner.runner import JobRunner
from tests.api.test_jobs import submit, wait
from tests.audio_files import make_audio_file
from tests.backends import ToneBackend

pytestmark = pytest.mark.usefixtures("low_rate")

URL = "/v1/audio/generations"
ROUTES = (URL, "/v1/audio/variations", "/v1/audio/inpaint", "/jobs", "/jobs/variations", "/jobs/inpaint")
REGION = {"inpaint_start_seconds": 0.1, "inpaint_end_seconds": 0.2}
SOURCE = {"audio": ("a.wav", make_audio_file(duration_s=0.5))}


async def post(client: httpx.AsyncClient, url: str, fields: dict[str, Any]) -> httpx.Response:
    """Post `fields` as JSON, or as a form with source audio, in which lists are JSON text."""
    fields = {"duration": 0.5, **fields}
    if url in {URL, "/jobs"}:
        return await client.post(url, json=fields)
    fields |= REGION if url.endswith("inpaint") else {}
    form = {name: value if isinstance(value, str) else json.dumps(value) for name, value in fields.items()}
    return await client.post(url, data=form, files=SOURCE)


@pytest.mark.parametrize("url", ROUTES[:3])
@pytest.mark.parametrize(
    ("fields", "prompts", "seeds"),
    [
        ({"prompts": ["a", " b "], "seed": 5}, ("a", "b"), (5, 6)),
        ({"prompt": "x", "prompts": ["a", "b"], "seeds": [9, 9], "batch_size": 2}, ("a", "b"), (9, 9)),
        ({"prompt": "x", "seeds": [3, 2**63 + 1, 0]}, ("x", "x", "x"), (3, 1, 0)),
        ({"prompts": ["a"], "seeds": [4], "batch_size": 1}, ("a",), (4,)),
        ({"prompt": "x", "seeds": [4], "prompts": None}, ("x",), (4,)),
        ({"prompt": "x", "seed": 4, "seeds": None, "batch_size": 2}, ("x", "x"), (4, 5)),
    ],
)
async def test_each_variation_has_its_prompt_and_seed(
    client: httpx.AsyncClient,
    backend: ToneBackend,
    url: str,
    fields: dict[str, Any],
    prompts: tuple[str, ...],
    seeds: tuple[int, ...],
) -> None:
    reply = await post(client, url, fields)
    assert reply.status_code == 200, reply.text
    assert (backend.last.prompts, backend.last.seeds, backend.last.batch_size) == (prompts, seeds, len(seeds))
    recipes = json.loads(f"[{reply.headers['x-recipe']}]")
    assert [(recipe["prompt"], recipe["seed"]) for recipe in recipes] == list(zip(prompts, seeds, strict=True))


async def test_each_file_is_that_of_its_own_request(client: httpx.AsyncClient) -> None:
    several = await post(client, URL, {"prompts": ["rain", "wind"], "seeds": [8, 3], "manifest": True})
    with zipfile.ZipFile(io.BytesIO(several.content)) as archive:
        files = [archive.read(name) for name in archive.namelist()]
    assert json.loads(files[2])["prompt"] == ["rain", "wind"]
    for file, prompt, seed in zip(files, ("rain", "wind"), (8, 3), strict=False):
        assert (await post(client, URL, {"prompt": prompt, "seed": seed})).content == file


async def test_a_random_seed_is_drawn_for_each_minus_one(client: httpx.AsyncClient, backend: ToneBackend) -> None:
    await post(client, URL, {"prompt": "x", "seeds": [-1, 7, -1]})
    first, second, third = backend.last.seeds
    assert second == 7
    assert len({first, 7, third}) == 3


async def test_jobs_have_prompts_and_seeds_too(client: httpx.AsyncClient, runner: JobRunner) -> None:
    job = await wait(client, await submit(client, prompts=["rain", "wind"], seeds=[8, 3]))
    assert (job["output_count"], job["seeds"]) == (2, [8, 3])
    assert [(recipe["prompt"], recipe["seed"]) for recipe in job["recipes"]] == [("rain", 8), ("wind", 3)]


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": " "}, "prompt"),
        ({"prompt": "x", "prompts": []}, "prompts"),
        ({"prompts": ["a", ""]}, "prompts"),
        ({"prompts": ["a", None]}, "prompts"),
        ({"prompts": "a"}, "prompts"),
        ({"prompts": {"0": "a"}}, "prompts"),
        ({"prompts": ["a", "b"], "batch_size": 3}, "prompts"),
        ({"prompts": ["a", "b"], "batch_size": 1}, "prompts"),
        ({"prompts": ["a", "b"], "seeds": [1]}, "seeds"),
        ({"prompt": "x", "seeds": []}, "seeds"),
        ({"prompt": "x", "seeds": [1, 2], "batch_size": 3}, "seeds"),
        ({"prompt": "x", "seeds": [1.5]}, "seeds"),
        ({"prompt": "x", "seeds": ["a"]}, "seeds"),
        ({"prompt": "x", "seeds": [None]}, "seeds"),
        ({"prompt": "x", "seeds": 7}, "seeds"),
        ({"prompt": "x", "seeds": [1, 2, 3, 4, 5]}, "seeds"),
        ({"prompts": ["a"] * 100}, "prompts"),
    ],
)
async def test_bad_lists_are_refused_by_name(
    client: httpx.AsyncClient, backend: ToneBackend, fields: dict[str, Any], field: str
) -> None:
    for url in ROUTES:
        if fields.get("prompt", "") is None and url not in {URL, "/jobs"}:
            continue  # a form has no null
        reply = await post(client, url, fields)
        assert reply.status_code == 422, reply.text
        assert any(field in fault["loc"] for fault in reply.json()["detail"]), reply.text
    assert not backend.requests
