"""Clips are recreated from their recipes byte for byte, by a real engine with a tiny model."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import zipfile
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from pathlib import Path
from random import Random
from typing import Any

import httpx
import pytest
import pytest_asyncio
import soundfile

from stable_audio_serve.api.app import create_app
from stable_audio_serve.api.compat.stable_audio_open_small import windowed_model
from stable_audio_serve.audio.embedded_text import extract
from stable_audio_serve.cli.sound_files import read_recipe
from stable_audio_serve.core.keys import hash_key
from stable_audio_serve.core.settings import Settings
from stable_audio_serve.jobs.open import open_queue
from stable_audio_serve.jobs.runner.runner import JobRunner
from stable_audio_serve.serving.engines import load_named_engine
from stable_audio_serve.serving.local import LocalBackend
from stable_audio_serve.serving.placement import plan_deployments
from tests.api.compat import test_aiml, test_fal_queue
from tests.api.compat.serving import make_client
from tests.api.test_jobs import submit, wait
from tests.audio_files import make_audio_file, pcm_of
from tests.backends import ToneBackend
from tests.goldens import OPEN_GOLDENS, SA3_GOLDENS

pytestmark = pytest.mark.server

TINY = str(SA3_GOLDENS / "tiny-s")
REPLAY = "/v1/audio/replay"
TAKES = int(os.environ.get("SOAK_TAKES", "50"))
Form = dict[str, Any]


@asynccontextmanager
async def serve_model(name: str, path: str, *, output_dir: Path) -> AsyncIterator[httpx.AsyncClient]:
    """Yield a client of a server with one real model. The server returns recipes in all dialects."""
    settings = Settings.model_validate(
        {
            # Several threads are slower on a busy machine.
            "models": [{"name": name, "path": path, "threads": 1, "engine": {"warmup_budget_s": 0}}],
            "output_dir": str(output_dir),
            "dialects": {"recipes": True},
        }
    )
    plan = plan_deployments(settings)
    engines = {model.name: load_named_engine(settings, model) for model in settings.models}
    async with LocalBackend(plan.catalog, engines) as backend:
        jobs = open_queue(settings)
        runner = JobRunner(jobs.store, jobs.artifacts, backend=backend, settings=settings)
        await runner.start()
        jobs.wake = runner.wake
        app = create_app(backend, settings, jobs=jobs)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(windowed_model, "WINDOW_S", 3.0)
                yield client
        await runner.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def real(shared: object, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[httpx.AsyncClient]:
    # `shared` is built first, because it would keep the shorter window that `serve_model` sets for the time being.
    async with serve_model("tiny", TINY, output_dir=tmp_path_factory.mktemp("outputs")) as client:
        yield client


in_module_loop = pytest.mark.asyncio(loop_scope="module")  # for tests with the fixture `real`, which uses this loop


def recipes_of(reply: httpx.Response) -> list[dict[str, Any]]:
    assert reply.status_code == 200, reply.text
    return json.loads(f"[{reply.headers['x-recipe']}]")


@in_module_loop
@pytest.mark.slow
async def test_text_to_audio_is_recreated_exactly(real: httpx.AsyncClient) -> None:
    original = await real.post("/v1/audio/generations", json={"prompt": "wind", "duration": 1, "steps": 2})
    (recipe,) = recipes_of(original)
    again = await real.post(REPLAY, json=recipe)
    assert (again.status_code, again.headers["x-replay"]) == (200, "exact")
    assert again.content == original.content
    assert again.headers["x-recipe"] == original.headers["x-recipe"]


@in_module_loop
async def test_long_piece_is_recreated_exactly(real: httpx.AsyncClient) -> None:
    sections = [{"duration": 1}, {"duration": 1.5, "prompt": "hail"}, {"duration": 1}]
    finishing = {"loudness": {"target_lufs": -20}, "fade_in_s": 0.5, "response_format": "flac", "peaks": "clip"}
    fields = {"duration": 3.5, "sections": sections, "overlap_s": 0.5, "steps": 2, **finishing}
    original = await wait(real, await submit(real, **fields))
    (recipe,) = original["recipes"]
    assert recipe["peaks"] == "clip"
    ticket = await real.post(REPLAY, json=recipe)
    assert ticket.status_code == 202, ticket.text
    again = await wait(real, ticket.json())
    assert (again["replay"], again["recipes"]) == ("exact", [recipe])
    first, second = [(await real.get(job["download_url"])).content for job in (original, again)]
    assert first == second
    for change, field in (({"duration": 1000.0}, "duration"), ({"fade_in_s": 3.0, "fade_out_s": 3.0}, "fade")):
        refused = await real.post(REPLAY, json=recipe | change)
        assert (refused.status_code, field in refused.text) == (422, True), change


async def test_replay_of_a_long_piece_needs_a_key_for_jobs(tmp_path: Path) -> None:
    recipe = await _long_recipe()
    (tmp_path / "keys").write_text(f"a:{hash_key('a')} scope=generate\n")
    (tmp_path / "keys").chmod(0o600)
    async with make_client(api={"key_file": str(tmp_path / "keys")}) as (client, _):
        reply = await client.post(REPLAY, json=recipe, headers={"authorization": "Bearer a"})
        assert (reply.status_code, "scope jobs" in reply.json()["detail"]) == (403, True)


async def _long_recipe() -> dict[str, Any]:
    async with make_client() as (client, _):
        job = await wait(client, await submit(client, duration=2, sections=[{"duration": 1}, {"duration": 1}]))
        (recipe,) = job["recipes"]
        return dict(recipe)


@in_module_loop
async def test_recipe_contains_the_models_defaults(real: httpx.AsyncClient) -> None:
    """The recipe must recreate the clip even in a later version that has other defaults."""
    body = {"prompt": "wind", "duration": 1, "seed": 7, "negative_prompt": "hiss"}
    (recipe,) = recipes_of(original := await real.post("/v1/audio/generations", json=body))
    left = {name: recipe[name] for name in ("steps", "cfg_scale", "apg_scale", "duration_padding_sec")}
    explicit = body | left | {"sampler_kwargs": {"sampler_type": recipe["sampler"]}}
    again = await real.post("/v1/audio/generations", json=explicit)
    assert again.headers["x-recipe"] == original.headers["x-recipe"]
    assert again.content == original.content


@in_module_loop
@pytest.mark.parametrize(
    "encoding",
    [
        {"response_format": "wav"},
        {"response_format": "flac", "bit_depth": 24},
        {"response_format": "wav", "bit_depth": "float", "sample_rate": 48_000},
        {"response_format": "mp3"},
        {"response_format": "mp3", "bitrate": 32},
        {"response_format": "ogg", "bitrate": 96, "sample_rate": 32_000},
        {"response_format": "opus", "bitrate": 64},
    ],
)
async def test_file_alone_is_enough(real: httpx.AsyncClient, encoding: dict[str, Any]) -> None:
    body = {"prompt": "wind", "duration": 1, "steps": 2, **encoding}
    original = await real.post("/v1/audio/generations", json=body)
    again = await real.post(REPLAY, files={"file": original.content})
    assert (again.status_code, again.headers["x-replay"]) == (200, "exact")
    assert again.content == original.content


@in_module_loop
@pytest.mark.parametrize("name", ["pcm", "ulaw"])
async def test_files_without_a_recipe_are_recreated_from_it(real: httpx.AsyncClient, name: str) -> None:
    body = {"prompt": "wind", "duration": 1, "steps": 2, "response_format": name, "sample_rate": 8000}
    original = await real.post("/v1/audio/generations", json=body)
    (recipe,) = recipes_of(original)
    again = await real.post(REPLAY, json=recipe)
    assert (again.headers["x-replay"], again.content) == ("exact", original.content)
    refused = await real.post(REPLAY, json=recipe | {"bitrate": 64})
    assert (refused.status_code, refused.json()["detail"][0]["loc"][-1]) == (422, "bitrate")


@in_module_loop
async def test_each_variation_of_a_source_has_its_own_recipe(real: httpx.AsyncClient) -> None:
    source = make_audio_file(duration_s=1.0)
    form = {"prompt": "wind", "duration": "1", "steps": "2", "batch_size": "2", "manifest": "true"}
    original = await real.post("/v1/audio/variations", data=form, files={"audio": source})
    archive = zipfile.ZipFile(io.BytesIO(original.content))
    recipes = recipes_of(original)
    assert json.loads(archive.read("manifest.json"))["files"][1]["recipe"] == recipes[1]
    assert recipes[0]["init_audio"] == {"sha256": hashlib.sha256(source).hexdigest()}
    for name, recipe in zip(archive.namelist()[:2], recipes, strict=True):
        files = [("audio", ("other", b"other")), ("audio", ("source", source))]
        again = await real.post(REPLAY, data={"recipe": json.dumps(recipe)}, files=files)
        assert again.headers["x-replay"] == "exact"
        assert again.content == archive.read(name)


SOURCE = make_audio_file(duration_s=1.5)
FORMATS = ["wav", "flac", "mp3", "ogg", "opus"]


KINDS = ("text", "variation", "inpaint", "continue", "loop", "styled loop", "small")


def draw_request(random: Random, kind: str) -> tuple[str, Form, dict[str, bytes] | None]:
    """Returns a random request of this kind: path, fields, and the uploaded file or None."""
    if kind in {"loop", "styled loop", "small"}:
        tempo, bars = random.choice([90, 120, 140]), random.choice([1, 2])
        form: Form = {"prompt": f"beat {tempo}bpm", "steps": random.randint(1, 3), "cfg_scale": random.choice([1, 6])}
        if kind == "small":
            return "/saos/generate", form | {"seconds_total": random.randint(1, 3)}, None
        form |= {"bars": bars, "loop_type": random.choice(["auto", "drums", "instruments"])}
        return "/saos/generate/loop", form, {"audio_file": SOURCE} if kind == "styled loop" else None
    form = {
        "prompt": random.choice(["wind", "Wellen \N{WATER WAVE}", "a\nbell"]),
        "duration": round(random.uniform(0.2, 1.2), random.randint(0, 6)) or 1.0,
        "steps": random.randint(1, 4),
        "response_format": random.choice(FORMATS),
        "peaks": random.choice(["limit", "scale", "clip"]),
        "seed": random.choice([-1, 7, 2**63 - 1]),
    }
    more: Form = {
        "cfg_scale": round(random.uniform(0, 9), 2),
        "negative_prompt": "hiss",
        "apg_scale": random.choice([0.0, 0.5]),
        "duration_padding_sec": random.choice([0, 1.5]),
        "chunked_decode": random.choice([True, False]),
        "sampler_kwargs": {"sampler_type": random.choice(["euler", "dpmpp", "pingpong", "rk4"]), "scale_phi": 0.3},
    }
    form |= {name: value for name, value in more.items() if random.random() < 0.4}
    if kind == "text":
        return "/v1/audio/generations", form, None
    if kind == "variation":
        form |= {"init_noise_level": round(random.uniform(0.1, 1), 3)}
        form |= random.choice([{}, {"edit_schedule": "reference"}])
        return "/v1/audio/variations", form, {"audio": SOURCE}
    start = 0.1 if kind == "inpaint" else 1.5
    form |= {"duration": 2.0, "inpaint_start_seconds": start, "inpaint_end_seconds": round(random.uniform(1.6, 2), 3)}
    form |= random.choice([{}, {"keep": "model"}])
    return "/v1/audio/inpaint", form, {"audio": SOURCE}


@in_module_loop
@pytest.mark.parametrize("num_takes", [len(KINDS), pytest.param(TAKES, marks=pytest.mark.slow)])
async def test_clips_of_all_kinds_are_recreated_exactly(real: httpx.AsyncClient, num_takes: int) -> None:
    random = Random(20)
    paths = Counter[str]()
    for number in range(num_takes):
        path, form, files = draw_request(random, KINDS[number % len(KINDS)])
        paths[path] += 1
        if files is None:
            original = await real.post(path, json=form)
        else:
            data = {name: value if isinstance(value, str) else json.dumps(value) for name, value in form.items()}
            original = await real.post(path, data=data, files=files)
        (recipe,) = recipes_of(original)
        assert json.loads(extract(io.BytesIO(original.content)) or "") == recipe
        given = {"file": original.content} if random.random() < 0.5 else {"recipe": json.dumps(recipe).encode()}
        sent = [*given.items(), *([("audio", SOURCE)] if files else [])]
        again = await real.post(REPLAY, files=sent)
        assert again.headers.get("x-replay") == "exact", (form, again.text[:500])
        assert again.content == original.content, recipe
    assert len(paths) == 5


def open_requests(sampler: str, **levels: float) -> list[tuple[str, Form]]:
    """Returns a request (path and fields) of each kind for a Stable Audio Open model."""
    chosen: Form = {"sampler_kwargs": {"sampler_type": sampler} | levels}
    text = {"prompt": "a bell", "duration": 2, "steps": 2}
    return [
        ("/v1/audio/generations", text),
        ("/v1/audio/generations", text | chosen),
        ("/v1/audio/variations", text | {"init_noise_level": 0.4}),
        ("/v1/audio/variations", text | {"init_noise_level": 0.4} | chosen),
        ("/v1/audio/inpaint", text | {"inpaint_start_seconds": 1, "inpaint_end_seconds": 1.5} | chosen),
        ("/saos/generate", {"prompt": "a bell", "steps": 2, "seconds_total": 2, "seconds_start": 1.5}),
        ("/saos/generate", {"prompt": "a bell", "steps": 2, "seconds_total": 2, "seconds_start": 1e9}),
    ]


@pytest.mark.parametrize(
    ("name", "requests"),
    [
        ("tiny-1.0", open_requests("dpmpp-2m", sigma_min=0.05, sigma_max=90, rho=2)[2:5]),
        ("tiny-small", open_requests("euler", sigma_max=0.9)),
    ],
)
@pytest.mark.slow
async def test_stable_audio_open_clips_are_recreated_exactly(
    name: str, requests: list[tuple[str, Form]], tmp_path: Path
) -> None:
    async with serve_model(name, str(OPEN_GOLDENS / name), output_dir=tmp_path) as client:
        for path, form in requests:
            data = {key: value if isinstance(value, str) else json.dumps(value) for key, value in form.items()}
            is_edit = path.endswith(("variations", "inpaint"))
            original = await client.post(
                path, **({"data": data, "files": {"audio": SOURCE}} if is_edit else {"json": form})
            )
            (recipe,) = recipes_of(original)
            again = await client.post(REPLAY, data={"recipe": json.dumps(recipe)}, files={"audio": SOURCE})
            assert again.headers.get("x-replay") == "exact", (form, again.text[:500])
            assert again.content == original.content, recipe
            assert recipes_of(again) == [recipe]


@in_module_loop
async def test_invalid_recipes_are_refused(real: httpx.AsyncClient) -> None:
    (recipe,) = recipes_of(await real.post("/v1/audio/generations", json={"prompt": "a", "duration": 1, "steps": 1}))
    text = json.dumps(recipe)
    sha256 = "0" * 64
    for bad, field in (
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"seed": "7"}, "seed"),
        ({"seed": True}, "seed"),
        ({"duration": 0}, "duration"),
        ({"duration": 1e6}, "duration"),
        ({"steps": 1001}, "steps"),
        ({"sampler": "ddim"}, "sampler"),
        ({"prompt": "x" * 100_001}, "prompt"),
        ({"response_format": "mp5"}, "response_format"),
        ({"init_noise_level": 0.5}, "recipe"),
        ({"init_audio": {"sha256": sha256}}, "recipe"),
        ({"init_audio": {"sha256": "../../etc"}, "init_noise_level": 1.0}, "sha256"),
        ({"inpaint_audio": {"sha256": sha256}, "inpaint_regions": [[0.0, 5.0]]}, "inpaint_regions"),
        ({"inpaint_audio": {"sha256": sha256}, "inpaint_regions": [[1.0, 0.5]]}, "recipe"),
        ({"inpaint_audio": {"sha256": sha256}, "inpaint_regions": [[0.0, 0.5]] * 10_000}, "inpaint_regions"),
        ({"keep": "source"}, "recipe"),
        ({"keep": "all"}, "keep"),
        ({"peaks": "full", "response_format": "mp3"}, "recipe"),
        ({"samples": 5}, "recipe"),
        ({"made_on": recipe["made_on"] | {"host": "x"}}, "host"),
        ({f"key{number}": 1 for number in range(10_000)}, "recipe"),
        ({"x" * 500_000: 1}, "x" * 200),
    ):
        reply = await real.post(REPLAY, json=recipe | bad)
        assert reply.status_code == 422, (bad, reply.text[:300])
        assert len(reply.content) < 10_000
        assert field in {part for fault in reply.json()["detail"] for part in fault["loc"]}, reply.text[:300]
    for junk in (
        b"",
        b"[]",
        b"null",
        b"{",
        b"[" * 100_000,
        text.replace("1.0", "NaN").encode(),
        b"\xff" + text.encode(),
    ):
        assert (await real.post(REPLAY, content=junk)).status_code == 422
    for files in (
        {"file": b""},
        {"file": b"RIFF"},
        {"file": SOURCE},
        {"audio": SOURCE},
        {"recipe": b"x" * 1_100_000},
        [("recipe", text.encode()), ("recipe", text.encode())],
    ):
        reply = await real.post(REPLAY, files=files)
        assert reply.status_code in {400, 422}, reply.text
    assert (await real.post(REPLAY, json=recipe)).headers["x-replay"] == "exact"


async def test_recipe_may_start_with_a_byte_order_mark(client: httpx.AsyncClient) -> None:
    original = await client.post("/v1/audio/generations", json={"prompt": "a", "duration": 1})
    marked = f"\ufeff{original.headers['x-recipe']}".encode()
    for again in (await client.post(REPLAY, content=marked), await client.post(REPLAY, files={"recipe": marked})):
        assert again.content == original.content
    assert read_recipe(marked) == recipes_of(original)[0]


async def test_refusals_of_recipes_are_plain(client: httpx.AsyncClient) -> None:
    (recipe,) = recipes_of(await client.post("/v1/audio/generations", json={"prompt": "a", "duration": 1}))
    (fault,) = (await client.post(REPLAY, content=b"{")).json()["detail"]
    assert fault["msg"] == "Invalid JSON: EOF while parsing an object at line 1 column 1"
    reply = await client.post(REPLAY, json=recipe | {"loras": [{"name": "a", "strength": 1}] * 65})
    (fault,) = reply.json()["detail"]
    assert fault["msg"] == "List should have at most 64 items after validation, not 65"


async def test_recipe_with_many_errors_is_refused_with_one(client: httpx.AsyncClient) -> None:
    """A recipe of 1 MB could contain 600,000 errors. Listing all of them would block the event loop."""
    (recipe,) = recipes_of(await client.post("/v1/audio/generations", json={"prompt": "a", "duration": 1}))
    keys = dict.fromkeys(map(str, range(5_000)), 1)
    for bad, field in (
        (keys, "recipe"),
        ({"made_on": recipe["made_on"] | keys}, "recipe"),
        ({"loras": [{"name": "a", "strength": 1} | keys]}, "recipe"),
        ({"sections": [dict(list(keys.items())[:50])] * 100, "overlap": 1}, "recipe"),
        ({"inpaint_regions": [[]] * 20_000}, "inpaint_regions"),
        ({"prompt": [1] * 20_000}, "prompt"),
    ):
        reply = await client.post(REPLAY, json=recipe | bad)
        (fault,) = reply.json()["detail"]
        assert (reply.status_code, fault["loc"][-1], fault["input"]) == (422, field, None)
    reply = await client.post(REPLAY, json=recipe | dict.fromkeys(map(str, range(40_000)), 1))
    assert reply.status_code == 422
    assert reply.json()["detail"][0]["msg"] == "recipe: more than 30000 lists, objects and commas"


@in_module_loop
async def test_replay_on_another_device_is_close(real: httpx.AsyncClient) -> None:
    (recipe,) = recipes_of(await real.post("/v1/audio/generations", json={"prompt": "a", "duration": 1, "steps": 1}))
    assert recipe["made_on"]["transformers"] == version("transformers")
    other = {"device": "cuda", "dtype": "float16", "mode": "fast", "version": "0", "torch": "2.0", "processor": "AVX2"}
    other |= {"transformers": "4.0"}
    for name, value in (other | {"threads": 3, "decode_precision": "tf32", "is_compiled": True}).items():
        reply = await real.post(REPLAY, json=recipe | {"made_on": recipe["made_on"] | {name: value}})
        assert (reply.status_code, reply.headers["x-replay"]) == (200, "close"), name
    del recipe["checkpoint"]
    assert (await real.post(REPLAY, json=recipe)).headers["x-replay"] == "close"


@in_module_loop
async def test_recipe_names_the_libraries_that_matter(real: httpx.AsyncClient) -> None:
    """Different versions of libsndfile write different FLAC files and decode MP3 files differently."""
    body = {"prompt": "a", "duration": 1, "steps": 1}
    (plain,) = recipes_of(await real.post("/v1/audio/generations", json=body))
    (flac,) = recipes_of(await real.post("/v1/audio/generations", json=body | {"response_format": "flac"}))
    form = {name: str(value) for name, value in body.items()}
    (varied,) = recipes_of(await real.post("/v1/audio/variations", data=form, files={"audio": SOURCE}))
    assert "codecs" not in plain["made_on"]
    for recipe in (flac, varied):
        assert f"libsndfile {soundfile.__libsndfile_version__}" in recipe["made_on"]["codecs"]
        for codecs, verdict in ((recipe["made_on"]["codecs"], "exact"), ("libsndfile 1.0", "close")):
            sent = json.dumps(recipe | {"made_on": recipe["made_on"] | {"codecs": codecs}})
            again = await real.post(REPLAY, data={"recipe": sent}, files={"audio": SOURCE})
            assert again.headers["x-replay"] == verdict


@in_module_loop
async def test_unrepeatable_request_is_refused_by_name(real: httpx.AsyncClient) -> None:
    source = make_audio_file(duration_s=1.0)
    form = {"prompt": "wind", "duration": "1", "steps": "2", "inpaint_start_seconds": "0.5", "inpaint_end_seconds": "1"}
    (recipe,) = recipes_of(await real.post("/v1/audio/inpaint", data=form, files={"audio": source}))
    sha256 = hashlib.sha256(source).hexdigest()
    for change, field, message in (
        ({"checkpoint": "0" * 64}, "checkpoint", recipe["checkpoint"]),
        ({"model": "gpt"}, "model", "gpt"),
        ({"recipe": 2}, "recipe", "1"),
        ({"tempo": 120}, "tempo", "Extra"),
        ({}, "audio", sha256),
    ):
        files = {"audio": source} if change else {"audio": b"other"}
        reply = await real.post(REPLAY, data={"recipe": json.dumps(recipe | change)}, files=files)
        (fault,) = reply.json()["detail"]
        assert (reply.status_code, fault["loc"][-1]) == (422, field)
        assert message in fault["msg"]


async def test_long_prompt_is_left_out_of_the_header_only(client: httpx.AsyncClient) -> None:
    for prompt, is_whole in (("x" * 3000, True), ("x" * 4000, False), ("雨" * 700, False)):
        reply = await client.post("/v1/audio/generations", json={"prompt": prompt, "duration": 1})
        assert len(reply.headers["x-recipe"]) <= 4096
        (recipe,) = recipes_of(reply)
        inside = read_recipe(reply.content)
        assert inside["prompt"] == prompt
        left = inside if is_whole else {**inside, "left_out": ["prompt"]}
        assert recipe == {name: value for name, value in left.items() if is_whole or name != "prompt"}
        refused = await client.post(REPLAY, json=recipe)
        assert refused.status_code == (200 if is_whole else 422)


@in_module_loop
async def test_model_reports_how_much_of_a_prompt_it_reads(real: httpx.AsyncClient) -> None:
    body = {"prompt": "warm analog pad, slow attack " * 400, "duration": 1, "steps": 1}
    original = await real.post("/v1/audio/generations", json=body)
    (chars,) = re.findall(r"prompt: the model reads the first (\d+) characters only", original.headers["warning"])
    cut = await real.post("/v1/audio/generations", json={**body, "prompt": body["prompt"][: int(chars)], "seed": 7})
    assert "warning" not in cut.headers
    assert pcm_of(cut.content) == pcm_of((await real.post("/v1/audio/generations", json={**body, "seed": 7})).content)


async def test_job_audio_has_recipes(client: httpx.AsyncClient, runner: JobRunner) -> None:
    for number in (1, 2):
        job = await wait(client, await submit(client, prompt="rain", batch_size=number))
        audio = await client.get(job["download_url"])
        assert recipes_of(audio) == job["recipes"]
        assert (await client.head(job["download_url"])).headers["x-recipe"] == audio.headers["x-recipe"]
    long = await wait(client, await submit(client, prompt="x" * 4000))
    (recipe,) = recipes_of(await client.get(long["download_url"]))
    assert recipe["left_out"] == ["prompt"]


@pytest.mark.parametrize("is_configured", [False, True])
async def test_hosted_dialects_have_recipes_if_configured(is_configured: bool) -> None:
    body = {"model": "stable-audio", "prompt": "rain", "seconds_total": 1, "steps": 2}
    fal, aiml = "/fal-ai/stable-audio", "/v2/generate/audio"
    async with make_client(dialects={"recipes": is_configured}) as (client, _):
        outputs = [(await client.post(fal, json=body)).json()]
        ticket = (await client.post(f"/queue{fal}", json=body)).json()
        await test_fal_queue.wait_for(client, ticket, "COMPLETED")
        outputs.append((await client.get(ticket["response_url"])).json())
        generation_id = (await client.post(aiml, json=body)).json()["id"]
        outputs.append(await test_aiml.poll_until(client, generation_id, "completed"))
        for output in outputs:
            file = (await client.get(output["audio_file"]["url"])).content
            text = extract(io.BytesIO(file))
            assert (text is not None) == is_configured
            if text is not None:
                again = await client.post(REPLAY, content=text)
                assert again.content == file


async def test_list_of_jobs_has_no_long_recipes(client: httpx.AsyncClient, runner: JobRunner) -> None:
    """The recipes of each job could add 1 MB of prompts to the list."""
    for prompt, is_there in (("x" * 2048, True), ("x" * 2049, False)):
        job = await wait(client, await submit(client, prompt=prompt, batch_size=2))
        (listed, *_) = (await client.get("/jobs")).json()["jobs"]
        assert [recipe["prompt"] for recipe in job["recipes"]] == [prompt, prompt]
        assert listed == job | {"recipes": job["recipes"] if is_there else None}


async def test_other_dialects_have_no_recipe_by_default(client: httpx.AsyncClient) -> None:
    for path, body in (("/saos/generate", {"prompt": "x", "seconds_total": 1}), ("/v1/audio/generate", {"input": "x"})):
        reply = await client.post(path, json=body)
        assert reply.status_code == 200
        assert "x-recipe" not in reply.headers


async def test_replay_with_unknown_origin_is_close(client: httpx.AsyncClient, backend: ToneBackend) -> None:
    original = await client.post("/v1/audio/generations", json={"prompt": "x", "duration": 1})
    again = await client.post(REPLAY, content=original.headers["x-recipe"])
    assert (again.headers["x-replay"], again.content) == ("close", original.content)
