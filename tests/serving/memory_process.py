"""A program that sends requests to an engine with the demo model, each with another prompt, and measures its memory.

Prints a JSON list with the resident memory in bytes after every 250 requests.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys

import numpy as np

from benchmarks.cases.memory import resident_bytes
from benchmarks.load import send_in_flight
from stable_audio_serve.core.generation import GenerationRequest, SourceAudio
from stable_audio_serve.core.settings import Settings
from stable_audio_serve.serving.engines import load_engine

GROUP = 250
IN_FLIGHT = 8
RATE_HZ = 44_100


def draw_requests(count: int) -> list[GenerationRequest]:
    """Returns requests for clips of 1 to 4 s. One in ten has source audio."""
    draw = random.Random(0)
    samples = 0.1 * np.random.default_rng(0).standard_normal((2, RATE_HZ))
    source = SourceAudio(samples.astype(np.float32), RATE_HZ)
    return [
        GenerationRequest(
            prompt=f"rain {number}",
            duration_s=draw.choice((1.0, 2.0, 4.0)),
            seed=number,
            steps=draw.choice((1, 4, 8)),
            init_audio=source if draw.random() < 0.1 else None,
        )
        for number in range(count)
    ]


async def measure(count: int) -> list[int]:
    model = {"name": "demo", "mode": "strict", "threads": 1, "engine": {"warmup_budget_s": 0}}
    settings = Settings.model_validate({"models": [model]})
    engine = load_engine(settings, settings.models[0])
    requests, held = draw_requests(count), []
    async with engine:
        for start in range(0, count, GROUP):
            await send_in_flight(engine.generate, requests[start : start + GROUP], num_in_flight=IN_FLIGHT)
            held.append(resident_bytes())
    return held


if __name__ == "__main__":
    print(json.dumps(asyncio.run(measure(int(sys.argv[1])))))
