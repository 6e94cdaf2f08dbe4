"""Adapters over HTTP: in requests of every dialect, in jobs, recipes and lists; how they are loaded and unloaded."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import httpx
import pytest

from stable_audio_serve.api.app import create_app
from stable_audio_serve.core.keys import SCOPES, hash_key
from stable_audio_serve.core.settings import Settings
from stable_audio_serve.core.settings_models import LoraSettings
from stable_audio_serve.jobs.job import JobRef
from stable_audio_serve.jobs.open import open_queue
from stable_audio_serve.jobs.queue import JobQueue
from stable_audio_serve.jobs.store.loaded_adapters import AdapterStore
from stable_audio_serve.serving.adapters import Library
from stable_audio_serve.serving.placement import plan_deployments
from tests.adapter_files import write_file
from tests.audio_files import make_audio_file
from tests.backends import ToneBackend
from tests.models.adapters.test_damaged import KINDS, damage

pytestmark = pytest.mark.server

BODY = {"prompt": "rain", "duration": 0.1, "steps": 2, "seed": 1}


@dataclass
class Site:
    """A server with the adapters vinyl (dora-rows, rank 4), bells (lora, rank 60) and torn, a damaged file."""

    client: httpx.AsyncClient
    backend: ToneBackend
    library: Library
    jobs: JobQueue
    folder: Path
    hashes: Mapping[str, str]

    async def generate(self, **fields: Any) -> httpx.Response:
        return await self.client.post("/v1/audio/generations", json={**BODY, **fields})

    @property
    def used(self) -> list[tuple[str, float, tuple[float, float], str]]:
        return [(lora.name, lora.strength, lora.interval, lora.sha256) for lora in self.backend.last.loras]


def make_settings(folder: Path, **more: Any) -> Settings:
    model = {"name": "medium", "lora_folder": str(folder / "adapters"), "max_loras": 3}
    scopes = {scope: scope for scope in SCOPES} | {"all": ",".join(SCOPES)}
    (folder / "keys").write_text("\n".join(f"{name}:{hash_key(name)} scope={scope}" for name, scope in scopes.items()))
    api = {"key_file": str(folder / "keys")}
    tree = {"models": [{"name": "small-sfx"}, model], "output_dir": str(folder / "out"), "api": api, **more}
    return Settings.model_validate(tree)


def open_site(folder: Path, settings: Settings) -> Site:
    hashes = {
        "vinyl": write_file(folder / "adapters" / "vinyl.safetensors", kind="dora-rows", rank=4),
        "bells": write_file(folder / "adapters" / "bells.safetensors", rank=60),
    }
    (folder / "adapters" / "torn.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    backend, jobs = ToneBackend(plan_deployments(settings).catalog), open_queue(settings)
    library = Library(settings, backend.catalog, store=AdapterStore(jobs.store.database, "audio"))
    library.start()
    app = create_app(backend, settings, jobs=jobs, adapters=library)
    headers = {"Authorization": "Bearer all"}
    client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost", headers=headers)
    return Site(client, backend, library, jobs, folder, hashes)


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    site = open_site(folder, make_settings(folder))
    yield site
    asyncio.run(site.jobs.close())


@pytest.fixture
def kept(opened: Site) -> Site:
    """Returns a site that tests share. They change no adapters."""
    opened.backend.requests.clear()
    return opened


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    site = open_site(tmp_path, make_settings(tmp_path))
    async with site.client:
        yield site
    await site.jobs.close()


async def test_adapters_reach_the_model_with_hash_and_source(kept: Site) -> None:
    loras = [{"name": "vinyl", "strength": 0.5, "interval": [0.25, 1]}, {"name": "bells", "strength": -1}]
    reply = await kept.generate(model="medium", loras=loras)
    assert reply.status_code == 200
    assert kept.used == [
        ("vinyl", 0.5, (0.25, 1.0), kept.hashes["vinyl"]),
        ("bells", -1.0, (0.0, 1.0), kept.hashes["bells"]),
    ]
    assert kept.backend.last.loras[0].source == str(kept.folder / "adapters" / "vinyl.safetensors")
    assert kept.backend.last.lora_stacking == "chained"
    assert (await kept.generate(model="medium", loras=loras, lora_stacking="summed")).status_code == 200
    assert kept.backend.last.lora_stacking == "summed"


async def test_null_stands_for_an_unset_adapter_field(kept: Site) -> None:
    assert (await kept.generate(model="medium", loras=None, lora_stacking=None)).status_code == 200
    assert kept.used == []
    assert (await kept.generate(model="medium", loras=[{"name": "vinyl", "interval": None}])).status_code == 200
    assert kept.used == [("vinyl", 1.0, (0.0, 1.0), kept.hashes["vinyl"])]


@pytest.mark.parametrize("route", ["variations", "inpaint"])
async def test_forms_take_adapters_as_json_text(kept: Site, route: str) -> None:
    times = {"inpaint_start_seconds": "0", "inpaint_end_seconds": "0.05"} if route == "inpaint" else {}
    data = {"prompt": "rain", "duration": "0.1", "model": "medium", **times}
    files = {"audio": ("a.wav", make_audio_file(duration_s=0.1))}
    loras = json.dumps([{"name": "vinyl", "strength": 0.5}])
    reply = await kept.client.post(f"/v1/audio/{route}", data={**data, "loras": loras}, files=files)
    assert reply.status_code == 200, reply.text
    assert kept.used == [("vinyl", 0.5, (0.0, 1.0), kept.hashes["vinyl"])]
    for text in ("[", "{}", '[{"strength": 1}]', '[{"name": "vinyl", "strength": 7}]'):
        reply = await kept.client.post(f"/v1/audio/{route}", data={**data, "loras": text}, files=files)
        assert reply.status_code == 422
        assert reply.json()["detail"][0]["loc"][:2] == ["body", "loras"]


@pytest.mark.parametrize("name", ["medium:vinyl", "medium:vinyl+bells", "stabilityai/stable-audio-3-medium:vinyl"])
async def test_model_names_may_have_adapters(kept: Site, name: str) -> None:
    reply = await kept.generate(model=name)
    assert reply.status_code == 200, reply.text
    assert reply.headers["x-model"] == "medium"
    wanted = name.rpartition(":")[2].split("+")
    assert kept.used == [(each, 1.0, (0.0, 1.0), kept.hashes[each]) for each in wanted]


async def test_adapters_of_name_and_field_are_joined(kept: Site) -> None:
    assert (await kept.generate(model="medium:vinyl", loras=[{"name": "bells"}])).status_code == 200
    assert [name for name, *_ in kept.used] == ["vinyl", "bells"]


async def test_other_dialects_take_adapters_in_the_name(kept: Site) -> None:
    reply = await kept.client.post("/v1/audio/generate", json={"input": "rain", "model": "medium:vinyl"})
    assert reply.status_code == 200, reply.text
    assert [name for name, *_ in kept.used] == ["vinyl"]
    body = {"prompt": "rain", "model_type": "finetune", "finetune_repo": "medium:bells"}
    reply = await kept.client.post("/saos/generate", json=body)
    assert reply.status_code == 200, reply.text
    assert [name for name, *_ in kept.used] == ["bells"]
    reply = await kept.client.post("/v2/generate/audio", json={"prompt": "rain", "model": "medium:vinyl"})
    assert reply.status_code == 200, reply.text


async def test_unknown_adapter_of_a_name_is_an_unknown_model(kept: Site) -> None:
    for model in ("medium:vinil", "medium:Vinyl", "medium:torn", "small-sfx:vinyl"):
        native = await kept.generate(model=model)
        assert native.status_code == 422
        assert native.json()["detail"][0]["loc"] == ["body", "model"]
        vllm = await kept.client.post("/v1/audio/generate", json={"input": "rain", "model": model})
        assert vllm.status_code == 404
        small = {"prompt": "rain", "model_type": "finetune", "finetune_repo": model}
        saos = await kept.client.post("/saos/generate", json=small)
        assert saos.status_code == 400
        assert saos.json()["error"].startswith("finetune_repo: ")
        aiml = await kept.client.post("/v2/generate/audio", json={"prompt": "rain", "model": model})
        assert aiml.status_code == 400
        assert aiml.json()["meta"][0]["path"] == ["model"]
        assert "stable-audio" not in aiml.json()["message"]  # which is no name of an adapter
        form = {"prompt": "rain", "duration": "1", "model": model}
        for path in ("stable-audio", "stable-audio-2"):
            stability = await kept.client.post(f"/v2beta/audio/{path}/text-to-audio", data=form, files={"none": ""})
            assert stability.status_code == 400
            assert stability.json()["errors"][0].startswith("model: ")
        sound = await kept.client.post("/v1/sound-generation", json={"text": "rain", "model_id": model})
        assert sound.json()["detail"][0]["loc"] == ["body", "model_id"]
    assert "vinyl" in (await kept.generate(model="medium:vinil")).text
    assert not kept.backend.requests


@pytest.mark.parametrize(
    ("model", "loras", "named"),
    [
        ("medium", [{"name": "vinil"}], "vinyl"),
        ("medium", [{"name": "Vinyl"}], "vinyl"),
        ("small-sfx", [{"name": "vinyl"}], "none"),
        ("medium", [{"name": "torn"}], "corrupt"),
        ("medium", [{"name": "vinyl", "strength": -0.5}], "0 to 2"),
        ("medium", [{"name": "vinyl"}] * 4, "at most 3"),
        ("medium", [{"name": "bells"}, {"name": "bells"}], "add up to 120"),
    ],
)
async def test_unusable_adapters_are_refused_by_field(kept: Site, model: str, loras: Any, named: str) -> None:
    for path in ("/v1/audio/generations", "/jobs"):
        reply = await kept.client.post(path, json={**BODY, "model": model, "loras": loras})
        assert reply.status_code == 422
        (fault,) = reply.json()["detail"]
        assert fault["loc"] == ["body", "loras"]
        assert named in fault["msg"]
        assert str(kept.folder) not in reply.text


@pytest.mark.parametrize(
    "loras",
    [
        "vinyl",
        {"name": "vinyl"},
        [{}],
        [{"name": ""}],
        [{"name": "vinyl", "strength": 2.5}],
        [{"name": "vinyl", "strength": "loud"}],
        [{"name": "vinyl", "interval": [0.5]}],
        [{"name": "vinyl", "interval": [0.5, 0.25]}],
        [{"name": "vinyl", "interval": [-1, 1]}],
        [{"name": "vinyl", "weight": 0.5}],
        [{"name": "vinyl"}] * 65,
    ],
)
async def test_malformed_adapters_are_refused(kept: Site, loras: Any) -> None:
    reply = await kept.generate(model="medium", loras=loras)
    assert reply.status_code == 422
    assert all(fault["loc"][:2] == ["body", "loras"] for fault in reply.json()["detail"])
    assert "tuple" not in reply.text  # a word of Python
    reply = await kept.generate(model="medium", lora_stacking="mixed")
    assert reply.status_code == 422
    assert "'chained' or 'summed'" in reply.text


async def test_requests_without_a_stacking_use_the_configured_one(tmp_path: Path) -> None:
    settings = make_settings(tmp_path)
    sfx, medium = settings.models
    models = (sfx, medium.model_copy(update={"lora_stacking": "summed"}))
    site = open_site(tmp_path, settings.model_copy(update={"models": models}))
    async with site.client:
        for fields, expected in (({}, "summed"), ({"lora_stacking": "chained"}, "chained")):
            assert (await site.generate(model="medium:vinyl", **fields)).status_code == 200
            assert site.backend.last.lora_stacking == expected
    await site.jobs.close()


async def test_models_without_adapters_refuse_them_by_name(tmp_path: Path) -> None:
    settings = make_settings(tmp_path)
    site = open_site(tmp_path, settings)
    card = site.backend.catalog.find("medium")
    object.__setattr__(card, "family", "stable-audio-open")
    async with site.client:
        reply = await site.generate(model="medium", loras=[{"name": "vinyl"}])
    assert reply.status_code == 422
    assert "takes no adapters" in reply.text
    await site.jobs.close()


async def test_requests_may_be_sent_again_when_an_adapter_is_downloaded(tmp_path: Path) -> None:
    settings = make_settings(tmp_path)
    sfx, medium = settings.models
    loras = {"slow": LoraSettings(path="https://localhost/slow.safetensors")}
    site = open_site(
        tmp_path, settings.model_copy(update={"models": (sfx, medium.model_copy(update={"loras": loras}))})
    )
    model = "medium:slow"
    form = {"prompt": "rain", "duration": "1", "model": model}
    async with site.client:
        replies = [
            await site.generate(model=model),
            await site.generate(model="medium", loras=[{"name": "slow"}]),
            await site.client.post("/jobs", json={**BODY, "model": model}),
            await site.client.post("/v1/audio/generate", json={"input": "rain", "model": model}),
            await site.client.post("/v1/sound-generation", json={"text": "rain", "model_id": model}),
            await site.client.post("/v2/generate/audio", json={"prompt": "rain", "model": model}),
            await site.client.post("/v2beta/audio/stable-audio-2/text-to-audio", data=form, files={"none": ""}),
        ]
    for reply in replies:
        assert (reply.status_code, reply.headers.get("retry-after")) == (503, "5"), reply.text
        assert "adapter 'slow' is being downloaded; retry" in reply.text
    await site.jobs.close()


async def test_jobs_keep_sources_and_hashes(kept: Site) -> None:
    reply = await kept.client.post("/jobs", json={**BODY, "model": "medium:vinyl", "loras": [{"name": "bells"}]})
    assert reply.status_code == 202
    job = await kept.jobs.get(JobRef("sa3", "all", reply.json()["id"]))
    assert job is not None
    stored = job.spec.request
    assert [(lora.name, lora.sha256) for lora in stored.loras] == [(n, kept.hashes[n]) for n in ("vinyl", "bells")]
    assert stored.loras[0].source.endswith("vinyl.safetensors")
    assert stored.lora_stacking == "chained"


async def test_jobs_with_other_adapters_are_other_jobs(kept: Site) -> None:
    def submit(strength: float) -> Any:
        body = {**BODY, "model": "medium", "loras": [{"name": "vinyl", "strength": strength}]}
        return kept.client.post("/jobs", json=body, headers={"Idempotency-Key": "one"})

    first, again, other = await submit(1.0), await submit(1.0), await submit(0.5)
    assert first.json()["id"] == again.json()["id"]
    assert other.status_code == 409


async def test_recipes_have_adapters_and_replay_checks_the_file(site: Site) -> None:
    loras = [{"name": "vinyl", "strength": 0.5, "interval": [0, 0.5]}]
    reply = await site.generate(model="medium:bells", loras=loras)
    recipe = json.loads(reply.headers["x-recipe"])
    assert recipe["lora_stacking"] == "chained"
    assert recipe["loras"] == [
        {"name": "bells", "strength": 1.0, "sha256": site.hashes["bells"]},
        {"name": "vinyl", "strength": 0.5, "interval": [0.0, 0.5], "sha256": site.hashes["vinyl"]},
    ]
    before = site.backend.last.loras
    again = await site.client.post("/v1/audio/replay", json=recipe)
    assert again.status_code == 200, again.text
    assert again.content == reply.content
    assert json.loads(again.headers["x-recipe"]) == recipe
    assert site.backend.last.loras == before
    write_file(site.folder / "adapters" / "vinyl.safetensors", kind="dora-rows", rank=4, seed=2)
    await site.library.refresh()
    refused = await site.client.post("/v1/audio/replay", json=recipe)
    assert refused.status_code == 422
    assert refused.json()["detail"][0]["loc"] == ["body", "loras"]
    assert "another file" in refused.text
    (site.folder / "adapters" / "vinyl.safetensors").unlink()
    await site.library.refresh()
    assert (await site.client.post("/v1/audio/replay", json=recipe)).status_code == 422


async def test_lists_have_adapters_without_folders(kept: Site) -> None:
    entries = {entry["id"]: entry for entry in (await kept.client.get("/v1/models")).json()["data"]}
    vinyl = entries["medium:vinyl"]
    assert "medium:torn" not in entries
    assert (vinyl["parent"], vinyl["root"], vinyl["type"], vinyl["rank"], vinyl["sha256"]) == (
        "medium",
        "vinyl.safetensors",
        "dora-rows",
        4,
        kept.hashes["vinyl"],
    )
    assert entries["medium"]["parent"] is None
    listed = (await kept.client.get("/loras")).json()
    assert listed == {"success": True, "loras": [], "adapters_dir": "", "model_loaded": True}


async def test_adapters_of_the_default_model_are_listed_for_sa3_cpp(tmp_path: Path) -> None:
    site = open_site(tmp_path, make_settings(tmp_path))
    site.backend.catalog.default = site.backend.catalog.find("medium")
    async with site.client:
        listed = (await site.client.get("/loras")).json()
    assert listed["loras"] == [
        {"index": 0, "name": "bells", "path": "bells.safetensors"},
        {"index": 1, "name": "vinyl", "path": "vinyl.safetensors"},
    ]
    await site.jobs.close()


async def load(site: Site, name: str, path: object, **more: Any) -> httpx.Response:
    body = {"lora_name": name, "lora_path": str(path), "model": "medium", **more}
    return await site.client.post("/v1/load_lora_adapter", json=body)


async def unload(site: Site, name: str, **more: Any) -> httpx.Response:
    return await site.client.post("/v1/unload_lora_adapter", json={"lora_name": name, **more})


async def test_adapters_are_loaded_and_unloaded(site: Site) -> None:
    path = site.folder / "tape.safetensors"
    write_file(path, rank=8)
    assert (await site.generate(model="medium:tape")).status_code == 422
    reply = await load(site, "tape", path)
    assert (reply.status_code, reply.text) == (200, "Success: LoRA adapter 'tape' added successfully.")
    assert (await load(site, "tape", path)).status_code == 200
    assert (await site.generate(model="medium:tape")).status_code == 200
    other = await load(site, "tape", site.folder / "adapters" / "vinyl.safetensors")
    assert other.status_code == 400
    assert other.json()["error"]["param"] == "lora_name"
    assert "already been loaded" in other.json()["error"]["message"]
    reply = await unload(site, "tape")
    assert (reply.status_code, reply.text) == (200, "Success: LoRA adapter 'tape' removed successfully.")
    assert (await site.generate(model="medium:tape")).status_code == 422
    again = await unload(site, "tape")
    assert (again.status_code, again.json()["error"]["type"]) == (404, "NotFoundError")
    for more in ({}, {"model": "medium"}):
        assert (await unload(site, "tape", **more)).json()["error"]["param"] == "lora_name"


async def test_a_repeated_job_has_its_ticket_after_unloading(site: Site) -> None:
    path = site.folder / "tape.safetensors"
    write_file(path, rank=8)
    await load(site, "tape", path)
    bodies = ({**BODY, "model": "medium:tape"}, {**BODY, "model": "medium", "loras": [{"name": "tape"}]})
    tickets = [
        (await site.client.post("/jobs", json=body, headers={"Idempotency-Key": f"key-{number}"})).json()
        for number, body in enumerate(bodies)
    ]
    await unload(site, "tape")
    for number, body in enumerate(bodies):
        again = await site.client.post("/jobs", json=body, headers={"Idempotency-Key": f"key-{number}"})
        assert (again.status_code, again.json()) == (202, tickets[number])
        assert again.headers["idempotent-replayed"] == "true"
        other = await site.client.post("/jobs", json={**body, "seed": 2}, headers={"Idempotency-Key": f"key-{number}"})
        assert other.status_code == 409
        assert (await site.client.post("/jobs", json=body, headers={"Idempotency-Key": "new"})).status_code == 422


async def test_adapters_of_the_folder_cannot_be_unloaded(site: Site) -> None:
    for more in ({}, {"model": "medium"}):
        reply = await unload(site, "vinyl", **more)
        assert (reply.status_code, reply.json()["error"]["param"]) == (409, "lora_name")
    assert (await site.generate(model="medium:vinyl")).status_code == 200


async def test_unusable_files_are_not_loaded(site: Site) -> None:
    write_file(site.folder / "large.safetensors", rank=65)
    write_file(site.folder / "columns.safetensors", kind="dora-cols")
    cases = {
        "missing.safetensors": "no file missing.safetensors",
        "adapters": "folder",
        "adapters/torn.safetensors": "corrupt",
        "large.safetensors": "rank 65",
        "columns.safetensors": "dora-cols",
    }
    for path, named in cases.items():
        reply = await load(site, "new", site.folder / path)
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "lora_path"), reply.text
        assert named in reply.text
        assert "'new'" in reply.json()["error"]["message"]
    for source in ("relative/path/x.gguf", "~/x", "/\0", "/" + "x" * 300, "s3://"):
        reply = await load(site, "new", source)
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "lora_path"), reply.text
    for name in ("", "a:b", "a+b", "a/b", "a" * 101):
        reply = await load(site, name, site.folder / "adapters" / "vinyl.safetensors")
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "lora_name")
    assert (await load(site, "new", "/x", model="unknown")).status_code == 404
    assert (await load(site, "new", "/x", model=7)).status_code == 400


async def test_loading_needs_the_scope_admin(tmp_path: Path) -> None:
    site = open_site(tmp_path, make_settings(tmp_path))
    path = str(tmp_path / "adapters" / "vinyl.safetensors")
    async with site.client:
        for scope, expected in (("none", 401), ("generate", 403), ("jobs", 403), ("admin", 200)):
            headers = {"Authorization": f"Bearer {scope}"}
            body = {"lora_name": "tape", "lora_path": path, "model": "medium"}
            for what in ("load", "unload"):
                reply = await site.client.post(f"/v1/{what}_lora_adapter", json=body, headers=headers)
                assert reply.status_code == expected, (scope, what, reply.text)
            assert (await site.client.get("/loras", headers=headers)).status_code == (401 if scope == "none" else 200)
    await site.jobs.close()


async def test_requests_during_a_load_are_answered(site: Site) -> None:
    write_file(site.folder / "tape.safetensors", rank=8)
    replies = await asyncio.gather(
        load(site, "tape", site.folder / "tape.safetensors"),
        *(site.generate(model="medium:vinyl") for _ in range(4)),
    )
    assert [reply.status_code for reply in replies] == [200] * 5


async def test_damaged_files_are_refused_one_by_one(site: Site) -> None:
    whole = (site.folder / "adapters" / "vinyl.safetensors").read_bytes()
    refused = 0
    for kind in KINDS:
        random = Random(kind)
        for index in range(4):
            name = f"{kind} {index}"
            content = damage(whole, kind, random=random)
            (site.folder / "adapters" / f"{name}.safetensors").write_bytes(content)
            (site.folder / f"{name}.safetensors").write_bytes(content)
            reply = await load(site, f"new {name}", site.folder / f"{name}.safetensors")
            assert reply.status_code in (200, 400), reply.text
            if reply.status_code == 400:
                refused += 1
                assert f"new {name}" in reply.json()["error"]["message"]
                await site.library.refresh()
                native = await site.generate(model="medium", loras=[{"name": name}])
                assert native.status_code == 422
                assert repr(name) in native.json()["detail"][0]["msg"]
    assert refused >= 4 * len(KINDS) - 4
    assert (await site.generate(model="medium:vinyl")).status_code == 200
