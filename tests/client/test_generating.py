from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile

from stable_audio_serve.client import Audio, Result
from stable_audio_serve.core import errors
from tests.audio_files import make_audio_file
from tests.client.conftest import ASYNC, IN_ONE_LOOP, Caller, Served, serve

pytestmark = [pytest.mark.server, IN_ONE_LOOP]


def read(content: bytes) -> tuple[np.ndarray, int]:
    return soundfile.read(io.BytesIO(content), always_2d=True)


async def test_generate_returns_a_clip_with_its_metadata(served: Served, connect: Callable[..., Caller]) -> None:
    call = connect(served.url)
    take: Result = await call("generate", "rain", duration=0.5, seed=7, model="medium")
    audio, rate_hz = read(take.content)
    assert (len(audio), rate_hz, take.sample_rate_hz) == (22050, 44100, 44100)
    assert (take.seed, take.model, take.clips[0].file_name) == (7, "medium", "stable-audio-3-medium.wav")
    assert take.clips[0].peak == pytest.approx(np.abs(audio).max(), abs=1e-3)
    assert not take.clips[0].is_silent
    assert take.timings_ms["denoise"] == 2.0
    assert served.backend.last.duration_s == 0.5


async def test_this_machine_is_reached_without_the_proxy(
    served: Served, connect: Callable[..., Caller], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # no server listens there
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for url in (served.url, served.url.replace("127.0.0.1", "localhost")):
        assert await connect(url)("models")
    with pytest.raises(errors.UnreachableError, match=r"refused|attempts failed"):  # by the proxy
        await connect("http://audio.example.com")("models")


@ASYNC
async def test_fields_choose_the_encoding_of_files(served: Served, connect: Callable[..., Caller]) -> None:
    call = connect(served.url)
    take: Result = await call("generate", "rain", duration=0.5, bit_depth="float", sample_rate=48_000)
    info = soundfile.info(io.BytesIO(take.content))
    assert (info.subtype, info.samplerate, take.sample_rate_hz) == ("FLOAT", 48_000, 48_000)
    source = make_audio_file(duration_s=1.0)
    small = await call("vary", source, "rain", duration=1, response_format="opus", bitrate=32)
    assert len(small.content) < 8000
    with pytest.raises(errors.InvalidRequestError, match="bitrate"):
        await call("generate", "rain", response_format="flac", bitrate=128)


async def test_clips_are_recreated_from_recipes_and_files(
    served: Served, connect: Callable[..., Caller], *, tmp_path: Path
) -> None:
    call = connect(served.url)
    source = make_audio_file(duration_s=1.0)
    take: Result = await call("vary", source, "rain", duration=0.5, batch_size=2, response_format="flac")
    job = await call("jobs.submit_variation", source, "rain", duration=0.5, seed=take.seed, response_format="flac")
    fetched = await call("jobs.fetch", await call("jobs.wait", job.id))
    assert fetched.clips[0].recipe == take.clips[0].recipe
    for clip in take.clips:
        for item in (clip, clip.recipe):
            again = await call("replay", item, sources=[b"another file", source])
            # The replay is not "exact", because the test backend reports no device.
            assert (again.replay, again.content) == ("close", clip.content)
            assert again.clips[0].recipe == clip.recipe
        with pytest.raises(errors.InvalidRequestError, match=clip.recipe["init_audio"]["sha256"]):
            await call("replay", clip)
    long = {**take.clips[0].recipe, "prompt": "雨" * 100_000}  # 600 kB in JSON, which escapes each character
    assert (await call("replay", long, sources=[source])).seed == take.seed
    file = tmp_path / "source.wav"
    file.write_bytes(source)
    for one in (source, file, str(file), io.BytesIO(source), replace(take.clips[0], content=source)):
        assert (await call("replay", take.clips[0], sources=one)).seed == take.seed
    text = await call("generate", "rain", duration=0.5)
    assert (await call("replay", text.clips[0].recipe)).content == text.content
    assert text.replay is None
    with pytest.raises(errors.InvalidRequestError, match="recipe"):
        await call("replay", source)


async def test_fields_without_effect_are_reported(served: Served, connect: Callable[..., Caller]) -> None:
    served.backend.prompt_chars = 1012
    call = connect(served.url)
    take: Result = await call("generate", "x" * 10_400, duration=0.5)
    job = await call("jobs.submit", "x" * 10_400, duration=0.5)
    fetched: Result = await call("jobs.fetch", await call("jobs.wait", job.id))
    assert take.warnings == fetched.warnings == ("prompt: the model reads the first 1012 characters only",)
    assert take.clips[0].recipe is None  # the header has no room for a recipe with this prompt
    assert (await call("generate", "rain", duration=0.5)).warnings == ()


@ASYNC
async def test_variations_are_returned_in_order(served: Served, connect: Callable[..., Caller]) -> None:
    take = await connect(served.url)(
        "generate", "rain", duration=0.5, seed=7, batch_size=3, response_format="flac", manifest=True
    )
    assert [clip.seed for clip in take.clips] == [7, 8, 9]
    assert [clip.file_name[-7:] for clip in take.clips] == ["01.flac", "02.flac", "03.flac"]
    for clip in take.clips:
        audio, rate_hz = read(clip.content)
        loudest = np.abs(np.fft.rfft(audio[:, 0])).argmax() * rate_hz / len(audio)
        assert loudest == pytest.approx(100 + clip.seed, abs=2)
    assert [entry["seed"] for entry in take.manifest["files"]] == [7, 8, 9]


@pytest.mark.parametrize("kind", ["bytes", "path", "text", "file", "clip"])
async def test_a_source_may_be_bytes_a_path_a_file_or_a_clip(
    kind: str, served: Served, connect: Callable[..., Caller], *, tmp_path: Path
) -> None:
    call = connect(served.url)
    path = tmp_path / "source.wav"
    path.write_bytes(make_audio_file(duration_s=1.0))
    clip = (await call("generate", "a", duration=1.0)).clips[0]
    make: dict[str, Callable[[], Audio]] = {
        "bytes": path.read_bytes,
        "path": lambda: path,
        "text": lambda: str(path),
        "file": lambda: path.open("rb"),
        "clip": lambda: clip,
    }
    source = make[kind]
    await call("vary", source(), "rain", duration=1.0, init_noise_level=0.25)
    assert served.backend.last.init_noise_level == 0.25
    assert served.backend.last.init_audio is not None
    await call("inpaint", source(), "rain", regions=[(0.25, 0.5), (0.75, 1.0)], duration=1.0)
    assert served.backend.last.inpaint_regions_s == ((0.25, 0.5), (0.75, 1.0))
    assert served.backend.last.keep == "source"
    euler = {"sampler_type": "euler"}
    await call("extend", source(), "rain", extend_before_s=0.5, extend_after_s=1.5, sampler_kwargs=euler, keep="model")
    assert served.backend.last.keep == "model"
    assert served.backend.last.inpaint_regions_s == ((0.0, 0.5), (1.5, 3.0))
    assert (served.backend.last.duration_s, served.backend.last.sampler) == (3.0, "euler")


async def test_models_are_listed(served: Served, connect: Callable[..., Caller]) -> None:
    models = await connect(served.url)("models")
    assert [model.name for model in models] == ["small-sfx", "small-music", "medium", "demo"]
    assert [model.name for model in models if model.is_default] == ["small-sfx"]
    assert models[2].max_duration_s == served.backend.catalog.resolve("medium").max_duration_s


@ASYNC
@pytest.mark.parametrize(
    ("controls", "kind", "field"),
    [
        ({"steps": 0}, errors.InvalidRequestError, "steps"),
        ({"duration": 1e6}, errors.InvalidRequestError, "duration"),
        ({"model": "gpt"}, errors.InvalidRequestError, "model"),
        ({"sampler_kwargs": {"prompt": "no"}}, errors.InvalidRequestError, "sampler_kwargs"),
    ],
)
async def test_an_invalid_request_names_its_field(
    controls: dict[str, object],
    kind: type[errors.StableAudioError],
    field: str,
    *,
    served: Served,
    connect: Callable[..., Caller],
) -> None:
    with pytest.raises(kind) as caught:
        await connect(served.url)("generate", "rain", **controls)
    assert caught.value.field == field
    assert field in caught.value.message
    assert not served.backend.requests


@ASYNC
async def test_a_message_names_its_field_once(served: Served, connect: Callable[..., Caller]) -> None:
    with pytest.raises(errors.InvalidRequestError, match=r"^duration must be at most"):
        await connect(served.url)("generate", "rain", duration=4000)
    with pytest.raises(errors.InvalidRequestError, match=r"^steps: Input should be"):
        await connect(served.url)("generate", "rain", steps=0)


@ASYNC
async def test_each_kind_of_error_raises_its_exception(served: Served, connect: Callable[..., Caller]) -> None:
    call = connect(served.url)
    for error in (
        errors.DeadlineExceededError("late"),
        errors.StartTimeoutError("late"),
        errors.InvalidUploadError("no audio", field="audio"),
        errors.GenerationError("not finite"),
        errors.StorageFullError("no room"),
    ):
        served.backend.error = error
        with pytest.raises(errors.StableAudioError) as caught:
            await call("generate", "rain", duration=0.1)
        assert type(caught.value) is type(error) or isinstance(error, errors.StartTimeoutError)
    assert len(served.backend.requests) == 5


@ASYNC
async def test_a_url_that_leads_to_no_route_is_named(served: Served, connect: Callable[..., Caller]) -> None:
    with pytest.raises(errors.NotFoundError, match=r"^the server has no route /v1/v1/models; check the server's URL$"):
        await connect(f"{served.url}/v1")("models")


async def test_a_key_is_sent_and_a_wrong_one_refused(connect: Callable[..., Caller]) -> None:
    from stable_audio_serve.core.keys import hash_key, make_key

    key = make_key()
    async with serve(api={"key_hashes": [hash_key(key)]}) as served:
        assert (await connect(served.url, api_key=key)("generate", "rain", duration=0.1)).content
        for wrong in (None, "wrong"):
            for method, *arguments in (("generate", "rain"), ("models",), ("jobs.list",), ("loop", "a 120bpm")):
                with pytest.raises(errors.UnauthorizedError) as caught:
                    await connect(served.url, api_key=wrong)(method, *arguments)
                assert caught.value.message[0] not in "{["


async def test_a_server_may_have_a_path_prefix(connect: Callable[..., Caller], served: Served) -> None:
    with pytest.raises(errors.NotFoundError):
        await connect(served.url + "/nowhere/")("models")
    for url in ("ftp://example.org", "localhost:8000", "http://", "http://[::1"):
        with pytest.raises(ValueError, match="URL"):
            connect(url)


async def test_loops_have_whole_bars(served: Served, connect: Callable[..., Caller]) -> None:
    call = connect(served.url)
    take = await call("loop", "techno drums 120bpm", bars=2, loop_type="drums", seed=4)
    assert len(read(take.content)[0]) == 4 * 44100
    assert take.seed == 4
    await call("loop", "techno 120bpm", audio=make_audio_file(duration_s=1.0), style_strength=0.5)
    assert served.backend.last.init_audio is not None
    with pytest.raises(errors.StableAudioError, match="BPM"):
        await call("loop", "techno drums")
