"""What waits in the job store, as the controller's process last heard it from a job runner.

The policy of the runners' deployment writes, those of the models read. All are called by one thread of one process,
which imports this module by its name. Knows neither Ray nor the store.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

from stable_audio_serve.core.pricing import WorkSize

OLD_S = 30.0  # a runner that says nothing new for so long is not believed
_SIZES = tuple(field.name for field in fields(WorkSize))


@dataclass(frozen=True, slots=True)
class WaitingJobs:
    """Jobs of one model that no runner has started, and the size of all together."""

    num_jobs: float
    size: WorkSize


@dataclass(frozen=True, slots=True)
class Word:
    """What one runner said, and when by its own clock, which is compared with nothing but itself."""

    said_at: float
    by_model: Mapping[str, WaitingJobs]


@dataclass(frozen=True, slots=True)
class _Heard:
    word: Word
    at: float  # by the controller's clock


_heard: dict[str, dict[str, _Heard]] = {}  # by application and runner


def to_stats(by_model: Mapping[str, WaitingJobs]) -> dict[str, float]:
    """Returns numbers by name, as Serve carries them from a replica to the policy of its deployment."""
    return {
        f"{name}/{model}": float(value)
        for model, jobs in by_model.items()
        for name, value in {"jobs": jobs.num_jobs, **asdict(jobs.size)}.items()
    }


def from_stats(stats: Mapping[str, float]) -> dict[str, WaitingJobs]:
    """Returns what `to_stats` was made of; a model of which something is missing is left out."""
    models = [name.removeprefix("jobs/") for name in stats if name.startswith("jobs/")]
    found = {model: [stats.get(f"{name}/{model}") for name in ("jobs", *_SIZES)] for model in models}
    return {
        model: WaitingJobs(values[0], WorkSize(*values[1:]))  # type: ignore[arg-type]
        for model, values in found.items()
        if None not in values
    }


def write(application: str, words: Mapping[str, Word], *, now: float) -> None:
    """Note the last word of every runner there is; the same word again does not make it younger."""
    known = _heard.get(application, {})
    _heard[application] = {
        runner: known[runner] if runner in known and known[runner].word.said_at == word.said_at else _Heard(word, now)
        for runner, word in words.items()
    }


def read(application: str, model: str, *, now: float) -> WaitingJobs | None:
    """Returns what waits for a model as a runner said last; None while none has said so lately."""
    latest = max(_heard.get(application, {}).values(), key=lambda heard: heard.at, default=None)
    if latest is None or not 0.0 <= now - latest.at <= OLD_S:  # also not if the clock was set back
        return None
    return latest.word.by_model.get(model)
