"""Edits keep the exact samples of the source file outside the edited regions, for every kind of file and model."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import AsyncIterator
from dataclasses import dataclass

import httpx
import numpy as np
import numpy.typing as npt
import pytest
import pytest_asyncio
import soundfile

from stable_audio_serve.api.app import create_app
from stable_audio_serve.audio.pcm import to_pcm16
from stable_audio_serve.audio.prepare import prepare_source
from stable_audio_serve.core.generation import SourceAudio
from stable_audio_serve.core.settings import Settings
from stable_audio_serve.serving.engines import load_engine
from stable_audio_serve.serving.local import LocalBackend
from stable_audio_serve.serving.placement import plan_deployments
from tests.goldens import OPEN_GOLDENS, SA3_GOLDENS
from tests.parameters import slow, some

pytestmark = pytest.mark.asyncio(loop_scope="module")

Audio = npt.NDArray[np.float32]
Pcm = npt.NDArray[np.int16]  # (samples, channels)
Region = tuple[float, float]

RATE_HZ, DURATION_S, FADE_S = 1000, 4.0, 0.03
MODELS = {"three": str(SA3_GOLDENS / "tiny-s"), "open": str(OPEN_GOLDENS / "tiny-small")}
REGIONS: dict[str, tuple[Region, ...]] = {
    "one": ((1.0, 2.0),),
    "two": ((0.0, 0.7), (3.2, 4.0)),
    "three": ((0.5, 0.54), (1.3, 1.9), (2.5, 3.1)),
}


@dataclass(frozen=True, slots=True)
class Source:
    """A source clip: its audio of shape (channels, samples), and the sample rate and sample format of its file."""

    samples: Audio
    rate_hz: int = RATE_HZ
    container: str = "WAV"
    subtype: str = "PCM_16"

    @property
    def file(self) -> bytes:
        stream = io.BytesIO()
        soundfile.write(stream, self.samples.T, self.rate_hz, format=self.container, subtype=self.subtype)
        return stream.getvalue()


def make_tone(
    level: float = 0.5, *, rate_hz: int = RATE_HZ, duration_s: float = DURATION_S, channels: int = 2
) -> Audio:
    t = np.arange(int(duration_s * rate_hz)) / rate_hz
    return np.tile(level * np.sin(2 * np.pi * 110 * t), (channels, 1)).astype(np.float32)


def make_noise(level: float, *, rate_hz: int = RATE_HZ, duration_s: float = DURATION_S, channels: int = 2) -> Audio:
    shape = channels, int(duration_s * rate_hz)
    return np.random.default_rng(3).uniform(-level, level, shape).astype(np.float32)


def make_clicks() -> Audio:
    clicks = np.zeros((2, int(DURATION_S * RATE_HZ)), np.float32)
    clicks[0, ::97] = 0.9
    clicks[1, 5::61] = -0.9
    return clicks


SOURCES = {
    "tone": Source(make_tone()),
    "noise": Source(make_noise(0.3)),
    "clicks": Source(make_clicks()),
    "silence": Source(np.zeros((2, 4000), np.float32)),
    "full scale": Source(np.sign(make_noise(1.0))),
    "too loud": Source(make_noise(1.8), subtype="FLOAT"),
    "fine steps": Source(make_noise(0.01), subtype="PCM_24"),
    "mono": Source(make_tone(channels=1)),
    "8 kHz": Source(make_noise(0.4, rate_hz=8000), 8000, "FLAC"),
    "44.1 kHz": Source(make_tone(rate_hz=44_100, channels=1), 44_100, subtype="FLOAT"),
    "short": Source(make_noise(0.4, duration_s=2.6)),
    "long": Source(make_noise(0.4, duration_s=9.0)),
}
CASES = [(source, regions) for source in SOURCES for regions in REGIONS]
ALWAYS = [(source, list(REGIONS)[index % len(REGIONS)]) for index, source in enumerate(SOURCES)]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[httpx.AsyncClient]:
    models = [{"name": name, "path": path, "engine": {"warmup_budget_s": 0}} for name, path in MODELS.items()]
    settings = Settings.model_validate(
        {"models": models, "device": "cpu", "output_dir": str(tmp_path_factory.mktemp("outputs"))}
    )
    engines = {model.name: load_engine(settings, model) for model in settings.models}
    async with LocalBackend(plan_deployments(settings).catalog, engines) as backend:
        app = create_app(backend, settings)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost", timeout=120) as client,
        ):
            yield client


async def send(client: httpx.AsyncClient, audio: bytes, *regions: Region, **fields: object) -> httpx.Response:
    starts, ends = zip(*regions, strict=True)
    form: dict[str, object] = {"model": "three", "prompt": "a bell", "seed": 7, "duration": DURATION_S, "steps": 2}
    form |= {"inpaint_start_seconds": list(starts), "inpaint_end_seconds": list(ends), **fields}
    data = {key: value if isinstance(value, str) else json.dumps(value) for key, value in form.items()}
    reply = await client.post("/v1/audio/inpaint", data=data, files={"audio": ("a.wav", audio)})
    assert reply.status_code == 200, reply.text
    return reply


async def edit(client: httpx.AsyncClient, audio: bytes, *regions: Region, **fields: object) -> Pcm:
    return read((await send(client, audio, *regions, **fields)).content)


def read(file: bytes) -> Pcm:
    samples: Pcm = soundfile.read(io.BytesIO(file), dtype="int16", always_2d=True)[0]
    return samples


def pcm_of(file: bytes, *, duration_s: float = DURATION_S) -> Pcm:
    """Decode a file in the same way as the server decodes the source of an edit with this duration.

    Return the samples as 16-bit integers.
    """
    samples, rate_hz = soundfile.read(io.BytesIO(file), dtype="float32", always_2d=True)
    source = SourceAudio(np.ascontiguousarray(samples.T), rate_hz)
    prepared = prepare_source(source, sample_rate_hz=RATE_HZ, channels=2, num_samples=int(duration_s * RATE_HZ))
    return to_pcm16(prepared.numpy())


def outside(*regions: Region, source_s: float = DURATION_S) -> npt.NDArray[np.bool_]:
    """Return a mask of the edit's samples: True for samples of the source that are outside all `regions` (seconds)."""
    kept = np.zeros(int(DURATION_S * RATE_HZ), dtype=bool)
    kept[: int(source_s * RATE_HZ)] = True
    for start_s, end_s in regions:
        kept[int(start_s * RATE_HZ) : int(end_s * RATE_HZ)] = False
    return kept


def wav_of(pcm: Pcm) -> bytes:
    return Source(pcm.T.astype(np.float32) / 32768).file


@pytest.mark.parametrize(("name", "regions"), some(CASES, ALWAYS))
async def test_an_edit_keeps_each_sample(client: httpx.AsyncClient, name: str, regions: str) -> None:
    source = SOURCES[name]
    first = await edit(client, source.file, *REGIONS[regions])
    source_s = source.samples.shape[1] / source.rate_hz
    kept = outside(*REGIONS[regions], source_s=source_s)
    np.testing.assert_array_equal(first[kept], pcm_of(source.file)[kept])
    assert (first[~kept] != pcm_of(source.file)[~kept]).mean() > 0.5


@pytest.mark.parametrize("name", ["tone", "too loud", slow("noise"), slow("clicks"), slow("full scale")])
async def test_two_successive_edits_keep_each_sample(client: httpx.AsyncClient, name: str) -> None:
    first = await edit(client, SOURCES[name].file, *REGIONS["two"])
    again: Region = (2.1, 2.4)
    second = await edit(client, wav_of(first), again, seed=8)
    kept = outside(again)
    np.testing.assert_array_equal(second[kept], first[kept])


@pytest.mark.parametrize("model", MODELS)
async def test_continuation_keeps_all_but_the_last_30_ms(client: httpx.AsyncClient, model: str) -> None:
    file, end = Source(make_noise(0.4, duration_s=2.048)).file, 2048  # the source ends at the end of a latent frame
    longer, alone = [
        await edit(client, file, (2.048, DURATION_S), model=model, peaks="clip", keep=keep)
        for keep in ("source", "model")
    ]
    source = pcm_of(file)
    np.testing.assert_array_equal(longer[: end - 30], source[: end - 30])
    np.testing.assert_array_equal(longer[end:], alone[end:])
    share = ((np.arange(30) + 0.5) / 30)[:, None]
    mixed = share * alone[end - 30 : end] + (1 - share) * source[end - 30 : end]
    assert np.abs(longer[end - 30 : end] - mixed).max() <= 1


@pytest.mark.parametrize("model", MODELS)
async def test_regions_are_generated_between_their_fades(client: httpx.AsyncClient, model: str) -> None:
    file, regions = SOURCES["noise"].file, REGIONS["three"]
    kept, alone = [
        await edit(client, file, *regions, model=model, peaks="clip", keep=keep) for keep in ("source", "model")
    ]
    assert (alone != pcm_of(file)).mean() > 0.9
    np.testing.assert_array_equal(kept[outside(*regions)], pcm_of(file)[outside(*regions)])
    for start, stop in ((1330, 1870), (2530, 3070)):
        np.testing.assert_array_equal(kept[start:stop], alone[start:stop])


async def test_loud_model_changes_no_kept_sample(client: httpx.AsyncClient) -> None:
    file, regions = SOURCES["full scale"].file, REGIONS["one"]
    loud = await edit(client, file, *regions, model="open", peaks="clip")
    assert np.abs(loud[1030:1970]).max() == 32767
    limited = await edit(client, file, *regions, model="open")
    np.testing.assert_array_equal(limited[outside(*regions)], pcm_of(file)[outside(*regions)])
    assert np.abs(limited[1030:1970]).max() <= 0.978 * 32768


async def test_each_variation_keeps_the_source(client: httpx.AsyncClient) -> None:
    file, region = SOURCES["noise"].file, (1.0, 2.0)
    reply = await send(client, file, region, batch_size=2)
    with zipfile.ZipFile(io.BytesIO(reply.content)) as archive:
        first, second = (read(archive.read(name)) for name in archive.namelist())
    for each in (first, second):
        np.testing.assert_array_equal(each[outside(region)], pcm_of(file)[outside(region)])
    assert (first != second)[1030:1970].mean() > 0.9


async def test_peaks_of_the_source_change_only_on_request(client: httpx.AsyncClient) -> None:
    file, region = SOURCES["too loud"].file, (1.0, 2.0)
    scaled = await edit(client, file, region, peaks="scale")
    samples = soundfile.read(io.BytesIO(file), dtype="float32")[0]
    np.testing.assert_allclose(scaled[:1000] / 32768, samples[:1000] / np.abs(samples).max(), atol=1e-3)


async def test_recipe_records_what_was_kept(client: httpx.AsyncClient) -> None:
    file, region = SOURCES["noise"].file, (1.0, 2.0)
    for keep in ("source", "model"):
        take = await send(client, file, region, keep=keep)
        recipe = json.loads(take.headers["X-Recipe"])
        assert recipe["keep"] == keep
        again = await replay(client, recipe, file)
        assert again.content == take.content
    del recipe["keep"]  # recipes of older versions do not have this field
    np.testing.assert_array_equal(read((await replay(client, recipe, file)).content), read(take.content))


async def replay(client: httpx.AsyncClient, recipe: dict[str, object], source: bytes) -> httpx.Response:
    parts = [("recipe", json.dumps(recipe).encode()), ("audio", source)]
    reply = await client.post("/v1/audio/replay", files=parts)
    assert reply.status_code == 200, reply.text
    return reply
