"""Checks at start that the speed features of an engine give the right audio on this machine. A small battery of
requests runs with the features and without them (the plain path), and both must give the same audio. Does not depend
on how engines work inside.
"""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from stable_audio_serve.core.errors import InvalidRequestError
from stable_audio_serve.core.generation import GenerationRequest, GenerationResult, Mode, SourceAudio
from stable_audio_serve.engine.hardware.graphs import difference_db
from stable_audio_serve.engine.options import PLAIN, Features
from stable_audio_serve.models.protocol import ModelSpec

Audio = npt.NDArray[np.float32]

log = logging.getLogger(__name__)

# The level of the plain audio must be at least this far above the level of the difference, by the denoiser's precision.
# In half precision, two correct computations of a step in another order differ by as much as the rounding.
_LEAST_DB = {torch.float32: 50.0, torch.float16: 30.0, torch.bfloat16: 18.0}
_LENGTHS = (1.0, 0.4, 0.7, 0.55)  # durations of the requests, as fractions of the longest one
_LONGEST_S = 5.0
_STEPS = 2
# These features must not change any bit in strict mode.
_EXACT = Features(packing=False, fast_decoding=False, fused_kernels=False)


class Generator(Protocol):
    """The methods of `Engine` that the battery uses."""

    async def start(self) -> None: ...

    async def close(self) -> None: ...

    async def generate(self, request: GenerationRequest) -> GenerationResult: ...


@dataclass(frozen=True, slots=True)
class Profile:
    """The speed features that an engine uses. If all are off, `reason` says why: the operator switched them off, or the
    battery found an error.
    """

    features: Features
    reason: str = ""

    @property
    def name(self) -> str:
        """`accelerated` if any feature is on, else `plain`."""
        return "plain" if self.features == PLAIN else "accelerated"

    def __str__(self) -> str:
        """The name, and the reason if there is one."""
        return f"{self.name}: {self.reason}" if self.reason else self.name


async def prove(
    make: Callable[[Features, Mode], Generator], features: Features, *, spec: ModelSpec, mode: Mode
) -> Profile:
    """Run the battery with `features` and without, and compare the audio. Returns a profile with `features` if
    the audio agrees, else the plain profile with the reason.

    In strict mode, the audio with CUDA graphs, the second stream and asynchronous copies must have the same bits as
    without these three. With all features, the difference must be `_LEAST_DB` below the audio's level. `make` builds
    an engine with some features and a mode, and does not start it. The engines of the battery are closed afterwards, so
    audio from a wrong feature never reaches a client.
    """
    requests, profile = battery(spec), Profile(features)

    async def run(own: Features, own_mode: Mode) -> list[Audio]:
        audio = await _run(make(own, own_mode), requests)
        _free_memory()
        return audio

    try:
        if not spec.is_compiled:  # compiled networks have no strict mode
            plain = await run(PLAIN, "strict")
            exact = replace(_EXACT, captures=features.captures, second_queue=features.second_queue)
            _require(plain, await run(exact, "strict"), least_db=float("inf"))
        if mode != "strict":
            plain = await run(PLAIN, mode)
        _require(plain, await run(features, mode), least_db=_LEAST_DB[spec.dtype])
    except Exception as error:  # noqa: BLE001 - whatever a feature does, the plain path serves
        log.warning("the speed features of this engine are off: %s", error or repr(error))
        profile = Profile(PLAIN, f"{type(error).__name__}: {error}")
    _free_memory()  # again, because the traceback of an error holds an engine
    return profile


def _free_memory() -> None:
    """Return the memory of engines without references to the GPU. The memory plan of the next engine counts all memory
    that the allocator keeps.
    """
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


def battery(spec: ModelSpec, *, longest_s: float = _LONGEST_S) -> list[GenerationRequest]:
    """Return four different requests of two steps each. One is guided, and one regenerates a region of a source.

    `longest_s` can make the clips shorter.
    """
    longest_s = min(longest_s, _LONGEST_S, spec.card.max_duration_s / 4)
    source = SourceAudio(_tone(longest_s, spec), spec.card.sample_rate_hz)
    first, guided, edited, last = (
        GenerationRequest(
            prompt=f"self-check {number}",
            duration_s=share * longest_s,
            seed=number,
            steps=_STEPS,
            duration_padding_s=0.0,
        )
        for number, share in enumerate(_LENGTHS)
    )
    third = edited.duration_s / 3
    return [
        first,
        replace(guided, cfg_scale=3.0, negative_prompt="noise"),
        replace(edited, inpaint_audio=source, inpaint_regions_s=((third, 2 * third),)),
        last,
    ]


def _tone(seconds: float, spec: ModelSpec) -> Audio:
    times = np.arange(round(seconds * spec.card.sample_rate_hz)) / spec.card.sample_rate_hz
    return np.tile(0.3 * np.sin(2 * np.pi * 220.0 * times), (spec.card.channels, 1)).astype(np.float32)


async def _run(engine: Generator, requests: Sequence[GenerationRequest]) -> list[Audio]:
    """Run all requests at once, then again in reverse order. Returns the audio of both runs, each in the order of
    `requests`. Closes the engine.

    In the second run, calls that were captured in the meantime replay their CUDA graphs. Only few calls are captured by
    then, but every graph is compared with the eager call anyway when the graph is first used (`Graphs.confirm`).
    """
    try:
        await engine.start()
        forward = await asyncio.gather(*(_generate(engine, request) for request in requests))
        backward = await asyncio.gather(*(_generate(engine, request) for request in reversed(requests)))
    finally:
        await engine.close()
    return [*forward, *reversed(backward)]


async def _generate(engine: Generator, request: GenerationRequest) -> Audio:
    """Return the request's audio. It is empty if the model does not support the request."""
    try:
        return (await engine.generate(request)).audio[0]
    except InvalidRequestError:
        return np.zeros((0, 0), np.float32)


def _require(expected: Sequence[Audio], actual: Sequence[Audio], *, least_db: float) -> None:
    """Raise ValueError if the difference of any clip is less than `least_db` dB below the level of the clip."""
    for number, (plain, fast) in enumerate(zip(expected, actual, strict=True)):
        difference = difference_db(torch.from_numpy(fast), torch.from_numpy(plain)) if plain.size else -least_db
        if difference > -least_db:
            allowed = "no difference" if least_db == float("inf") else f"-{least_db:g} dB"
            raise ValueError(
                f"request {number % len(_LENGTHS)} of the start-up check differs from the plain path by "
                f"{difference:.1f} dB (allowed: {allowed})"
            )
