"""Evaluates a checkpoint of the demo model, or the demo model of a running server, with random prompts.

`python -m examples.demo_model.evaluate [FOLDER | URL]` prints for each check how many clips passed. The checks use only
the audio, not weights or latents.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from examples.demo_model.cases import KINDS, Case, draw_cases
from examples.demo_model.checks import Audio, check_scene, has_loose_tempo, has_pitch, has_strict_tempo
from examples.demo_model.players import EnginePlayer, HttpPlayer, Player
from stable_audio_serve.core.generation import GenerationRequest, SourceAudio
from stable_audio_serve.models.oscillator.bank import OSCILLATOR_HZ, SAMPLE_RATE_HZ
from stable_audio_serve.models.registry import BUILT_IN

# Check -> (percentage of clips that must pass, percentage of clips that should pass).
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
    "variation": (85, 95),
    "holes": (85, 95),
    "loop repeats": (85, 95),
    "long pitch": (90, 97),
    "long tempo": (80, 90),
    "length": (100, 100),
}


_SETTINGS = ("per_kind", "seeds", "seed", "steps", "sampler", "cfg_scale", "dtype")


async def judge(
    player: Player,
    cases: Sequence[Case],
    *,
    steps: int = 8,
    sampler: str | None = None,
    cfg_scale: float | None = None,
) -> dict[str, Any]:
    """Generate the clips of all cases with `player` and run their checks. Returns the report."""
    counts: dict[str, list[bool]] = defaultdict(list)
    failures = []
    began = time.perf_counter()
    for case in cases:
        request = GenerationRequest(
            case.prompt, case.duration_s, case.seed, steps=steps, sampler=sampler, cfg_scale=cfg_scale
        )
        audio = await player.play(request)
        verdicts = {"length": audio.shape == (2, int(case.duration_s * SAMPLE_RATE_HZ))}
        verdicts |= await _judge_sound(player, case, request=request, audio=audio)
        for name, passed in verdicts.items():
            counts[name].append(passed)
            if not passed:
                failures.append(f"{name}: {case.prompt!r} {case.duration_s:.2f} s seed {case.seed}")
    seconds = time.perf_counter() - began
    return {
        "checks": {name: _summary(name, counts[name]) for name in sorted(counts)},
        "audio_seconds": round(sum(case.duration_s for case in cases), 1),
        "wall_seconds": round(seconds, 1),
        "failures": failures,
    }


async def _judge_sound(player: Player, case: Case, *, request: GenerationRequest, audio: Audio) -> dict[str, bool]:
    if case.task == "loop":
        return {"loop repeats": _repeats(audio, case)}
    verdicts = check_scene(audio, case.scene)
    if case.is_long:
        name = "long pitch" if case.scene.kind == "tone" else "long tempo"
        return {name: check_scene(audio[:, -10 * SAMPLE_RATE_HZ :], case.scene)[next(iter(verdicts))]}
    if case.task == "edit":
        verdicts |= await _judge_edits(player, case, request=request, audio=audio)
    return verdicts


def _repeats(audio: Audio, case: Case) -> bool:
    """Whether the clip, played twice without a gap, keeps its tempo."""
    twice = np.concatenate([audio, audio], axis=1)
    judged = has_strict_tempo if case.scene.voice in ("metronome", "kick") else has_loose_tempo
    return judged(twice, case.scene.tempo_bpm)


async def _judge_edits(player: Player, case: Case, *, request: GenerationRequest, audio: Audio) -> dict[str, bool]:
    """Check that an extension of the first half, an inpainting of two regions and a variation keep the pitch."""
    hertz = float(OSCILLATOR_HZ[case.scene.pitch])
    half = audio.shape[1] // 2
    fifth_s = case.duration_s / 5
    variants: dict[str, dict[str, Any]] = {
        "continuation": {
            "inpaint_audio": SourceAudio(audio[:, :half], SAMPLE_RATE_HZ),
            "inpaint_regions_s": ((half / SAMPLE_RATE_HZ, case.duration_s),),
        },
        "holes": {
            "inpaint_audio": SourceAudio(audio, SAMPLE_RATE_HZ),
            "inpaint_regions_s": ((fifth_s, 2 * fifth_s), (3 * fifth_s, 4 * fifth_s)),
        },
        "variation": {"init_audio": SourceAudio(audio, SAMPLE_RATE_HZ), "init_noise_level": 0.5},
    }
    verdicts = {}
    for name, options in variants.items():
        edited = replace(request, seed=case.seed + 7, **options)
        result = await player.play(edited)
        first, second, third, fourth = (round(n * fifth_s * SAMPLE_RATE_HZ) for n in range(1, 5))
        holes = np.concatenate([result[:, first:second], result[:, third:fourth]], axis=1)
        heard = {"continuation": result[:, half + 4096 :], "holes": holes, "variation": result}[name]
        verdicts[name] = has_pitch(heard, hertz)
    return verdicts


def _summary(name: str, passed: list[bool]) -> dict[str, Any]:
    percent = round(100 * sum(passed) / len(passed), 1)
    must, aim = THRESHOLDS[name]
    verdict = "aim" if percent >= aim else "must" if percent >= must else "below"
    return {"passed": sum(passed), "count": len(passed), "percent": percent, "must": must, "aim": aim, "meets": verdict}


async def _run(options: argparse.Namespace) -> dict[str, Any]:
    target = str(options.target)
    over_http = target.startswith(("http://", "https://"))
    kinds = [kind for kind in KINDS if not (over_http and kind == "hush")]  # servers refuse the empty prompt of a hush
    cases = draw_cases(per_kind=options.per_kind, seeds=options.seeds, seed=options.seed, kinds=kinds)
    async with HttpPlayer(target) if over_http else EnginePlayer(Path(target), dtype=options.dtype) as player:
        return await judge(player, cases, steps=options.steps, sampler=options.sampler, cfg_scale=options.cfg_scale)


def main() -> None:
    """Run the evaluation, print a table and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", nargs="?", default=BUILT_IN["demo"].folder, help="checkpoint folder or server URL")
    parser.add_argument("--json", type=Path, help="where to write the report")
    parser.add_argument("--per-kind", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--sampler")
    parser.add_argument("--cfg-scale", type=float)
    parser.add_argument("--dtype", help="precision of the denoiser, of a folder only: a server has its own")
    options = parser.parse_args()
    body = asyncio.run(_run(options))
    settings = {key: getattr(options, key) for key in _SETTINGS}
    for name, row in body["checks"].items():
        print(f"{name:16s} {row['passed']:4d}/{row['count']:<4d} {row['percent']:5.1f} %  {row['meets']}")
    if options.json:
        options.json.write_text(json.dumps({"settings": settings, **body}, indent=1) + "\n")


if __name__ == "__main__":
    main()
