from __future__ import annotations

import numpy as np
import pytest
import torch

from examples.demo_model.captions import caption
from examples.demo_model.checks import check_scene, onset_times_s, strongest_hz
from examples.demo_model.scenes import SHARES, Scene, draw_scene
from examples.demo_model.synthesis import render_scene
from stable_audio_serve.models.oscillator.bank import FRAME_SAMPLES, OSCILLATOR_HZ, OscillatorBank

BANK = OscillatorBank()


def make_audio(scene: Scene, *, duration_s: float, seed: int = 0) -> np.ndarray:
    num_frames = int(duration_s * 44100) // FRAME_SAMPLES + 1
    frames = render_scene(scene, np.random.default_rng(seed), duration_s=duration_s, num_frames=num_frames)
    noise = torch.randn(2, num_frames * FRAME_SAMPLES, generator=torch.Generator().manual_seed(seed))
    return BANK.render(torch.from_numpy(frames.T.copy()), noise, start_frame=0).numpy()[:, : int(duration_s * 44100)]


@pytest.mark.parametrize("voice", ["sine", "square", "saw", "triangle", "organ", "piano", "flute"])
@pytest.mark.parametrize("pitch", [24, 57, 82, 119])
def test_a_note_sounds_at_its_pitch(voice: str, pitch: int) -> None:
    audio = make_audio(Scene("tone", voice=voice, pitch=pitch), duration_s=1.0)
    assert strongest_hz(audio) == pytest.approx(OSCILLATOR_HZ[pitch], rel=0.003)


@pytest.mark.parametrize("tempo", [60, 97, 120, 180])
@pytest.mark.parametrize("voice", ["metronome", "kick"])
def test_there_is_one_onset_per_beat(voice: str, tempo: int) -> None:
    times = onset_times_s(make_audio(Scene("beat", voice=voice, tempo_bpm=tempo), duration_s=5.0))
    assert np.abs(np.diff(times) - 60 / tempo).max() < 0.02
    assert len(times) in (round(5 * tempo / 60) - 1, round(5 * tempo / 60), round(5 * tempo / 60) + 1)


@pytest.mark.parametrize("kind", [kind for kind in SHARES if kind not in ("pair", "siren", "arpeggio", "beat")])
def test_rendered_scenes_pass_the_evaluation_checks(kind: str) -> None:
    rng = np.random.default_rng(4)
    for _ in range(6):
        scene = draw_scene(rng, shares={kind: 1.0})
        if scene.kind == "hit" and scene.fade:
            continue
        results = check_scene(make_audio(scene, duration_s=2.5), scene)
        assert all(results.values()), (scene, results)


@pytest.mark.parametrize(
    ("check", "scene"),
    [
        ("pitch", Scene("tone", voice="saw", pitch=64)),
        ("timbre", Scene("tone", voice="sine", pitch=60)),
        ("panning", Scene("tone", voice="saw", pitch=60, pan="left")),
        ("fade", Scene("tone", voice="saw", pitch=60, fade="in")),
        ("chord", Scene("chord", voice="organ", pitch=60, quality="minor")),
        ("tempo strict", Scene("beat", voice="metronome")),
        ("tempo loop", Scene("beat", voice="drums")),
        ("noise", Scene("noise", voice="white")),
        ("sweep", Scene("sweep", voice="sine", pitch=55, target=135, direction="up")),
        ("one-shot", Scene("hit", voice="kick")),
        ("silence", Scene("silence")),
    ],
)
def test_a_held_saw_fails_the_checks_of_other_scenes(check: str, scene: Scene) -> None:
    held = make_audio(Scene("tone", voice="saw", pitch=60), duration_s=2.0)
    assert check_scene(held, scene)[check] is False


def test_audio_after_the_clip_is_silent() -> None:
    frames = render_scene(
        Scene("chord", voice="pad", pitch=64, quality="major"), np.random.default_rng(0), duration_s=1.0, num_frames=120
    )
    assert frames[:86, :-2].max() > 0.5
    assert frames[87:, :-2].max() == 0


def test_every_kind_of_scene_has_a_caption() -> None:
    rng = np.random.default_rng(1)
    for kind in SHARES:
        texts = {caption(draw_scene(rng, shares={kind: 1.0}), rng) for _ in range(30)}
        assert texts == {""} if kind == "hush" else "" not in texts
