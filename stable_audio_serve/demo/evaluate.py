"""Judges a demo checkpoint on fresh prompts through the real loader and engine: `python -m ...demo.evaluate FOLDER`.

Every class is reported apart. Thresholds are the acceptance table's; nothing here looks at weights or latents.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stable_audio_serve.core.generation import GenerationRequest, SourceAudio
from stable_audio_serve.demo.captions import caption
from stable_audio_serve.demo.checks import check_scene, has_pitch
from stable_audio_serve.demo.scenes import SHARES, Scene, draw_scene
from stable_audio_serve.engine import Engine
from stable_audio_serve.models.blocks.oscillator_bank import OSCILLATOR_HZ, SAMPLE_RATE_HZ
from stable_audio_serve.models.registry import BUILT_IN
from stable_audio_serve.models.sa3.build import load_sa3

# What must pass and what is aimed at, in percent, by check.
THRESHOLDS: dict[str, tuple[float, float]] = {
    "pitch": (90, 97),
    "timbre": (80, 92),
    "chord": (75, 92),
    "chord mode": (85, 95),
    "tempo strict": (85, 95),
    "tempo loop": (80, 90),
    "tempo arpeggio": (80, 90),
    "noise": (95, 99),
    "one-shot": (95, 99),
    "silence": (95, 99),
    "empty prompt": (95, 99),
    "panning": (95, 99),
    "sweep": (90, 98),
    "fade": (85, 95),
    "continuation": (85, 95),
    "length": (100, 100),
}
_KINDS = [kind for kind in SHARES if kind not in ("siren", "pair")]


@dataclass(frozen=True, slots=True)
class Case:
    """One request and the scene it describes."""

    scene: Scene
    prompt: str
    duration_s: float
    seed: int


def draw_cases(*, per_kind: int, seeds: int, seed: int) -> list[Case]:
    """`per_kind` fresh prompts of every kind (beats and tones twice as many), each with `seeds` seeds."""
    rng = np.random.default_rng((seed, 99))
    cases = []
    for kind in _KINDS:
        for number in range(per_kind * (2 if kind in ("tone", "beat") else 1)):
            scene = draw_scene(rng, shares={kind: 1.0})
            shortest = {"beat": 2.5, "arpeggio": 3.0, "hit": 1.5, "chord": 1.0, "sweep": 1.0}.get(kind, 0.7)
            duration_s = round(float(np.exp(rng.uniform(np.log(shortest), np.log(10.0)))), 2)
            text = caption(scene, rng)
            cases += [Case(scene, text, duration_s, 1000 * seed + 10 * number + repeat) for repeat in range(seeds)]
    return cases


async def judge(folder: Path, cases: list[Case], *, steps: int = 8, sampler: str | None = None) -> dict[str, Any]:
    """Generate every case and count what passes; the result is the report's body."""
    model = load_sa3(BUILT_IN["demo"], folder, device=torch.device("cpu"), dtype=torch.float32)
    counts: dict[str, list[bool]] = defaultdict(list)
    failures = []
    began = time.perf_counter()
    async with Engine(model) as engine:
        for case in cases:
            audio = await _generate(engine, case, steps=steps, sampler=sampler)
            counts["length"].append(audio.shape == (2, int(case.duration_s * SAMPLE_RATE_HZ)))
            for name, passed in check_scene(audio, case.scene).items():
                counts[name].append(passed)
                if not passed:
                    failures.append(f"{name}: {case.prompt!r} {case.duration_s} s seed {case.seed}")
            if case.scene.kind == "tone" and case.scene.voice in ("sine", "organ", "square") and case.duration_s > 2:
                counts["continuation"].append(await _continues(engine, case, audio, steps=steps))
    seconds = time.perf_counter() - began
    return {
        "checks": {name: _summary(name, counts[name]) for name in sorted(counts)},
        "audio_seconds": round(sum(case.duration_s for case in cases), 1),
        "wall_seconds": round(seconds, 1),
        "failures": failures,
    }


async def _generate(engine: Engine, case: Case, *, steps: int, sampler: str | None) -> np.ndarray[Any, Any]:
    request = GenerationRequest(case.prompt, case.duration_s, case.seed, steps=steps, sampler=sampler)
    return (await engine.generate(request)).audio[0]


async def _continues(engine: Engine, case: Case, audio: np.ndarray[Any, Any], *, steps: int) -> bool:
    """Whether a continuation of the first half keeps the pitch it had."""
    half = audio.shape[1] // 2
    request = GenerationRequest(
        case.prompt,
        case.duration_s,
        case.seed + 7,
        steps=steps,
        inpaint_audio=SourceAudio(audio[:, :half], SAMPLE_RATE_HZ),
        inpaint_regions_s=((half / SAMPLE_RATE_HZ, case.duration_s),),
    )
    result = (await engine.generate(request)).audio[0]
    return has_pitch(result[:, half + 4096 :], float(OSCILLATOR_HZ[case.scene.pitch]))


def _summary(name: str, passed: list[bool]) -> dict[str, Any]:
    percent = round(100 * sum(passed) / len(passed), 1)
    must, aim = THRESHOLDS[name]
    verdict = "aim" if percent >= aim else "must" if percent >= must else "below"
    return {"passed": sum(passed), "count": len(passed), "percent": percent, "must": must, "aim": aim, "meets": verdict}


def main() -> None:
    """Parse the command line, judge, print a table and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=Path(BUILT_IN["demo"].folder or ""))
    parser.add_argument("--json", type=Path, help="where to write the report")
    parser.add_argument("--per-kind", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--sampler")
    options = parser.parse_args()
    cases = draw_cases(per_kind=options.per_kind, seeds=options.seeds, seed=options.seed)
    body = asyncio.run(judge(options.folder, cases, steps=options.steps, sampler=options.sampler))
    settings = {key: getattr(options, key) for key in ("per_kind", "seeds", "seed", "steps", "sampler")}
    for name, row in body["checks"].items():
        print(f"{name:16s} {row['passed']:4d}/{row['count']:<4d} {row['percent']:5.1f} %  {row['meets']}")
    if options.json:
        options.json.write_text(json.dumps({"settings": settings, **body}, indent=1) + "\n")


if __name__ == "__main__":
    main()
