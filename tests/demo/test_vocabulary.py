from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from examples.demo_model.captions import caption, nearest_oscillator
from examples.demo_model.scenes import draw_scene
from examples.demo_model.vocabulary import MAX_CHARS, TEMPO_PATTERN, build_tokenizer
from stable_audio_serve.models.registry import BUILT_IN
from tests.parameters import slow

CHECKPOINT = Path(BUILT_IN["demo"].folder or "")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return build_tokenizer()


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("a 440Hz sine wave", "pitch82 sine"),
        ("A4", "pitch82"),
        ("note F sharp 3", "pitch52"),
        ("F♯3 saw", "pitch52 saw"),
        ("Gb3 sawtooth", "pitch52 saw"),
        ("Ａ４ ｓｉｎｅ", "pitch82 sine"),
        ("1.5 kHz tone", "pitch124"),
        ("1,000 Hz beep", "pitch110 sine"),
        ("sine at 440", "sine pitch82"),
        ("square 523.25 Hz", "square pitch88"),
        ("middle C flute", "pitch64 flute"),
        ("sweep from 200 to 2000 Hz", "sweep pitch55 target134"),
        ("falling sweep 2000-200 Hz", "down sweep pitch134 target55"),
        ("slide from C3 to C5", "sweep pitch40 target88"),
        ("rising sine sweep, 200 → 800 hz", "up sine sweep pitch55 target103"),
        ("C major chord", "pitch64 major chord"),
        ("F#m chord", "pitch76 minor chord"),
        ("B♭ minor chord on piano", "pitch84 minor chord piano"),
        ("a 4 second drum loop at 120BPM", "drums bpm"),
        ("KICK DRUM LOOP 128bpm", "kick loop bpm"),
        ("metronome, tempo 90", "metronome bpm"),
        ("white noise panned hard left", "white noise left"),
        ("pink noise moving from left to right", "pink noise lefttoright"),
        ("violet helicopter, please!", ""),
        ("", ""),
        ("🎵 440 hz 🎵", "pitch82"),
        ("a saw on e 2 over a house beat at 120 bpm", "saw pitch24 house bpm"),
        ("sine wave that fades out", "sine fadeout"),
        ("sweep 200Hz->2000Hz", "sweep pitch55 target134"),
        ("200 Hz - 800 Hz sweep", "pitch55 target103 sweep"),
        ("tone - 440 Hz", "pitch82"),
        ("A4 (440 Hz) sine", "pitch82 sine"),
        ("F# chord", "major pitch76 chord"),
        ("E♭ minor", "chord pitch70 minor"),
        ("95 bpm", "drums bpm"),
        ("square wave, F sharp in octave 3", "square pitch52"),
        ("kick, kick and kick at 100 bpm", "kick bpm"),
        ("a 1 kHz tone", "pitch110"),  # not the note A1
        ("a 2kHz to a 4kHz sweep", "pitch134 target158 sweep"),
        ("play an A440", "pitch82"),
        ("sine@440", "sine pitch82"),
        ("220 square", "pitch58 square"),
        ("Am", "chord pitch82 minor"),
        ("Bbm7 organ chord", "pitch84 minor organ chord"),
        ("piano in F#m", "chord piano pitch76 minor"),
        ("Cmaj7 pad", "chord pitch64 major pad"),
        ("E7 chord", "major pitch72 chord"),
        ("7 am alarm", "alarm"),
        ("I am the wind", "wind"),
        ("AM radio static", "white noise"),
        ("FM bell", "bell"),
        ("a C on a bell", "pitch64 bell"),
        ("pad in G", "pad pitch78"),
        ("rain in a forest", "rain"),
        ("D minor chord on a pad", "pitch68 minor chord pad"),
        ("fading in, a G chord", "major fadein pitch78 chord"),
        ("chord of A on a pad", "major chord pitch82 pad"),
        ("E on an organ", "pitch72 organ"),
        ("rain increasing in volume", "rain fadein"),
        ("an organ A4 building up from silence", "organ pitch82 fadein"),
        ("white noise, ending in silence", "white noise fadeout"),
        ("pinknoise, left → right", "pink noise lefttoright"),
        ("a rainstorm on the L channel", "rain left"),
        ("softly ringing bell at full volume", "quiet bell loud"),
        ("chord: E flat", "major chord pitch70"),
        ("a sine tone tuned to 500 Hz", "sine pitch86"),
        ("837-Hz→1617-Hz sweep", "pitch104 target127 sweep"),
        ("sweep 200 Hz..800 Hz", "sweep pitch55 target103"),
        ("sweep starting at 200 Hz and ending at 2 kHz", "sweep pitch55 target134"),
        ("C in the 3rd octave", "pitch40"),
        ("violin A4", "pad pitch82"),
    ],
)
def test_spellings_become_known_words(tokenizer: Tokenizer, prompt: str, words: str) -> None:
    assert " ".join(tokenizer.encode(prompt).tokens) == words


def test_the_packaged_checkpoint_reads_prompts_like_this_source(tokenizer: Tokenizer) -> None:
    packaged = json.loads((CHECKPOINT / "t5gemma" / "tokenizer.json").read_text())
    assert json.loads(tokenizer.to_str()) == packaged
    conditioners = json.loads((CHECKPOINT / "model_config.json").read_text())["model"]["conditioning"]["configs"]
    tempos = [each["config"]["tempo"]["pattern"] for each in conditioners if each["type"] == "timeline"]
    assert tempos == [TEMPO_PATTERN]


@pytest.mark.parametrize(
    ("form", "step"),
    [
        ("{}Hz sine", 7),
        slow("{}Hz sine", 1),
        slow("a sine of {} Hertz", 17),
        slow("SINE {} HZ!", 17),
        slow("sine at {}", 17),
    ],
)
def test_whole_frequencies_become_the_nearest_pitch(tokenizer: Tokenizer, form: str, step: int) -> None:
    for hertz in range(80, 2001, step):
        tokens = tokenizer.encode(form.format(hertz)).tokens
        assert sorted(tokens) == sorted(["sine", f"pitch{nearest_oscillator(hertz)}"]), (hertz, tokens)


def test_every_note_name_becomes_its_pitch(tokenizer: Tokenizer) -> None:
    names = [("c",), ("c#", "db"), ("d",), ("d#", "eb"), ("e",), ("f",), ("f#", "gb"), ("g",), ("g#", "ab"), ("a",)]
    names += [("a#", "bb"), ("b",)]
    for octave in range(2, 7):
        for step, spellings in enumerate(names):
            for name in spellings:
                spelled = name.replace("#", " sharp") if "#" in name else name[0] + name[1:].replace("b", " flat")
                for text in (f"{name}{octave}", f"{name.upper()} {octave}", f"note {spelled} {octave}"):
                    wanted = 82 + 2 * (12 * (octave + 1) + step - 69)
                    assert tokenizer.encode(text.replace("B", "b") if "Bb" in text else text).tokens == [
                        f"pitch{wanted}"
                    ], text


@pytest.mark.parametrize("filler", ["x" * MAX_CHARS, "\ufdfa" * (MAX_CHARS // 18)], ids=["typed", "one becomes 18"])
def test_what_follows_the_longest_prompt_is_not_read(tokenizer: Tokenizer, filler: str) -> None:
    """Each character costs time, and other requests wait meanwhile: without a limit, 100,000 took 20 s."""
    assert tokenizer.encode(f"kick {filler} sine").tokens == ["kick"]
    assert tokenizer.encode(f"kick {filler[: MAX_CHARS // 20]} sine").tokens == ["kick", "sine"]


def test_numbers_without_a_pitch_are_ignored(tokenizer: Tokenizer) -> None:
    for prompt in ("a 4 bar drum loop", "for 3 seconds", "909 drums", "a 4/4 beat", "2 times", "in 10 s"):
        assert not any(token.startswith(("pitch", "target")) for token in tokenizer.encode(prompt).tokens), prompt


def test_captions_keep_their_meaning_as_tokens(tokenizer: Tokenizer) -> None:
    rng = np.random.default_rng(0)
    for _ in range(150):
        scene = draw_scene(rng)
        tokens = tokenizer.encode(caption(scene, rng)).tokens
        assert len(tokens) <= 12
        assert not scene.fade or f"fade{scene.fade}" in tokens
        assert not scene.pan or scene.pan.replace(" ", "") in tokens
        if scene.kind == "tone" and scene.pitch not in (82, 24):
            assert f"pitch{scene.pitch}" in tokens, (scene, tokens)
