"""Riffs of the Stable Audio Open Small dialect: valid file names, choice of a riff, time stretching."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
import structlog
from fastapi import FastAPI

from stable_audio_serve.api.compat.stable_audio_open_small.riffs import RiffLibrary
from stable_audio_serve.api.service import resolve_seed
from tests.api.compat.saos import RIFF_KEYS, expect_base64, expect_refusal, expect_wav
from tests.api.compat.serving import connect_anew, keep_app, make_client
from tests.audio_files import make_audio_file
from tests.backends import ToneBackend

pytestmark = pytest.mark.server

URL = "/generate/loop-with-riff"

MATCHING = {
    "gsharp_80bpm_4.wav": ("gsharp", 80),
    "fsharp_83_bpm_1.wav": ("fsharp", 83),
    "f_91bpm.wav": ("f", 91),
    "F_110BPM_3.WAV": ("f", 110),
    "Asharp_070bpm.wav": ("asharp", 70),
    "c_120_bpm.wav": ("c", 120),
}
SKIPPED = [
    "bb_80bpm.wav",
    "aflat_80bpm.wav",
    "h_80bpm.wav",
    "f_80.wav",
    "f80bpm.wav",
    "f_80bpm_.wav",
    "f_80bpm_x.wav",
    "f_0bpm.wav",
    "x f_80bpm.wav",
    "f_80bpm.wav.wav",
    "fsharpsharp_80bpm.wav",
    ".wav",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with three riff files in F and one in G sharp. Their channels and sample rates differ."""
    folder = tmp_path_factory.mktemp("riffs")
    for name, hz, duration_s, rate_hz, channels in (
        ("f_91bpm_1.wav", 300, 4.0, 44_100, 2),
        ("f_110bpm_3.wav", 400, 30.0, 44_100, 1),
        ("f_60bpm_2.wav", 500, 12.0, 22_050, 2),
        ("gsharp_120bpm.wav", 600, 20.0, 44_100, 2),
        ("notes.wav", 700, 1.0, 44_100, 1),
    ):
        wav = make_audio_file(duration_s=duration_s, rate_hz=rate_hz, channels=channels, hz=hz)
        (folder / name).write_bytes(wav)
    return folder


@pytest.fixture(scope="module")
def kept(folder: Path) -> Iterator[tuple[FastAPI, ToneBackend]]:
    with keep_app(dialects={"riff_dir": str(folder)}) as kept:
        yield kept


@pytest.fixture
async def served(kept: tuple[FastAPI, ToneBackend]) -> AsyncIterator[tuple[httpx.AsyncClient, ToneBackend]]:
    async with connect_anew(kept) as pair:
        yield pair


def pitch_hz(samples: np.ndarray, rate_hz: int) -> float:
    middle = samples[0, len(samples[0]) // 4 : len(samples[0]) * 3 // 4]
    spectrum = np.abs(np.fft.rfft(middle * np.hanning(len(middle)), n=8 * len(middle)))
    return float(spectrum.argmax() * rate_hz / (8 * len(middle)))


@pytest.mark.parametrize("name", MATCHING)
def test_valid_names_are_recognized(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    key, tempo = MATCHING[name]
    riff = {"filename": name, "original_bpm": tempo, "description": f"{key} riff at {tempo} BPM"}
    assert RiffLibrary(tmp_path).describe() == {
        "available_keys": [key],
        "total_keys": 1,
        "riff_details": {key: [riff]},
    }


@pytest.mark.parametrize("name", SKIPPED)
def test_other_names_are_skipped_with_a_warning(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with structlog.testing.capture_logs() as lines:
        assert RiffLibrary(tmp_path).describe() == {"available_keys": [], "total_keys": 0, "riff_details": {}}
    if name != ".wav":  # hidden files are skipped without a warning
        assert [(line["log_level"], line["file"]) for line in lines] == [("warning", name)]


def test_other_files_and_folders_are_ignored(tmp_path: Path) -> None:
    (tmp_path / "f_80bpm.mp3").touch()
    (tmp_path / "f_80bpm.wav").mkdir()
    with structlog.testing.capture_logs() as lines:
        assert RiffLibrary(tmp_path).describe()["total_keys"] == 0
    assert lines == []


@pytest.mark.parametrize("prefix", ["", "/saos"])
async def test_list_of_riffs(served: tuple[httpx.AsyncClient, ToneBackend], prefix: str) -> None:
    reply = await served[0].get(f"{prefix}/riffs/available")
    assert reply.status_code == 200
    body = reply.json()
    assert (body["available_keys"], body["total_keys"]) == (["f", "gsharp"], 2)
    assert [riff["original_bpm"] for riff in body["riff_details"]["f"]] == [60, 91, 110]
    assert body["riff_details"]["f"][2] == {
        "filename": "f_110bpm_3.wav",
        "original_bpm": 110,
        "description": "f riff at 110 BPM",
    }


async def test_missing_folder_is_an_empty_library(tmp_path: Path) -> None:
    async with make_client(dialects={"riff_dir": str(tmp_path / "absent")}) as (client, _):
        reply = await client.get("/riffs/available")
        assert (reply.status_code, reply.json()) == (200, {"available_keys": [], "total_keys": 0, "riff_details": {}})
        reply = await client.post(URL, data={"prompt": "x 120bpm", "key": "f"})
    assert reply.status_code == 400
    assert reply.json() == {"error": "No riffs available for key 'f'", "available_keys": []}


async def test_unknown_key_error_lists_the_available_keys(served: tuple[httpx.AsyncClient, ToneBackend]) -> None:
    reply = await served[0].post(URL, data={"prompt": "x 120bpm", "key": "csharp"})
    assert reply.status_code == 400
    assert reply.json() == {"error": "No riffs available for key 'csharp'", "available_keys": ["f", "gsharp"]}


@pytest.mark.parametrize(("key", "multipart"), [("gsharp", False), ("GSharp", True)])
async def test_loop_from_a_riff(served: tuple[httpx.AsyncClient, ToneBackend], key: str, multipart: bool) -> None:
    client, backend = served
    form = {"prompt": "dark techno drums 140bpm", "key": key, "seed": "8"}
    sent = {"files": {name: (None, value) for name, value in form.items()}} if multipart else {"data": form}
    reply = await client.post(URL, **sent)
    pcm = expect_wav(reply, name=rf"riff_{key}_instruments_140bpm_4bars_8\.wav")
    assert len(pcm) == 302_400
    request = backend.last
    assert (request.prompt, request.init_noise_level) == ("dark techno 140bpm", 0.8)
    assert (request.steps, request.cfg_scale, request.seed) == (8, 1.0, 8)
    assert request.negative_prompt == "drums, percussion, kick, snare, hi-hat"
    assert request.init_audio is not None
    assert request.init_audio.samples.shape == (1, 12 * 44_100)  # the stretched riff is longer than 12 s, so it is cut


async def test_metadata(served: tuple[httpx.AsyncClient, ToneBackend]) -> None:
    form = {
        *{"prompt": "x 130bpm", "key": "F", "loop_type": "drums", "bars": "2", "style_strength": "0.3"}.items(),
        *{"steps": "20", "cfg_scale": "3", "seed": "1", "return_format": "base64"}.items(),
    }
    pcm, metadata = expect_base64(await served[0].post(URL, data=dict(form)))
    assert len(pcm) == 2 * 240 * 44_100 // 130
    assert set(metadata) == RIFF_KEYS
    expected = {
        "key": "F",
        "source": "personal_riff_library",
        "style_transfer": True,
        "style_strength": 0.3,
        "loop_type": "drums",
        "prompt": "x 130bpm drum loop",
        "original_prompt": "x 130bpm",
        "detected_bpm": 130,
        "bars": 2,
        "loop_duration_seconds": 3.69,
        "steps": 20,
        "cfg_scale": 3.0,
        "seed": 1,
    }
    assert expected.items() <= metadata.items()


@pytest.mark.parametrize(
    ("seed", "hz", "own_bpm", "own_s", "rate_hz", "bpm"),
    [(0, 500, 60, 12.0, 22_050, 170), (1, 300, 91, 4.0, 44_100, 70), (5, 400, 110, 30.0, 44_100, 100)],
)
@pytest.mark.server
async def test_seed_selects_the_riff_and_the_pitch_stays(
    served: tuple[httpx.AsyncClient, ToneBackend],
    seed: int,
    hz: float,
    own_bpm: int,
    own_s: float,
    rate_hz: int,
    bpm: int,
) -> None:
    client, backend = served
    form = {"prompt": f"x {bpm}bpm", "key": "f", "seed": str(seed)}
    assert (await client.post(URL, data=form)).status_code == 200
    source = backend.last.init_audio
    assert source is not None
    assert source.sample_rate_hz == rate_hz
    expected_s = min(own_s * own_bpm / bpm, 12.0)
    assert source.samples.shape[1] == pytest.approx(expected_s * rate_hz, abs=2)
    assert pitch_hz(source.samples, rate_hz) == pytest.approx(hz, rel=0.005)


def test_random_seeds_select_riffs_uniformly(folder: Path) -> None:
    library = RiffLibrary(folder)
    taken = Counter(library.choose("f", seed=resolve_seed(-1)).tempo_bpm for _ in range(3000))
    assert set(taken) == {60, 91, 110}
    assert min(taken.values()) > 800


@pytest.mark.parametrize(("bars", "bpm", "samples"), [("8", 120, 352_800), ("", 74, 286_054)])
async def test_bars_follow_the_rules_of_the_loop(
    served: tuple[httpx.AsyncClient, ToneBackend], bars: str, bpm: int, samples: int
) -> None:
    form = {"prompt": f"x {bpm}bpm", "key": "f", "bars": bars}
    assert len(expect_wav(await served[0].post(URL, data=form), name=r".*")) == samples


@pytest.mark.parametrize("bpm", [7, 2000, 10**9])
async def test_tempo_too_far_from_the_riffs_is_refused(served: tuple[httpx.AsyncClient, ToneBackend], bpm: int) -> None:
    reply = await served[0].post(URL, data={"prompt": f"x {bpm}bpm", "key": "gsharp"})
    if bpm == 10**9:
        expect_refusal(reply, "prompt: 8 bars at 1000000000bpm are shorter than one sample")
    else:
        expect_refusal(reply, f"prompt: a riff of 120bpm can be played at 7.5 to 1920bpm, not {bpm}")


@pytest.mark.parametrize(
    ("key", "status"), [("GSHARP", 200), ("g\u017fharp", 400), ("\uff46", 400), ("f\x00", 400), ("f\r\nx: y", 400)]
)
async def test_invalid_key_is_refused(served: tuple[httpx.AsyncClient, ToneBackend], key: str, status: int) -> None:
    reply = await served[0].post(URL, data={"prompt": "x 120bpm", "key": key})
    assert reply.status_code == status, reply.text
    assert "x" not in reply.headers


async def test_unreadable_riff_is_a_server_error(tmp_path: Path) -> None:
    (tmp_path / "f_80bpm.wav").write_bytes(b"RIFF" + bytes(100))
    (tmp_path / "g_80bpm.wav").touch()
    async with make_client(dialects={"riff_dir": str(tmp_path)}) as (client, _):
        (tmp_path / "g_80bpm.wav").unlink()
        for key in ("f", "g"):
            reply = await client.post(URL, data={"prompt": "x 120bpm", "key": key})
            assert reply.status_code == 500
            request_id = reply.headers["x-request-id"]
            assert reply.json() == {"success": False, "error": f"generation failed; request id {request_id}"}
