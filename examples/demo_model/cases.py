"""Draws the requests of the demo model's evaluation: prompts of every kind of sound, edits, loops and long clips."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from examples.demo_model.captions import caption
from examples.demo_model.scenes import SHARES, Scene, draw_scene

Task = Literal["generate", "edit", "loop"]

KINDS = [kind for kind in SHARES if kind not in ("siren", "pair")]
_SHORTEST_S = {"beat": 2.5, "arpeggio": 3.0, "hit": 1.5, "chord": 1.0, "sweep": 1.0}
_LONG_S = (14.0, 47.0)


@dataclass(frozen=True, slots=True)
class Case:
    """One request of the evaluation, and the scene (sound) that its prompt describes.

    With the task `edit`, the generated clip is also extended, varied and inpainted. With the task `loop`, the clip must
    also keep its tempo when it is played twice in a row.
    """

    scene: Scene
    prompt: str
    duration_s: float
    seed: int
    task: Task = "generate"

    @property
    def is_long(self) -> bool:
        """Whether the clip is longer than every training clip."""
        return self.duration_s >= _LONG_S[0]


def draw_cases(*, per_kind: int, seeds: int, seed: int, kinds: list[str] | None = None) -> list[Case]:
    """Draw `per_kind` prompts of every kind of scene, twice as many for beats and tones, and `seeds` seeds per prompt.

    The result also has `per_kind` / 2 loops of whole beats, `per_kind` / 10 long tones and `per_kind` / 10 long beats.
    """
    rng = np.random.default_rng((seed, 99))
    cases = []
    for kind in kinds or KINDS:
        for number in range(per_kind * (2 if kind in ("tone", "beat") else 1)):
            scene = draw_scene(rng, shares={kind: 1.0})
            duration_s = round(float(np.exp(rng.uniform(np.log(_SHORTEST_S.get(kind, 0.7)), np.log(10.0)))), 2)
            text = caption(scene, rng)
            is_held = kind == "tone" and scene.voice in ("sine", "organ", "square") and duration_s > 2
            task: Task = "edit" if is_held else "generate"
            cases += [Case(scene, text, duration_s, 1000 * seed + 10 * number + n, task) for n in range(seeds)]
    for number in range(max(1, per_kind // 2)):
        scene = replace(_steady(rng, "beat"), voice=str(rng.choice(["metronome", "kick", "drums", "house"])))
        duration_s = 60.0 / scene.tempo_bpm * 4 * int(rng.integers(1, 3))
        text = caption(scene, rng)
        cases += [Case(scene, text, duration_s, 2000 * seed + 10 * number + n, "loop") for n in range(seeds)]
    for number in range(max(1, per_kind // 10)):
        for kind in ("tone", "beat"):
            scene = _steady(rng, kind)
            duration_s = round(float(rng.uniform(*_LONG_S)), 2)
            text = caption(scene, rng)
            cases += [Case(scene, text, duration_s, 3000 * seed + 10 * number + n) for n in range(seeds)]
    return cases


def _steady(rng: np.random.Generator, kind: str) -> Scene:
    """Draw a scene that sounds the same from start to end, without a fade and without decaying tones."""
    scene = replace(draw_scene(rng, shares={kind: 1.0}), fade="")
    held = scene.voice in ("sine", "square", "saw", "triangle", "organ")
    return scene if held or kind != "tone" else replace(scene, voice="sine")
