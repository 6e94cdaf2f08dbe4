"""fal's endpoints for Stable Audio 3 and 2.5, compared with the fields of fal's own descriptions (a table)."""

from __future__ import annotations

import asyncio
import base64
import csv
import io
import socket
import threading
from collections import defaultdict
from collections.abc import Coroutine, Mapping
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import soundfile

from stable_audio_serve.audio.formats import available_formats
from stable_audio_serve.core.catalog import ModelCatalog
from stable_audio_serve.core.errors import InvalidRequestError
from stable_audio_serve.core.keys import hash_key
from stable_audio_serve.core.settings import ApiSettings
from stable_audio_serve.jobs.runner.runner import JobRunner
from stable_audio_serve.models.registry import BUILT_IN
from tests.api.compat.serving import make_app, make_client
from tests.audio_files import make_audio_file
from tests.backends import ToneBackend
from tests.parameters import few
from tests.patience import PATIENCE_S, until
from tests.sockets import listening

pytestmark = pytest.mark.usefixtures("low_rate")

ROOT = Path(__file__).parents[2] / "data" / "fal" / "stable-audio.tsv"
SOURCE_S = 2.0
SLOW_S = 0.1
SOURCE = make_audio_file(duration_s=SOURCE_S, rate_hz=8000, channels=1)
DATA_URI = f"data:audio/wav;base64,{base64.b64encode(SOURCE).decode()}"
MEDIUM, SMALL = "fal-ai/stable-audio-3/medium", "fal-ai/stable-audio-3/small/sfx"
CARDS = [BUILT_IN[f"{name}{base}"].card for name in ("small-sfx", "small-music", "medium") for base in ("", "-base")]

Row = Mapping[str, str]


def read_table() -> dict[str, list[Row]]:
    found: defaultdict[str, list[Row]] = defaultdict(list)
    with ROOT.open() as file:
        for row in csv.DictReader(file, delimiter="\t"):
            found[row["endpoint"]].append(row)
    return found


ALL = read_table()
TABLE = {name: rows for name, rows in ALL.items() if name != "fal-ai/stable-audio"}


def body_for(endpoint: str) -> dict[str, Any]:
    """Returns a valid input with a value for each required field."""
    known = {"prompt": "rain", "audio_url": DATA_URI, "mask_start_seconds": 0.5, "mask_end_seconds": 1.5}
    body = {
        row["field"]: known[row["field"]] for row in TABLE[endpoint] if row["required"] and row["direction"] == "in"
    }
    if endpoint.endswith("outpainting"):
        body["extend_seconds_after"] = 1
    if endpoint.endswith("25/inpaint"):
        body["mask_start"] = 1
    return body


def number(text: str) -> float:
    return float(text) if "." in text else int(text)


def serve_all() -> AbstractAsyncContextManager[tuple[httpx.AsyncClient, ToneBackend]]:
    """Yields a client of a server with all six models of Stable Audio 3."""
    return make_client(ToneBackend(catalog=ModelCatalog(CARDS)), run_jobs=False)


async def post(client: httpx.AsyncClient, endpoint: str, *, prefix: str = "", **changes: Any) -> httpx.Response:
    return await client.post(f"{prefix}/{endpoint}", json={**body_for(endpoint.removesuffix("/lora")), **changes})


async def finished(client: httpx.AsyncClient, url: str) -> httpx.Response:
    """Returns the result of a queued request once there is one."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            reply = await client.get(url)
            if reply.status_code != 400:
                return reply
            await asyncio.sleep(0.02)


def fault(reply: httpx.Response) -> dict[str, Any]:
    assert reply.status_code == 422, reply.text
    assert reply.headers["x-fal-retryable"] == "false"
    (entry,) = reply.json()["detail"]
    assert {"loc", "msg", "type"} <= entry.keys()
    return entry


@pytest.mark.parametrize("endpoint", few(ALL, number=6))
async def test_the_description_has_the_fields_of_the_table(client: httpx.AsyncClient, endpoint: str) -> None:
    document = (await client.get("/api/openapi/queue/openapi.json", params={"endpoint_id": endpoint})).json()
    assert document["servers"] == [{"url": "http://localhost/queue"}]
    result = document["paths"][f"/{endpoint}/requests/{{request_id}}"]["get"]["responses"]["200"]
    parts = {"in": document["paths"][f"/{endpoint}"]["post"]["requestBody"], "out": result}
    for direction, part in parts.items():
        name = part["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
        schema = document["components"]["schemas"][name]
        rows = sorted(
            (row for row in ALL[endpoint] if row["direction"] == direction), key=lambda row: int(row["order"])
        )
        assert [row["field"] for row in rows] == list(schema["properties"]) == schema["x-fal-order-properties"]
        assert {row["field"] for row in rows if row["required"]} == set(schema.get("required", ()))
        for row in rows:
            is_length = (endpoint, row["field"]) == ("fal-ai/stable-audio", "seconds_total")  # 0 is refused here
            check_field(schema["properties"][row["field"]], {**row, "minimum": "1"} if is_length else row)


async def test_the_description_s_paths_are_answered(client: httpx.AsyncClient, runner: JobRunner) -> None:
    endpoint = f"{SMALL}/text-to-audio"
    document = (await client.get("/api/openapi/queue/openapi.json", params={"endpoint_id": endpoint})).json()
    paths, base = document["paths"], document["servers"][0]["url"]
    request_id = ""
    for path, method, statuses in (
        (f"/{endpoint}", "post", ["200"]),
        (f"/{endpoint}/requests/{{request_id}}/status", "get", ["200", "202"]),
        (f"/{endpoint}/requests/{{request_id}}", "get", ["200"]),
        (f"/{endpoint}/requests/{{request_id}}/cancel", "put", ["202"]),
    ):
        operation = paths.pop(path)[method]
        assert sorted(operation["responses"]) == statuses
        url = base + path.format(request_id=request_id)
        reply = await (
            finished(client, url) if method == "get" else client.request(method, url, json=body_for(endpoint))
        )
        request_id = request_id or reply.json()["request_id"]
        if method != "put":
            assert str(reply.status_code) in statuses, reply.text
        else:
            assert (reply.status_code, reply.json()["status"]) == (400, "ALREADY_COMPLETED")
    assert not paths


def check_field(field: dict[str, Any], row: Row) -> None:
    kinds = [field, *field.get("anyOf", ())]
    if row["type"] != "File":
        assert {each["type"] for each in kinds if "type" in each} == set(row["type"].split("|"))
    for name in ("minimum", "maximum"):
        found = [each[name] for each in kinds if name in each]
        assert found == ([number(row[name])] if row[name] else []), (row["field"], name)
    if row["default"]:
        default = {"true": True, "false": False}.get(row["default"], row["default"].strip('"'))
        assert field["default"] == (default if row["type"] in ("string", "boolean") else number(row["default"]))
    if row["enum"]:
        # m4a and aac need an optional package
        assert field["enum"] == [name for name in row["enum"].split() if name in available_formats()]


@pytest.mark.parametrize("endpoint", few(TABLE, number=6))
async def test_defaults_reach_the_model(endpoint: str) -> None:
    async with serve_all() as (client, backend):
        reply = await post(client, endpoint)
        assert reply.status_code == 200, reply.text
        output = {row["field"] for row in TABLE[endpoint] if row["direction"] == "out"}
        assert reply.json().keys() == output
        defaults = {row["field"]: row["default"] for row in TABLE[endpoint] if row["default"]}
        request = backend.last
        assert request.steps == int(defaults["num_inference_steps"])
        assert request.cfg_scale == float(defaults["guidance_scale"])
        assert (request.prompt, request.negative_prompt, request.seed) == ("rain", None, reply.json()["seed"])
        file = reply.json()["audio"]
        is_mp3 = "3/" in endpoint
        assert (file["content_type"], file["file_name"]) == (
            ("audio/mpeg", "stable-audio.mp3") if is_mp3 else ("audio/wav", "stable-audio.wav")
        )
        content = (await client.get(file["url"])).content
        assert len(content) == file["file_size"]


@pytest.mark.parametrize("endpoint", few(TABLE, number=4))
async def test_bounds_and_wrong_values_of_each_field(endpoint: str) -> None:
    wrong = {"string": 5, "integer": 2.5, "integer|null": 2.5, "number": "x", "boolean": "true"}
    async with serve_all() as (client, backend):
        backend.delay_s = 0.0
        for row in (row for row in TABLE[endpoint] if row["direction"] == "in"):
            name = row["field"]
            assert fault(await post(client, endpoint, **{name: wrong[row["type"]]}))["loc"] == ["body", name]
            if row["required"]:
                reply = await client.post(
                    f"/{endpoint}", json={k: v for k, v in body_for(endpoint).items() if k != name}
                )
                assert (fault(reply)["loc"], fault(reply)["type"]) == (["body", name], "missing")
            for bound, step in (("minimum", -0.001), ("maximum", 0.001)):
                if row[bound]:
                    step = int(1000 * step) if row["type"].startswith("integer") else step
                    entry = fault(await post(client, endpoint, **{name: number(row[bound]) + step}))
                    assert (entry["loc"], name in ("mask_start", "mask_end")) in (
                        (["body", name], True),
                        (["body", name], False),
                    )
        for value in ("192", "7k", "321k", "１９２k", "x", ""):
            if any(row["field"] == "bitrate" for row in TABLE[endpoint]):
                assert fault(await post(client, endpoint, bitrate=value))["loc"] == ["body", "bitrate"]


async def test_numbers_at_their_bounds_are_accepted() -> None:
    async with serve_all() as (client, backend):
        for fields in (
            {"duration": 1, "num_inference_steps": 1, "guidance_scale": 0},
            {"duration": 1.5, "num_inference_steps": 100, "guidance_scale": 25},
            {"duration": 1, "num_inference_steps": 8.0},
        ):
            assert (await post(client, f"{MEDIUM}/text-to-audio", **fields)).status_code == 200
            assert backend.last.duration_s == fields["duration"]
        for level in (0, 1):
            reply = await post(client, f"{MEDIUM}/audio-to-audio", duration=1, init_noise_level=level)
            assert (reply.status_code, backend.last.init_noise_level) == (200, level)


async def test_unset_lengths_shrink_and_longer_ones_are_refused() -> None:
    """The model of each request makes clips of at most 120 s. At the endpoint of 2.5, the default length is 190 s."""
    async with serve_all() as (client, backend):
        await post(client, f"{SMALL}/text-to-audio")
        assert backend.last.duration_s == 30
        entry = fault(await post(client, f"{SMALL}/text-to-audio", duration=121))
        assert (entry["loc"], entry["ctx"]["le"]) == (["body", "duration"], 120)
        reply = await post(client, "fal-ai/stable-audio-25/text-to-audio", sync_mode=True)
        assert reply.status_code == 200
        assert backend.last.duration_s == 120
        entry = fault(await post(client, "fal-ai/stable-audio-25/text-to-audio", seconds_total=121))
        assert "longest clip of the model" in entry["msg"]


@pytest.mark.parametrize(
    ("endpoint", "model"),
    [(f"fal-ai/stable-audio-3/{path}{base}", f"{name}{base.replace('/', '-')}")
     for path, name in (("medium", "medium"), ("small/music", "small-music"), ("small/sfx", "small-sfx"))
     for base in ("", "/base")],
)  # fmt: skip
async def test_each_checkpoint_has_its_model(endpoint: str, model: str) -> None:
    async with serve_all() as (client, backend):
        reply = await post(client, f"{endpoint}/text-to-audio", duration=1)
        assert (reply.status_code, backend.requests[-1][0]) == (200, model)


async def test_the_operator_may_choose_the_model() -> None:
    dialects = {"fal_models": {"stable-audio-3/medium/base": "small-sfx"}}
    async with make_client(run_jobs=False, dialects=dialects) as (client, backend):
        reply = await post(client, f"{MEDIUM}/base/text-to-audio", duration=1)
        assert (reply.status_code, backend.requests[-1][0]) == (200, "small-sfx")


async def test_endpoints_without_their_model_are_404(client: httpx.AsyncClient) -> None:
    reply = await post(client, f"{MEDIUM}/base/text-to-audio", duration=1)
    assert reply.status_code == 404
    assert "the model medium-base is not served; served: small-sfx, " in reply.json()["detail"]


@pytest.mark.parametrize("endpoint", [f"{SMALL}/audio-to-audio", "fal-ai/stable-audio-25/text-to-audio"])
@pytest.mark.parametrize("prefix", ["", "/queue"])
async def test_endpoint_may_end_with_a_slash(client: httpx.AsyncClient, endpoint: str, prefix: str) -> None:
    """fal's JavaScript client appends a slash if its caller names the endpoint by a URL."""
    body = body_for(endpoint) | {"sync_mode": True}
    reply = await client.post(f"{prefix}/{endpoint}/", json=body)
    assert reply.status_code == 200, reply.text
    if prefix:
        app = "/".join(endpoint.split("/")[:2])
        assert f"/queue/{app}/requests/" in reply.json()["status_url"]


async def test_unknown_endpoints_are_404(client: httpx.AsyncClient) -> None:
    for path in ("fal-ai/stable-audio-3/large/text-to-audio", f"{MEDIUM}/sing", "fal-ai/stable-audio-25/x"):
        assert (await client.post(f"/{path}", json={"prompt": "x"})).status_code == 404
    for url in ("/api/openapi/queue/openapi.json?endpoint_id=x", "/models/fal-ai/x/llms.txt"):
        reply = await client.get(url)
        assert (reply.status_code, "endpoint_id" in reply.json()["detail"]) == (404, True)


async def test_prompt_expansion_is_refused_and_the_safety_checker_ignored(client: httpx.AsyncClient) -> None:
    entry = fault(await post(client, f"{SMALL}/text-to-audio", enable_prompt_expansion=True))
    assert entry["loc"] == ["body", "enable_prompt_expansion"]
    assert "not supported by this server" in entry["msg"]
    for value in (True, False):
        reply = await post(client, f"{SMALL}/text-to-audio", duration=1, enable_safety_checker=value)
        assert reply.status_code == 200


@pytest.mark.parametrize("name", ["mp3", "wav", "flac", "ogg", "opus"])
async def test_output_formats(client: httpx.AsyncClient, name: str) -> None:
    reply = await post(client, f"{SMALL}/text-to-audio", duration=1, output_format=name, bitrate="96k", sync_mode=True)
    file = reply.json()["audio"]
    assert file["file_name"] == f"stable-audio.{name}"
    head, _, content = file["url"].partition(",")
    assert head == f"data:{file['content_type']};base64"
    decoded = base64.b64decode(content)
    assert len(decoded) == file["file_size"]
    assert soundfile.info(io.BytesIO(decoded)).duration == pytest.approx(1, abs=0.1)


async def test_bit_rates_are_ignored_by_formats_without(client: httpx.AsyncClient) -> None:
    reply = await post(client, f"{SMALL}/text-to-audio", duration=1, output_format="wav", bitrate="any")
    assert reply.status_code == 200


@pytest.mark.parametrize("name", ["pcm", "MP3", "m4a" if "m4a" not in available_formats() else "x", "", None, 5])
async def test_other_formats_are_refused_by_the_field_s_name(client: httpx.AsyncClient, name: object) -> None:
    entry = fault(await post(client, f"{SMALL}/text-to-audio", output_format=name))
    assert entry["loc"] == ["body", "output_format"]
    assert entry["msg"].startswith("Input should be 'mp3', 'wav', 'flac', 'ogg'")


async def test_seeds_are_reported_and_random_without(client: httpx.AsyncClient, backend: ToneBackend) -> None:
    seeds = [
        (await post(client, f"{SMALL}/text-to-audio", duration=1, sync_mode=True, seed=seed)).json()["seed"]
        for seed in (7, None, None)
    ]
    assert seeds[0] == 7
    assert seeds[1] != seeds[2]
    assert [request.seed for _, request in backend.requests] == seeds


async def test_edits_reach_the_model(client: httpx.AsyncClient, backend: ToneBackend) -> None:
    assert (await post(client, f"{SMALL}/audio-to-audio", init_noise_level=0.4)).status_code == 200
    assert (backend.last.duration_s, backend.last.init_noise_level) == (30, 0.4)
    assert backend.last.init_audio is not None
    assert backend.last.init_audio.duration_s == SOURCE_S
    assert (await post(client, f"{SMALL}/audio-inpainting", mask_end_seconds=100)).status_code == 200
    assert (backend.last.duration_s, backend.last.inpaint_regions_s) == (SOURCE_S, ((0.5, SOURCE_S),))
    assert backend.last.keep == "source"
    reply = await post(client, f"{SMALL}/audio-outpainting", extend_seconds_before=3, extend_seconds_after=1)
    assert reply.status_code == 200, reply.text
    assert (backend.last.duration_s, backend.last.source_start_s) == (6, 3)
    assert backend.last.inpaint_regions_s == ((0, 3), (5, 6))
    assert backend.last.keep == "source"
    assert (await post(client, "fal-ai/stable-audio-25/audio-to-audio")).status_code == 200
    assert (backend.last.duration_s, backend.last.init_noise_level) == (SOURCE_S, 0.8)
    assert (await post(client, "fal-ai/stable-audio-25/inpaint", mask_end=2)).status_code == 200
    assert (backend.last.duration_s, backend.last.inpaint_regions_s) == (120, ((1, 2),))  # the default, 190, cut
    assert (await post(client, "fal-ai/stable-audio-25/inpaint", seconds_total=None, mask_end=2)).status_code == 200
    assert backend.last.duration_s == SOURCE_S


@pytest.mark.parametrize(
    ("operation", "fields", "field"),
    [
        ("audio-inpainting", {"mask_start_seconds": 1, "mask_end_seconds": 1}, "mask_start_seconds"),
        ("audio-inpainting", {"mask_start_seconds": 2, "mask_end_seconds": 100}, "mask_start_seconds"),
        ("audio-outpainting", {"extend_seconds_before": 0, "extend_seconds_after": 0}, "extend_seconds_after"),
        ("audio-outpainting", {"extend_seconds_after": 1e-20}, "extend_seconds_after"),
        ("audio-outpainting", {"extend_seconds_before": 119, "extend_seconds_after": 1}, "extend_seconds_before"),
        ("audio-outpainting", {"extend_seconds_after": 119}, "extend_seconds_after"),
    ],
)
async def test_impossible_edits_are_refused(
    client: httpx.AsyncClient, operation: str, fields: dict[str, Any], field: str
) -> None:
    assert fault(await post(client, f"{SMALL}/{operation}", **fields))["loc"] == ["body", field]


@pytest.mark.parametrize(
    "url",
    [
        "data:audio/wav;base64,@@", "data:audio/wav", "data:,not%20audio", "file:///etc/passwd", "x", "ftp://a.b/c",
        "http://127.0.0.1:1/a.wav", "http://[::1]/a.wav", "http://169.254.169.254/latest", "http://localhost/a.wav",
        "http://user:pass@example.com/a.wav", "http://localhost:1/files/" + "0" * 32 + "/a.wav",
        "http://localhost/files/" + "0" * 32 + "/a.wav", "http://" + "a" * 3000, "data:;base64,",
        DATA_URI[:200] + " " + DATA_URI[200:], DATA_URI[:-4] + "=" + DATA_URI[-4:], DATA_URI[:-1] + "\u00e9",
    ],
)  # fmt: skip
async def test_unusable_sources_are_refused(client: httpx.AsyncClient, url: str) -> None:
    assert fault(await post(client, f"{SMALL}/audio-to-audio", audio_url=url))["loc"] == ["body", "audio_url"]


@pytest.mark.parametrize(
    "url",
    [
        DATA_URI.rstrip("="), DATA_URI[:22] + DATA_URI[22:].replace("+", "-").replace("/", "_"),
        "DATA:audio/wav;BASE64," + DATA_URI.partition(",")[2], DATA_URI[:80] + "%0D%0A" + DATA_URI[80:],
        "data:," + "".join(f"%{byte:02x}" for byte in SOURCE),
    ],
    ids=["no padding", "URL-safe", "upper case", "lines", "no base64"],
)  # fmt: skip
async def test_data_uris_of_any_spelling_are_sources(client: httpx.AsyncClient, backend: ToneBackend, url: str) -> None:
    samples = []
    for source in (DATA_URI, url):
        reply = await post(client, f"{SMALL}/audio-to-audio", duration=1, audio_url=source)
        assert reply.status_code == 200, reply.text
        assert backend.last.init_audio is not None
        samples.append(backend.last.init_audio.samples)
    np.testing.assert_array_equal(*samples)


async def test_files_of_this_server_are_sources(client: httpx.AsyncClient, backend: ToneBackend) -> None:
    made = await post(client, f"{SMALL}/text-to-audio", duration=1, output_format="wav")
    reply = await post(client, f"{SMALL}/audio-to-audio", duration=1, audio_url=made.json()["audio"]["url"])
    assert reply.status_code == 200, reply.text
    assert backend.last.init_audio is not None
    assert backend.last.init_audio.duration_s == 1


@pytest.mark.server
@pytest.mark.parametrize("is_own", [True, False])
async def test_sources_from_urls_count_like_request_bodies(is_own: bool) -> None:
    """Each request is small, but makes the server keep a large temporary file."""
    source = make_audio_file(duration_s=10)

    async def host(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": source})

    jobs, api = {"webhook_allow_hosts": ["127.0.0.1"]}, {"max_bodies_bytes": len(source) * 3 // 2}
    async with listening(host) as port, make_client(jobs=jobs, api=api, run_jobs=False) as (client, backend):
        url = f"http://127.0.0.1:{port}/a.wav"
        if is_own:
            url = (await client.post("/files/upload", content=source)).json()["access_url"]
        backend.released.clear()
        first = asyncio.create_task(post(client, f"{SMALL}/audio-to-audio", duration=1, audio_url=url))
        await until(lambda: backend.num_running == 1)
        second = await post(client, f"{SMALL}/audio-to-audio", duration=1, audio_url=url)
        assert (second.status_code, second.headers["retry-after"]) == (503, "5")
        assert second.json()["error_type"] == second.headers["x-fal-error-type"] == "unavailable"
        assert second.headers["x-fal-retryable"] == "true"
        assert "retry later (api.max_bodies_bytes)" in second.json()["detail"]
        backend.released.set()
        assert (await first).status_code == 200
        assert (await post(client, f"{SMALL}/audio-to-audio", duration=1, audio_url=url)).status_code == 200


@pytest.mark.server
async def test_sources_are_downloaded_from_allowed_hosts_only() -> None:
    moved = {"/moved.wav": b"a.wav", "/inside.wav": b"http://10.0.0.1/a.wav", "/file.wav": b"file:///etc/passwd"}
    moved |= {"/circle.wav": b"/circle.wav", "/wrong.wav": b"http://a:port/", "/gone.wav": b"/nowhere.wav"}

    async def host(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/slow.wav":
            await asyncio.sleep(SLOW_S)
        if scope["path"] == "/cut.wav":
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"9")]})
            return
        size = 300_000 if scope["path"] == "/large.wav" else 0
        location = moved.get(scope["path"])
        status = 302 if location else 404 if scope["path"] == "/nowhere.wav" else 200
        headers = [(b"location", location)] if location else []
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": SOURCE + b"0" * size})

    jobs, api = {"webhook_allow_hosts": ["127.0.0.1"]}, {"max_upload_bytes": 100_000}
    async with listening(host) as port, make_client(jobs=jobs, api=api, run_jobs=False) as (client, backend):
        url = f"http://127.0.0.1:{port}"
        for name in ("a.wav", "moved.wav", f"a.wav?token={'0' * 8000}"):
            reply = await post(client, f"{SMALL}/audio-to-audio", duration=1, audio_url=f"{url}/{name}")
            assert reply.status_code == 200, reply.text
            assert backend.last.init_audio is not None
        assert (await post(client, f"{SMALL}/audio-to-audio", duration=1, audio_url=f"{url}/slow.wav")).is_success
        assert backend.last.deadline_s is not None
        assert backend.last.deadline_s <= ApiSettings().default_deadline_s - SLOW_S  # the download counts
        for name, message in (
            ("large.wav", "larger than 100000 bytes"),
            ("inside.wav", "not public"),
            ("file.wav", "not an http or https URL"),
            ("circle.wav", "redirects more than 5 times"),
            ("wrong.wav", "invalid URL"),
            ("gone.wav", "status 404"),
            ("cut.wav", "audio_url gave no complete answer"),
            (f"a.wav?token={'0' * 9000}", "longer than 8192 characters"),
        ):
            entry = fault(await post(client, f"{SMALL}/audio-to-audio", audio_url=f"{url}/{name}"))
            assert message in entry["msg"]
        for source, message in (
            ("http://10.0.0.1/", "not public"),
            (f"https://127.0.0.1:{port}/a.wav", "audio_url cannot be reached: "),
            ("http://a.invalid/", "audio_url has a host that cannot be resolved; allowed: "),
        ):
            entry = fault(await post(client, f"{SMALL}/audio-to-audio", audio_url=source))
            assert message in entry["msg"]
            assert "Error" not in entry["msg"]


@pytest.mark.server
async def test_slow_name_servers_of_one_client_do_not_affect_another(monkeypatch: pytest.MonkeyPatch) -> None:
    resolve, released, slow_names = socket.getaddrinfo, threading.Event(), list[str]()

    def look_up(host: str, *args: Any, **kwargs: Any) -> Any:
        if host.startswith("slow"):
            slow_names.append(host)
            released.wait()
            raise socket.gaierror("no answer")
        return resolve(host, *args, **kwargs)

    async def host(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": SOURCE})

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    greedy, other = ({"authorization": f"Key {name}"} for name in ("greedy", "other"))
    jobs, api = {"webhook_allow_hosts": ["127.0.0.1"]}, {"key_hashes": [hash_key("greedy"), hash_key("other")]}
    async with listening(host) as port, make_client(jobs=jobs, api=api, run_jobs=False) as (client, _):

        def ask(url: str, headers: dict[str, str]) -> Coroutine[Any, Any, httpx.Response]:
            body = {"prompt": "rain", "audio_url": url, "duration": 1}
            return client.post(f"/{SMALL}/audio-to-audio", json=body, headers=headers)

        try:
            for number in (48, 1):
                slow = [ask(f"http://slow{index}.example.com/", greedy) for index in range(number)]
                for reply in await asyncio.gather(*slow):  # the lookups go on after the client has got its response
                    assert "cannot be resolved" in fault(reply)["msg"]
                assert len(slow_names) == 16
            reply = await ask(f"http://127.0.0.1:{port}/a.wav", other)
            assert reply.status_code == 200, reply.text
        finally:
            released.set()


@pytest.mark.parametrize("prefix", ["/queue", pytest.param("/fal/queue", marks=pytest.mark.slow)])
async def test_queued_requests_have_links_of_their_application(
    client: httpx.AsyncClient, backend: ToneBackend, runner: JobRunner, prefix: str
) -> None:
    for endpoint, sources in (
        (f"{SMALL}/audio-to-audio", (True, False)),
        (f"{SMALL}/audio-inpainting", (False, True)),
        ("fal-ai/stable-audio-25/text-to-audio", (False, False)),
    ):
        app = "/".join(endpoint.split("/")[:2])
        ticket = (await post(client, endpoint, prefix=prefix, seed=3)).json()
        url = f"http://localhost{prefix}/{app}/requests/{ticket['request_id']}"
        assert (ticket["response_url"], ticket["status_url"]) == (url, f"{url}/status")
        output = (await finished(client, url)).json()
        assert output.keys() == {row["field"] for row in TABLE[endpoint] if row["direction"] == "out"}
        assert output["seed"] == backend.last.seed == 3
        assert (backend.last.init_audio is not None, backend.last.inpaint_audio is not None) == sources
        assert (await client.get(output["audio"]["url"])).status_code == 200


@pytest.mark.parametrize(
    ("headers", "query"),
    [({"x-fal-queue-priority": "first"}, ""), ({"x-fal-request-timeout": "0"}, ""), ({}, "?fal_webhook=x")],
)
async def test_refused_submissions_store_no_source(headers: dict[str, str], query: str) -> None:
    async with make_app(run_jobs=False) as (app, _):
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            body = body_for(f"{SMALL}/audio-to-audio")
            reply = await client.post(f"/queue/{SMALL}/audio-to-audio{query}", json=body, headers=headers)
        assert reply.status_code == 422
        assert not list(await asyncio.to_thread(Path(app.state.output_dir, "uploads").glob, "*"))


async def test_queued_outputs_can_be_data_uris(client: httpx.AsyncClient, runner: JobRunner) -> None:
    ticket = (await post(client, f"{SMALL}/text-to-audio", prefix="/queue", duration=1, sync_mode=True)).json()
    reply = await finished(client, ticket["response_url"])
    assert reply.json()["audio"]["url"].startswith("data:audio/mpeg;base64,")


async def test_adapters_are_taken_by_the_endpoints_for_them(client: httpx.AsyncClient) -> None:
    reply = await post(client, f"{SMALL}/text-to-audio/lora", loras=[{"path": "vinyl", "scale": 0.5}])
    entry = fault(reply)
    assert (entry["loc"], "vinyl" in entry["msg"]) == (["body", "loras"], True)
    assert fault(await post(client, f"{SMALL}/text-to-audio/lora", loras=[{"scale": 1}]))["loc"][:2] == [
        "body",
        "loras",
    ]
    assert (await post(client, f"{SMALL}/text-to-audio/lora", duration=1)).status_code == 200


async def test_each_endpoint_is_explained_for_language_models(client: httpx.AsyncClient) -> None:
    for endpoint in ALL:
        reply = await client.get(f"/models/{endpoint}/llms.txt")
        assert (reply.status_code, reply.headers["content-type"]) == (200, "text/plain; charset=utf-8")
        assert reply.text.startswith(f"# {endpoint}\n\n> POST http://localhost/{endpoint}\n\n## Input\n\n")
        assert "- `prompt` (string, required" in reply.text
        assert "- `url` (string, required)" in reply.text
        if endpoint in TABLE:
            assert "- `seed` (integer or null, default null)" in reply.text
        if "3/" in endpoint:
            assert '(string, default "mp3", one of mp3, wav, flac, ogg, opus' in reply.text


async def test_a_large_data_uri_is_accepted_and_a_huge_one_refused(client: httpx.AsyncClient) -> None:
    source = make_audio_file(duration_s=20, rate_hz=44100)
    uri = f"data:audio/wav;base64,{base64.b64encode(source).decode()}"
    assert len(uri) > 2**22
    assert (await post(client, f"{SMALL}/audio-to-audio", duration=1, audio_url=uri)).status_code == 200
    assert (await post(client, f"{SMALL}/audio-to-audio", audio_url="data:," + "0" * 2**26)).status_code == 413


@pytest.mark.parametrize("operation", ["text-to-audio", "audio-to-audio"])
async def test_large_json_without_a_file_is_refused(client: httpx.AsyncClient, operation: str) -> None:
    body = b'{"prompt":"x","z":[' + b"[]," * 400_000 + b"[]]}"
    reply = await client.post(f"{SMALL}/{operation}", content=body, headers={"content-type": "application/json"})
    assert (reply.status_code, reply.json()["error_type"]) == (413, "bad_request")
    assert reply.headers["x-fal-retryable"] == "false"
    assert reply.json()["detail"].startswith("body: larger than 1048576 bytes")


async def test_only_endpoints_with_a_source_take_large_json(client: httpx.AsyncClient) -> None:
    assert (await post(client, f"{SMALL}/text-to-audio", audio_url="data:," + "0" * 2**21)).status_code == 413
    assert (await post(client, f"{SMALL}/audio-to-audio", audio_url="data:," + "0" * 2**21)).status_code == 422


@pytest.mark.parametrize(
    ("endpoint", "names"),
    [
        ("fal-ai/stable-audio-25/text-to-audio", {"duration": "seconds_total", "prompt": "prompt"}),
        (f"{SMALL}/text-to-audio", {"duration": "duration", "steps": "num_inference_steps"}),
        (f"{SMALL}/audio-to-audio", {"cfg_scale": "guidance_scale", "init_noise_level": "init_noise_level"}),
        ("fal-ai/stable-audio-25/audio-to-audio", {"init_noise_level": "strength", "cfg_scale": "guidance_scale"}),
        ("fal-ai/stable-audio-25/inpaint", {"inpaint_start_seconds": "mask_start", "audio": "audio_url"}),
    ],
)
async def test_refusals_by_the_model_have_the_name_of_the_field(
    client: httpx.AsyncClient, backend: ToneBackend, runner: JobRunner, *, endpoint: str, names: dict[str, str]
) -> None:
    for field, name in names.items():
        backend.error = InvalidRequestError(f"{field} must be low", field=field)
        ticket = (await post(client, endpoint, prefix="/queue")).json()
        for reply in (await post(client, endpoint), await finished(client, ticket["response_url"])):
            assert (fault(reply)["loc"], fault(reply)["msg"]) == (["body", name], f"{name} must be low")
