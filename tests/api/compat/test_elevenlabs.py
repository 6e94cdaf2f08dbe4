"""ElevenLabs' API over HTTP: each field's default, bounds and wrong values, formats, errors and keys."""

from __future__ import annotations

import asyncio
import io
import json
import threading
import wave
from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import soundfile

from stable_audio_serve.api.streams import StreamLimits
from stable_audio_serve.artifacts.local import LocalArtifacts
from stable_audio_serve.audio.embedded_text import extract
from stable_audio_serve.core.catalog import ModelCard, ModelCatalog
from stable_audio_serve.core.errors import (
    GenerationError,
    InvalidRequestError,
    ModelUnavailableError,
    OverloadedError,
    StorageError,
    StorageFullError,
)
from stable_audio_serve.core.keys import hash_key
from stable_audio_serve.jobs.store.client_jobs import ClientJobs
from tests.api.compat.serving import make_client, serve_app
from tests.api.test_buckets import storage_args
from tests.backends import PausingBackend, ToneBackend
from tests.object_storage import Faults, ObjectStorage
from tests.parameters import few, some
from tests.patience import PATIENCE_S, until

SOUND, MUSIC, STREAM = "/v1/sound-generation", "/v1/music", "/v1/music/stream"
BODIES = {SOUND: {"text": "a dog", "duration_seconds": 1}, MUSIC: {"prompt": "piano", "music_length_ms": 3000}}
BODIES[STREAM] = BODIES[MUSIC]
RATES = (8000, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000)
MP3 = {"mp3_22050_32", "mp3_24000_48", *(f"mp3_44100_{kbps}" for kbps in (32, 64, 96, 128, 192))}
OPUS = {f"opus_48000_{kbps}" for kbps in (32, 64, 96, 128, 192)}
RAW = {f"{name}_{rate_hz}" for name in ("pcm", "wav") for rate_hz in RATES} | {"ulaw_8000", "alaw_8000"}
FORMATS = sorted(MP3 | OPUS | RAW)
MEDIA_TYPES = {
    **{"mp3": "audio/mpeg", "opus": "audio/ogg", "pcm": "audio/pcm", "wav": "audio/wav"},
    **{"ulaw": "audio/basic", "alaw": "audio/x-alaw-basic"},
}
QUICK = {"output_format": "pcm_44100"}  # for tests of other things, because MP3 takes most of their time
PLAN = {
    "positive_global_styles": ["jazz", "warm"],
    "negative_global_styles": ["metal"],
    "sections": [
        {
            "section_name": name,
            "positive_local_styles": [style],
            "negative_local_styles": [],
            "duration_ms": 3000,
            "lines": [],
        }
        for name, style in (("Intro", "piano"), ("Solo", "saxophone"))
    ],
}


def faults(reply: httpx.Response) -> list[tuple[str, str]]:
    """Return the names and messages of the invalid fields of a response with the status 422."""
    assert reply.status_code == 422, reply.text
    items = reply.json()["detail"]
    assert all(item.keys() == {"loc", "msg", "type"} for item in items)
    return [(item["loc"][-1], item["msg"]) for item in items]


def detail(reply: httpx.Response, status: int) -> dict[str, str]:
    assert reply.status_code == status, reply.text
    body = reply.json()["detail"]
    assert body.keys() == {"status", "message"}
    return body


@pytest.mark.parametrize("prefix", ["", "/elevenlabs"])
@pytest.mark.parametrize("path", [SOUND, MUSIC])
async def test_answer_is_an_mp3_file_with_its_seed(
    client: httpx.AsyncClient, backend: ToneBackend, path: str, prefix: str
) -> None:
    reply = await client.post(prefix + path, json=BODIES[path])
    assert reply.status_code == 200, reply.text
    assert reply.headers["content-type"] == "audio/mpeg"
    assert reply.headers["x-request-id"]
    assert int(reply.headers["x-seed"]) == backend.last.seed
    info = soundfile.info(io.BytesIO(reply.content))
    assert (info.samplerate, info.channels) == (44_100, 2)
    length_s = backend.last.duration_s
    assert info.frames == round(44_100 * length_s)
    assert len(reply.content) * 8 / 1000 / length_s == pytest.approx(128, rel=0.1)


@pytest.mark.parametrize(
    "name", some(FORMATS, ("mp3_22050_32", "opus_48000_96", "pcm_16000", "wav_24000", "ulaw_8000"))
)
async def test_formats_have_their_rate_and_bit_rate(client: httpx.AsyncClient, name: str) -> None:
    reply = await client.post(SOUND, params={"output_format": name}, json=BODIES[SOUND])
    kind, rate, *kbps = name.split("_")
    assert reply.headers["content-type"] == MEDIA_TYPES[kind]
    content, rate_hz = reply.content, int(rate)
    if kind in ("pcm", "ulaw", "alaw"):
        channels, subtype = (2, "PCM_16") if kind == "pcm" else (1, kind.upper())
        raw = {"samplerate": rate_hz, "channels": channels, "subtype": subtype, "format": "RAW"}
        samples, found_hz = soundfile.read(io.BytesIO(content), always_2d=True, **raw)
    else:
        samples, found_hz = soundfile.read(io.BytesIO(content), always_2d=True)
        assert samples.shape[1] == 2
    assert (found_hz, len(samples)) == (rate_hz, rate_hz)
    spectrum = np.abs(np.fft.rfft(samples[:, 0]))
    assert spectrum[:4000].argmax() == pytest.approx(100 + int(reply.headers["x-seed"]) % 1000, abs=1)
    if kbps:
        assert len(content) * 8 / 1000 == pytest.approx(int(kbps[0]), rel=0.3)  # Opus: up to 0.28 more in 1 s


@pytest.mark.parametrize(
    ("fields", "name", "rate_hz", "kbps"),
    [
        ({}, "auto", 44_100, 128),
        ({"model_id": "music_v1"}, "auto", 44_100, 128),
        ({"model_id": "music_v2"}, "auto", 48_000, 192),
        ({}, "mp3_48000_320", 48_000, 320),
    ],
)
async def test_music_has_more_formats(
    client: httpx.AsyncClient, fields: dict[str, Any], name: str, rate_hz: int, kbps: int
) -> None:
    reply = await client.post(MUSIC, params={"output_format": name}, json=BODIES[MUSIC] | fields)
    assert soundfile.info(io.BytesIO(reply.content)).samplerate == rate_hz
    assert len(reply.content) * 8 / 3000 == pytest.approx(kbps, rel=0.05)
    if not fields:
        refused = await client.post(SOUND, params={"output_format": name}, json=BODIES[SOUND])
        assert faults(refused)[0][0] == "output_format"


@pytest.mark.parametrize("name", ["mp3_44100_100", "pcm_11025", "flac_44100", "", "MP3_44100_128"])
@pytest.mark.parametrize("path", [SOUND, MUSIC, STREAM])
async def test_other_formats_are_refused_by_name(client: httpx.AsyncClient, path: str, name: str) -> None:
    ((field, message),) = faults(await client.post(path, params={"output_format": name}, json=BODIES[path]))
    assert field == "output_format"
    assert "mp3_44100_128" in message


@pytest.mark.parametrize(
    ("fields", "duration_s"),
    [
        ({}, 5.0),
        ({"duration_seconds": None}, 5.0),
        ({"duration_seconds": 0.5}, 0.5),
        ({"duration_seconds": 30}, 30.0),
        ({"text": "a 10 second drum roll"}, 10.0),
        ({"text": "rain for 2 s"}, 2.0),
        ({"text": "a 12-second riser"}, 12.0),
        ({"text": "2.5s of wind"}, 2.5),
        ({"text": "wind, 45 seconds"}, 30.0),
        ({"text": "rain for 60 s"}, 30.0),
        ({"text": "a .75 second click"}, 0.75),
        ({"text": "0.1 seconds of a click"}, 0.5),
        ({"text": "an 80s synth from the 1980s"}, 5.0),
        ({"text": "10 seconds of rain", "duration_seconds": 3}, 3.0),
        ({"loop": True, "duration_seconds": 30}, 30.0),
    ],
)
async def test_length_of_a_sound(
    client: httpx.AsyncClient, backend: ToneBackend, fields: dict[str, Any], duration_s: float
) -> None:
    query = {"output_format": "ulaw_8000"}
    reply = await client.post(SOUND, params=query, json={"text": "a dog", **fields})
    assert reply.status_code == 200, reply.text
    assert backend.last.duration_s == duration_s
    assert len(reply.content) == round(8000 * duration_s)


SOUND_REFUSED = [
    ({"text": ""}, "text"),
    ({"text": " "}, "text"),
    ({"text": None}, "text"),
    ({"text": 5}, "text"),
    ({"duration_seconds": 0.49}, "duration_seconds"),
    ({"duration_seconds": 30.1}, "duration_seconds"),
    ({"duration_seconds": "long"}, "duration_seconds"),
    ({"prompt_influence": -0.1}, "prompt_influence"),
    ({"prompt_influence": 1.1}, "prompt_influence"),
    ({"prompt_influence": "much"}, "prompt_influence"),
    ({"loop": "maybe"}, "loop"),
    ({"model_id": "eleven_multilingual_v2"}, "model_id"),
    ({"model_id": 3}, "model_id"),
]
MUSIC_REFUSED = [
    ({"prompt": ""}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"prompt": ["x"]}, "prompt"),
    ({"composition_plan": PLAN}, "prompt"),
    ({"prompt": None, "composition_plan": {"sections": []}}, "sections"),
    ({"prompt": None, "composition_plan": "jazz"}, "composition_plan"),
    ({"prompt": None, "composition_plan": {"sections": [{"duration_ms": 2999}]}}, "duration_ms"),
    ({"prompt": None, "composition_plan": {"sections": [{"duration_ms": 120_001}]}}, "duration_ms"),
    ({"prompt": None, "composition_plan": {"sections": [{}]}}, "duration_ms"),
    ({"prompt": None, "composition_plan": PLAN | {"positive_global_styles": ["x" * 1001]}}, 0),
    *(
        ({"prompt": None, "composition_plan": {part: [{"duration_ms": 3000, field: {"song_id": "x"}}]}}, field)
        for part, field in (("sections", "source_from"), ("chunks", "conditioning_ref"))
    ),
    ({"music_length_ms": 2999}, "music_length_ms"),
    ({"music_length_ms": 600_001}, "music_length_ms"),
    ({"music_length_ms": 3000.5}, "music_length_ms"),
    ({"seed": -1}, "seed"),
    ({"seed": "x"}, "seed"),
    ({"seed": 2**32}, "seed"),
    ({"model_id": "music_v9"}, "model_id"),
    ({"force_instrumental": "maybe"}, "force_instrumental"),
    ({"respect_sections_durations": "maybe"}, "respect_sections_durations"),
    ({"sign_with_c2pa": "maybe"}, "sign_with_c2pa"),
    ({"store_for_inpainting": True}, "store_for_inpainting"),
    ({"finetune_id": "abc"}, "finetune_id"),
]


@pytest.mark.parametrize(
    ("path", "fields", "field"),
    [(SOUND, *case) for case in SOUND_REFUSED] + [(path, *case) for path in (MUSIC, STREAM) for case in MUSIC_REFUSED],
)
async def test_wrong_values_are_refused_by_name(
    client: httpx.AsyncClient, backend: ToneBackend, path: str, fields: dict[str, Any], field: str
) -> None:
    reply = await client.post(path, json=BODIES[path] | fields)
    ((name, message),) = faults(reply)
    assert name == field
    assert "uple" not in message
    assert backend.requests == []


@pytest.mark.parametrize("path", [SOUND, MUSIC, STREAM])
async def test_enable_logging_is_accepted(client: httpx.AsyncClient, path: str) -> None:
    for value in ("true", "false"):
        reply = await client.post(path, params=QUICK | {"enable_logging": value}, json=BODIES[path] | {"unknown": 1})
        assert reply.status_code == 200, reply.text
    assert faults(await client.post(path, params={"enable_logging": "x"}, json=BODIES[path]))[0][0] == "enable_logging"


async def test_music_fields_and_defaults(client: httpx.AsyncClient, backend: ToneBackend) -> None:
    query = {"output_format": "ulaw_8000"}
    nulls = dict.fromkeys(("music_length_ms", "seed", "model_id", "finetune_id", "store_for_inpainting"))
    reply = await client.post(MUSIC, params=query, json={"prompt": "piano", **nulls, "composition_plan": None})
    assert (reply.status_code, backend.last.duration_s, len(reply.content)) == (200, 30.0, 240_000)
    body = BODIES[MUSIC] | {"seed": 2**32 - 1, "store_for_inpainting": False, "force_instrumental": True}
    first = await client.post(MUSIC, json=body | {"sign_with_c2pa": True, "respect_sections_durations": False})
    assert (first.status_code, first.headers["x-seed"]) == (200, str(2**32 - 1))
    assert (await client.post(MUSIC, json=body)).content == first.content


async def test_stream_has_the_same_bytes_without_a_length(client: httpx.AsyncClient) -> None:
    body = BODIES[MUSIC] | {"seed": 5}
    whole = await client.post(MUSIC, json=body)
    streamed = await client.post(STREAM, json=body)
    assert "content-length" not in streamed.headers
    assert int(whole.headers["content-length"]) == len(whole.content)
    assert streamed.content == whole.content
    assert streamed.headers["x-seed"] == "5"


async def test_null_sources_of_sections_are_accepted(client: httpx.AsyncClient) -> None:
    plan = {"sections": [{"duration_ms": 3000, "source_from": None, "conditioning_ref": None}]}
    reply = await client.post(MUSIC, params={"output_format": "ulaw_8000"}, json={"composition_plan": plan})
    assert reply.status_code == 200, reply.text


async def test_blank_styles_are_left_out_of_the_prompt(client: httpx.AsyncClient, backend: ToneBackend) -> None:
    for name, styles, prompt in (("A", ["", " soft "], "soft"), (" A ", [" "], "A"), (" ", [], "music")):
        section = {"section_name": name, "positive_local_styles": styles, "duration_ms": 3000}
        plan = {"positive_global_styles": [" "], "negative_global_styles": ["", "loud"], "sections": [section]}
        reply = await client.post(MUSIC, params={"output_format": "ulaw_8000"}, json={"composition_plan": plan})
        assert reply.status_code == 200, reply.text
        assert (backend.last.prompt, backend.last.negative_prompt) == (prompt, "loud")


def with_models(
    *cards: ModelCard, **dialects: str
) -> AbstractAsyncContextManager[tuple[httpx.AsyncClient, ToneBackend]]:
    return make_client(ToneBackend(catalog=ModelCatalog(cards)), dialects=dialects)


BASE = ModelCard("medium-base", "stable-audio-3", max_duration_s=60, default_cfg_scale=7)
SHORT = ModelCard("short", "stable-audio-3", max_duration_s=10)
SFX = ModelCard("small-sfx", "stable-audio-3")
OPEN = ModelCard("open", "stable-audio-open", max_duration_s=47)


async def test_prompt_influence_is_the_guidance_of_base_models() -> None:
    async with with_models(SFX, BASE) as (client, backend):
        for influence, guidance in (({}, 2.8), (None, 2.8), (0, 1.0), (0.3, 2.8), (0.5, 4.0), (1, 7.0)):
            body = BODIES[SOUND] | ({} if influence == {} else {"prompt_influence": influence})
            await client.post(SOUND, params=QUICK, json=body | {"model_id": "medium-base"})
            assert backend.last.cfg_scale == pytest.approx(guidance)
            await client.post(SOUND, params=QUICK, json=body)
            assert backend.last.cfg_scale is None


@pytest.mark.parametrize(
    ("cards", "setting", "expected"),
    few(
        [
            ((SHORT, SFX, BASE), None, "small-sfx"),
            ((SHORT, SFX), "short", "short"),
            ((OPEN, SHORT, BASE), None, "short"),
            ((OPEN,), None, "open"),
        ]
    ),
)
async def test_the_setting_chooses_the_model(cards: tuple[ModelCard, ...], setting: str | None, expected: str) -> None:
    async with with_models(*cards, **({"elevenlabs_model": setting} if setting else {})) as (client, backend):
        for path, names in ((SOUND, ("eleven_text_to_sound_v2", "eleven_text_to_sound_v3")), (MUSIC, ("music_v1",))):
            for name in (None, *names):
                reply = await client.post(path, params=QUICK, json=BODIES[path] | {"model_id": name})
                assert (reply.status_code, backend.requests[-1][0]) == (200, expected)
        await client.post(SOUND, params=QUICK, json=BODIES[SOUND] | {"model_id": cards[0].name})
        assert backend.requests[-1][0] == cards[0].name


async def test_lengths_depend_on_the_models_longest_clip() -> None:
    async with with_models(SHORT) as (client, backend):
        await client.post(SOUND, params=QUICK, json={"text": "20 seconds of rain"})
        assert backend.last.duration_s == 10
        ((field, message),) = faults(await client.post(SOUND, json={"text": "x", "duration_seconds": 10.5}))
        assert (field, "to 10 for the model short" in message) == ("duration_seconds", True)
        await client.post(SOUND, params=QUICK, json={"text": "20 seconds of rain", "loop": True})
        assert backend.last.duration_s == 9.95
        ((field, _),) = faults(await client.post(SOUND, json={"text": "x", "duration_seconds": 10, "loop": True}))
        assert field == "duration_seconds"


@pytest.mark.server
@pytest.mark.parametrize("path", few([STREAM, MUSIC], number=1))
async def test_pieces_longer_than_the_longest_clip_have_sections(path: str) -> None:
    query = {"output_format": "ulaw_8000"}
    async with with_models(SHORT) as (client, backend):
        reply = await client.post(path, params=query, json={"prompt": "piano", "music_length_ms": 13_000, "seed": 7})
        assert reply.status_code == 200, reply.text
        assert (reply.headers["content-type"], reply.headers["x-seed"]) == ("audio/basic", "7")
        assert len(reply.content) == 13 * 8000
        assert ("content-length" in reply.headers) is (path == MUSIC)
        assert [request.prompt for _, request in backend.requests] == ["piano"] * 3
        assert all(request.duration_s <= 10 for _, request in backend.requests)
        backend.requests.clear()
        reply = await client.post(path, params=query, json={"composition_plan": PLAN})
        assert len(reply.content) == 6 * 8000
        prompts = [request.prompt for _, request in backend.requests]
        assert prompts == ["jazz, warm, piano", "jazz, warm, saxophone"]
        assert {request.negative_prompt for _, request in backend.requests} == {"metal"}
        backend.requests.clear()
        chunks = [{"text": "[Verse] la", "duration_ms": 3000, "positive_styles": [style]} for style in ("rock", "folk")]
        reply = await client.post(path, params=query, json={"composition_plan": {"chunks": chunks}})
        assert [request.prompt for _, request in backend.requests] == ["rock", "folk"]


@pytest.mark.server
@pytest.mark.parametrize("path", [STREAM, MUSIC])
async def test_pieces_that_the_model_refuses_are_422(path: str) -> None:
    async with with_models(SHORT) as (client, backend):
        backend.error = InvalidRequestError("a clip of 9 s takes 4 GB", field="duration")
        for body, field in (
            ({"prompt": "piano", "music_length_ms": 13_000}, "music_length_ms"),
            ({"composition_plan": PLAN}, "composition_plan"),
        ):
            ((name, message),) = faults(await client.post(path, params=QUICK, json=body))
            assert (name, message) == (field, f"{field}: a clip of 9 s takes 4 GB")


@pytest.mark.server
async def test_pieces_with_sections_follow_the_settings_of_the_server() -> None:
    settings = {"dialects": {"recipes": True}, "audio": {"peaks": "clip"}}
    async with make_client(ToneBackend(level=2.0), **settings) as (client, _):
        body = {"composition_plan": PLAN}
        reply = await client.post(MUSIC, params={"output_format": "wav_44100"}, json=body)
    recipe = json.loads(extract(io.BytesIO(reply.content)) or "{}")
    assert (recipe["peaks"], len(recipe["sections"])) == ("clip", 2)


@pytest.mark.server
@pytest.mark.parametrize("path", [STREAM, MUSIC])
async def test_pieces_with_sections_count_toward_the_concurrency(path: str, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(f"bob:{hash_key('bob')} concurrency=1\n")
    (tmp_path / "keys").chmod(0o600)
    body: dict[str, Any] = {"params": QUICK, "json": {"composition_plan": PLAN}, "headers": {"xi-api-key": "bob"}}
    async with make_client(api={"key_file": str(tmp_path / "keys")}) as (client, backend):
        backend.released.clear()
        first = asyncio.create_task(client.post(path, **body))
        await until(lambda: backend.num_running == 1)
        assert (await client.post(path, **body)).status_code == 429
        backend.released.set()
        assert (await first).status_code == 200
        assert (await client.post(path, **body)).status_code == 200


@pytest.mark.server
@pytest.mark.parametrize("path", [STREAM, MUSIC])
async def test_client_that_leaves_while_its_piece_is_added_cancels_it(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_all, is_adding, may_add = ClientJobs.add_all, threading.Event(), threading.Event()
    awaited: list[bool] = []

    def add_late(*args: Any) -> Any:
        awaited.extend(spec.is_awaited for spec in args[1])  # a drain does not requeue the jobs of such requests
        is_adding.set()
        may_add.wait()
        return add_all(*args)

    async with make_client(run_jobs=False) as (client, _):
        monkeypatch.setattr(ClientJobs, "add_all", add_late)
        sending = asyncio.create_task(client.post(path, params=QUICK, json={"composition_plan": PLAN}))
        await until(is_adding.is_set)
        sending.cancel()
        await asyncio.sleep(0.05)
        may_add.set()
        await asyncio.gather(sending, return_exceptions=True)
        jobs = (await client.get("/v1/status")).json()["jobs"]
        assert (jobs["queued"], jobs["cancelled"], awaited) == (0, 1, [True])


@pytest.mark.server
async def test_pieces_are_refused_while_files_cannot_be_stored(object_storage: ObjectStorage) -> None:
    storage = storage_args(object_storage, object_storage.make_bucket())
    piece: dict[str, Any] = {"params": QUICK, "json": {"composition_plan": PLAN}}
    async with make_client(hasty=True, storage=storage) as (client, _):
        for path in (MUSIC, STREAM):
            object_storage.proxy.faults = Faults(answer=(403, "AccessDenied"), only="PUT")
            for _ in range(2):  # the first piece meets the error, the second one would not start
                reply = await client.post(path, **piece)
                assert detail(reply, 503)["status"] == "service_unavailable"
                assert reply.headers["retry-after"] == "5"
            jobs = (await client.get("/v1/status")).json()["jobs"]
            assert (jobs["queued"], jobs["running"]) == (0, 0)
            object_storage.proxy.faults = Faults()
            async with asyncio.timeout(PATIENCE_S):
                while (reply := await client.post(path, **piece)).status_code == 503:  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
            assert reply.status_code == 200


async def test_piece_that_cannot_be_read_is_503(monkeypatch: pytest.MonkeyPatch) -> None:
    async def read(*_: object) -> AsyncGenerator[bytes]:
        raise StorageError("away")
        yield b""

    monkeypatch.setattr(LocalArtifacts, "read", read)
    async with make_client(hasty=True) as (client, _):
        reply = await client.post(MUSIC, params=QUICK, json={"composition_plan": PLAN})
        assert (detail(reply, 503)["message"], reply.headers["retry-after"]) == ("away", "5")


@pytest.mark.server
async def test_stream_begins_with_the_first_section() -> None:
    backend = PausingBackend(catalog=ModelCatalog([SHORT]))
    request = {"params": {"output_format": "pcm_8000"}, "json": {"prompt": "x", "music_length_ms": 12_000}}
    async with (
        serve_app(backend) as (port, _),
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE_S) as client,
    ):
        async with client.stream("POST", STREAM, **request) as reply:
            chunks = reply.aiter_bytes()
            whole = await anext(chunks)
            await until(lambda: backend.num_running == 1)
            backend.released.set()
            async for chunk in chunks:
                whole += chunk
        assert len(whole) == 12 * 8000 * 4
        backend.requests.clear()
        async with client.stream("POST", STREAM, **request) as reply:
            chunks = reply.aiter_bytes()
            await anext(chunks)
            await until(lambda: backend.num_running == 1)
            backend.error = GenerationError("broken")
            backend.released.set()
            with pytest.raises(httpx.RemoteProtocolError):
                async for _ in chunks:
                    pass
        backend.requests.clear()
        backend.error = None
        async with client.stream("POST", STREAM, **request) as reply:
            chunks = reply.aiter_bytes()  # if it were garbage, the response would be closed
            await anext(chunks)
            await until(lambda: backend.num_running == 1)
        await until(lambda: backend.num_cancelled == 1)


@pytest.mark.server
async def test_streamed_wav_file_states_its_length() -> None:
    async with with_models(SHORT) as (client, _):
        request = {"params": {"output_format": "wav_44100"}, "json": {"prompt": "x", "music_length_ms": 12_345}}
        reply = await client.post(STREAM, **request)
        with wave.open(io.BytesIO(reply.content)) as file:
            num_frames = file.getnframes()
            assert num_frames == int(12.345 * 44_100) == len(file.readframes(num_frames)) // 4


@pytest.mark.server
async def test_long_pieces_fail_and_are_refused_like_clips() -> None:
    async with with_models(SHORT) as (client, backend):
        long = {"prompt": "x", "music_length_ms": 20_000}
        backend.error = GenerationError("secret")
        assert "secret" not in detail(await client.post(MUSIC, json=long), 500)["message"]
    jobs = {"max_attempts": 1}
    async with make_client(ToneBackend(catalog=ModelCatalog([SHORT])), jobs=jobs) as (client, backend):
        backend.error = ModelUnavailableError("model short failed to load; the server's log says why")
        assert "failed to load" in detail(await client.post(MUSIC, json=long), 503)["message"]
    for error, status in ((StorageError("away"), 503), (StorageFullError("the disk is full"), 507)):
        # With the delay, the request does not see the refusal while it still takes the job for a queued one.
        failing = ToneBackend(catalog=ModelCatalog([SHORT]), error=error, delay_s=0.3)
        async with make_client(failing, jobs=jobs) as (client, _):
            assert detail(await client.post(MUSIC, json=long), status)["message"] == error.message
    limits = StreamLimits(max_open_per_client=0)
    async with make_client(ToneBackend(catalog=ModelCatalog([SHORT])), stream_limits=limits) as (client, _):
        for path in (MUSIC, STREAM):
            reply = await client.post(path, json=long)
            assert detail(reply, 429)["status"] == "too_many_concurrent_requests"
            assert int(reply.headers["retry-after"]) > 0
    async with make_client(ToneBackend(catalog=ModelCatalog([SHORT])), api={"max_long_s": 30}) as (client, _):
        ((field, message),) = faults(await client.post(MUSIC, json={"prompt": "x", "music_length_ms": 31_000}))
        assert (field, "at most 30 s" in message) == ("music_length_ms", True)


async def test_loop_asks_for_a_clip_without_a_seam(client: httpx.AsyncClient, backend: ToneBackend) -> None:
    await client.post(SOUND, json=BODIES[SOUND] | {"loop": True})
    assert backend.last.loop == "free"
    for value in (False, None):
        await client.post(SOUND, json=BODIES[SOUND] | {"loop": value})
        assert backend.last.loop is None


@pytest.mark.parametrize("path", [SOUND, MUSIC])
async def test_bodies_that_are_not_json_are_refused(client: httpx.AsyncClient, path: str) -> None:
    required = [["body", "text"]] if path == SOUND else [["body", "prompt"]]
    for content in (b"{", b"[]", b'"x"', b"\xff"):
        assert faults(await client.post(path, content=content, headers={"content-type": "application/json"}))
    for options in ({}, {"json": {}}):
        reply = await client.post(path, **options)
        assert faults(reply)
        assert [fault["loc"] for fault in reply.json()["detail"]] == required


async def test_unknown_paths_and_methods(client: httpx.AsyncClient) -> None:
    assert detail(await client.get(SOUND), 405)["status"] == "method_not_allowed"
    assert (await client.post("/elevenlabs/v1/nothing", json={})).status_code == 404


@pytest.mark.parametrize(
    ("error", "status", "word"),
    few(
        [
            (OverloadedError("full", retry_after_s=7), 429, "too_many_concurrent_requests"),
            (ModelUnavailableError("loading", retry_after_s=7), 503, "service_unavailable"),
            (GenerationError("secret"), 500, "internal_server_error"),
        ]
    ),
)
async def test_errors_have_the_form_of_the_original(
    client: httpx.AsyncClient, backend: ToneBackend, error: Exception, status: int, word: str
) -> None:
    backend.error = error
    for path in (SOUND, MUSIC, STREAM):
        reply = await client.post(path, json=BODIES[path])
        body = detail(reply, status)
        assert body["status"] == word
        assert "secret" not in body["message"]
        assert reply.headers.get("retry-after") == (None if status == 500 else "7")


async def test_keys_are_accepted_in_three_headers() -> None:
    async with make_client(api={"key_hashes": [hash_key("key-1")]}) as (client, _):
        for headers in ({"xi-api-key": "key-1"}, {"Authorization": "Bearer key-1"}, {"Authorization": "Key key-1"}):
            for path, body in (*BODIES.items(), ("/v1/audio/generations", {"prompt": "x", "duration": 1})):
                assert (await client.post(path, params=QUICK, json=body, headers=headers)).status_code == 200
            assert (await client.get("/v1/user", headers=headers)).status_code == 200
        for headers in ({}, {"xi-api-key": "key-2"}, {"xi-api-key": ""}, {"xi-api-key": "x" * 5000}):
            for path, body in BODIES.items():
                refused = detail(await client.post(path, json=body, headers=headers), 401)
                assert refused["status"] == "invalid_api_key"
            detail(await client.get("/v1/user", headers=headers), 401)
        assert detail(await client.get("/v1/models", headers={"xi-api-key": "no"}), 401)["status"] == "invalid_api_key"
        assert "error" in (await client.get("/v1/models")).json()


async def test_list_of_models_depends_on_the_header(client: httpx.AsyncClient) -> None:
    answers = [await client.get("/v1/models", headers=headers) for headers in ({}, {"xi-api-key": "any"})]
    assert ["xi-api-key" in answer.headers["vary"] for answer in answers] == [True, True]
    ours, theirs = (answer.json() for answer in answers)
    assert [model["model_id"] for model in theirs] == [model["id"] for model in ours["data"]]
    assert {"name", "languages", "can_do_text_to_speech"} <= theirs[0].keys()
    assert (await client.get("/elevenlabs/v1/models")).json() == theirs
    for prefix in ("/sa3", "/vllm"):
        listed = (await client.get(f"{prefix}/v1/models", headers={"xi-api-key": "any"})).json()
        assert listed["object"] == "list"


@pytest.mark.server
async def test_a_client_that_leaves_cancels_its_generation() -> None:
    backend = ToneBackend()
    backend.released.clear()
    async with serve_app(backend) as (port, _), httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        with pytest.raises(httpx.TimeoutException):
            await client.post(SOUND, json=BODIES[SOUND], timeout=0.5)
        for _ in range(100):
            if backend.num_cancelled:
                break
            with pytest.raises(httpx.TimeoutException):
                await client.post(SOUND, json=BODIES[SOUND], timeout=0.1)
        assert backend.num_cancelled


@pytest.mark.parametrize(
    ("path", "names"),
    [
        (SOUND, {"prompt": "text", "duration": "duration_seconds", "cfg_scale": "prompt_influence"}),
        (MUSIC, {"prompt": "prompt", "duration": "music_length_ms"}),
    ],
)
async def test_refusals_by_the_model_have_the_name_of_the_field(
    client: httpx.AsyncClient, backend: ToneBackend, path: str, names: dict[str, str]
) -> None:
    for field, name in names.items():
        for message, expected in ((f"{field} must be small", "must be small"), ("a clip of 9 s", "a clip of 9 s")):
            backend.error = InvalidRequestError(message, field=field)
            ((found, sentence),) = faults(await client.post(path, json=BODIES[path]))
            assert (found, sentence.replace(":", "")) == (name, f"{name} {expected}")
