"""The quality gate with a scripted model, and a real folder or bucket for its reports."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from stable_audio_serve.artifacts.local import LocalArtifacts
from stable_audio_serve.artifacts.s3 import S3Artifacts
from stable_audio_serve.artifacts.store import ArtifactStore
from stable_audio_serve.core.catalog import ModelCard
from stable_audio_serve.core.errors import GenerationError, QualityError, QualityReportError, StorageError
from stable_audio_serve.core.generation import GenerationRequest, GenerationResult
from stable_audio_serve.verification.quality.archive import ReportArchive
from stable_audio_serve.verification.quality.gate import Passed, QualityGate
from stable_audio_serve.verification.quality.report import MAX_BYTES, Setup, Source, last_good_id
from tests.factories import FakeClock
from tests.object_storage import ObjectStorage
from tests.patience import PATIENCE_S

CARD = ModelCard("m", "stable-audio-3", max_duration_s=20.0, sample_rate_hz=8000)
FIRST = Setup("m", "1" * 64, "cpu", "float32", "float32")
OTHER = replace(FIRST, weights="2" * 64)
AT_FIRST, AT_OTHER = Source(repo_id="lab/m", commit="a" * 40), Source(repo_id="lab/m", commit="b" * 40)

Change = Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float32]]


class Player:
    """A model that generates noise from the request's seed, then applies `change` to the noise."""

    def __init__(
        self, change: Change = lambda audio: audio, *, clock: FakeClock | None = None, takes_s: float = 0.0
    ) -> None:
        self.requests: list[GenerationRequest] = []
        self._change, self._clock, self._takes_s = change, clock, takes_s

    async def __call__(self, request: GenerationRequest) -> GenerationResult:
        self.requests.append(request)
        if self._clock is not None:
            self._clock.now += self._takes_s
        noise = np.random.default_rng(request.seed).standard_normal((2, round(request.duration_s * 8000)))
        return GenerationResult((self._change(0.1 * noise.astype(np.float32)),), 8000, "m", (request.seed,))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "outputs"


@pytest.fixture
def gate(folder: Path) -> QualityGate:
    return make_gate(LocalArtifacts(folder))


def make_gate(store: ArtifactStore, *, wait_s: float = 10.0, clock: FakeClock | None = None) -> QualityGate:
    return QualityGate(ReportArchive(store, wait_s=wait_s), clock=clock or FakeClock())


async def judge(
    gate: QualityGate,
    change: Change | Player = lambda audio: audio,
    *,
    setup: Setup = FIRST,
    source: Source = AT_FIRST,
    **options: Any,
) -> Passed:
    player = change if isinstance(change, Player) else Player(change)
    return await gate.judge(CARD, player, setup=setup, source=source, **options)


def louder(decibels: float) -> Change:
    return lambda audio: audio * np.float32(10 ** (decibels / 20))


def other_noise(audio: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    return np.ascontiguousarray(audio[:, ::-1])


async def test_first_weights_pass_if_audible_and_become_the_reference(gate: QualityGate) -> None:
    assert (await judge(gate)).basis == "new"
    assert (await judge(gate)).basis == "same"
    assert (await judge(gate, louder(0.09))).basis == "same"
    with pytest.raises(QualityError, match=r"golden request music: \+0\.11 dB"):
        await judge(gate, louder(0.11))
    with pytest.raises(QualityError, match="spectral cosine"):
        await judge(gate, other_noise)


async def test_levels_do_not_drift_from_one_report_to_the_next(gate: QualityGate) -> None:
    await judge(gate)
    await judge(gate, louder(0.08))
    with pytest.raises(QualityError):
        await judge(gate, louder(0.16))


async def test_other_weights_may_sound_different_but_not_twice_as_loud(gate: QualityGate) -> None:
    await judge(gate)
    assert (await judge(gate, other_noise, setup=OTHER, source=AT_OTHER)).basis == "other"
    third = replace(FIRST, weights="3" * 64)
    for decibels in (6.03, -6.03):
        with pytest.raises(QualityError, match="dB beside the last good weights"):
            await judge(gate, louder(decibels), setup=third, source=replace(AT_OTHER, commit="c" * 40))


@pytest.mark.parametrize(
    ("setup", "change", "complaint"),
    [
        (FIRST, lambda audio: audio * 0, "silence"),
        (OTHER, lambda audio: audio * 0 + 0.5, "silence"),
        (FIRST, lambda audio: audio[:, :-2], "2x11998 samples, not 2x12000"),
        (OTHER, lambda audio: audio[:1], "1x12000 samples"),
        (FIRST, lambda audio: np.where(np.arange(12000) == 77, np.nan, audio), "not finite"),
        (OTHER, lambda audio: np.where(np.arange(12000) == 77, np.inf, audio), "not finite"),
    ],
)
async def test_invalid_audio_is_refused_for_any_weights(
    gate: QualityGate, setup: Setup, change: Change, complaint: str
) -> None:
    with pytest.raises(QualityError, match=complaint):
        await judge(gate, change, setup=setup)  # there is no earlier report
    await judge(gate)
    with pytest.raises(QualityError, match=complaint):
        await judge(gate, change, setup=setup, source=AT_OTHER)
    assert (await judge(gate)).basis == "same"  # the failed run stored nothing


async def test_a_failed_golden_request_fails_the_model(gate: QualityGate) -> None:
    async def fail(request: GenerationRequest) -> GenerationResult:
        raise GenerationError("values that are not finite")

    with pytest.raises(QualityError, match="golden request music: values that are not finite"):
        await gate.judge(CARD, fail, setup=FIRST, source=AT_FIRST)


async def test_every_golden_request_is_compared(gate: QualityGate) -> None:
    await judge(gate)
    player = Player()
    await judge(gate, player)
    assert len(player.requests) == 3
    assert sum(request.init_audio is not None for request in player.requests) == 1
    for request in player.requests:

        def change_one(audio: npt.NDArray[np.float32], seed: int = request.seed) -> npt.NDArray[np.float32]:
            expected = np.random.default_rng(seed).standard_normal((2, audio.shape[1])).astype(np.float32)
            return audio * 0.5 if np.allclose(audio, 0.1 * expected) else audio

        with pytest.raises(QualityError):
            await judge(gate, change_one)


async def test_only_the_first_request_may_begin_after_the_budget(folder: Path) -> None:
    clock = FakeClock()
    gate = make_gate(LocalArtifacts(folder), clock=clock)
    slow = Player(clock=clock, takes_s=21.0)
    assert (await judge(gate, slow)).basis == "new"
    assert len(slow.requests) == 1
    assert (await judge(gate, louder(0.05))).basis == "same"  # the one clip of the stored report is compared


async def test_a_commit_whose_files_have_changed_is_refused(gate: QualityGate) -> None:
    await judge(gate)
    with pytest.raises(QualityError, match="differ from the files that passed before"):
        await judge(gate, setup=OTHER, source=AT_FIRST)


async def test_reports_are_separate_per_device_and_precision(gate: QualityGate) -> None:
    await judge(gate)
    for setup in (
        replace(FIRST, device="cuda"),
        replace(FIRST, dtype="float16"),
        replace(FIRST, decode_precision="half"),
        replace(FIRST, model="n"),
    ):
        assert (await judge(gate, other_noise, setup=setup)).basis == "new"
    assert (await judge(gate)).basis == "same"


async def test_a_pinned_report_applies_to_any_weights(gate: QualityGate) -> None:
    pinned = (await judge(gate)).report
    assert (await judge(gate, setup=OTHER, source=AT_OTHER, pinned=pinned)).basis == "pinned"
    with pytest.raises(QualityError, match=f"spectral cosine .*quality report {pinned}"):
        await judge(gate, other_noise, setup=replace(FIRST, weights="3" * 64), source=AT_OTHER, pinned=pinned)


@pytest.mark.parametrize("pinned", ["0" * 32, "../../etc/passwd", "x" * 100_000, ""])
async def test_a_missing_pinned_report_is_named(gate: QualityGate, pinned: str) -> None:
    with pytest.raises(QualityReportError, match=r"no quality report 0|32 hexadecimal digits"):
        await judge(gate, pinned=pinned)


@cache
def hostile() -> dict[str, bytes]:
    zeros = {"num_samples": 12000, "level_db": 0.0, "shape": [2, 64, 128], "spectrum": ""}
    report = {
        "kind": "report",
        "version": 1,
        "setup": {
            "model": "m",
            "weights": "1" * 64,
            "device": "cpu",
            "dtype": "float32",
            "decode_precision": "float32",
        },
        "source": {"folder": None, "repo_id": None, "commit": None},
        "made_at": 0.0,
        "clips": {"music": zeros},
    }
    dump = json.dumps(report)
    return {
        "nothing": b"",
        "no JSON": b"\x00\xff\xfe not JSON",
        "deep": b"[" * 200_000,
        "deep object": b'{"a":' * 200_000,
        "large": b" " * (MAX_BYTES + 1),
        "a list": b"[]",
        "cut short": dump.encode()[: len(dump) // 2],
        "a huge number": dump.replace('"made_at": 0.0', '"made_at": ' + "9" * 10_000).encode(),
        "not a number": dump.replace("0.0", "NaN").encode(),
        "a time after all times": dump.replace('"made_at": 0.0', '"made_at": 1e300').encode(),
        "infinite": dump.replace('"level_db": 0.0', '"level_db": 1e999').encode(),
        "no spectrum": dump.encode(),
        "a bomb of a shape": dump.replace("[2, 64, 128]", "[16777216, 16777216, 16777216]").encode(),
        "negative shape": dump.replace("[2, 64, 128]", "[-1, -1, 0]").encode(),
        "no base64": dump.replace('"spectrum": ""', '"spectrum": "***"').encode(),
        "another version": dump.replace('"version": 1', '"version": 2').encode(),
        "another setup": dump.replace("1" * 64, "2" * 64).encode(),
        "unknown keys": dump.replace('"made_at"', '"run": "rm", "made_at"').encode(),
        "many clips": json.dumps(report | {"clips": {str(k): zeros for k in range(10_000)}}).encode(),
        "a name of a megabyte": json.dumps(report | {"kind": "x" * 1_000_000}).encode(),
    }


@pytest.mark.parametrize("key", ["kind", "version"])
async def test_a_report_that_does_not_state_its_format_is_refused(gate: QualityGate, folder: Path, key: str) -> None:
    report_id = (await judge(gate)).report
    path = folder / "quality" / report_id
    stated = json.loads(path.read_bytes())
    del stated[key]
    path.write_bytes(json.dumps(stated).encode())
    with pytest.raises(QualityReportError, match=rf"{report_id} cannot be used: {key}"):
        await judge(gate, pinned=report_id)


@pytest.mark.parametrize("kind", hostile())
async def test_a_broken_or_hostile_report_is_named_and_stops_no_model(
    gate: QualityGate, folder: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "quality").mkdir(parents=True)
    path = folder / "quality" / FIRST.report_id
    path.write_bytes(hostile()[kind])
    passed = await judge(gate)
    assert passed.basis == "unchecked"
    assert FIRST.report_id in (passed.problem or "")
    assert len(passed.problem or "") < 500
    assert FIRST.report_id in caplog.text
    assert path.read_bytes() == hostile()[kind]  # the file stays until an operator deletes it
    with pytest.raises(QualityReportError, match=FIRST.report_id):
        await judge(gate, pinned=FIRST.report_id)
    with pytest.raises(QualityError, match="silence"):
        await judge(gate, lambda audio: audio * 0)


async def test_a_broken_record_of_last_good_weights_is_named(gate: QualityGate, folder: Path) -> None:
    await judge(gate)
    (folder / "quality" / last_good_id("m")).write_bytes(b"{}")
    passed = await judge(gate, setup=OTHER, source=AT_OTHER)
    assert passed.basis == "unchecked"
    assert last_good_id("m") in (passed.problem or "")


class _Silent(LocalArtifacts):
    """A folder whose disk hangs."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.released = threading.Event()

    def fetch(self, key: Any, *, max_bytes: int) -> bytes | None:
        self.released.wait(PATIENCE_S)
        return None


async def test_a_store_that_does_not_answer_stops_no_model(folder: Path) -> None:
    store = _Silent(folder)
    gate = make_gate(store, wait_s=0.05)
    try:
        for options in ({}, {"pinned": "0" * 32}):
            passed = await judge(gate, **options)
            assert passed.basis == "unchecked"
            assert "did not answer" in (passed.problem or "")
        with pytest.raises(QualityError, match="silence"):
            await judge(gate, lambda audio: audio * 0)
    finally:
        store.released.set()


async def test_a_missing_folder_stops_no_model(tmp_path: Path) -> None:
    gate = make_gate(LocalArtifacts(tmp_path / "absent", may_make=False))
    assert (await judge(gate)).basis == "unchecked"
    assert not (tmp_path / "absent").exists()


@pytest.mark.server
async def test_reports_in_a_bucket_and_a_missing_bucket(object_storage: ObjectStorage) -> None:
    bucket = object_storage.make_bucket()
    store = S3Artifacts(object_storage.settings(bucket, prefix="a/b"))
    gate = make_gate(store, wait_s=30.0)
    assert (await judge(gate)).basis == "new"
    assert sorted(object_storage.keys(bucket)) == sorted(
        f"a/b/quality/{name}" for name in (FIRST.report_id, last_good_id("m"))
    )
    assert (await judge(gate)).basis == "same"
    with pytest.raises(QualityError, match="spectral cosine"):
        await judge(gate, other_noise)
    away = S3Artifacts(object_storage.settings("no-such-bucket-at-all", prefix="a/b"))
    assert (await judge(make_gate(away))).basis == "unchecked"
    await store.close()


async def test_replicas_that_pass_at_the_same_time_write_whole_files(folder: Path) -> None:
    """16 replicas pass at the same time, as in a large cluster. Each stored file is one replica's complete file."""
    gates = [make_gate(LocalArtifacts(folder)) for _ in range(16)]
    passed = await asyncio.gather(*(judge(gate, louder(0.001 * k)) for k, gate in enumerate(gates)))
    assert {each.basis for each in passed} <= {"new", "same"}
    assert (await judge(gates[0])).basis == "same"
    assert sorted(path.name for path in (folder / "quality").iterdir()) == sorted([FIRST.report_id, last_good_id("m")])


async def test_reports_can_be_listed_and_deleted(folder: Path) -> None:
    archive = ReportArchive(LocalArtifacts(folder), wait_s=10.0)
    gate = QualityGate(archive, clock=FakeClock())
    assert await archive.names() == []
    await judge(gate)
    assert sorted(await archive.names()) == sorted([FIRST.report_id, last_good_id("m")])
    await archive.delete(FIRST.report_id)
    assert (await judge(gate, louder(3.0))).basis == "new"


async def test_the_archive_times_out_if_the_store_hangs(folder: Path) -> None:
    store = _Silent(folder)
    with pytest.raises(StorageError, match=r"0\.05 s"):
        await ReportArchive(store, wait_s=0.05).report("0" * 32)
    store.released.set()
