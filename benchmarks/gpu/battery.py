"""Four unlike requests in engines with one feature each, compared with the same requests in a plain engine.

The plain engine runs in strict mode, eager, padded and on one queue, with blocking copies and float32 decoding.
"""

from __future__ import annotations

import traceback
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.engines import ALL, EXACT, PLAIN, Machine, OpenEngine
from benchmarks.gpu.results import Results
from benchmarks.load import Audio
from stable_audio_serve.core.catalog import DecodePrecision, ModelCard
from stable_audio_serve.core.errors import ConfigError
from stable_audio_serve.core.generation import GenerationRequest, Mode, SourceAudio
from stable_audio_serve.models.protocol import DiffusionModel

LEAST_DB, LEAST_HALF_DB = 50.0, 40.0
_FINITE_DB = -900.0  # any finite audio of the right length: the precision of steps is reported, but has no bound
_LONGEST_S = 5.0
_PER_BIT_DB = 6.0


def battery(card: ModelCard, *, longest_s: float) -> list[GenerationRequest]:
    """Returns four requests of two steps with one prompt: two plain ones, one guided, one with a mask."""
    longest_s = min(card.max_duration_s, longest_s, _LONGEST_S)
    noise = np.random.default_rng(0).uniform(-0.3, 0.3, (card.channels, int(longest_s / 2 * card.sample_rate_hz)))
    clip = SourceAudio(noise.astype(np.float32), card.sample_rate_hz)
    mask = {"inpaint_audio": clip, "inpaint_regions_s": ((longest_s / 8, longest_s / 4),)}
    fields: Sequence[dict[str, Any]] = (
        {"duration_s": longest_s},
        {"duration_s": longest_s * 0.6, "cfg_scale": 3.0},
        {"duration_s": longest_s * 0.5, **mask},
        {"duration_s": longest_s * 0.2},
    )
    plain = GenerationRequest("rain on a roof", 1.0, 0, steps=2, cfg_scale=1.0, duration_padding_s=0.0)
    return [replace(plain, seed=seed, **field) for seed, field in enumerate(fields)]


async def measure(machine: Machine, results: Results, *, name: str) -> None:
    """Store how close the clips of each feature are to the plain ones."""
    model = machine.load(name)
    results.record("dtype", str(model.spec.dtype))
    results.record("can_pack_segments", model.spec.packs_segments)
    own = _Battery(machine, results, battery(model.spec.card, longest_s=machine.sizes.longest_s))
    plays = await own.play("plain", model, features=PLAIN, mode="strict")
    if plays is None:
        raise RuntimeError("the plain engine failed")
    own.plain = plays[0]
    results.compare("plain", plays[1:], plain=own.plain, least_db=None)
    for feature in EXACT:
        await own.compare(feature, model, features={feature}, mode="strict")
    await own.compare("all_exact", model, features=EXACT, mode="strict")
    for feature, features in {"shared_calls": PLAIN, "packed_rows": {"packed_rows"}, "accelerated": ALL}.items():
        await own.compare(feature, model, features=features, least_db=LEAST_DB)
    del model
    half_db = LEAST_HALF_DB - (3 * _PER_BIT_DB if machine.is_tiny else 0.0)  # bfloat16 on a CPU has three bits less
    bounds: dict[DecodePrecision, float] = {"tf32": LEAST_DB, "half": half_db}
    for decode, least_db in bounds.items():
        machine.free()
        try:
            model = machine.load(name, decode=decode)
        except ConfigError as error:
            results.record(f"features.{decode}_decode.absent", str(error))
            continue
        await own.compare(f"{decode}_decode", model, features=PLAIN, mode="strict", least_db=least_db)
        del model
    machine.free()
    model = machine.load(name, dtype=torch.float32)
    await own.compare("float32_steps", model, features=PLAIN, mode="strict", least_db=_FINITE_DB)


@dataclass
class _Battery:
    machine: Machine
    results: Results
    requests: Sequence[GenerationRequest]
    plain: Sequence[Audio] = ()

    async def compare(
        self,
        feature: str,
        model: DiffusionModel,
        *,
        features: Collection[str],
        mode: Mode = "fast",
        least_db: float | None = None,
    ) -> None:
        """Compare every play of an engine with the plain clips."""
        plays = await self.play(feature, model, features=features, mode=mode)
        if plays is not None:
            self.results.compare(feature, plays, plain=self.plain, least_db=least_db)

    async def play(
        self, feature: str, model: DiffusionModel, *, features: Collection[str], mode: Mode
    ) -> list[list[Audio]] | None:
        """Play the requests together, twice in each order; frequent calls are captured after the first two plays.

        Returns the clips of each play in the order of the requests. An error is stored as a difference; then the result
        is None.
        """
        try:
            async with self.machine.engine(model, features, mode=mode) as engine:
                plays = [await self._generate(engine, step=step) for step in (1, -1)]
                await engine.settle()
                misses = engine.captures.num_misses
                plays += [await self._generate(engine, step=step) for step in (1, -1)]
                self.results.record(f"features.{feature}.captured", engine.captures.num_captured)
                self.results.record(f"features.{feature}.misses", engine.captures.num_misses - misses)
                if "captures" in features and engine.can_capture and not engine.captures.num_captured:
                    self.results.differ(f"{feature}: nothing was captured")
        except Exception as error:  # noqa: BLE001 - a feature that fails is a finding
            self.results.record(f"features.{feature}.error", traceback.format_exc()[-2000:])
            self.results.differ(f"{feature}: {type(error).__name__}: {error}"[:300])
            return None
        return plays

    async def _generate(self, engine: OpenEngine, *, step: int) -> list[Audio]:
        """`step` -1 reverses the order of the requests."""
        return (await engine.together(*self.requests[::step]))[::step]
