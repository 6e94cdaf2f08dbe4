"""Which weights a replica serves after its start: the configured weights, or if they are bad, the last good weights.

The checkpoints are real. A cache of the Hugging Face hub has two revisions of each.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from stable_audio_serve.artifacts.local import LocalArtifacts
from stable_audio_serve.core.errors import CheckpointError, QualityError, StableAudioError
from stable_audio_serve.core.settings import Settings
from stable_audio_serve.models.registry import BUILT_IN
from stable_audio_serve.serving.engines import load_engine
from stable_audio_serve.serving.trial import Started, Trial
from tests.adapter_files import write_file
from tests.goldens import SA3_GOLDENS
from tests.models.revisions import (
    BAD,
    GOOD,
    copy_checkpoint,
    fill_revisions,
    not_numbers,
    of_another_model,
    scale,
    spoil,
)
from tests.parameters import few
from tests.recorded_metrics import RecordedMetrics

pytestmark = pytest.mark.server

TINY = SA3_GOLDENS / "tiny-s"
DEMO = Path(str(BUILT_IN["demo"].folder))


def truncate(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 1_000_000)


def swap_encoder(folder: Path) -> None:
    (encoder,) = (path.parent for path in folder.glob("*/model.safetensors"))
    spoil(encoder, of_another_model)


# Ways to damage a checkpoint that the start must detect. The config stays the same.
POISONS: dict[str, Callable[[Path], None]] = {
    "a value that is no number": partial(spoil, change=not_numbers),
    "a truncated file": truncate,
    "zeros in the decoder": partial(spoil, change=partial(scale, factor=0.0)),
    "twice as loud": partial(spoil, change=partial(scale, factor=2.0)),
}
# Changed weights whose audio is as loud as before. They could be a newly trained model, so only a pinned quality report
# detects them. Changes of the text encoder are made in the demo model, because the text encoder of the tiny checkpoint
# hardly changes the audio.
LOOKALIKES: dict[str, tuple[Path, Callable[[Path], None]]] = {
    "weights of another model": (TINY, partial(spoil, change=of_another_model)),
    "another text encoder": (DEMO, swap_encoder),
}


class Starter:
    """Starts replicas of a model one after another. All of them use the same store of quality reports."""

    def __init__(self, folder: Path) -> None:
        self.cache, self.outputs = folder / "hub", folder / "outputs"
        self.metrics = RecordedMetrics()
        self.others_answer = False

    async def start(self, *, is_judged: bool = True, **model: Any) -> Started:
        settings = Settings.model_validate(
            {"models": [{"name": "tiny", "engine": {"warmup_budget_s": 0}, **model}], "device": "cpu"}
        )
        load = partial(load_engine, settings, settings.models[0])

        async def others_answer() -> bool:
            return self.others_answer

        @contextmanager
        def stage(_: str) -> Iterator[None]:
            yield

        trial = Trial(
            settings,
            settings.models[0],
            artifacts=LocalArtifacts(self.outputs),
            load=lambda entry: load(entry=entry),
            others_answer=others_answer,
            stage=stage,
            metrics=self.metrics,
        )
        started = await (trial.run() if is_judged else trial.skip())
        await started.engine.close()
        return started


@pytest.fixture(scope="module", autouse=True)
def _frozen() -> None:
    """A fallback collects garbage, which takes most of its time in a process that has imported all tests."""
    gc.freeze()


@pytest.fixture
def starter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Starter:
    starter = Starter(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(starter.cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return starter


def fill(starter: Starter, poison: Callable[[Path], None], tmp_path: Path, *, source: Path = TINY) -> None:
    good, bad = (copy_checkpoint(source, tmp_path / name) for name in ("good", "bad"))
    poison(bad)
    fill_revisions(starter.cache, "lab/tiny", {GOOD: good, BAD: bad}, main=BAD)


@pytest.mark.parametrize("name", few(POISONS, number=1))
async def test_poisoned_weights_fall_back_to_the_last_good_ones(starter: Starter, name: str, tmp_path: Path) -> None:
    fill(starter, POISONS[name], tmp_path)
    good = await starter.start(repo_id="lab/tiny", revision=GOOD)
    assert (good.quality.gate, good.quality.revision) == ("passed", GOOD)
    started = await starter.start(repo_id="lab/tiny", revision="main")
    assert (started.quality.gate, started.quality.revision) == ("fallback", GOOD)
    assert started.quality.weights == good.quality.weights
    assert started.quality.problem is not None
    assert str(tmp_path) not in started.quality.problem  # everyone may read /health, so no path may appear there
    assert starter.metrics.gauges["quality_fallback"] == 1
    assert (await starter.start(repo_id="lab/tiny", revision=GOOD)).quality.gate == "passed"
    assert starter.metrics.gauges["quality_fallback"] == 0


@pytest.mark.parametrize("name", few(POISONS, number=1))
@pytest.mark.slow
async def test_poisoned_weights_do_not_start_while_others_answer(starter: Starter, name: str, tmp_path: Path) -> None:
    fill(starter, POISONS[name], tmp_path)
    await starter.start(repo_id="lab/tiny", revision=GOOD)
    starter.others_answer = True
    with pytest.raises((CheckpointError, QualityError)):
        await starter.start(repo_id="lab/tiny", revision=BAD)


async def test_without_the_gate_silent_weights_start(starter: Starter, tmp_path: Path) -> None:
    fill(starter, POISONS["zeros in the decoder"], tmp_path)
    started = await starter.start(repo_id="lab/tiny", revision=BAD, is_judged=False)
    assert (started.quality.gate, started.quality.report) == ("off", None)
    assert started.quality.weights is not None
    assert not starter.metrics.counters


@pytest.mark.parametrize("name", few(LOOKALIKES, number=1))
async def test_pinned_report_detects_other_weights(starter: Starter, name: str, tmp_path: Path) -> None:
    source, poison = LOOKALIKES[name]
    fill(starter, poison, tmp_path, source=source)
    pinned = (await starter.start(repo_id="lab/tiny", revision=GOOD)).quality.report
    started = await starter.start(repo_id="lab/tiny", revision=BAD, quality_report=pinned)
    assert (started.quality.gate, started.quality.revision) == ("fallback", GOOD)
    assert "spectral cosine" in (started.quality.problem or "")


async def test_changed_file_of_a_known_commit_is_detected(starter: Starter, tmp_path: Path) -> None:
    """After a commit has passed the gate, one of its files in the hub cache is replaced by another of the same size."""
    fill(starter, lambda _: None, tmp_path)
    await starter.start(repo_id="lab/tiny", revision=GOOD)
    weights = starter.cache / "models--lab--tiny" / "snapshots" / GOOD / "model.safetensors"
    spoiled = copy_checkpoint(TINY, tmp_path / "spoiled")
    spoil(spoiled, partial(scale, factor=1.5))
    weights.resolve().write_bytes((spoiled / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=r"not those that the hub listed.*no copy"):
        await starter.start(repo_id="lab/tiny", revision=GOOD)


@pytest.mark.slow
async def test_overwritten_folder_has_no_fallback(starter: Starter, tmp_path: Path) -> None:
    folder = copy_checkpoint(TINY, tmp_path / "model")
    assert (await starter.start(path=str(folder))).quality.gate == "passed"
    spoil(folder, partial(scale, factor=2.0))
    with pytest.raises(QualityError, match=r"\+6\.02 dB.*no copy"):
        await starter.start(path=str(folder))
    other = copy_checkpoint(TINY, tmp_path / "model-2")
    assert (await starter.start(path=str(other))).quality.gate == "passed"  # the same weights in another folder
    assert (await starter.start(path=str(folder))).quality.gate == "fallback"


@pytest.mark.slow
async def test_changed_last_good_weights_do_not_serve(starter: Starter, tmp_path: Path) -> None:
    first, second = (copy_checkpoint(TINY, tmp_path / name) for name in ("first", "second"))
    await starter.start(path=str(first))
    spoil(first, partial(scale, factor=1.2))  # so small a change that the gate would accept it in new weights
    spoil(second, partial(scale, factor=0.0))
    with pytest.raises(QualityError, match=r"silence.*fail too: .* has changed since it passed"):
        await starter.start(path=str(second))


async def test_poisoned_model_without_good_weights_does_not_start(starter: Starter, tmp_path: Path) -> None:
    fill(starter, POISONS["zeros in the decoder"], tmp_path)
    with pytest.raises(QualityError, match=r"golden request music: silence$"):
        await starter.start(repo_id="lab/tiny", revision=BAD)


async def test_record_of_another_repository_is_ignored(starter: Starter, tmp_path: Path) -> None:
    """If the record were used, an attacker who can write to the store of reports could choose the weights."""
    fill(starter, POISONS["zeros in the decoder"], tmp_path)
    await starter.start(repo_id="lab/tiny", revision=GOOD)
    for path in (starter.outputs / "quality").iterdir():
        path.write_bytes(path.read_bytes().replace(b"lab/tiny", b"evil/one"))
    with pytest.raises(StableAudioError, match="not in the configured repository"):
        await starter.start(repo_id="lab/tiny", revision=BAD)


async def test_adapters_are_compared_with_their_earlier_audio(
    starter: Starter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torn.safetensors").write_bytes(b"torn")
    start = partial(starter.start, path=str(TINY))
    first = await start()
    write_file(tmp_path / "vinyl.safetensors", shape=(216, 72))
    loras = {"vinyl": str(tmp_path / "vinyl.safetensors")}
    for _ in range(2):
        started = await start(loras=loras)
        assert (started.quality.gate, started.quality.report) == ("passed", first.quality.report)
        assert started.quality.problem is None
    assert starter.metrics.counters["quality_gates", "passed"] == 3
    # From now on, the model ignores adapters.
    monkeypatch.setattr("stable_audio_serve.models.adapters.apply.adapt", lambda out, x, *, groups: out)
    started = await start(loras={**loras, "torn": str(tmp_path / "torn.safetensors")})
    assert started.quality.gate == "passed"
    assert started.quality.problem is not None
    assert "the adapter vinyl is bad" in started.quality.problem
    assert "the adapter torn is bad" in started.quality.problem
    assert str(tmp_path) not in started.quality.problem
