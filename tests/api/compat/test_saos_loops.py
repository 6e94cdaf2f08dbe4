"""Loops of the Stable Audio Open Small dialect: tempo, bars, length of the file, prompts and metadata."""

from __future__ import annotations

import time
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stable_audio_serve.api.compat.stable_audio_open_small.loops import rewrite_prompt
from tests.api.compat.saos import LOOP_KEYS, WINDOW_SAMPLES, expect_base64, expect_wav
from tests.api.compat.serving import make_client
from tests.audio_files import make_audio_file
from tests.backends import ToneBackend

pytestmark = pytest.mark.server

URL = "/generate/loop"
NOT_DRUMS = "melody, harmony, pitched instruments, vocals, singing"
NOT_INSTRUMENTS = "drums, percussion, kick, snare, hi-hat"


async def post(client: httpx.AsyncClient, kind: str, fields: dict[str, Any], *, url: str = URL) -> httpx.Response:
    if kind == "json":
        return await client.post(url, json=fields)
    texts = {name: str(value) for name, value in fields.items()}
    if kind == "form":
        return await client.post(url, data=texts)
    return await client.post(url, files={name: (None, text) for name, text in texts.items()})


kinds = pytest.mark.parametrize("kind", ["json", "form", "multipart"])


@pytest.mark.parametrize(
    ("bpm", "bars", "seconds", "samples"),
    [
        (74, 2, 6.49, 286_054),
        (90, 4, 10.67, 470_400),
        (128, 4, 7.5, 330_750),
        (140, 4, 6.86, 302_400),
        (170, 8, 11.29, 498_070),
    ],
)
async def test_documented_tempos_give_the_documented_lengths(
    client: httpx.AsyncClient, bpm: int, bars: int, seconds: float, samples: int
) -> None:
    form = {"prompt": f"techno {bpm}bpm", "seed": "9"}
    pcm = expect_wav(await client.post(URL, data=form), name=rf"loop_auto_{bpm}bpm_{bars}bars_9\.wav")
    assert len(pcm) == samples
    pcm, metadata = expect_base64(await client.post(URL, data={**form, "return_format": "base64"}))
    assert len(pcm) == samples
    assert (metadata["detected_bpm"], metadata["bars"]) == (bpm, bars)
    assert metadata["loop_duration_seconds"] == metadata["calculated_duration_seconds"] == seconds
    assert metadata["available_audio_seconds"] == 11.89
    assert metadata["seconds_per_bar"] == round(240 / bpm, 2)


@kinds
@pytest.mark.parametrize("prefix", ["", "/saos"])
async def test_all_body_types_give_the_same_loop(
    client: httpx.AsyncClient, backend: ToneBackend, kind: str, prefix: str
) -> None:
    fields = {
        "prompt": "aggressive techno drums 140bpm",
        "loop_type": "drums",
        "bars": 2,
        "style_strength": 0.5,
        "steps": 12,
        "cfg_scale": 1.5,
        "seed": 42,
        "return_format": "base64",
        "unknown": "ignored",
    }
    pcm, metadata = expect_base64(await post(client, kind, fields, url=prefix + URL))
    assert len(pcm) == 2 * 240 * 44_100 // 140
    assert set(metadata) == LOOP_KEYS
    assert (
        metadata
        | {
            "prompt": "aggressive techno drums 140bpm",
            "original_prompt": "aggressive techno drums 140bpm",
            "negative_prompt": NOT_DRUMS,
            "loop_type": "drums",
            "detected_bpm": 140,
            "bars": 2,
            "loop_duration_seconds": 3.43,
            "calculated_duration_seconds": 3.43,
            "available_audio_seconds": 11.89,
            "seconds_per_bar": 1.71,
            "style_transfer": False,
            "style_strength": None,
            "model_type": "standard",
            "steps": 12,
            "cfg_scale": 1.5,
            "seed": 42,
            "sample_rate": 44_100,
            "device": "cpu",
        }
        == metadata
    )
    request = backend.last
    assert (request.prompt, request.negative_prompt) == (fields["prompt"], NOT_DRUMS)
    assert (request.steps, request.cfg_scale, request.seed, request.init_audio) == (12, 1.5, 42, None)
    assert request.duration_s * 44_100 == WINDOW_SAMPLES


@pytest.mark.parametrize("kind", ["application/json", "Application/JSON; charset=utf-8", "application/x+json"])
async def test_every_json_content_type_is_accepted(client: httpx.AsyncClient, kind: str) -> None:
    reply = await client.post(URL, content=b'{"prompt": "x 120bpm", "bars": 1}', headers={"content-type": kind})
    assert len(expect_wav(reply, name=r"loop_auto_120bpm_1bars_\d+\.wav")) == 88_200


async def test_multipart_boundary_that_looks_like_json(client: httpx.AsyncClient) -> None:
    body = b'--/json\r\nContent-Disposition: form-data; name="prompt"\r\n\r\nx 120bpm\r\n--/json--\r\n'
    headers = {"content-type": 'multipart/form-data; boundary="/json"'}
    expect_wav(await client.post(URL, content=body, headers=headers), name=r"loop_auto_120bpm_4bars_\d+\.wav")


@kinds
async def test_unset_fields_have_the_documented_defaults(
    client: httpx.AsyncClient, backend: ToneBackend, kind: str
) -> None:
    reply = await post(client, kind, {"prompt": "house 120bpm"})
    expect_wav(reply, name=r"loop_auto_120bpm_4bars_\d+\.wav")
    request = backend.last
    assert (request.prompt, request.negative_prompt) == ("house 120bpm", "")
    assert (request.steps, request.cfg_scale, request.init_noise_level) == (8, 6.0, 1.0)


@pytest.mark.parametrize(
    ("bars", "bpm", "taken"),
    [
        *[(bars, 120, bars) for bars in (1, 2, 4)],
        (8, 170, 8),
        (8, 120, 4),  # 8 bars last 16 s, so the number of bars is halved
        (8, 150, 8),  # 12.8 s: allowed, because it exceeds the model's longest clip by less than a second
        (8, 60, 4),  # halved only once: the 16 s that remain are cut to the model's longest clip
        *[(bars, 128, 4) for bars in ("", "auto", " AUTO ", None)],
        ("4", 140, 4),
    ],
)
async def test_number_of_bars_sets_the_length(client: httpx.AsyncClient, bars: Any, bpm: int, taken: int) -> None:
    fields = {"prompt": f"x {bpm}bpm", "return_format": "base64", "bars": bars}
    pcm, metadata = expect_base64(await client.post(URL, json=fields))
    calculated = taken * 240 / bpm
    assert metadata["bars"] == taken
    assert metadata["calculated_duration_seconds"] == round(calculated, 2)
    assert metadata["loop_duration_seconds"] == round(min(calculated, WINDOW_SAMPLES / 44_100), 2)
    assert len(pcm) == min(int(calculated * 44_100), WINDOW_SAMPLES)


@pytest.mark.parametrize(
    ("prompt", "tempo"),
    [
        ("x 140bpm", 140),
        ("90 BPM x", 90),
        ("x 128  bpm", 128),
        ("x 127.5bpm", 5),
        ("100bpm or 120bpm", 100),
        ("x 9999bpm", 9999),
        ("x 1bpm", 1),
    ],
)
async def test_tempo_of_the_prompt(client: httpx.AsyncClient, prompt: str, tempo: int) -> None:
    _, metadata = expect_base64(await client.post(URL, data={"prompt": prompt, "return_format": "base64"}))
    assert metadata["detected_bpm"] == tempo


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tempo=st.integers(1, 400),
    bars=st.sampled_from([None, 1, 2, 4, 8]),
    kind=st.sampled_from(["json", "form", "multipart"]),
)
async def test_lengths_over_http(client: httpx.AsyncClient, tempo: int, bars: int | None, kind: str) -> None:
    fields = {"prompt": f"loop {tempo} bpm", **({"bars": bars} if bars else {})}
    pcm = expect_wav(await post(client, kind, fields), name=r".*")
    window_s = WINDOW_SAMPLES / 44_100
    if bars is None:
        bars = next((count for count in (8, 4, 2, 1) if count * 240 / tempo <= window_s), 1)
    elif bars * 240 / tempo > window_s + 1:
        bars = max(1, bars // 2)
    assert len(pcm) == min(bars * 240 * 44_100 // tempo, WINDOW_SAMPLES)


async def test_loop_is_the_start_of_the_clip_at_full_scale(client: httpx.AsyncClient) -> None:
    fields = {"prompt": "x 120bpm", "seed": 3}
    loop = expect_wav(await client.post(URL, data=fields), name=r".*")
    whole = expect_wav(await client.post("/generate", json=fields), name=r".*")
    np.testing.assert_array_equal(loop, whole[: len(loop)])


@pytest.mark.parametrize(
    ("loop_type", "prompt", "rewritten", "negative"),
    [
        ("auto", "funky drums 120bpm", "funky drums 120bpm", ""),
        ("whatever", "funky drums 120bpm", "funky drums 120bpm", ""),
        ("drums", "techno 140bpm", "techno 140bpm drum loop", NOT_DRUMS),
        ("drums", "techno Drums 140bpm", "techno Drums 140bpm", NOT_DRUMS),
        ("drums", "DRUM machine 140bpm", "DRUM machine 140bpm", NOT_DRUMS),
        ("instruments", "deep techno bass 140bpm", "deep techno bass 140bpm", NOT_INSTRUMENTS),
        ("instruments", "bass and drums 140bpm", "bass and 140bpm", NOT_INSTRUMENTS),
        ("instruments", "drum loop 140bpm", "loop 140bpm", NOT_INSTRUMENTS),
        ("instruments", "bass, Drums, keys 140bpm", "bass, keys 140bpm", NOT_INSTRUMENTS),
        ("instruments", "140bpm keys, drums", "140bpm keys", NOT_INSTRUMENTS),
        ("instruments", "drum and drums 140bpm", "and 140bpm", NOT_INSTRUMENTS),
    ],
)
async def test_loop_type_rewrites_the_prompt(
    client: httpx.AsyncClient, backend: ToneBackend, loop_type: str, prompt: str, rewritten: str, negative: str
) -> None:
    form = {"prompt": prompt, "loop_type": loop_type, "return_format": "base64", "negative_prompt": "not a field"}
    _, metadata = expect_base64(await client.post(URL, data=form))
    assert (metadata["prompt"], metadata["original_prompt"]) == (rewritten, prompt)
    assert metadata["negative_prompt"] == negative
    assert metadata["loop_type"] == (loop_type if loop_type != "whatever" else "auto")
    assert (backend.last.prompt, backend.last.negative_prompt) == (rewritten, negative)


@given(st.text(), st.sampled_from(["drums", "instruments", "auto"]))
def test_any_prompt_can_be_rewritten(prompt: str, loop_type: str) -> None:
    rewritten, _ = rewrite_prompt(prompt, loop_type)
    if loop_type == "drums":
        assert "drum" in rewritten.casefold()
    if loop_type == "instruments":
        assert "drum" not in rewritten.casefold() or "drum" not in prompt.casefold()


@pytest.mark.parametrize("rest", ["a" * 100_000, "a1" * 50_000, " " * 100_000, " ," * 50_000, "drum" * 25_000])
def test_hostile_prompts_are_rewritten_quickly(rest: str) -> None:
    started_at = time.thread_time()
    rewrite_prompt(f"120bpm drum {rest}", "instruments")
    assert time.thread_time() - started_at < 2  # CPU seconds; a quadratic search would take far longer


async def test_loop_in_the_style_of_an_upload(client: httpx.AsyncClient, backend: ToneBackend) -> None:
    form = {"prompt": "x 120bpm", "bars": "2", "style_strength": "0.4", "return_format": "base64"}
    upload = make_audio_file(duration_s=1.0, rate_hz=22_050, channels=2)
    pcm, metadata = expect_base64(await client.post(URL, data=form, files={"audio_file": ("a.wav", upload)}))
    assert len(pcm) == 2 * 240 * 44_100 // 120
    assert set(metadata) == LOOP_KEYS
    assert (metadata["style_transfer"], metadata["style_strength"]) == (True, 0.4)
    request = backend.last
    assert (request.init_noise_level, request.conditioned_total_s) == (0.4, 12.0)
    assert request.init_audio is not None
    assert request.init_audio.samples.shape == (1, 22_050)


async def test_empty_file_input_is_ignored(client: httpx.AsyncClient, backend: ToneBackend) -> None:
    empty = b'--B\r\nContent-Disposition: form-data; name="audio_file"; filename=""\r\n\r\n\r\n'
    prompt = b'--B\r\nContent-Disposition: form-data; name="prompt"\r\n\r\nx 120bpm\r\n--B--\r\n'
    headers = {"content-type": "multipart/form-data; boundary=B"}
    reply = await client.post(URL, content=empty + prompt, headers=headers)
    expect_wav(reply, name=r"loop_auto_120bpm_4bars_\d+\.wav")
    assert backend.last.init_audio is None
    text = b'--B\r\nContent-Disposition: form-data; name="audio_file"\r\n\r\n\r\n'
    form = "application/x-www-form-urlencoded"
    for body, kind in ((text + prompt, headers["content-type"]), (b"prompt=x+120bpm&audio_file=", form)):
        assert (await client.post(URL, content=body, headers={"content-type": kind})).status_code == 200
        assert backend.last.init_audio is None
    for value in (None, "", "a.wav", "UklGRg=="):  # JSON has no uploads
        assert (await client.post(URL, json={"prompt": "x 120bpm", "audio_file": value})).status_code == 200
        assert backend.last.init_audio is None


@pytest.mark.parametrize(("bpm", "bars", "samples"), [(120, 2, 176_400), (40, 1, 220_500), (200, 4, 211_680)])
async def test_shorter_window_holds_fewer_bars(bpm: int, bars: int, samples: int) -> None:
    async with make_client(dialects={"model": "demo"}) as (client, backend):  # demo's longest clip is 5 s
        reply = await client.post(URL, data={"prompt": f"x {bpm}bpm", "return_format": "base64"})
        pcm, metadata = expect_base64(reply)
    assert (metadata["bars"], len(pcm)) == (bars, samples)
    assert metadata["available_audio_seconds"] == 5.0
    assert backend.last.duration_s == 5.0


@pytest.mark.parametrize("kind", ["form", "multipart"])
async def test_first_of_equal_fields_counts(client: httpx.AsyncClient, backend: ToneBackend, kind: str) -> None:
    fields = {"prompt": ["first 120bpm", "second 90bpm"], "bars": ["2", "no number"]}
    form = [(name, (None, value)) for name, values in fields.items() for value in values]
    reply = await (client.post(URL, data=fields) if kind == "form" else client.post(URL, files=form))
    expect_wav(reply, name=r"loop_auto_120bpm_2bars_\d+\.wav")
    assert backend.last.prompt == "first 120bpm"
