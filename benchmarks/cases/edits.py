"""Measures how many variations of sustained tones keep the pitch, for each edit schedule and noise level.

The demo model generates twelve notes and then variations of them. Variations have no prompt, so that only the source
audio determines the note.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, get_args

from benchmarks.load import Audio
from benchmarks.models import CaseSettings
from examples.demo_model.checks import strongest_hz
from stable_audio_serve.core.generation import EditSchedule, GenerationRequest, SourceAudio
from stable_audio_serve.engine import Engine, EngineOptions
from stable_audio_serve.models.families import load_model
from stable_audio_serve.models.registry import resolve_entry

_NOTES = ("c3", "c sharp 4", "d5", "d sharp 3", "e4", "f5", "f sharp 3", "g4", "g sharp 5", "a3", "a sharp 4", "b5")
_VOICES = ("sine", "organ", "square", "saw")
_LEVELS = (0.25, 0.4)
_CENTS = 50.0
_CLIP_S = 3.0
_SEEDS_PER_ROUND = 1000


async def measure(settings: CaseSettings) -> dict[str, Any]:
    """In each round, generate one variation of every note with every schedule and noise level.

    Each round has its own seeds.
    """
    model = load_model(resolve_entry("demo"), device=settings.device)
    options = EngineOptions(mode="strict", torch_threads=settings.threads, max_queue_s=math.inf)
    rate_hz = model.spec.card.sample_rate_hz
    requests = [
        GenerationRequest(prompt=f"a held {_VOICES[number % len(_VOICES)]} on {note}", duration_s=_CLIP_S, seed=number)
        for number, note in enumerate(_NOTES)
    ]
    async with Engine(model, options) as engine:
        sources = await _play(engine, requests)
        pitches_hz = [strongest_hz(source) for source in sources]
        found = {}
        for level in _LEVELS:
            for schedule in get_args(EditSchedule):
                edits = [
                    replace(
                        request,
                        prompt="",
                        seed=_SEEDS_PER_ROUND * (number + 1) + request.seed,
                        init_audio=SourceAudio(source, rate_hz),
                        init_noise_level=level,
                        edit_schedule=schedule,
                    )
                    for number in range(settings.rounds)
                    for request, source in zip(requests, sources, strict=True)
                ]
                found[f"{schedule} {level:g}"] = _judge(await _play(engine, edits), pitches_hz)
    return {"by_schedule": found}


async def _play(engine: Engine, requests: Sequence[GenerationRequest]) -> list[Audio]:
    results = await asyncio.gather(*map(engine.generate, requests))
    return [result.audio[0] for result in results]


def _judge(clips: Sequence[Audio], pitches_hz: Sequence[float]) -> dict[str, int]:
    """Returns the number of clips, and how many of them have the pitch of the note that they vary.

    `clips` has the clips of all rounds. In each round, the notes have the pitches `pitches_hz`, in this order.
    """
    wanted = [pitches_hz[number % len(pitches_hz)] for number in range(len(clips))]
    found = map(strongest_hz, clips)
    cents = [abs(1200.0 * math.log2(hz / own)) if hz > 0 else math.inf for hz, own in zip(found, wanted, strict=True)]
    return {"clips": len(clips), "kept": sum(one <= _CENTS for one in cents)}


def rows(results: Mapping[str, Any]) -> list[dict[str, object]]:
    """Returns a table with the share of clips that keep the pitch, one row for each edit schedule."""
    shares = {name: figures["kept"] / figures["clips"] for name, figures in results["by_schedule"].items()}
    levels = dict.fromkeys(name.split()[1] for name in shares)
    return [
        {
            "`edit_schedule`": f"`{schedule}`",
            **{f"Strength {level}": f"{shares[f'{schedule} {level}']:.0%}" for level in levels},
        }
        for schedule in dict.fromkeys(name.split()[0] for name in shares)
    ]
